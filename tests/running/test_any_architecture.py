"""Architectures without a family: streamed, observed and followed through traced maps, whatever their experts are."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynquant.calibration.collector import Collector
from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import StatsError
from dynquant.families.common.conversion import Conversion
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.expert_hooks import ExpertCall, record_experts
from dynquant.running.linear_hooks import activation_gradients, observed_outputs
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.weight_inputs import WeightInputs, weight_inputs
from tests.helpers.architectures import SIZES, converted_model, save_architecture
from tests.helpers.representatives import represented_by
from tests.running.test_live_weights import running_without_family

TOKENS = torch.arange(3, 51)[None]


@torch.no_grad()
def logits(hf_model: torch.nn.Module) -> Tensor:
    return hf_model(input_ids=TOKENS, use_cache=False).logits


@pytest.mark.parametrize("model_type", represented_by(("gpt_oss", "llama4_text"), SIZES))
def test_a_model_is_streamed_and_its_experts_are_seen(model_type: str, tmp_path: Path) -> None:
    save_architecture(model_type, tmp_path)
    model = converted_model(tmp_path, [])
    hf_model, calls = load_hf(model), []
    plain = logits(hf_model)
    with record_experts(hf_model, calls.append):
        recorded = logits(hf_model)
    torch.testing.assert_close(recorded, plain, atol=1e-4, rtol=1e-4)
    assert torch.equal(logits(hf_model), plain)
    check_outputs(calls)
    stream = LayerStream(model)
    with stream.running():
        assert torch.equal(logits(stream.hf_model), recorded)


def check_outputs(calls: list[ExpertCall]) -> None:
    """Every call's output is that of the expert's own matrix."""
    for call in calls:
        matrix = call.module.down_proj[call.expert]
        is_transposed = matrix.shape[0] == call.down_input.shape[1] != matrix.shape[1]
        out = call.down_input @ (matrix if is_transposed else matrix.T)
        if getattr(call.module, "has_bias", False):
            out = out + call.module.down_proj_bias[call.expert]
        torch.testing.assert_close(call.down_output, out)


def observed(hf_model: torch.nn.Module, names: WeightInputs) -> Collector:
    """A collector that has seen `TOKENS`."""
    collector = Collector(hf_model, names, None)
    with collector.attached():
        for batch in ModelInputs(TOKENS, 1):
            collector.start(batch)
            logits(hf_model)
    return collector


def test_statistics_follow_reordered_columns(tmp_path: Path) -> None:
    save_architecture("qwen3_5_text", tmp_path)
    stored = "model.layers.0.linear_attn.out_proj.weight"
    rows = "model.layers.0.linear_attn.in_proj_qkv.weight"
    order = torch.arange(64).view(2, 2, 16).transpose(0, 1).flatten()
    plain = Conversion("blk.0.attn_output.weight", (stored,), (64, 64), "F32")
    moved = Conversion("blk.0.ssm_out.weight", (stored,), (64, 64), "F32", lambda weight: weight[:, order])
    halves = [
        Conversion(f"blk.0.{name}.weight", (rows,), (64, 64), "F32", lambda weight, at=at: weight[at : at + 64])
        for name, at in (("attn_q", 0), ("attn_k", 64))
    ]
    model = converted_model(tmp_path, [plain, moved, *halves])
    hf_model = load_hf(model)
    names = weight_inputs(model, hf_model)
    assert torch.equal(names.linears["blk.0.ssm_out.weight"].columns, order)
    assert torch.equal(names.linears["blk.0.attn_k.weight"].rows, torch.arange(64, 128))
    collector = observed(hf_model, names)
    assert collector.aliases["blk.0.attn_k.weight"] == "blk.0.attn_q.weight"
    assert "blk.0.ssm_out.weight" not in collector.aliases
    stats = collector.take()
    there, here = (stats[name].in_sum2 for name in ("blk.0.ssm_out.weight", "blk.0.attn_output.weight"))
    assert torch.equal(there, here[:, order]) and not torch.equal(there, here)
    live = LiveWeights(model, hf_model)
    values = torch.randn(64, 64)
    live.write("blk.0.ssm_out.weight", values)
    assert torch.equal(live.read("blk.0.attn_output.weight")[:, order], values)


def test_outputs_of_layers_that_are_one_matrix_are_seen_together(tmp_path: Path) -> None:
    save_architecture("qwen3_5_text", tmp_path)
    layers = [f"model.layers.0.mlp.{part}_proj" for part in ("gate", "up")]
    stored = tuple(f"{layer}.weight" for layer in layers)
    size = SafetensorsSource(tmp_path).info(stored[0]).shape
    both = Conversion("blk.0.ffn_up.weight", stored, (2 * size[0], size[1]), "F32", lambda weight: weight.flip(0))
    model = converted_model(tmp_path, [both])
    hf_model = load_hf(model)
    linear = weight_inputs(model, hf_model).linears[both.name]
    modules = [hf_model.get_submodule(layer) for layer in layers]
    assert linear.modules == tuple(modules) and len(linear.rows) == 2 * size[0]
    assert observed(hf_model, weight_inputs(model, hf_model)).take()[both.name].in_sum2.shape == (1, size[1])
    gradients, seen = {}, []
    for module in modules:
        module.register_full_backward_hook(lambda module, _, out: gradients.update({module: out[0]}))

    def observer(_name: str, x: Tensor, y: Tensor) -> Callable[[Tensor], None]:
        return lambda gradient: seen.append((x, y, gradient))

    with activation_gradients(hf_model), observed_outputs({both.name: linear}, observer):
        hf_model(input_ids=TOKENS, use_cache=False).logits.square().sum().backward()
    ((x, y, gradient),) = seen
    torch.testing.assert_close(y, x @ model.source.load(both.name).reshape(-1, size[1]).T)
    expected = torch.cat([gradients[module].flip(-1) for module in modules], -1)
    assert torch.equal(gradient, expected) and bool(expected.any())


def gpt_oss_conversions() -> list[Conversion]:
    parts = {
        "gate": ("gate_up_proj", (4, 96, 64), lambda weight: weight[..., ::2].transpose(-1, -2)),
        "up": ("gate_up_proj", (4, 96, 64), lambda weight: weight[..., 1::2].transpose(-1, -2)),
        "down": ("down_proj", (4, 64, 96), lambda weight: weight.transpose(-1, -2)),
    }
    return [
        Conversion(
            f"blk.{i}.ffn_{part}_exps.weight", (f"model.layers.{i}.mlp.experts.{name}",), shape, "F32", transform
        )
        for i in range(2)
        for part, (name, shape, transform) in parts.items()
    ]


def test_transposed_and_interleaved_experts_are_calibrated_and_followed(tmp_path: Path) -> None:
    save_architecture("gpt_oss", tmp_path)
    model = converted_model(tmp_path, gpt_oss_conversions())
    hf_model = load_hf(model)
    names, live = weight_inputs(model, hf_model), LiveWeights(model, hf_model)
    assert {(*inputs.inner, inputs.down) for inputs in names.experts.values()} == {
        tuple(f"blk.{i}.ffn_{part}_exps.weight" for part in ("gate", "up", "down")) for i in range(2)
    }
    stats = observed(hf_model, names).take()
    assert stats["blk.1.ffn_down_exps.weight"].in_sum2.shape == (4, 96)
    assert int(stats["blk.1.ffn_gate_exps.weight"].counts.sum()) == 4 * TOKENS.numel()
    for name in model.source.names():
        assert torch.equal(live.read(name), model.source.load(name))
        live.write(name, 2 * model.source.load(name))
        assert torch.equal(live.read(name), 2 * model.source.load(name))


def test_columns_of_a_base_gguf_are_found_by_their_values() -> None:
    model, hf_model = running_without_family("glm4", "glm4")
    tensors = {name: model.source.load(name) for name in model.source.names()}
    order, moved_name = torch.randperm(64), "blk.1.attn_output.weight"
    tensors[moved_name] = tensors[moved_name][:, order]
    moved = replace(model, source=DictSource(tensors), has_family=False)
    names = weight_inputs(moved, hf_model)
    assert torch.equal(names.linears[moved_name].columns, order)
    assert names.linears["blk.0.attn_output.weight"].columns is None
    assert torch.equal(LiveWeights(moved, hf_model).read(moved_name), tensors[moved_name])
    tensors[moved_name] = torch.randn(64, 64)
    with pytest.raises(StatsError, match=r"columns of `blk\.1\.attn_output\.weight`"):
        weight_inputs(replace(moved, source=DictSource(tensors)), hf_model)
