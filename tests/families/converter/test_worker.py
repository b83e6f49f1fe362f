"""Small decisions of the worker, which the converter's tree is not needed for."""

import sys
from pathlib import Path
from types import SimpleNamespace

import gguf
import pytest
import torch

from dynquant.families.converter import worker
from dynquant.families.converter.worker import Refusal, _as_expected, _Converter, _turned_experts


@pytest.mark.parametrize(("width", "hidden"), [(96, 128), (64, 128), (128, 128)])
def test_experts_of_qwen3_vl_are_turned_where_transformers_saved_them(width: int, hidden: int) -> None:
    config = {"model_type": "qwen3_vl_moe", "text_config": {"moe_intermediate_size": width, "hidden_size": hidden}}
    gate, down = "layers.0.mlp.experts.gate_up_proj", "layers.0.mlp.experts.down_proj"
    saved = {gate: (8, 2 * width, hidden), down: (8, hidden, width), "norm.weight": (hidden,)}
    published = {gate: (8, hidden, 2 * width), down: (8, width, hidden), "norm.weight": (hidden,)}
    assert _turned_experts(config, saved) == {gate, down}
    assert _turned_experts(config, published) == frozenset()
    assert _turned_experts({"model_type": "gpt_oss"}, saved) == frozenset()


def test_configurations_are_put_in_the_converter_s_words() -> None:
    hybrid = {"model_type": "granitemoehybrid", "layer_types": ["linear_attention", "full_attention"]}
    assert _as_expected(hybrid)["layer_types"] == ["mamba", "attention"]
    assert _as_expected({"model_type": "minimax_m2", "quantization_config": {}}) == {
        "model_type": "minimax_m2", "scoring_func": "sigmoid",
    }  # fmt: skip
    assert _as_expected({"model_type": "glm4_moe_lite", "scoring_func": "softmax"})["scoring_func"] == "softmax"
    assert _as_expected({"model_type": "olmo2", "layer_types": ["full_attention"]})["layer_types"] == ["full_attention"]
    angles = {"rope_type": "default", "partial_rotary_factor": 0.5}
    assert _as_expected({"model_type": "gpt_neox", "rope_parameters": angles})["rotary_pct"] == 0.5
    assert _as_expected({"model_type": "gpt_neox", "rope_parameters": angles, "rotary_pct": 1.0})["rotary_pct"] == 1.0
    assert _as_expected({"model_type": "cohere2"})["rotary_pct"] == 1.0
    assert _as_expected({"model_type": "solar_open"})["partial_rotary_factor"] == 1.0


def test_a_matrix_without_a_graph_is_refused_where_values_were_read() -> None:
    converter = SimpleNamespace(_gguf=gguf, _looked={"mtp.e_proj", "mtp.h_proj"}, _used=set())
    writer = gguf.GGUFWriter(None, "llama")
    with pytest.raises(Refusal, match=r"eh_proj.*\[2, 4\].*mtp.e_proj, mtp.h_proj"):
        _Converter._add_values(converter, "blk.1.nextn.eh_proj.weight", torch.ones(2, 4).numpy(), None, writer)
    _Converter._add_values(converter, "rope_freqs.weight", torch.ones(4).numpy(), None, writer)
    assert converter._used == {"mtp.e_proj", "mtp.h_proj"}
    converter._looked = set()
    _Converter._add_values(converter, "rope_table.weight", torch.ones(2, 4).numpy(), None, writer)
    assert list(writer.tensors[0]) == ["rope_freqs.weight", "rope_table.weight"]


def test_layers_ahead_that_cannot_be_followed_are_left_out_with_the_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    chooser = SimpleNamespace(supports_mtp_export=True, no_mtp=None)
    base = SimpleNamespace(load_hparams=lambda *_: {})
    functions = {"get_model_architecture": lambda *_: "Any", "get_model_class": lambda _: chooser}
    names = {"TEXT_MODEL_MAP": {}, "ModelBase": base, "ModelType": SimpleNamespace(TEXT=0), **functions}
    monkeypatch.setitem(sys.modules, "conversion", SimpleNamespace(**names))
    monkeypatch.setattr(worker, "_trust_no_code", lambda: None)
    faults, written = {False: Refusal("tensor", "eh_proj is computed")}, []

    class Converter(SimpleNamespace):
        def run(self, model_class: SimpleNamespace, _: Path) -> bool:
            return model_class.no_mtp

        def lacks_layers_ahead(self, no_mtp: bool) -> bool:
            return not faults and not no_mtp

        def write(self, no_mtp: bool, _: Path, mtp_fault: str) -> None:
            if no_mtp in faults:
                raise faults[no_mtp]
            written.append((no_mtp, mtp_fault))

    monkeypatch.setattr(worker, "_Converter", lambda _: Converter(prepare=lambda: None))
    request = {"tree": str(Path(gguf.__file__).parent), "directory": str(tmp_path), "no_mtp": False}
    worker._describe(request, tmp_path)
    assert written == [(True, "eh_proj is computed")]
    faults[False], faults[True] = KeyError("first"), AssertionError("second")
    with pytest.raises(Refusal, match=r"KeyError: 'first'; without layers .*: AssertionError: second"):
        worker._describe(request, tmp_path)
    faults.clear()
    worker._describe(request, tmp_path)
    assert written[1:] == [(True, "")]  # keys count layers ahead of which no tensor is
    with pytest.raises(Refusal, match=r"gguf from .* and not from the tree"):
        worker._describe(request | {"tree": str(tmp_path)}, tmp_path)
