"""Types equal llama-quantize's, tensor by tensor, on models that reach every rule."""

from pathlib import Path

import pytest

from dynquant.architecture import HyperParams
from dynquant.errors import PlanError
from dynquant.llama_presets import FILE_TYPES, llama_tensor_types
from tests.helpers.llama_quantize import TinyModel, deepseek_model, llama_model, llama_quantize_types

MODELS = {
    "llama": llama_model(layers=16),
    "tied": llama_model(layers=3, tied=True),
    "grouped-query": llama_model(layers=32, heads=8, kv_heads=2),
    "experts-2": llama_model(layers=16, experts=2),
    "experts-8": llama_model(layers=16, experts=8),
    "experts-16": llama_model(layers=16, experts=16, heads=8, kv_heads=2),
    "tied-experts-8": llama_model(arch="qwen3moe", layers=9, experts=8, tied=True),
    "llama-70b": llama_model(layers=80, heads=8, kv_heads=1),
    "llama-65b": llama_model(layers=80),
    "qwen2-72b": llama_model(arch="qwen2", layers=80),
    "deepseek-8": deepseek_model(layers=17, experts=8),
    "deepseek-16": deepseek_model(layers=9, experts=16),
    "rows-576": llama_model(layers=8, hidden=576, heads=9, kv_heads=3, ffn=1536, tied=True),
    "rows-320": llama_model(layers=8, hidden=320, heads=5, kv_heads=5),
    "rows-48": llama_model(hidden=48, heads=3, kv_heads=3, head_dim=16, ffn=80),
    "falcon": llama_model(arch="falcon", layers=32, fused_qkv=True),
}


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_types_equal_llama_quantize(model: TinyModel, tmp_path: Path):
    source = model.write_hollow(tmp_path / "model.gguf")
    for file_type, (number, _) in FILE_TYPES.items():
        ours = {n: c.type for n, c in llama_tensor_types(file_type, model.shapes.items(), model.hyper).items()}
        theirs = llama_quantize_types(source, number)
        assert set(ours) == set(theirs)
        wrong = {name: (ours[name], theirs[name]) for name in ours if ours[name] != theirs[name]}
        assert not wrong, f"{file_type}: (ours, llama-quantize) {wrong}"
