"""Exports whose parts are encoded side by side: the bytes of one thread, and nothing left of what failed."""

import threading

import pytest

from dynquant.encoding import dynquant_encoder, ggml
from dynquant.encoding.parts import PartLimits
from dynquant.encoding.stream import load_encoder
from dynquant.errors import EncodeError, ExportError
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types
from dynquant.storage.resumable_output import ResumableOutput
from tests.helpers.exports import export_gguf, export_safetensors
from tests.helpers.tiny_gguf import GGML, left_in, tiny_model, tiny_plan

LIMITS = PartLimits(4 * 256 * 40 * 12)
"""Parts of 40 rows of 256, four of them in memory."""


@pytest.fixture(scope="module")
def planned(tiny_moe):
    model = open_model(tiny_moe)
    shapes = {name: model.source.info(name).shape for name in model.source.names()}
    types = {name: ("Q3_K" if shape[-1] == 256 else "Q8_0", "test") for name, shape in shapes.items() if len(shape) > 1}
    types["token_embd.weight"] = types["output.weight"] = ("Q8_0", "test")  # large and soon done
    return model, plan_from_types(model, types, recipe="preset test")


@pytest.mark.parametrize("export, encoder", [(export_gguf, "dynquant"), (export_safetensors, "ggml")])
def test_threads_limits_and_splits_do_not_change_bytes(planned, tmp_path, monkeypatch, encoder, export):
    monkeypatch.setattr(ggml, "CHUNK_WEIGHTS", 7 * 256)
    monkeypatch.setattr(dynquant_encoder, "_CPU_WEIGHTS", 64 * 256)
    options = {"encoder": load_encoder(encoder, "cpu")}
    options |= {"split_max_bytes" if export is export_gguf else "shard_max_bytes": 3_000_000}
    written = []
    for threads, limits in ((1, PartLimits()), (2, PartLimits()), (5, PartLimits()), (5, LIMITS)):
        folder = tmp_path / str(len(written))
        output = folder / "a.gguf" if export is export_gguf else folder
        export(*planned, None, output, threads=threads, limits=limits, **options)
        written.append({path.name: path.read_bytes() for path in folder.iterdir()})
    assert len(written[0]) > 1 and all(files == written[0] for files in written)


@pytest.mark.parametrize("threads", [1, 5])
def test_weights_that_cannot_be_encoded_leave_nothing(tmp_path, threads):
    model = tiny_model()
    model.source.load("blk.7.ffn_up_exps.weight")[1, 3, 5] = float("nan")
    before = threading.active_count()
    with pytest.raises(EncodeError, match=r"^`blk\.7\.ffn_up_exps\.weight` holds NaN"):
        export_gguf(model, tiny_plan(model), None, tmp_path / "a.gguf", encoder=GGML, threads=threads)
    assert left_in(tmp_path) == [] and threading.active_count() == before


def test_a_disk_that_fills_up_ends_what_is_in_work(tmp_path, monkeypatch):
    model, begun = tiny_model(), []
    plan, write = tiny_plan(model), ResumableOutput.write
    load = model.source.load
    monkeypatch.setattr(model.source, "load", lambda name, index=None: (begun.append(name), load(name, index))[1])

    def full(self, name, data):
        if "weight" in name:
            raise ExportError("The disk is full")
        write(self, name, data)

    monkeypatch.setattr(ResumableOutput, "write", full)
    before = threading.active_count()
    with pytest.raises(ExportError, match="full"):
        export_gguf(model, plan, None, tmp_path / "a.gguf", encoder=GGML, threads=2)
    assert threading.active_count() == before and len(set(begun)) < len(plan.entries) // 2
