"""imatrix files: what llama.cpp's loader demands of them, round trips, and refusals of damaged or foreign files."""

import gguf
import numpy as np
import pytest
import torch

from dynquant.calibration.imatrix import export_imatrix, import_imatrix
from dynquant.calibration.importance import importance
from dynquant.calibration.run import collect_statistics
from dynquant.calibration.statistics import InputStats, StatsProvenance
from dynquant.errors import StatsError
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.running.load import load_hf
from dynquant.running.weight_inputs import weight_inputs
from tests.helpers.gguf_writing import finish

EXPERTS = "blk.2.ffn_down_exps.weight"


@pytest.fixture(scope="module")
def stats(moe_model):
    provenance = StatsProvenance(fingerprint=moe_model.fingerprint, text_hash="0" * 64, text_name="random tokens")
    tokens = torch.randint(0, 8192, (3, 32), generator=torch.Generator().manual_seed(0))
    inputs = ModelInputs(tokens)
    hf_model = load_hf(moe_model)
    names = weight_inputs(moe_model, hf_model)
    return collect_statistics(hf_model, inputs, names=names, provenance=provenance).stats


@pytest.fixture
def starved(stats, moe_model):
    """The same statistics with an expert that saw no token."""
    before = stats.inputs[EXPERTS]
    changed = InputStats(before.in_sum2.clone(), before.counts.clone())
    changed.in_sum2[3], changed.counts[3] = 0, 0
    stats.inputs[EXPERTS] = changed
    yield stats
    stats.inputs[EXPERTS] = before


def arrays(path):
    return {tensor.name: np.array(tensor.data) for tensor in gguf.GGUFReader(path).tensors}


def llama_cpp_matrix(found, weight):
    """What llama-quantize computes from an entry: sums / counts per slice, ones for count 0."""
    sums, counts = found[f"{weight}.in_sum2"].reshape(-1), found[f"{weight}.counts"].reshape(-1)
    sums = sums.reshape(len(counts), -1)
    return np.where(counts[:, None] > 0, sums / np.maximum(counts[:, None], 1), 1.0).reshape(-1)


def test_file_has_the_keys_and_types_that_llama_cpp_demands(stats, moe_model, tmp_path):
    path = tmp_path / "imatrix.gguf"
    written = export_imatrix(stats, path, model=moe_model)
    reader = gguf.GGUFReader(path)
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.datasets"].contents() == ["random tokens"]
    assert reader.fields["imatrix.chunk_size"].contents() == 32
    assert reader.fields["imatrix.chunk_count"].contents() == 2
    assert reader.fields["imatrix.chunk_count"].types == [gguf.GGUFValueType.UINT32]
    assert {tensor.tensor_type for tensor in reader.tensors} == {gguf.GGMLQuantizationType.F32}
    assert len(reader.tensors) == 2 * written
    assert max(len(tensor.name) for tensor in reader.tensors) < 64
    names = {tensor.name.removesuffix(".in_sum2") for tensor in reader.tensors if tensor.name.endswith(".in_sum2")}
    quantized = {name for name in moe_model.source.names() if len(moe_model.source.info(name).shape) > 1}
    assert quantized - names == {"token_embd.weight", *(f"blk.{layer}.ffn_gate_inp.weight" for layer in range(1, 6))}


def test_shapes_are_those_of_llama_imatrix(stats, moe_model, tmp_path):
    export_imatrix(stats, tmp_path / "imatrix.gguf", model=moe_model)
    found = arrays(tmp_path / "imatrix.gguf")
    assert found[f"{EXPERTS}.in_sum2"].shape == (8, 256) and found[f"{EXPERTS}.counts"].shape == (8, 1)
    assert found["blk.0.ffn_down.weight.in_sum2"].shape == (1, 768)
    for weight, flat in (("attn_k_b", 4 * 32), ("attn_v_b", 4 * 256)):
        assert found[f"blk.1.{weight}.weight.in_sum2"].shape == (1, flat)
        assert found[f"blk.1.{weight}.weight.counts"].shape == (1, 1)


def test_llama_cpp_gets_the_importance_that_dynquant_uses(starved, moe_model, tmp_path):
    export_imatrix(starved, tmp_path / "imatrix.gguf", model=moe_model)
    found = arrays(tmp_path / "imatrix.gguf")
    for name in moe_model.source.names():
        expected = importance(starved, name, moe_model.source.info(name).shape)
        if expected is not None:
            np.testing.assert_allclose(llama_cpp_matrix(found, name), expected.numpy().reshape(-1), rtol=1e-5)


def test_raw_sums_survive_a_round_trip(starved, moe_model, tmp_path):
    export_imatrix(starved, tmp_path / "imatrix.gguf", model=moe_model, shrink_tokens=None)
    loaded = import_imatrix(tmp_path / "imatrix.gguf", moe_model)
    assert loaded.provenance.fingerprint == moe_model.fingerprint
    assert loaded.provenance.imported_from == "imatrix.gguf"
    assert loaded.input_of(EXPERTS).counts[3] == 0
    for name in moe_model.source.names():
        shape = moe_model.source.info(name).shape
        expected = importance(starved, name, shape)
        found = importance(loaded, name, shape)
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)


def test_statistics_of_another_model_are_not_exported(stats, moe_model, tmp_path):
    foreign = stats.provenance.model_copy(update={"fingerprint": "e" * 64})
    with pytest.raises(StatsError, match="eeeeeeeeeeee"):
        export_imatrix(type(stats)(foreign, stats.inputs), tmp_path / "imatrix.gguf", model=moe_model)
    assert list(tmp_path.iterdir()) == []


def write_imatrix(path, entries, keys=True):
    writer = gguf.GGUFWriter(path, "deepseek2")
    if keys:
        writer.add_array("imatrix.datasets", ["x"])
        writer.add_uint32("imatrix.chunk_count", 1)
        writer.add_uint32("imatrix.chunk_size", 32)
    for name, values in entries.items():
        writer.add_tensor(name, np.asarray(values, dtype=np.float32))
    finish(writer)


GOOD = {"blk.0.ffn_down.weight.in_sum2": np.ones((1, 768)), "blk.0.ffn_down.weight.counts": np.ones((1, 1))}


@pytest.mark.parametrize(
    ("entries", "keys", "message"),
    [
        (GOOD, False, r"no imatrix\.datasets"),
        ({"other.in_sum2": [[1.0]], "other.counts": [[1.0]]}, True, "another model"),
        (GOOD | {"blk.0.ffn_down.weight.in_sum2": np.ones((1, 512))}, True, "512 sums and 1 counts"),
        (GOOD | {"blk.0.ffn_down.weight.in_sum2": np.full((1, 768), np.nan)}, True, "NaN"),
        ({"blk.0.ffn_down.weight.in_sum2": np.ones((1, 768))}, True, "no counts"),
    ],
)
def test_bad_files_are_refused(moe_model, tmp_path, entries, keys, message):
    write_imatrix(tmp_path / "bad.gguf", entries, keys)
    with pytest.raises(StatsError, match=message):
        import_imatrix(tmp_path / "bad.gguf", moe_model)


def test_files_that_are_no_gguf_are_refused(moe_model, tmp_path):
    (tmp_path / "old.dat").write_bytes(b"\x01\x00\x00\x00rest")
    with pytest.raises(StatsError, match=r"old \.dat form"):
        import_imatrix(tmp_path / "old.dat", moe_model)
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00")
    with pytest.raises(StatsError, match="cannot be read"):
        import_imatrix(tmp_path / "cut.gguf", moe_model)
