"""GGUF files: exact sizes, exact bytes, stock llama.cpp, and what a kill, a full disk or a wrong input leave behind."""

import errno
import io
import multiprocessing
import os
import random
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import gguf
import pytest
import torch
from gguf import GGUFValueType

from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.gguf_layout import file_type_of
from dynquant.checkpoints.gguf_source import GGUFSource, MetadataField
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_source import DictSource
from dynquant.encoding.parts import PartLimits
from dynquant.encoding.stream import load_encoder
from dynquant.errors import EncodeError, ExportError, PlanError, StatsError
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.build_plan import plan_from_types
from dynquant.storage import resumable_output as artifacts
from tests.helpers.exports import export_gguf
from tests.helpers.packed_models import plan_of

GGML = load_encoder("ggml")
NUM_LAYERS = 12


def tiny_model(**changes: torch.Tensor) -> Model:
    generator = torch.Generator().manual_seed(0)
    tensors = {"token_embd.weight": torch.randn(70, 256, generator=generator)}
    for layer in range(NUM_LAYERS):
        tensors[f"blk.{layer}.attn_norm.weight"] = torch.rand(250, generator=generator)
        tensors[f"blk.{layer}.ffn_up_exps.weight"] = torch.randn(3, 16, 256, generator=generator)
    fields = (
        MetadataField("general.architecture", "llama", GGUFValueType.STRING),
        MetadataField("general.alignment", 64, GGUFValueType.UINT32),
        MetadataField("llama.block_count", NUM_LAYERS, GGUFValueType.UINT32),
        MetadataField("llama.embedding_length", 256, GGUFValueType.UINT32),
        MetadataField("llama.rope.freq_base", 1e4, GGUFValueType.FLOAT32),
        MetadataField("llama.flag", False, GGUFValueType.BOOL),
        MetadataField("tokenizer.ggml.tokens", ["é", ""], GGUFValueType.ARRAY, GGUFValueType.STRING),
        MetadataField("tokenizer.ggml.token_type", [1, 3], GGUFValueType.ARRAY, GGUFValueType.INT32),
        MetadataField("tokenizer.ggml.empty", [], GGUFValueType.ARRAY, GGUFValueType.STRING),
    )
    return Model(Path("tiny"), DictSource(tensors | changes), fields, lambda name: (name,))


def tiny_plan(model: Model, type_name: str = "Q4_K", **options):
    types = {name: (type_name, "asked") for name in model.source.names() if "norm" not in name}
    return plan_from_types(model, types, recipe="preset test", **options)


def tiny_stats(model: Model) -> CalibrationStats:
    provenance = StatsProvenance(
        fingerprint=model.fingerprint, text_hash="7", text_name="/home/somebody/texts/prose.jsonl", num_windows=7
    )
    inputs = {
        f"blk.{layer}.ffn_up_exps.weight": InputStats(
            torch.rand(3, 256, dtype=torch.float64) * 50 + 1, torch.full((3,), 40)
        )
        for layer in range(NUM_LAYERS)
    }
    return CalibrationStats(provenance, inputs)


class SlowEncoder:
    """ggml's bytes, with a pause per tensor that a kill can hit."""

    name = "ggml"
    uses_hessians = False

    def encode(self, *args, **options):
        time.sleep(0.004)
        return GGML.encode(*args, **options)


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture(scope="module")
def moe(small_moe):
    return open_model(small_moe)


@pytest.fixture(scope="module")
def moe_plan(moe):
    return plan_of(moe, lambda name: "MXFP4" if "exps" in name else "Q8_0", recipe="preset uniform-q8_0")


@pytest.fixture(scope="module")
def moe_file(moe, moe_plan, tmp_path_factory):
    (path,) = export_gguf(moe, moe_plan, None, tmp_path_factory.mktemp("moe") / "moe.gguf", encoder=GGML, threads=2)
    return path


@pytest.fixture(scope="module")
def moe_parts(moe, moe_plan, moe_file):
    output = moe_file.with_name("parts.gguf")
    return export_gguf(moe, moe_plan, None, output, encoder=GGML, threads=2, split_max_bytes=4_000_000)


def test_the_file_has_the_predicted_size_and_the_bytes_of_direct_encodes(moe, moe_plan, moe_file):
    assert moe_file.stat().st_size == moe_plan.predicted_bytes
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(moe_file).tensors}
    assert list(stored) == moe.source.names()
    for entry in moe_plan.entries:
        weights = moe.source.load(entry.name)
        weights = weights if weights.dim() > 1 else weights[None]
        assert stored[entry.name].tensor_type.name == entry.type
        assert stored[entry.name].data.tobytes() == GGML.encode(entry.quant_type, weights, None, 2).numpy().tobytes()


def test_metadata_survives_with_its_types(moe, moe_file):
    written = {field.key: field for field in open_model(moe_file).metadata}
    for field in moe.metadata:
        found = written[field.key]
        assert (found.value_type, found.item_type) == (field.value_type, field.item_type), field.key
        if isinstance(field.value, float):
            assert found.value == pytest.approx(field.value, rel=1e-6)
        elif isinstance(field.value, list | tuple):
            assert list(found.value) == list(field.value)
        else:
            assert found.value == field.value


def greedy_tokens(path: Path, count: int = 8) -> list[int]:
    llama_cpp = pytest.importorskip("llama_cpp")
    model = llama_cpp.Llama(str(path), n_ctx=64, n_threads=1, verbose=False, seed=0)
    try:
        prompt = model.tokenize(b"The largest planet is")
        return [token for token, _ in zip(model.generate(prompt, temp=0.0), range(count), strict=False)]
    finally:
        model.close()


def test_stock_llama_cpp_generates_the_same_from_one_file_and_from_parts(moe_file, moe_parts):
    tokens = greedy_tokens(moe_file)
    assert len(tokens) == 8 and len(set(tokens)) > 2
    assert greedy_tokens(moe_parts[0]) == tokens


def test_parts_hold_the_tensors_of_the_single_file_and_keep_to_the_limit(moe_file, moe_parts):
    count = len(moe_parts)
    assert [path.name for path in moe_parts] == [f"parts-{i + 1:05d}-of-{count:05d}.gguf" for i in range(count)]
    assert count > 2 and all(path.stat().st_size <= 4_000_000 for path in moe_parts)
    single, parts = GGUFSource(moe_file), GGUFSource(moe_parts[0])
    assert single.names() == parts.names()
    assert all(torch.equal(single.load_packed(name), parts.load_packed(name)) for name in single.names())
    for number, path in enumerate(moe_parts):
        fields = gguf.GGUFReader(path).fields
        keys = {"split.no": (number, "UINT16"), "split.count": (count, "UINT16"),
                "split.tensors.count": (len(single.names()), "INT32")}  # fmt: skip
        for key, (value, type_name) in keys.items():
            assert (fields[key].contents(), fields[key].types[0].name) == (value, type_name)


def test_provenance_and_imatrix_keys_name_no_path(tmp_path):
    model = tiny_model()
    stats = tiny_stats(model)
    plan = tiny_plan(model, "Q4_K", stats=stats, stats_hash="5" * 64)
    (path,) = export_gguf(model, plan, stats, tmp_path / "a.gguf", encoder=GGML)
    assert path.stat().st_size == plan.predicted_bytes
    assert b"somebody" not in path.read_bytes()
    fields = {key: field.contents() for key, field in gguf.GGUFReader(path).fields.items()}
    assert fields["quantize.imatrix.file"] == "stats.safetensors"
    assert fields["quantize.imatrix.dataset"] == "prose.jsonl"
    assert fields["quantize.imatrix.entries_count"] == NUM_LAYERS
    assert fields["quantize.imatrix.chunks_count"] == 7
    assert fields["general.quantization_version"] == 2
    assert fields["dynquant.plan_hash"] == plan.hash
    assert fields["dynquant.stats_hash"] == "5" * 64
    assert fields["dynquant.fingerprint"] == model.fingerprint
    assert fields["dynquant.encoder"].strip() == "ggml"
    assert "general.alignment" not in fields and fields["llama.flag"] is False


def test_each_expert_is_encoded_with_its_own_statistics(tmp_path):
    model, name = tiny_model(), "blk.3.ffn_up_exps.weight"
    stats = tiny_stats(model)
    types = {n: ("IQ2_XXS" if "exps" in n else "Q4_K", "asked") for n in model.source.names() if "norm" not in n}
    plan = plan_from_types(model, types, recipe="bpw 2.0", stats=stats, stats_hash="5" * 64)
    (path,) = export_gguf(model, plan, stats, tmp_path / "a.gguf", encoder=GGML)
    weights, measured = model.source.load(name), importance(stats, name, (3, 16, 256))
    stored = GGUFSource(path)
    for expert in range(3):
        direct = GGML.encode(QUANT_TYPES["IQ2_XXS"], weights[expert], measured[expert], 1)
        assert torch.equal(stored.load_packed(name, expert), direct)
        swapped = GGML.encode(QUANT_TYPES["IQ2_XXS"], weights[expert], measured[(expert + 1) % 3], 1)
        assert not torch.equal(swapped, direct), "the statistics of two experts must differ for this test to mean much"


def test_the_size_does_not_depend_on_the_encoder(tmp_path):
    class LongerName(SlowEncoder):
        name = "dynquant"

    model = tiny_model()
    plan = tiny_plan(model)
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=LongerName())
    assert path.stat().st_size == plan.predicted_bytes


@pytest.mark.parametrize(
    "recipe, expected",
    [("preset llama-q4_k_s", "MOSTLY_Q4_K_S"), ("preset r1-iq1_s", "MOSTLY_IQ1_S"), ("preset bf16", "MOSTLY_BF16"),
     ("preset f32", "ALL_F32"), ("preset r1-q2_k_xl", "MOSTLY_Q5_K_M"), ("bpw 2.0", "MOSTLY_Q5_K_M")],
)  # fmt: skip
def test_file_type_is_the_presets_or_that_of_most_weights(recipe, expected):
    model = tiny_model()
    plan = tiny_plan(model, "Q5_K")
    specs = [gguf_spec(entry) for entry in plan.entries]
    assert gguf.LlamaFileType(file_type_of(recipe, specs)).name == expected


def gguf_spec(entry):
    return namedtuple("Spec", "name shape type")(entry.name, entry.shape, entry.type)


@pytest.mark.parametrize("split_max_bytes", [None, 60_000], ids=["single", "split"])
def test_kills_at_random_moments_leave_a_file_with_the_same_bytes(tmp_path, split_max_bytes):
    torch.set_num_threads(1)
    model = tiny_model()
    plan = tiny_plan(model)
    options = {"threads": 1, "split_max_bytes": split_max_bytes}
    expected = export_gguf(model, plan, None, tmp_path / "straight" / "a.gguf", encoder=GGML, **options)
    context, dice, kills = multiprocessing.get_context("fork"), random.Random(1), 0
    output = tmp_path / "killed" / "a.gguf"
    wanted = {path.name: path.read_bytes() for path in expected}
    child = None
    while child is None or child.exitcode != 0:
        child = context.Process(
            target=export_gguf, args=(model, plan, None, output), kwargs={"encoder": SlowEncoder(), **options}
        )
        child.start()
        # Pauses grow, so that a busy machine ends this loop too.
        child.join(dice.uniform(0.01, 0.1) * (1 + kills / 4))
        if child.exitcode is None:
            child.kill()
            child.join()
            kills += 1
        else:
            assert child.exitcode == 0, "the export failed on its own"
        for path in output.parent.glob("*.gguf"):
            assert path.read_bytes() == wanted[path.name], "a final name must only ever hold a complete file"
    assert kills >= 2
    assert {path.name: path.read_bytes() for path in output.parent.iterdir()} == wanted


def interrupt_after(monkeypatch, count: int) -> None:
    """Stop like a kill, right before the journal line of region number `count`."""
    record = artifacts.Journal.add
    calls = iter(range(10**6))

    def stop(self, line):
        if next(calls) == count:
            raise KeyboardInterrupt
        record(self, line)

    monkeypatch.setattr(artifacts.Journal, "add", stop)


def interrupted(monkeypatch, tmp_path, count=10):
    model = tiny_model()
    plan = tiny_plan(model)
    with monkeypatch.context() as patch:
        interrupt_after(patch, count)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == ["a.gguf.journal", "a.gguf.partial"]
    return model, plan


def test_a_resumed_export_encodes_only_what_is_missing_or_damaged(monkeypatch, tmp_path):
    model, plan = interrupted(monkeypatch, tmp_path)
    first = plan.entries[0]
    partial = tmp_path / "a.gguf.partial"
    with partial.open("r+b") as file:
        file.seek(partial.stat().st_size - sum(-(-entry.bytes // 32) * 32 for entry in plan.entries) + 5)
        file.write(b"damage")
    encoded = []

    class Recorder(SlowEncoder):
        def encode(self, *args, name, **options):
            encoded.append(name)
            return GGML.encode(*args, name=name, **options)

    with (tmp_path / "a.gguf.journal").open("ab") as journal:
        journal.write(b'{"region": "blk.7.ffn_up_e')
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=Recorder())
    assert first.name in encoded and len(encoded) == len(plan.entries) - 8
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


def test_a_kill_between_two_renames_is_finished_by_the_next_run(monkeypatch, tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    expected = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML, split_max_bytes=60_000)
    move, moved = os.replace, []

    def move_once(source, target):
        if Path(source).name == f"{Path(target).name}.partial":
            if moved:
                raise KeyboardInterrupt
            moved.append(target)
        move(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts.os, "replace", move_once)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML, split_max_bytes=60_000)
    assert len(moved) == 1

    class Unused:
        name = "ggml"
        uses_hessians = False

        def encode(self, *args, **options):
            raise AssertionError("everything was already encoded")

    paths = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=Unused(), split_max_bytes=60_000)
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in expected]
    assert left_in(tmp_path) == sorted(path.name for path in (*paths, *expected))


def test_an_interrupted_export_of_another_plan_is_refused_and_kept(monkeypatch, tmp_path):
    model, _ = interrupted(monkeypatch, tmp_path)
    before = (tmp_path / "a.gguf.partial").read_bytes()
    other = tiny_plan(model, "Q5_K")
    with pytest.raises(ExportError, match="another plan"):
        export_gguf(model, other, None, tmp_path / "a.gguf", encoder=GGML)
    assert (tmp_path / "a.gguf.partial").read_bytes() == before
    (path,) = export_gguf(model, other, None, tmp_path / "a.gguf", encoder=GGML, resume=False)
    assert left_in(tmp_path) == ["a.gguf"] and path.stat().st_size == other.predicted_bytes


def test_an_older_output_stays_until_the_new_one_is_complete(monkeypatch, tmp_path):
    model = tiny_model()
    output = tmp_path / "a.gguf"
    output.write_bytes(b"older")
    with monkeypatch.context() as patch:
        interrupt_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, tiny_plan(model), None, output, encoder=GGML)
    assert output.read_bytes() == b"older"
    export_gguf(model, tiny_plan(model), None, output, encoder=GGML)
    assert output.read_bytes()[:4] == b"GGUF" and left_in(tmp_path) == ["a.gguf"]


def test_a_disk_that_fills_up_keeps_what_is_done_and_says_how_to_go_on(monkeypatch, tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    write, calls = artifacts.write_all, iter(range(10**6))

    def fill_up(file, data):
        is_journal = str(file.name).endswith(".journal")
        if not is_journal and next(calls) == 9:
            write(file, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        write(file, data)

    with monkeypatch.context() as patch:
        patch.setattr(artifacts, "write_all", fill_up)
        with pytest.raises(ExportError, match=r"full: `blk\.3\..*9 of 26 parts are kept.*same command") as refusal:
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    assert "a.gguf.partial" in str(refusal.value)
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


@pytest.mark.parametrize("seed", range(4))
def test_a_disk_full_at_any_byte_is_gone_on_from(monkeypatch, tmp_path, seed):
    """Room for a random number of bytes, in tensors or in the journal; then again, until the export fits."""
    model, dice = tiny_model(), random.Random(seed)
    plan, room, full_for = tiny_plan(model), 0, ""
    os_open = open

    class SmallDisk(io.FileIO):
        def write(self, data):
            nonlocal room
            if not str(self.name).endswith(full_for):
                return super().write(data)
            if not room:
                raise OSError(errno.ENOSPC, "No space left on device")
            count = super().write(memoryview(data)[: min(room, len(data))])
            room -= count
            return count

    def open_small(path, mode="r", **options):
        if "b" in mode and ("w" in mode or "+" in mode or "a" in mode):
            file = SmallDisk(path, mode.replace("b", ""))
            return file if options.get("buffering") == 0 else io.BufferedWriter(file)
        return os_open(path, mode, **options)

    monkeypatch.setattr(artifacts, "open", open_small, raising=False)
    monkeypatch.setattr(Path, "open", open_small)
    fills, options = 0, {"encoder": GGML, "limits": PartLimits(20 * 256 * 12)}
    while True:
        full_for = dice.choice(["", ".journal"])
        room = dice.randrange(2000 if full_for else plan.predicted_bytes // 2)
        try:
            (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", **options)
            break
        except ExportError as refusal:
            assert "is full" in str(refusal) and left_in(tmp_path) == ["a.gguf.journal", "a.gguf.partial"]
            fills += 1
    assert fills >= 2
    monkeypatch.undo()
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


def test_a_resumed_export_may_have_other_parts(monkeypatch, tmp_path):
    model = tiny_model()
    plan, parts = tiny_plan(model), PartLimits(20 * 256 * 12)
    encoded = []

    class Recorder(SlowEncoder):
        def encode(self, _type, weights, *args, name, **options):
            encoded.append((name, len(weights)))
            return GGML.encode(_type, weights, *args, name=name, **options)

    with monkeypatch.context() as patch:
        interrupt_after(patch, 12)
        with pytest.raises(KeyboardInterrupt):
            export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=Recorder(), limits=parts)
    assert {name: [n for other, n in encoded if other == name] for name, _ in encoded}["blk.0.ffn_up_exps.weight"] == [
        1, 1, 1,
    ]  # fmt: skip
    done, encoded[:] = {name for name, _ in encoded[:-1]}, []
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=Recorder())
    begun = encoded[0][0]
    assert {name for name, _ in encoded}.isdisjoint(done - {begun}) and (begun, 3) in encoded[:1]
    (straight,) = export_gguf(model, plan, None, tmp_path / "b.gguf", encoder=GGML)
    assert path.read_bytes() == straight.read_bytes()


def test_space_that_the_partial_file_has_already_is_not_asked_for_again(monkeypatch, tmp_path):
    model, plan = interrupted(monkeypatch, tmp_path, count=25)
    allocated = 512 * (tmp_path / "a.gguf.partial").stat().st_blocks
    usage = namedtuple("usage", "total used free")
    free = max(0, plan.predicted_bytes - allocated)
    assert free < plan.predicted_bytes // 4
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: usage(10**9, 10**9 - free, free))
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    assert path.stat().st_size == plan.predicted_bytes


def test_too_little_space_is_refused_before_anything_is_written(monkeypatch, tmp_path):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(artifacts.shutil, "disk_usage", lambda path: usage(10**6, 10**6 - 9, 9))
    with pytest.raises(ExportError, match="only 9 are free"):
        export_gguf(tiny_model(), tiny_plan(tiny_model()), None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == []


def test_nan_weights_are_refused_and_nothing_is_left(tmp_path):
    name = "blk.5.ffn_up_exps.weight"
    broken = torch.randn(3, 16, 256)
    broken[2, 3, 4] = float("nan")
    model = tiny_model(**{name: broken})
    with pytest.raises(EncodeError, match=name):
        export_gguf(model, tiny_plan(model), None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == []


def test_a_plan_with_another_size_or_shape_is_refused(tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    with pytest.raises(ExportError, match="predicts a file of"):
        wrong = plan.model_copy(update={"predicted_bytes": plan.predicted_bytes + 32})
        export_gguf(model, wrong, None, tmp_path / "a.gguf", encoder=GGML)
    entries = (plan.entries[0].model_copy(update={"shape": (35, 512)}), *plan.entries[1:])
    with pytest.raises(PlanError, match="shape"):
        export_gguf(model, plan.model_copy(update={"entries": entries}), None, tmp_path / "a.gguf", encoder=GGML)
    assert left_in(tmp_path) == []


def test_statistics_must_be_the_plans_own(tmp_path):
    model = tiny_model()
    stats = tiny_stats(model)
    with_stats = tiny_plan(model, stats=stats, stats_hash="5" * 64)
    with pytest.raises(StatsError, match=r"stats\.safetensors"):
        export_gguf(model, with_stats, None, tmp_path / "a.gguf", encoder=GGML)
    with pytest.raises(PlanError, match="without calibration statistics"):
        export_gguf(model, tiny_plan(model), stats, tmp_path / "a.gguf", encoder=GGML)
    stats.provenance.fingerprint = "another"
    with pytest.raises(StatsError, match="another"):
        export_gguf(model, with_stats, stats, tmp_path / "a.gguf", encoder=GGML)


def test_outputs_that_cannot_be_are_refused(tmp_path):
    model = tiny_model()
    plan = tiny_plan(model)
    (path,) = export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML)
    again = open_model(path)
    (tmp_path / "d.gguf").mkdir()
    for output, words in [(tmp_path / "d.gguf", "directory"), (tmp_path / "x.bin", r"\.gguf"), (path, "being read")]:
        with pytest.raises(ExportError, match=words):
            export_gguf(again, tiny_plan(again), None, output, encoder=GGML)


def test_a_tensor_larger_than_a_part_and_a_name_llama_cpp_cannot_load_are_refused(tmp_path):
    model = tiny_model()
    with pytest.raises(ExportError, match=r"token_embd\.weight.*at least"):
        export_gguf(model, tiny_plan(model), None, tmp_path / "a.gguf", encoder=GGML, split_max_bytes=5_000)
    tensors = {"blk.0." + "x" * 60: torch.zeros(4)}
    with pytest.raises(ExportError, match="longer than the 63 bytes"):
        tiny_plan(replace(model, source=DictSource(tensors)))
