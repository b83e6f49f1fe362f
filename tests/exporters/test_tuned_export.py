"""Exports that the closing pass tunes: what a kill leaves on the way, and what the next run makes of it."""

import os
import shutil
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.exporters import compressed_tensors, gguf
from dynquant.exporters import safetensors as packed
from dynquant.exporters.closing_pass import TunedFiles
from dynquant.exporters.output import Encoding
from dynquant.exporters.tuning import export as tuned_export
from dynquant.exporters.tuning.export import TunedFormat, export_tuned
from dynquant.exporters.tuning.training import TuneOptions
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.families.text.llama import interleave_halves
from dynquant.recipes.build_plan import plan_for_vllm, plan_from_types, uniform_schemes
from dynquant.recipes.presets import preset_types
from dynquant.storage.work_files import remove_work
from tests.helpers.tiny_gguf import GGML

QUERY = "blk.0.attn_q.weight"
PART_BYTES = 2_600_000
"""Bytes of a part of a split file."""


@pytest.fixture
def trained(monkeypatch):
    """What stands in for training gives: other bytes whenever it runs, as one does that ends by the clock."""
    values = []

    def tune_file(_model, path, _windows, _options, output, _session, *, encoder, shared):
        if path.is_dir():
            values.append(path)
            return TunedFiles(compressed_tensors.write_patched(path, output, {}, outcome="nothing changed"), "")
        source = GGUFSource(path)
        values.append(source.load_packed(QUERY) + len(values) + 1)
        files = gguf.write_patched(source, output, {QUERY: values[-1]}, encoder=encoder)
        return TunedFiles(files, f"the closing pass of run {len(values)} helped")

    monkeypatch.setattr(tuned_export, "tune_file", tune_file)
    return values


@pytest.fixture(scope="module")
def model(tiny_text):
    """A Llama with rotary rows to reorder."""
    return open_model(tiny_text("llama"))


@pytest.fixture
def encoding(model):
    plan = plan_from_types(model, preset_types("uniform-q8_0", model), recipe="preset uniform-q8_0")
    return Encoding(model=model, plan=plan, encoder=GGML, moments=SimpleNamespace(tokens=None))


@pytest.fixture
def export(encoding, trained):
    """Exports in a format under a name."""

    def export(kind: str, output, **options):
        asked = replace(encoding, **options)
        if kind == "compressed-tensors":
            layers = linear_checkpoint(encoding.model)
            plan = plan_for_vllm(encoding.model, layers, uniform_schemes("uniform-w8a16", layers), recipe="test")
            asked = replace(asked, plan=plan)
            tuned = TunedFormat(partial(compressed_tensors.export_compressed_tensors, asked, layers))
        else:
            convert = partial(packed.export_safetensors, asked) if kind == "safetensors" else None
            tuned = TunedFormat(partial(gguf.export_gguf, asked, split_max_bytes=PART_BYTES), ".gguf", convert)
        return export_tuned(asked, tuned, output, TuneOptions(), PART_BYTES, None)

    return export


def names(folder) -> set[str]:
    return {path.name for path in folder.iterdir()}


def killed_at(call: int, function):
    """Return the function as a process has it that is killed before its call number `call`."""
    calls = count(1)

    def killed(*arguments, **options):
        if next(calls) == call:
            raise KeyboardInterrupt
        return function(*arguments, **options)

    return killed


def test_half_a_folder_is_not_taken_for_a_whole_one(export, tmp_path):
    """A kill while work was removed left some of its files under the name of a finished checkpoint."""
    output = tmp_path / "m"

    def removes_one_file(folder, **_: object) -> None:
        if folder.exists():  # unlike that from which the output got its name
            (folder / "config.json").unlink()
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shutil, "rmtree", removes_one_file)
        export("compressed-tensors", output)
    assert len(names(tmp_path)) == 2
    whole = {path.name: path.read_bytes() for path in output.iterdir()}
    shutil.rmtree(output)
    export("compressed-tensors", output)
    remove_work(output)  # as every export does at its end
    assert names(tmp_path) == {"m"} and {path.name: path.read_bytes() for path in output.iterdir()} == whole


@pytest.mark.parametrize(
    ("place", "call"),
    [
        ("dynquant.storage.resumable_output.os.replace", 2),  # some parts have their names, and the first has not
        ("dynquant.exporters.tuning.export.discard", 2),  # the first part is gone, and others are there
    ],
)
def test_some_parts_of_a_file_are_not_taken_for_all(place, call, export, trained, tmp_path):
    output = tmp_path / "m.gguf"
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(place, killed_at(call, os.replace if place.endswith("replace") else tuned_export.discard))
        export("gguf", output)
    assert any("-00002-of-" in name for name in names(tmp_path) if ".untuned-" in name)
    assert not any("-00001-of-" in name for name in names(tmp_path) if name.endswith("gguf") and ".untuned-" in name)
    files = export("gguf", output)
    remove_work(output)
    assert names(tmp_path) == {file.name for file in files} and len(files) > 2
    assert torch.equal(GGUFSource(files[0]).load_packed(QUERY), trained[-1])


def test_what_was_tuned_is_packed_after_an_interruption(export, trained, tmp_path):
    """Other bytes would not go with those that are there."""

    def stopped(*arguments):
        yield from list(parts_of(*arguments))[:2]
        raise KeyboardInterrupt

    parts_of = packed._parts_of
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(packed, "_parts_of", stopped)
        export("safetensors", tmp_path / "out")
    export("safetensors", tmp_path / "out")
    assert len(trained) == 1 and names(tmp_path) == {"out"}
    stored = load_file(tmp_path / "out" / "model.safetensors")["model.layers.0.self_attn.q_proj.weight"]
    assert torch.equal(interleave_halves(4)(stored), trained[0])
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.endswith("\n\n## Closing pass\n\nThe closing pass of run 1 helped.\n")
    assert "- Measured on this file by the closing pass alone, see below." in card
    export("safetensors", tmp_path / "out")
    assert "The closing pass of run 2 helped." in (tmp_path / "out" / "README.md").read_text()
    assert names(tmp_path) == {"out"}


def test_a_link_is_not_read_and_goes(export, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuned_export, "tune_file", killed_at(1, None))
        export("compressed-tensors", tmp_path / "m")
    (untuned,) = tmp_path.iterdir()
    other = untuned.rename(tmp_path / "other")
    (other / "config.json").unlink()
    untuned.symlink_to(other)
    before = names(other)
    export("compressed-tensors", tmp_path / "m")
    assert names(tmp_path) == {"m", "other"} and names(other) == before and "config.json" in names(tmp_path / "m")


def test_without_resume_all_starts_over(export, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuned_export, "tune_file", killed_at(1, None))
        export("compressed-tensors", tmp_path / "m")
    (untuned,) = tmp_path.iterdir()
    (untuned / "config.json").write_text("of another version")
    export("compressed-tensors", tmp_path / "m", resume=False)
    assert names(tmp_path) == {"m"} and "of another version" not in (tmp_path / "m" / "config.json").read_text()
