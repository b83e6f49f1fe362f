"""GGUF files: what is read, and that no damaged file crashes, hangs or fills the memory."""

import struct
import time
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType, GGUFValueType
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynquant.checkpoints.gguf_source import GGUFSource, is_gguf
from dynquant.errors import CheckpointError
from dynquant.families.open import open_model
from tests.helpers.gguf_writing import finish

RANDOM = np.random.default_rng(0)
STACK = RANDOM.standard_normal((4, 6, 64)).astype(np.float32)
MATRIX = RANDOM.standard_normal((5, 64)).astype(np.float32)
Q8_0 = GGMLQuantizationType.Q8_0


def write_gguf(path: Path, *, split: bool = False) -> Path:
    """Float and quantized tensors with a little metadata; with `split`, files of one tensor each."""
    writer = gguf.GGUFWriter(path, "refact", split_max_tensors=1 if split else 0)
    writer.add_block_count(1)
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_token_list(["a", "b", "\u00e9"])
    writer.add_array("test.numbers", [1, 2, 3])
    writer.add_float32("test.eps", 1e-6)
    writer.add_tensor("output_norm.weight", MATRIX[0].copy())
    writer.add_tensor("blk.0.attn_q.weight", MATRIX.astype(np.float16))
    bf16 = gguf.quants.quantize(MATRIX, GGMLQuantizationType.BF16)
    writer.add_tensor("blk.0.attn_k.weight", bf16, raw_dtype=GGMLQuantizationType.BF16)
    writer.add_tensor("blk.0.ffn_down_exps.weight", gguf.quants.quantize(STACK, Q8_0), raw_dtype=Q8_0)
    writer.add_tensor("blk.0.ffn_up_exps.weight", STACK)
    finish(writer)
    return path


@pytest.fixture(scope="module")
def valid(tmp_path_factory) -> Path:
    return write_gguf(tmp_path_factory.mktemp("gguf") / "model.gguf")


def test_every_stored_type_is_read(valid):
    source = GGUFSource(valid)
    expected = {
        "output_norm.weight": ("F32", MATRIX[0]),
        "blk.0.attn_q.weight": ("F16", MATRIX.astype(np.float16).astype(np.float32)),
        "blk.0.attn_k.weight": ("BF16", torch.from_numpy(MATRIX).bfloat16().float().numpy()),
        "blk.0.ffn_down_exps.weight": ("Q8_0", gguf.quants.dequantize(gguf.quants.quantize(STACK, Q8_0), Q8_0)),
        "blk.0.ffn_up_exps.weight": ("F32", STACK),
    }
    assert set(source.names()) == set(expected)
    for name, (dtype, values) in expected.items():
        info = source.info(name)
        assert (info.dtype, info.shape, info.numel) == (dtype, values.shape, values.size)
        torch.testing.assert_close(source.load(name), torch.from_numpy(values), rtol=0, atol=0)


@pytest.mark.parametrize("name", ["blk.0.ffn_down_exps.weight", "blk.0.ffn_up_exps.weight"])
def test_one_expert_is_the_slice_of_the_whole(valid, name):
    source = GGUFSource(valid)
    for expert in range(4):
        assert torch.equal(source.load(name, expert), source.load(name)[expert])
        assert torch.equal(source.load_packed(name, expert), source.load_packed(name)[expert])


def test_endings_in_capitals_are_of_gguf_files_too(tmp_path):
    write_gguf(tmp_path / "split.gguf", split=True)
    parts = sorted(tmp_path.iterdir())
    names = GGUFSource(parts[0]).names()
    files = [path.rename(path.with_suffix(".GGUF")) for path in parts]
    assert len(files) > 1 and is_gguf(files[0])
    source = GGUFSource(files[0])
    assert source.names() == names and list(source.files) == files


def test_metadata_keeps_its_types_and_leaves_out_the_header(valid):
    fields = {field.key: field for field in GGUFSource(valid).metadata}
    assert not any(key.startswith(("GGUF.", "split.")) for key in fields)
    assert fields["tokenizer.ggml.tokens"].value == ["a", "b", "\u00e9"]
    assert fields["tokenizer.ggml.tokens"].item_type == GGUFValueType.STRING
    assert fields["test.numbers"].value == [1, 2, 3]
    assert fields["test.eps"].value_type == GGUFValueType.FLOAT32


def test_fingerprint_follows_the_data(valid, tmp_path):
    assert GGUFSource(write_gguf(tmp_path / "same.gguf")).fingerprint == GGUFSource(valid).fingerprint
    changed = tmp_path / "changed.gguf"
    data = bytearray(valid.read_bytes())
    data[GGUFSource(valid).location("output_norm.weight")[1]] ^= 1
    changed.write_bytes(data)
    assert GGUFSource(changed).fingerprint != GGUFSource(valid).fingerprint


class TestSplit:
    @pytest.fixture
    def parts(self, tmp_path) -> list[Path]:
        write_gguf(tmp_path / "model.gguf", split=True)
        return sorted(tmp_path.glob("*.gguf"))

    def test_the_first_part_stands_for_all(self, parts, valid):
        assert len(parts) == 5
        source, whole = GGUFSource(parts[0]), GGUFSource(valid)
        assert source.files == parts
        assert source.fingerprint == whole.fingerprint
        for name in whole.names():
            assert torch.equal(source.load(name), whole.load(name))
        assert not any(field.key.startswith("split.") for field in source.metadata)

    def test_a_missing_part_is_named(self, parts):
        parts[3].unlink()
        with pytest.raises(CheckpointError, match="00004-of-00005"):
            GGUFSource(parts[0])

    def test_another_part_than_the_first_is_refused(self, parts):
        with pytest.raises(CheckpointError, match=r"part 2 of a split.*give the first part"):
            GGUFSource(parts[1])

    def test_a_first_part_that_lost_its_name_is_not_taken_for_the_whole_model(self, parts):
        renamed = parts[0].rename(parts[0].with_name("renamed.gguf"))
        with pytest.raises(CheckpointError, match=r"renamed\.gguf.*one of 5 files"):
            GGUFSource(renamed)

    @pytest.mark.parametrize("number", ["00001-of-00000", "00000-of-00005", "00006-of-00005"])
    def test_an_impossible_part_number_is_refused(self, tmp_path, number):
        with pytest.raises(CheckpointError, match="cannot be"):
            GGUFSource(tmp_path / f"m-{number}.gguf")


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def key(name: str, kind: GGUFValueType, value: bytes) -> bytes:
    return text(name) + struct.pack("<I", kind) + value


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


def tensor(shape=(8,), *, name="output_norm.weight", kind=0, offset=0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def file_of(*, keys=(), tensors=(), num_keys=None, num_tensors=None, version=3, data=b"") -> bytes:
    """A GGUF file of hand-made parts; the counts may lie."""
    counts = (len(tensors) if num_tensors is None else num_tensors, len(keys) if num_keys is None else num_keys)
    header = b"GGUF" + struct.pack("<IQQ", version, *counts) + b"".join(keys) + b"".join(tensors)
    return header + b"\0" * (-len(header) % 32) + data


HUGE = 1 << 60
DATA = bytes(32)
LIES = {
    "empty": b"",
    "magic": b"GGML" + file_of(tensors=[tensor()], data=DATA)[4:],
    "magic only": b"GGUF",
    "old version": file_of(version=1),
    "big-endian": b"GGUF" + struct.pack(">IQQ", 3, 0, 0),
    "many tensors": file_of(num_tensors=HUGE),
    "more tensors than fit": file_of(num_tensors=1 << 40),
    "many keys": file_of(num_keys=HUGE),
    "long key": file_of(keys=[struct.pack("<Q", HUGE) + b"a"]),
    "key is not text": file_of(keys=[text(b"\xff\xfe") + struct.pack("<II", GGUFValueType.UINT32, 1)]),
    "value is not text": file_of(keys=[key("a", GGUFValueType.STRING, text(b"\xff\xfe"))]),
    "long string": file_of(keys=[key("a", GGUFValueType.STRING, struct.pack("<Q", HUGE))]),
    "unknown value type": file_of(keys=[key("a", 77, b"\0" * 8)]),
    "long array": file_of(keys=[key("a", GGUFValueType.ARRAY, array(GGUFValueType.UINT32, HUGE))]),
    "long string array": file_of(keys=[key("a", GGUFValueType.ARRAY, array(GGUFValueType.STRING, 1 << 62))]),
    "unknown array type": file_of(keys=[key("a", GGUFValueType.ARRAY, array(99, 1))]),
    "deep arrays": file_of(
        keys=[key("a", GGUFValueType.ARRAY, array(GGUFValueType.ARRAY, 1) * 5000 + array(GGUFValueType.UINT8, 1))]
    ),
    "repeated key": file_of(keys=[key("a", GGUFValueType.UINT8, b"\0")] * 2),
    "alignment of zero": file_of(keys=[key("general.alignment", GGUFValueType.UINT32, bytes(4))], tensors=[tensor()]),
    "no dimensions": file_of(tensors=[tensor(())], data=DATA),
    "many dimensions": file_of(tensors=[tensor((1,) * 5)], data=DATA),
    "a dimension of zero": file_of(tensors=[tensor((8, 0))], data=DATA),
    "product overflows": file_of(tensors=[tensor((1 << 33, 1 << 33))], data=DATA),
    "huge tensor": file_of(tensors=[tensor((1 << 40,))], data=DATA),
    "data cut off": file_of(tensors=[tensor((9,))], data=DATA),
    "unknown tensor type": file_of(tensors=[tensor(kind=250)], data=DATA),
    "integer tensor": file_of(tensors=[tensor(kind=int(GGMLQuantizationType.I8))], data=DATA),
    "row is no multiple of the block": file_of(tensors=[tensor((33,), kind=int(Q8_0))], data=DATA * 2),
    "offset beyond the end": file_of(tensors=[tensor(offset=1 << 20)], data=DATA),
    "offset overflows": file_of(tensors=[tensor(offset=(1 << 64) - 32)], data=DATA),
    "tensor twice": file_of(tensors=[tensor(), tensor()], data=DATA),
}


def test_the_hand_made_files_would_be_read_if_they_did_not_lie(tmp_path):
    path = tmp_path / "honest.gguf"
    keys = [key("a", GGUFValueType.ARRAY, array(GGUFValueType.UINT32, 1, bytes(4)))]
    path.write_bytes(file_of(keys=keys, tensors=[tensor()], data=struct.pack("<8f", *range(8))))
    assert GGUFSource(path).load("output_norm.weight").tolist() == list(range(8))


@pytest.mark.parametrize("lie", LIES)
def test_a_lying_header_is_refused_at_once(tmp_path, lie):
    path = tmp_path / "broken.gguf"
    path.write_bytes(LIES[lie])
    start = time.perf_counter()
    with pytest.raises(CheckpointError, match=r"broken\.gguf"):
        GGUFSource(path)
    assert time.perf_counter() - start < 2


def test_a_file_cut_anywhere_is_refused(valid, tmp_path):
    data, path = valid.read_bytes(), tmp_path / "cut.gguf"
    last = max(t.data_offset + t.n_bytes for t in gguf.GGUFReader(valid).tensors)
    for length in [*range(0, 900, 7), *range(900, last, 331), last - 1]:
        path.write_bytes(data[:length])
        with pytest.raises(CheckpointError, match=r"cut\.gguf"):
            GGUFSource(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"nowhere\.gguf"):
        GGUFSource(tmp_path / "nowhere.gguf")


def read_everything(path: Path) -> None:
    model = open_model(path)
    assert len(model.metadata) >= 0 and model.fingerprint
    for name in model.source.names():
        assert model.source.load(name).shape == model.source.info(name).shape
    assert model.hyper.n_layer >= 0


@settings(
    max_examples=400, deadline=2000, suppress_health_check=[HealthCheck.function_scoped_fixture], derandomize=True
)
@given(flips=st.lists(st.tuples(st.integers(0, 899), st.integers(1, 255)), min_size=1, max_size=4))
def test_flipped_header_bytes_are_read_or_refused(valid, tmp_path, flips):
    data, path = bytearray(valid.read_bytes()), tmp_path / "flipped.gguf"
    for at, mask in flips:
        data[at] ^= mask
    path.write_bytes(data)
    try:
        read_everything(path)
    except CheckpointError as refusal:
        assert "flipped.gguf" in str(refusal) or "GGUF metadata" in str(refusal)
