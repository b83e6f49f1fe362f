"""Maps of parameters: every entry of every parameter comes from where the map says, and goes back there."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dynquant.checkpoints.safetensors_source import SafetensorsSource
from dynquant.families.common.strided_maps import whole
from dynquant.families.common.traced_tensor import TracedTensor
from dynquant.families.open import open_model
from dynquant.running.load import load_hf
from dynquant.running.parameter_map import parameter_map
from tests.helpers.architectures import SIZES, save_architecture
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY, save_tiny

TENSORS = {"a": torch.randn(24, 8), "b": torch.randn(24, 8), "c": torch.randn(4, 6, 10)}


@pytest.mark.parametrize(
    "function",
    [
        lambda a, b, c: torch.stack([a, b]).transpose(1, 2).contiguous()[..., ::2],
        lambda a, b, c: torch.cat([a.view(2, 12, 8), b.view(2, 12, 8)], 1)[:, 3:20],
        lambda a, b, c: a.view(4, 2, 3, 8).transpose(1, 2).reshape(24, 8)[5:20] + 1,
        lambda a, b, c: a.view(4, 2, 3, 8).transpose(1, 2).reshape(24, 8).view(3, 8, 8).permute(2, 0, 1)[:, 1:],
        lambda a, b, c: c.reshape(4, 3, 2, 10).transpose(1, 2).reshape(24, 10).t()[:, torch.tensor([3, 1, 2, 0, 7, 9])],
        lambda a, b, c: c[1:3, ::2, 1:9:3].flatten(1).chunk(2, 1)[1],
        lambda a, b, c: c.flip(1).unbind(0)[2].unsqueeze(0).squeeze(),
        lambda a, b, c: torch.cat([a.view(4, 6, 8)[:, :4].reshape(16, 8), b.view(4, 6, 8)[:, 4:].reshape(8, 8)]),
        lambda a, b, c: c[1:3, ::2].to(torch.float64).float(),
        lambda a, b, c: c[1, 2, :, None],
    ],
)
def test_what_moves_entries_is_traced(function: Callable[..., Tensor]) -> None:
    traced = function(**{name: TracedTensor(whole(name, tensor.shape)) for name, tensor in TENSORS.items()}).map
    expected = function(**TENSORS)
    gathered = traced.gather(TENSORS.get)
    assert torch.equal(gathered, expected)
    assert gathered.contiguous().view(torch.uint8).numel() == 4 * expected.numel()  # the bytes that a file gets
    shapes = {name: tuple(tensor.shape) for name, tensor in TENSORS.items()}
    for name, back in traced.inverted(shapes, "result").items():
        values = torch.full(back.shape, torch.nan)
        for piece in back.pieces:
            piece.of_target(values).copy_(piece.of_source(expected.clone(memory_format=torch.contiguous_format)))
        is_used = ~values.isnan()
        assert torch.allclose(values[is_used] - traced.added, TENSORS[name][is_used], atol=1e-6)
        assert int(is_used.sum()) == sum(piece.numel for piece in traced.pieces if piece.source == name)
    copies = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    traced.scatter(expected, copies.get)
    assert torch.allclose(traced.gather(copies.get), expected, atol=1e-6)


@pytest.mark.parametrize(
    "function",
    [
        lambda a: a * 2,
        lambda a: a + a,
        lambda a: -a.exp(),
        lambda a: a[0].expand(4, 8),
        lambda a: a.sum(0),
        lambda a: torch.add(a, 1, alpha=2),
        lambda a: torch.sub(a, 1, alpha=2),
        lambda a: a.int(),
        lambda a: torch.cat([a, torch.ones(1, 8)]),
    ],
)
def test_what_computes_values_is_refused(function: Callable[[Tensor], Tensor]) -> None:
    with pytest.raises(NotImplementedError):
        function(TracedTensor(whole("a", (24, 8))))


@pytest.mark.parametrize("model_type", represented_by(("mixtral", "gpt_oss", "llama4_text"), tuple(SIZES)))
def test_every_parameter_is_where_the_map_says(model_type: str, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM

    save_architecture(model_type, tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"mtp.layers.0.fc.weight": torch.randn(8, 8)}
    save_file(weights, tmp_path / "model.safetensors")
    hf_model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    traced = parameter_map(hf_model, SafetensorsSource(tmp_path))
    assert parameter_map(AutoModelForCausalLM.from_pretrained(tmp_path), SafetensorsSource(tmp_path)) is traced
    state = hf_model.state_dict()
    assert traced.stored_shapes.keys() - traced.stored.keys() == {"mtp.layers.0.fc.weight"}
    assert not traced.reasons
    assert state.keys() - traced.parameters.keys() == set(hf_model.all_tied_weights_keys)
    for name, parts in traced.parameters.items():
        assert torch.equal(parts.gather(weights.get), state[name])
    for name, parts in traced.stored.items():
        assert torch.equal(parts.gather(state.get), weights[name])


@pytest.mark.parametrize("name", represented_by(("qwen3-moe", "gemma3-period-3", "deepseek-v3"), TINY))
def test_gguf_tensors_of_the_families_are_entries_of_parameters(name: str, tmp_path: Path, small_moe: Path) -> None:
    model = open_model(save_tiny(name, tmp_path / name, small_moe))
    hf_model = load_hf(model)
    traced, state = parameter_map(hf_model, model.source.checkpoint), hf_model.state_dict()
    for name in model.source.names():
        place = traced.gguf(model.source, name)
        if place is None:
            assert not model.source.checkpoint_names(name)
        else:
            assert torch.equal(place.gather(state.get), model.source.load(name))
