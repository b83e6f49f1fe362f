"""Placements: llama.cpp's own buffers of the same file and context, and what goes where when memory is short."""

import json
import re
import subprocess
import sys

import pytest

from dynquant.errors import PlanError
from dynquant.planning.memory.budget import CUDA_CONTEXT_BYTES
from dynquant.planning.memory.placement import fit
from dynquant.planning.options import FitOptions
from tests.helpers.commands import succeed

MIB = 1 << 20
OPEN = """
import sys
from llama_cpp import Llama
Llama(sys.argv[1], n_ctx=int(sys.argv[2]), n_batch=2048, n_ubatch=512, type_k=int(sys.argv[3]), type_v=int(sys.argv[3]),
      flash_attn=True, swa_full=False, verbose=True)
"""


@pytest.fixture(scope="module")
def file(f32_moe):
    pytest.importorskip("llama_cpp")
    return f32_moe


def placed(file, gpu=None, ram="1GB", **options):
    return fit(FitOptions(file=file, gpu=gpu, ram=ram, **options))


@pytest.fixture
def no_llama_cpp(monkeypatch):
    """Formulas alone: a process of llama.cpp takes seconds."""
    monkeypatch.setattr("dynquant.planning.memory.placement.reserved_bytes", lambda *_: None)


@pytest.mark.parametrize(
    ("context", "kv_type", "ggml_type"), [(1000, "f16", 1), pytest.param(4096, "q8_0", 8, marks=pytest.mark.nightly)]
)
def test_buffers_are_those_that_llama_cpp_reports(file, context, kv_type, ggml_type):
    command = [sys.executable, "-c", OPEN, str(file), str(context), str(ggml_type)]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr

    def reported(kind):
        return sum(map(float, re.findall(rf"{kind} buffer size = +([\d.]+) MiB", log))) * MIB

    host = placed(file, context=context, kv_type=kv_type).host
    assert host.weights == pytest.approx(reported("model"), rel=0.05)
    assert host.kv_cache == pytest.approx(reported("KV"), rel=0.05)
    assert host.compute_buffer == pytest.approx(reported("compute"), rel=0.05)


def test_experts_leave_the_gpu_before_layers_do(file, no_llama_cpp):
    whole = placed(file, "1GB", context=8192)
    assert (whole.layers_on_gpu, whole.cpu_moe, whole.host.kv_cache) == (6, 0, 0)
    assert whole.flags("f16") == "-ngl 7 -c 8192"
    placements = [placed(file, f"{whole.gpu.total - cut}B", context=8192) for cut in range(1, 120 * 10**6, 6 * 10**6)]
    steps = list(dict.fromkeys((each.layers_on_gpu, each.cpu_moe) for each in placements))
    assert (6, 2) in steps and (6, 1) not in steps  # the first layer is dense
    assert steps == sorted(steps, key=lambda step: -step[0]) and steps[-1] == (0, 0)
    assert all(moe == 6 for layers, moe in steps if 0 < layers < 6)
    for each in placements:
        assert each.gpu.total <= whole.gpu.total
        assert each.gpu.weights + each.host.weights == whole.gpu.weights + whole.host.weights
        assert each.gpu.kv_cache + each.host.kv_cache == whole.gpu.kv_cache
        assert each.gpu.cuda_context in (0, CUDA_CONTEXT_BYTES)
    assert placements[0].flags("q8_0") == "-ngl 7 --n-cpu-moe 2 -c 8192 -ctk q8_0 -ctv q8_0 -fa on"


def test_what_does_not_fit_is_refused_with_what_would(file, no_llama_cpp):
    with pytest.raises(PlanError, match=r"does not fit: weights of .*--ram is 110MB.*--context 2048") as refusal:
        placed(file, ram="110MB", context=16384)
    needed = re.search(r"at least ([\d,]+) bytes", str(refusal.value)).group(1).replace(",", "")
    assert placed(file, ram=f"{needed}B", context=16384).host.total == int(needed)
    assert placed(file, ram="110MB", context=2048).host.total <= 110 * 10**6
    with pytest.raises(PlanError, match="is no GGUF file"):
        placed(file.parent, ram="1GB")


def test_the_command_prints_flags_and_bytes(file, no_llama_cpp):
    call = ("fit", file, "--gpu", "630MB", "--ram", "1GB", "--context", "2048")
    assert "was trained for 1,024 tokens of context, and --context is 2,048" in succeed(*call)
    said = json.loads(succeed(*call, "--json"))
    assert said["flags"].startswith("-ngl 7") and said["gpu"]["cuda_context"] == CUDA_CONTEXT_BYTES
    assert said["gpu"]["total"] == sum(size for part, size in said["gpu"].items() if part != "total")
    bound = placed(file, "630MB", context=2048).gpu
    assert bound.kv_cache == said["gpu"]["kv_cache"] and bound.compute_buffer >= said["gpu"]["compute_buffer"]


def test_without_memories_there_is_a_row_for_each_common_card(file, no_llama_cpp):
    cards = json.loads(succeed("fit", file, "--json"))
    assert list(cards) == ["8 GB", "12 GB", "16 GB", "24 GB"]
    alone = json.loads(succeed("fit", file, "--gpu", "12GB", "--json"))  # the host has room for whatever it gets
    assert alone["context"] == alone["trained_context"] == 1024
    assert cards["12 GB"] == alone and alone["host"]["total"] == placed(file, "12GB").host.total


PARSE = """
import ctypes, sys, xllamacpp
from xllamacpp import xllamacpp as library
parse = ctypes.CDLL(library.__file__)._Z19common_params_parseiPPcR13common_params13llama_examplePFviS0_E
parse.restype = ctypes.c_bool
params, words = xllamacpp.CommonParams(), [word.encode() for word in ("llama-server", "-m", "FILE", *sys.argv[1:])]
LLAMA_EXAMPLE_SERVER, HEAD_OF_OBJECT = 5, 16
parsed = parse(len(words), (ctypes.c_char_p * (len(words) + 1))(*words, None),
               ctypes.c_void_p(id(params) + HEAD_OF_OBJECT), LLAMA_EXAMPLE_SERVER, None)
on_host = params.tensor_buft_overrides.count("=CPU")
types = params.cache_type_k.name, params.cache_type_v.name
print(parsed, params.n_gpu_layers, on_host, params.n_ctx, *types)
"""


@pytest.mark.nightly
def test_the_flags_are_read_by_the_parser_of_llama_cpp(file, no_llama_cpp):
    pytest.importorskip("xllamacpp", reason="llama-cpp-python has no parser of command lines")
    cache = {"context": 2048, "kv_type": "q8_0"}
    part = placed(file, f"{placed(file, '1GB', **cache).gpu.total - 1}B", **cache)
    command = [sys.executable, "-c", PARSE, *part.flags("q8_0").split()]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert part.cpu_moe == 2
    assert said == ["True", "7", "2", "2048", "GGML_TYPE_Q8_0", "GGML_TYPE_Q8_0"]
    refused = subprocess.run([*command, "--n-cpu-mo", "1"], capture_output=True, text=True).stdout.split()
    assert refused[0] == "False"
