"""What `inspect` says of GGUF files and safetensors checkpoints, checked against files made by other tools."""

import json
import shutil

import gguf
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from dynquant.checkpoints.inspect import inspect
from dynquant.checkpoints.tensor_roles import role_of
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from tests.helpers.gguf_writing import finish


@pytest.fixture
def gguf_file(tmp_path):
    path = tmp_path / "m.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_block_count(1)
    writer.add_token_list(["a", "b"])
    writer.add_string("dynquant.recipe", "preset test")
    writer.add_string("dynquant.encoder", "ggml            ")
    writer.add_uint32("quantize.imatrix.chunks_count", 7)
    q8 = np.zeros((16, 34 * 2), np.uint8)
    writer.add_tensor("blk.0.attn_q.weight", q8, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.add_tensor("blk.0.ffn_down.weight", np.zeros((8, 64), np.float32))
    writer.add_tensor("blk.0.attn_norm.weight", np.zeros(64, np.float32))
    finish(writer)
    return path


def test_gguf_types_roles_and_bits(gguf_file):
    summary = inspect(gguf_file)
    types = {share.label: share for share in summary.types}
    assert (summary.format, summary.arch, len(summary.tensors)) == ("gguf", "llama", 3)
    assert (types["Q8_0"].num_weights, types["Q8_0"].num_bytes) == (1024, 1088)
    assert types["Q8_0"].bits_per_weight == 8.5 and types["F32"].bits_per_weight == 32
    assert [share.label for share in summary.types] == ["F32", "Q8_0"]
    assert {share.label: share.num_bytes for share in summary.roles} == {"ffn_down": 2048, "attn_q": 1088, "norm": 256}
    assert summary.total_bytes == gguf_file.stat().st_size
    assert summary.bits_per_weight == 8 * gguf_file.stat().st_size / (1024 + 512 + 64)


def test_gguf_metadata_and_provenance(gguf_file):
    summary = inspect(gguf_file)
    assert summary.metadata == {"general.name": "tiny", "llama.block_count": 1}
    assert summary.provenance == {
        "dynquant.recipe": "preset test",
        "dynquant.encoder": "ggml",
        "quantize.imatrix.chunks_count": 7,
    }


def test_a_hugging_face_checkpoint_has_the_roles_of_its_gguf(small_moe):
    summary = inspect(small_moe)
    assert (summary.format, summary.arch) == ("safetensors", "DeepseekV3ForCausalLM")
    assert summary.metadata["n_routed_experts"] == 8
    assert summary.total_bytes == (small_moe / "model.safetensors").stat().st_size
    model, roles = open_model(small_moe), {tensor.name: tensor.role for tensor in summary.tensors}
    for name in model.source.names():
        expected = "mla_kv_b" if role_of(name) in ("mla_k_b", "mla_v_b") else role_of(name)
        assert {roles.pop(source, expected) for source in model.checkpoint_names(name)} == {expected}, name
    assert roles == {}
    assert sum(share.num_bytes for share in summary.types) == sum(tensor.num_bytes for tensor in summary.tensors)


def test_shards_and_packed_dtypes_are_counted(tmp_path):
    save_file(
        {"model.layers.0.mlp.down_proj.weight_packed": torch.zeros(4, 8, dtype=torch.uint8)}, tmp_path / "a.safetensors"
    )
    save_file({"lm_head.weight": torch.zeros(4, 8, dtype=torch.bfloat16)}, tmp_path / "b.safetensors")
    index = {
        "weight_map": {"lm_head.weight": "b.safetensors", "model.layers.0.mlp.down_proj.weight_packed": "a.safetensors"}
    }
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "llama", "quantization_config": {"quant_method": "x"}})
    )
    summary = inspect(tmp_path)
    assert {share.label: share.num_bytes for share in summary.types} == {"BF16": 64, "U8": 32}
    assert {tensor.role.value for tensor in summary.tensors} == {"ffn_down", "output"}
    assert summary.metadata == {"model_type": "llama", "quant_method": "x"}
    assert len(inspect(tmp_path / "b.safetensors").tensors) == 1
    (tmp_path / "a.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"a\.safetensors .*does not exist"):
        inspect(tmp_path)


def test_damaged_or_missing_files_are_refused_by_name(small_moe, gguf_file, tmp_path):
    shutil.copy(small_moe / "config.json", tmp_path)
    whole = (small_moe / "model.safetensors").read_bytes()
    broken = tmp_path / "model.safetensors"
    for content in (whole[: len(whole) // 2], whole[:100], b"", b"\xff" * 64):
        broken.write_bytes(content)
        with pytest.raises(CheckpointError, match=r"model\.safetensors"):
            inspect(tmp_path)
    gguf_file.write_bytes(gguf_file.read_bytes()[:200])
    for path in (gguf_file, tmp_path / "none.gguf", tmp_path / "none", tmp_path / "none.safetensors"):
        with pytest.raises(CheckpointError, match=path.name):
            inspect(path)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither"):
        inspect(tmp_path / "empty")
