"""Memory besides the weights: KV caches against llama.cpp's own figures, the parts of the budget, refusals."""

import json
import re
import subprocess
import sys

import pytest

from dynquant.errors import OptionError, PlanError
from dynquant.families.open import open_config, open_model
from dynquant.planning.memory.budget import CUDA_CONTEXT_BYTES, compute_buffer_bytes, kv_cache_bytes, memory_budget
from dynquant.planning.target import Target
from tests.helpers.tiny_models import write_f32

MIB = 1 << 20
LLAMA_8B = {
    "model_type": "llama", "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336,
    "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5, "rope_theta": 500000.0,
}  # fmt: skip
GGML_TYPE = {"f16": 1, "q8_0": 8, "q4_0": 2}
OPEN = """
import sys
from llama_cpp import Llama
context, kv_type = map(int, sys.argv[2:])
Llama(sys.argv[1], n_ctx=context, type_k=kv_type, type_v=kv_type, flash_attn=True, swa_full=False, verbose=True)
"""


@pytest.fixture(scope="module")
def llama_8b(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama")
    (directory / "config.json").write_text(json.dumps(LLAMA_8B))
    return open_config(directory)


@pytest.fixture(scope="module")
def files(small_moe, tiny_text, tmp_path_factory):
    """The bundled model (MLA), one with windows and one with grouped queries, each with its F32 file."""
    pytest.importorskip("llama_cpp")
    directory = tmp_path_factory.mktemp("files")
    names = {"mla": small_moe}
    names |= {name: tiny_text(name) for name in ("gemma3", "qwen3-moe")}
    models = {name: open_model(path) for name, path in names.items()}
    return {name: (model, write_f32(model, directory / f"{name}.gguf")) for name, model in models.items()}


@pytest.mark.parametrize(
    "name, context, kv_type",
    [
        ("mla", 512, "f16"), ("mla", 1000, "q8_0"), ("gemma3", 2048, "f16"), ("gemma3", 600, "q4_0"),
        ("qwen3-moe", 1000, "f16"), ("qwen3-moe", 2048, "q8_0"),
    ],
)  # fmt: skip
def test_the_kv_cache_is_what_llama_cpp_allocates_and_the_compute_buffer_bounds_its_own(files, name, context, kv_type):
    model, file = files[name]
    command = [sys.executable, "-c", OPEN, str(file), str(context), str(GGML_TYPE[kv_type])]
    log = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    caches = [float(size) for size in re.findall(r"KV buffer size = +([\d.]+) MiB", log)]
    ours = kv_cache_bytes(model, context, kv_type) / MIB
    assert caches and sum(caches) == pytest.approx(ours, abs=0.005 * len(caches) + 1e-6)
    (compute,) = map(float, re.findall(r"sched_reserve: .*compute buffer size = +([\d.]+) MiB", log))
    assert compute <= compute_buffer_bytes(model, context, kv_type) / MIB < 2.5 * compute


def test_grouped_query_attention_in_every_cache_type(llama_8b):
    assert kv_cache_bytes(llama_8b, 8192) == 1 << 30
    assert kv_cache_bytes(llama_8b, 8192, "q8_0") == (1 << 30) * 34 // 64
    assert kv_cache_bytes(llama_8b, 8192, "q4_0") == (1 << 30) * 18 // 64
    assert kv_cache_bytes(llama_8b, 1) == kv_cache_bytes(llama_8b, 256)


def test_mla_caches_the_latent_vector_once(small_moe):
    assert kv_cache_bytes(open_model(small_moe), 512) == 512 * 6 * (256 + 32) * 2


def test_the_parts_add_up_and_the_smaller_of_memory_and_largest_plan_counts(llama_8b):
    found = memory_budget(llama_8b, 24 * 10**9, context=8192, kv_type="f16")
    assert found.weights + found.kv_cache + found.compute_buffer + CUDA_CONTEXT_BYTES == 24 * 10**9
    assert 21 * 10**9 < found.weights < 23 * 10**9
    assert found.file_budget(10**9, 10**10) == 10**10
    assert found.file_budget(10**9, 10**11) == found.weights
    line = found.describe(found.weights)
    assert "KV cache 1.07 GB" in line and "together 24.00 GB" in line


def test_too_little_memory_names_every_part(llama_8b):
    with pytest.raises(PlanError, match=r"1\.00 GB of memory .* KV cache 1\.07 GB.* leave nothing for the weights"):
        memory_budget(llama_8b, 10**9, context=8192, kv_type="f16")
    found = memory_budget(llama_8b, 4 * 10**9, context=8192, kv_type="f16")
    with pytest.raises(PlanError, match=r"smallest plan .* 3\.00 GB \(3,000,000,000 bytes\)") as refusal:
        found.file_budget(3 * 10**9, 10**10)
    needed = int(re.search(r"at least ([\d,]+) bytes", str(refusal.value)).group(1).replace(",", ""))
    enough = memory_budget(llama_8b, needed, context=8192, kv_type="f16")
    assert enough.file_budget(3 * 10**9, 10**10) == 3 * 10**9


def test_impossible_caches_are_refused(llama_8b, small_moe, tmp_path):
    with pytest.raises(OptionError, match="f16, q8_0, q4_0"):
        Target(fits="24GB", kv_type="q4_k")
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA_8B, "head_dim": 80}))
    with pytest.raises(PlanError, match=r"blocks of 32.*80"):
        kv_cache_bytes(open_config(tmp_path), 512, "q8_0")


def test_fits_is_one_of_the_budgets():
    with pytest.raises(PlanError, match="--size and --fits"):
        Target(size="1GB", fits="24GB")
    assert Target(fits="24GB", couple=("gate-up",)).recipe == (
        "fits 24000000000, context 8192, KV f16, coupled gate-up"
    )
