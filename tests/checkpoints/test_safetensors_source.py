"""Safetensors checkpoints: single, sharded, and damaged in every way that a download can be."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from dynquant.checkpoints.safetensors_source import INDEX_NAME, SINGLE_NAME, SafetensorsSource
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.errors import CheckpointError

TENSORS = {
    "a.weight": torch.randn(6, 128, generator=torch.Generator().manual_seed(0)),
    "b.weight": torch.randn(3, 4, 8, generator=torch.Generator().manual_seed(1)).bfloat16(),
    "c.bias": torch.arange(5, dtype=torch.float16),
    "d.scale": torch.tensor(2.5),
}


def save_single(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(exist_ok=True)
    save_file(tensors, directory / SINGLE_NAME)
    return directory


def save_sharded(directory: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """One shard a tensor, in reverse order."""
    directory.mkdir(exist_ok=True)
    weight_map = {}
    for number, name in enumerate(reversed(tensors)):
        weight_map[name] = f"model-{number}.safetensors"
        save_file({name: tensors[name]}, directory / weight_map[name])
    (directory / INDEX_NAME).write_text(json.dumps({"weight_map": weight_map}))
    return directory


@pytest.fixture
def single(tmp_path) -> Path:
    return save_single(tmp_path / "single", TENSORS)


@pytest.fixture
def sharded(tmp_path) -> Path:
    return save_sharded(tmp_path / "sharded", TENSORS)


@pytest.mark.parametrize("layout", ["single", "sharded"])
def test_tensors_are_read_as_float32(layout, request):
    source = SafetensorsSource(request.getfixturevalue(layout))
    assert source.names() == sorted(TENSORS)
    assert [source.info(name).dtype for name in source.names()] == ["F32", "BF16", "F16", "F32"]
    for name, tensor in TENSORS.items():
        assert source.info(name).shape == tuple(tensor.shape)
        assert torch.equal(source.load(name), tensor.float())
    assert torch.equal(source.load("b.weight", 1), TENSORS["b.weight"][1].float())


def test_fingerprint_is_the_same_for_another_sharding_and_moves_with_a_weight(single, sharded, tmp_path):
    fingerprint = SafetensorsSource(single).fingerprint
    assert SafetensorsSource(sharded).fingerprint == fingerprint
    for name in TENSORS:
        if TENSORS[name].dim():  # scalars are in the fingerprint by name only
            changed = {**TENSORS, name: TENSORS[name].clone()}
            changed[name].view(-1)[0] += 1
            assert SafetensorsSource(save_single(tmp_path / "changed", changed)).fingerprint != fingerprint
    renamed = {("e" if name == "d.scale" else name): tensor for name, tensor in TENSORS.items()}
    assert SafetensorsSource(save_single(tmp_path / "changed", renamed)).fingerprint != fingerprint


def test_a_dict_source_behaves_like_a_file():
    source = DictSource(TENSORS)
    assert torch.equal(source.load("b.weight", 2), TENSORS["b.weight"][2].float())
    assert source.info("b.weight").dtype == "BF16"
    assert source.fingerprint == DictSource(dict(TENSORS)).fingerprint
    assert source.fingerprint != DictSource({**TENSORS, "d.scale": torch.tensor(2.6)}).fingerprint


def test_a_directory_without_weights_says_what_is_looked_for(tmp_path):
    with pytest.raises(CheckpointError, match=f"neither {SINGLE_NAME} nor {INDEX_NAME}"):
        SafetensorsSource(tmp_path)


@pytest.mark.parametrize("keep", [0, 4, 20, 300, -1])
def test_a_truncated_file_is_refused(single, keep):
    path = single / SINGLE_NAME
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors is (not a complete safetensors|truncated|an empty)"):
        SafetensorsSource(single)


def test_a_truncated_shard_is_refused(sharded):
    path = sharded / "model-2.safetensors"
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(CheckpointError, match=r"model-2\.safetensors"):
        SafetensorsSource(sharded)


def test_a_missing_shard_is_named(sharded):
    (sharded / "model-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors .*does not exist"):
        SafetensorsSource(sharded)


def test_a_tensor_that_is_not_in_its_shard_is_named(sharded):
    shutil.copy(sharded / "model-0.safetensors", sharded / "model-1.safetensors")
    with pytest.raises(CheckpointError, match=r"model-1\.safetensors does not hold `c\.bias`"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("file", ["../single/model.safetensors", "/x.safetensors", "sub/x.safetensors", ".."])
def test_an_index_cannot_point_outside_its_directory(single, sharded, file):
    (sharded / INDEX_NAME).write_text(json.dumps({"weight_map": {"a.weight": file}}))
    with pytest.raises(CheckpointError, match=r"points outside its directory for `a\.weight`"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "{}",
        '{"weight_map": {}}',
        '{"weight_map": 3}',
        '{"weight_map": ["a"]}',
        '{"weight_map": {"a": 5}}',
    ],
)
def test_a_damaged_index_is_refused(sharded, text):
    (sharded / INDEX_NAME).write_text(text)
    with pytest.raises(CheckpointError, match=r"index\.json is not a safetensors index"):
        SafetensorsSource(sharded)


@pytest.mark.parametrize("dtype, name", [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int64, "I64")])
def test_an_unsupported_dtype_is_named(tmp_path, dtype, name):
    directory = save_single(tmp_path / "other", {"q.weight": torch.ones(2, 2).to(dtype)})
    with pytest.raises(CheckpointError, match=rf"`q\.weight` as {name}"):
        SafetensorsSource(directory)
