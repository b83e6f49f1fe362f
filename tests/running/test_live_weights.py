"""Weights of plans in a running model, whatever they come from: every planned tensor has a place, or it is an error."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from gguf import GGUFValueType

from dynquant.checkpoints.gguf_source import MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import gguf_name_of
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.store import EncodedStore
from dynquant.encoding.stream import Guidance
from dynquant.errors import CheckpointError
from dynquant.evaluation.rendered_model import RenderedModel
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import stays_f32
from dynquant.running.equal_entries import EqualEntries
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_gguf import GGML
from tests.helpers.tiny_models import TINY, randomize, save_tiny, write_f32


@pytest.mark.parametrize("name", represented_by(("qwen2-moe-tied", "gemma3-period-3", "deepseek-v3"), TINY))
def test_a_base_gguf_is_rendered_as_the_checkpoint(name: str, tmp_path: Path, small_moe: Path) -> None:
    directory = save_tiny(name, tmp_path / name, small_moe)
    direct = open_model(directory)
    based = open_model(directory, base_gguf=write_f32(direct, tmp_path / "base.gguf"))
    types = {n: "Q4_0" for n in direct.source.names() if not stays_f32(n, direct.source.info(n).shape)}
    assert set(types) >= {n for n in direct.source.names() if "exps.weight" in n or "_b.weight" in n}
    rendered = []
    for number, model in enumerate((direct, based)):
        store = EncodedStore(model, Guidance(), GGML, tmp_path / str(number))
        running = RenderedModel(load_hf(model), store)
        before = {key: values.clone() for key, values in running.hf_model.state_dict().items()}
        running.install(types)
        rendered.append({key: values.clone() for key, values in running.hf_model.state_dict().items()})
        unchanged = {key for key, values in before.items() if torch.equal(values, rendered[-1][key])}
        assert not {key for key in unchanged if key.endswith(("proj.weight", "_proj", "embed_tokens.weight"))}
        running.install({})
        assert all(torch.equal(values, before[key]) for key, values in running.hf_model.state_dict().items())
    assert all(torch.equal(values, rendered[1][key]) for key, values in rendered[0].items())


def running_without_family(model_type: str, arch: str, **sizes: object) -> tuple[Model, torch.nn.Module]:
    """A random model of a family that dynquant does not convert, and its GGUF tensors by gguf-py's map of names."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(
        model_type, vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, pad_token_id=0, **sizes,
    )  # fmt: skip
    hf_model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    randomize(hf_model)
    tensors = {}
    for name, parameter in hf_model.named_parameters():
        parts = {name: parameter.detach()}
        if name.endswith("gate_up_proj"):
            stem = name.removesuffix("gate_up_proj")
            parts = dict(zip((f"{stem}gate_proj", f"{stem}up_proj"), parameter.detach().chunk(2, 1), strict=True))
        tensors |= {gguf_name_of(part, arch, 3): values.clone() for part, values in parts.items()}
    tensors.pop(None, None)
    keys = {"block_count": 3, "embedding_length": 64, "attention.head_count": 4, "attention.head_count_kv": 2}
    fields = [MetadataField(f"{arch}.{key}", value, GGUFValueType.UINT32) for key, value in keys.items()]
    fields.append(MetadataField("general.architecture", arch, GGUFValueType.STRING))
    path = Path("tiny")
    model = Model(path, DictSource(tensors), tuple(fields), lambda name: (name,), hf_directory=path, has_family=False)
    return model, hf_model


def test_stacks_of_experts_are_found_by_two_of_them() -> None:
    model, hf_model = running_without_family("olmoe", "olmoe", num_experts=4, num_experts_per_tok=2)
    names = [name for name in model.source.names() if "_exps" in name]
    tensors, loaded = {name: model.source.load(name) for name in names}, []

    class Source(DictSource):
        def load(self, name: str, index: int | slice | None = None) -> torch.Tensor:
            loaded.append(index)
            return super().load(name, index)

    search = EqualEntries(
        replace(model, source=Source(tensors | {"blk.1.other.weight": torch.randn(4, 96, 64)})), hf_model
    )
    for name in names:
        assert torch.equal(search.entries_of_stack(name).gather(hf_model.state_dict().get), tensors[name])
    assert loaded == [0, 3] * 9
    assert search.entries_of_stack("blk.1.other.weight") is None


EXPERTS = {"n_routed_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2, "first_k_dense_replace": 1}


@pytest.mark.parametrize(
    ("model_type", "arch", "sizes"),
    [
        ("olmoe", "olmoe", {"num_experts": 4, "num_experts_per_tok": 2}),
        ("glm4_moe", "glm4moe", {**EXPERTS, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}),
        ("minimax_m2", "minimax-m2", {"num_local_experts": 4, "num_experts_per_tok": 2, "rotary_dim": 8}),
        ("ernie4_5_moe", "ernie4_5-moe", {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 32}),
        ("glm4", "glm4", {}),
    ],
)
def test_experts_of_other_families_have_places(model_type: str, arch: str, sizes: dict[str, object]) -> None:
    model, hf_model = running_without_family(model_type, arch, **sizes)
    live = LiveWeights(model, hf_model)
    matrices = [name for name in model.source.names() if len(model.source.info(name).shape) > 1]
    live.check(matrices)
    assert set(matrices) <= set(live.names())
    for name in live.names():
        live.write(name, 2 * model.source.load(name))
        assert torch.equal(live.read(name), 2 * model.source.load(name)), name


def test_a_planned_tensor_without_a_place_is_an_error() -> None:
    model, hf_model = running_without_family("olmoe", "olmoe", num_experts=4, num_experts_per_tok=2)
    tensors = {name: model.source.load(name) for name in model.source.names()}
    tensors["blk.1.ffn_gate_shexp.weight"] = tensors["blk.3.nextn.eh_proj.weight"] = torch.ones(4, 32)
    other = replace(model, source=DictSource(tensors))
    rendered = RenderedModel(hf_model, EncodedStore(other, Guidance(), GGML, Path("unused")))
    with pytest.raises(CheckpointError, match=r"no place that dynquant knows for `blk\.1\.ffn_gate_shexp\.weight`, so"):
        rendered.install({"blk.1.ffn_gate_shexp.weight": "Q4_0", "blk.1.attn_norm.weight": "F32"})
    rendered.install({"blk.1.ffn_gate_shexp.weight": "F32", "blk.3.nextn.eh_proj.weight": "Q4_0"})


def test_a_gguf_in_f16_of_smaller_weights_is_that_of_the_checkpoint() -> None:
    model, hf_model = running_without_family("olmoe", "olmoe", num_experts=4, num_experts_per_tok=2)
    with torch.no_grad():
        for parameter in hf_model.parameters():
            parameter.copy_((parameter * 2.0**-14).bfloat16())
    # Rounded to multiples of 2^-24, and for one matrix with its rows in another order.
    tensors = {name: (model.source.load(name) * 2.0**-14).bfloat16().half() for name in model.source.names()}
    tensors["blk.1.attn_q.weight"] = tensors["blk.1.attn_q.weight"].flip(0)
    live = LiveWeights(replace(model, source=DictSource(tensors)), hf_model)
    assert set(tensors) <= set(live.names())


def test_a_gguf_of_other_weights_is_refused() -> None:
    model, hf_model = running_without_family("olmoe", "olmoe", num_experts=4, num_experts_per_tok=2)
    with torch.no_grad():
        hf_model.model.layers[1].mlp.experts.gate_up_proj[2, -1, -1] += 1
    with pytest.raises(CheckpointError, match=r"other weights than `blk\.1\.ffn_up_exps\.weight`"):
        LiveWeights(model, hf_model)
