"""Layers that predict tokens ahead: left out with the keys that count them, and told apart in every kind of file."""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGUFValueType
from safetensors.torch import save_file

from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import CheckpointError
from dynquant.families.common.settings import settings_of_metadata
from dynquant.recipes.build_plan import plan_from_types, plan_of_rest
from dynquant.recipes.presets import preset_types
from tests.helpers.gguf_writing import finish

LAYER = {"attn_q.weight": (32, 32), "attn_norm.weight": (32,), "ffn_up.weight": (64, 32)}
AHEAD = {"nextn.eh_proj.weight": (32, 64), "nextn.enorm.weight": (32,)}


def shapes_of(ahead: int, count: int = 3) -> dict[str, tuple[int, ...]]:
    layers = {f"blk.{i}.{part}": shape for i in range(count) for part, shape in LAYER.items()}
    own = {f"blk.{ahead}.{part}": shape for part, shape in AHEAD.items()}
    return {"token_embd.weight": (8, 32), **layers, **own}


def model_of(shapes: dict[str, tuple[int, ...]]) -> Model:
    fields = (
        MetadataField("general.architecture", "novel", GGUFValueType.STRING),
        MetadataField("novel.block_count", 3, GGUFValueType.UINT32),
        MetadataField("novel.embedding_length", 32, GGUFValueType.UINT32),
        MetadataField("novel.attention.head_count_kv", [2, 0, 4], GGUFValueType.ARRAY, GGUFValueType.UINT32),
        MetadataField("novel.nextn_predict_layers", 1, GGUFValueType.UINT32),
        MetadataField("tokenizer.ggml.tokens", ["a", "b", "c"], GGUFValueType.ARRAY, GGUFValueType.STRING),
    )
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    return Model(Path("novel"), DictSource(tensors), fields, lambda name: (name,))


def test_what_is_left_has_the_keys_of_a_model_without_such_layers():
    model = model_of(shapes_of(ahead=2))
    assert len(model.mtp_tensors) == len(LAYER) + len(AHEAD)
    rest = model.without_mtp()
    assert rest.source.names() == [name for name in model.source.names() if not name.startswith("blk.2.")]
    assert {field.key.partition(".")[2]: field.value for field in rest.metadata} == {
        "architecture": "novel", "block_count": 2, "embedding_length": 32, "attention.head_count_kv": [2, 0],
        "ggml.tokens": ["a", "b", "c"],
    }  # fmt: skip
    assert rest.fingerprint == model.fingerprint and not rest.mtp_tensors
    assert settings_of_metadata(rest.metadata) == settings_of_metadata(model.metadata)


def test_only_the_last_layers_can_be_left_out():
    with pytest.raises(CheckpointError, match=r"ahead at \[1\] of 3"):
        model_of(shapes_of(ahead=1)).without_mtp()


def test_a_plan_is_cut_to_the_layers_that_are_left():
    model = model_of(shapes_of(ahead=2))
    plan = plan_from_types(model, preset_types("uniform-q8_0", model), recipe="preset uniform-q8_0")
    rest = model.without_mtp()
    assert plan_of_rest(rest, plan, None) == plan_from_types(
        rest, preset_types("uniform-q8_0", rest), recipe="preset uniform-q8_0"
    ).model_copy(update={"notes": plan.notes})


def test_a_file_says_which_matrices_predict_ahead(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    for key in ("block_count", "embedding_length", "context_length"):
        writer.add_uint32(f"llama.{key}", 3)
    for name, shape in shapes_of(ahead=2).items():
        writer.add_tensor(name, np.zeros(shape, np.float32))
    finish(writer)
    source = GGUFSource(tmp_path / "a.gguf")
    rest = source.without({"blk.2.attn_q.weight"})
    assert rest.fingerprint == source.fingerprint and set(source.names()) - {*rest.names()} == {"blk.2.attn_q.weight"}
    roles = {tensor.name: tensor.role for tensor in inspect(tmp_path / "a.gguf").tensors}
    assert roles["blk.2.attn_q.weight"] is roles["blk.2.nextn.eh_proj.weight"] is Role.MTP
    assert roles["blk.1.attn_q.weight"] is Role.ATTN_Q and roles["blk.2.nextn.enorm.weight"] is Role.NORM


def test_a_directory_says_so_too(tmp_path):
    names = ("model.layers.1.self_attn.q_proj", "model.layers.2.self_attn.q_proj", "model.layers.2.eh_proj")
    names += ("model.layers.2.enorm", "mtp.layers.0.self_attn.q_proj", "mtp.fc", "mtp.pre_fc_norm_hidden")
    save_file({f"{name}.weight": torch.zeros(2, 2) for name in names}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "novel"}))
    roles = [tensor.role for tensor in sorted(inspect(tmp_path).tensors, key=lambda tensor: tensor.name)]
    by_name = dict(zip(sorted(names), roles, strict=True))
    ahead = [name for name in names if by_name[name] is Role.MTP]
    assert ahead == [names[1], names[2], names[4], names[5]]
    assert by_name[names[0]] is Role.ATTN_Q and by_name[names[3]] is by_name[names[6]] is Role.NORM
