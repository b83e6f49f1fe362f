"""Files of random weights that llama.cpp loads and runs, for speeds on a GPU."""

import pytest
from transformers import AutoConfig

from dynquant.analysis.bench.llama_speed.__main__ import LlamaModel
from dynquant.analysis.bench.llama_speed.random_files import write_random_gguf
from dynquant.llama_library import is_installed
from tests.analysis.bench.test_generation_speed import SHAPE

pytestmark = pytest.mark.skipif(not is_installed(), reason="llama.cpp is not installed")
DENSE = {name: size for name, size in SHAPE.items() if "expert" not in name and "moe" not in name}


@pytest.mark.parametrize(
    ("kind", "shape", "types"), [("llama", DENSE, "rest=Q4_K"), ("qwen3_moe", SHAPE, "experts=IQ2_XXS,rest=Q2_K")]
)
def test_llama_cpp_runs_random_weights(kind: str, shape: dict[str, int], types: str, tmp_path) -> None:
    write_random_gguf(AutoConfig.for_model(kind, **shape), types, tmp_path / "random.gguf")
    model = LlamaModel(tmp_path / "random.gguf")
    assert all(speed > 0 for speed in model.speeds(3, 7, 5))
    model.close()
