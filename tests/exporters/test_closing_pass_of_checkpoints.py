"""The closing pass over compressed-tensors checkpoints: places, a lower KL, what changes and what stays, kills."""

from contextlib import nullcontext
from pathlib import Path

import pytest
import torch

from dynquant.cli.terminal.record import RunRecord
from dynquant.errors import ExportError, WriteError
from dynquant.evaluation.runners import open_runner
from dynquant.exporters import stage
from dynquant.exporters.compressed_tensors import write_patched
from dynquant.exporters.model_card import with_closing_pass
from dynquant.exporters.options import TUNABLE_PARTS, ExportOptions
from dynquant.exporters.tuning import export as tuned_export
from dynquant.exporters.tuning.compressed_file import QuantizedCheckpoint
from dynquant.exporters.tuning.tensors import install
from dynquant.exporters.tuning.training import TuneOptions, tune
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.families.open import open_model
from dynquant.formats.storage_format import Choice
from dynquant.inputs.text import pack_windows, read_text
from dynquant.recipes.build_plan import plan_for_vllm
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import Session
from tests.helpers.commands import refused, succeed
from tests.helpers.compressed_models import stored_tensors
from tests.helpers.exports import export_compressed_tensors
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY

SCHEMES = ("W4A16", "FP8", "W2A16_ASYM", "NVFP4A16", "W8A16", "MXFP4A16", "W3A16_ASYM", "BF16", "W6A16", "W2A16")


def export(model, output, choose, **options) -> Path:
    """Export without statistics, each unit in the scheme that `choose` gives for its number and layers."""
    layers = linear_checkpoint(model)
    units = layers.units(mixed_experts=True).values()
    schemes = {linear.name: Choice(choose(n, linears), "test") for n, linears in enumerate(units) for linear in linears}
    plan = plan_for_vllm(model, layers, schemes, recipe="test", mixed_experts=True)
    export_compressed_tensors(model, plan, layers, output, **options)
    return output


def opened(model, directory) -> QuantizedCheckpoint:
    return QuantizedCheckpoint(directory, model, linear_checkpoint(model))


@pytest.mark.parametrize("family", represented_by(("deepseek-v2", "gemma3", "llama-tied", "qwen3-moe"), sorted(TINY)))
def test_every_tensor_finds_its_place_in_the_running_model(family, tiny_text):
    """Rows of heads are in the order of the files, experts in one stack; written with zeros and then with their own."""
    model = open_model(tiny_text(family))
    layers, hf_model = linear_checkpoint(model), load_hf(model)
    tokens = torch.arange(1, 40).unsqueeze(0)
    with torch.no_grad():
        expected = hf_model(input_ids=tokens).logits
        live = LiveWeights(model, hf_model, layers)
        values = {
            linear.name: torch.stack([linear.load(e) for e in range(linear.num_experts)]).view(linear.shape)
            for linear in layers.linears
        }
        values |= {name: layers.source.load(tensor.key) for name, tensor in layers.others_by_name(model).items()}
        assert values.keys() - live.buffers - set(live.names()) <= {"output.weight"} & {
            name for name in values if "tied" in family
        }
        for name in live.names():
            assert torch.equal(live.read(name), values[name]), name
            live.write(name, torch.zeros_like(values[name]))
        for name in live.names():
            live.write(name, values[name])
        assert torch.equal(hf_model(input_ids=tokens).logits, expected)


@pytest.mark.parametrize("family", ["llama-tied", "qwen2-moe-tied"])
def test_a_tied_head_is_measured_in_the_type_of_the_file(family, tiny_text, tmp_path):
    """An F32 embedding becomes BF16, and the head with it, although GGUF files of some families hold it twice."""
    model, tokens = open_model(tiny_text(family)), torch.arange(1, 40)
    output, hf_model = export(model, tmp_path / "out", lambda *_: "BF16"), load_hf(model)
    with torch.no_grad():
        install(opened(model, output).live(hf_model), opened(model, output), {}, {})
        found = hf_model(input_ids=tokens.unsqueeze(0)).logits[0]
    torch.testing.assert_close(found, open_runner(output).window_logits(tokens.tolist()), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def windows(moe_model):
    tokenizer = load_tokenizer(moe_model)
    return pack_windows(read_text(None, max_tokens=4096), tokenizer, window=128, max_tokens=4096)


@pytest.fixture(scope="module")
def crushed(moe_model, tmp_path_factory) -> Path:
    """Experts of two bits, rounded on their own: damage enough for a short run to mend some of it."""
    choose = lambda _, linears: "W2A16" if linears[0].is_expert else "W8A16"  # noqa: E731
    return export(moe_model, tmp_path_factory.mktemp("crushed") / "out", choose)


@pytest.fixture(scope="module")
def mixed(moe_model, tmp_path_factory) -> Path:
    """Every kind of scheme in one checkpoint."""
    choose = lambda n, linears: "W4A16_ASYM" if linears[0].is_expert else SCHEMES[n % len(SCHEMES)]  # noqa: E731
    return export(moe_model, tmp_path_factory.mktemp("mixed") / "out", choose)


OPTIONS = TuneOptions(tokens=1536, step_tokens=256, held_out_tokens=640, parts=TUNABLE_PARTS)


@pytest.fixture(scope="module")
def running(moe_model):
    """The original, which the runs of `tuned` change."""
    return load_hf(moe_model)


@pytest.fixture(scope="module")
def tuned(moe_model, crushed, windows, running):
    return tune(moe_model, running, opened(moe_model, crushed), windows, OPTIONS)


def test_kl_falls_on_windows_that_decided_nothing(tuned):
    assert 0 < tuned.after.kl < 0.97 * tuned.before.kl
    assert tuned.after.agreement > tuned.before.agreement


def test_what_was_measured_is_what_is_written(moe_model, crushed, running, tuned, tmp_path):
    """The model that was measured last has the values that the file gives, rounded to its types."""
    before, output = stored_tensors(crushed), tmp_path / "tuned"
    files = write_patched(crushed, output, tuned.replacements, outcome="the KL fell")
    assert set(files) == set(output.iterdir()) and {path.name for path in files} == {p.name for p in crushed.iterdir()}
    after = stored_tensors(output)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert (
        changed
        <= tuned.replacements.keys()
        == {
            name
            for name in before
            if name.endswith(("weight_scale", "norm.weight", "mlp.gate.weight", "correction_bias"))
        }
    )
    assert {name.rpartition(".")[2] for name in changed} >= {"weight_scale", "weight", "e_score_correction_bias"}
    assert all(after[name].dtype == before[name].dtype for name in before)
    file, live = opened(moe_model, output), LiveWeights(moe_model, running, linear_checkpoint(moe_model))
    for name in file.names():
        torch.testing.assert_close(live.read(name), file.load(name), rtol=1e-6, atol=0)
    card, former = ((folder / "README.md").read_text() for folder in (output, crushed))
    assert card.endswith("\n\n## Closing pass\n\nThe KL fell.\n")
    unmeasured, below = (
        "- Not measured on this file. ",
        "- Measured on this file by the closing pass alone, see below. ",
    )
    assert unmeasured in former and below in card and unmeasured not in card
    assert with_closing_pass(with_closing_pass(former, "it rose a lot"), "the KL fell") == card
    assert (output / "config.json").read_bytes() == (crushed / "config.json").read_bytes()


def test_weights_are_parts_times_scales_in_every_scheme(moe_model, mixed):
    file, device, before = opened(moe_model, mixed), torch.device("cpu"), stored_tensors(mixed)
    kinds = {name: file.kind(name) for name in file.names()}
    trained = [name for name, kind in kinds.items() if kind == "scales"]
    for name in trained:
        scales, parts = file.scaled(name, device)
        assert torch.equal(parts.sum(1).view(-1), file.load(name).view(-1)), name
        stored = file.stored(name, scales)
        assert all(torch.equal(values, before[key]) for key, values in stored.items())
        assert sum(values.numel() for values in stored.values()) == scales.numel()
    assert file.untrained == ["NVFP4A16", "MXFP4A16"]
    stays = [name for name in kinds if file.is_quantized(name) and name not in trained]
    assert stays and {kinds[name] for name in kinds if name.endswith("norm.weight")} == {"norms"}
    assert kinds["blk.2.ffn_gate_inp.weight"] == "routers" and not kinds["token_embd.weight"]


def test_rates_go_by_the_error_of_what_is_not_trained_too(moe_model, mixed, running):
    file = opened(moe_model, mixed)
    with torch.no_grad():
        live = file.live(load_hf(moe_model))
        norms = install(live, file, {"norms": 1.0}, {})
        assert norms and all(tensor.rate > 0 for tensor in norms.values())
        assert all(name.endswith("norm.weight") for name in norms)


def test_a_checkpoint_of_another_model_is_refused(crushed, tiny_text, tmp_path):
    other = open_model(tiny_text("deepseek-v3"))
    with pytest.raises(ExportError, match=r"is not of .*`.*` is (\[.*\]|missing), and \[.*\] there.*as --reference"):
        opened(other, crushed).check_original()
    for reference, words in (
        (tiny_text("llama"), "two different models"),
        (crushed, "already quantized"),
    ):
        said = refused("tune", crushed, "--reference", reference, "-o", tmp_path / "tuned")
        assert words in said and not list(tmp_path.iterdir())


def test_folders_that_cannot_be_tuned_are_refused(small_moe, crushed, tmp_path):
    for file, output, words in (
        (small_moe, tmp_path / "tuned", "no compressed-tensors checkpoint"),
        (tmp_path / "none", tmp_path / "tuned.gguf", "none"),
        (tmp_path / "none", tmp_path / "tuned", "There is no directory"),
        (crushed / "model.safetensors", tmp_path / "tuned.gguf", "is neither a directory nor a GGUF file"),
        (crushed, tmp_path / "tuned.gguf", "has the name of a file, and a folder is written"),
        (crushed, crushed.parent, "exists already"),
    ):
        said = refused("tune", file, "--reference", small_moe, "-o", output)
        assert words in said and not list(tmp_path.iterdir())


def test_nothing_is_left_when_the_disk_is_full(crushed, tuned, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynquant.exporters.compressed_tensors.os.fsync", full)
    with pytest.raises(WriteError, match="could not be written"):
        write_patched(crushed, tmp_path / "tuned", tuned.replacements, outcome="nothing")
    assert not list(tmp_path.iterdir())


@pytest.mark.nightly
def test_an_interrupted_pass_keeps_what_is_encoded(small_moe, calibrated_16m, tmp_path, monkeypatch):
    """The second run encodes nothing; when it is done nothing is beside its output."""
    record, notes = RunRecord(), []
    how = {"preset": "uniform-w8a16", "format": "compressed-tensors", "tune": 512}
    stats = calibrated_16m / "stats.safetensors"
    options = ExportOptions(model=str(small_moe), output=tmp_path / "m", stats=stats, **how)
    session = Session(stage=lambda _: nullcontext(record.report), note=notes.append)

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(tuned_export, "tune_file", interrupt)
        stage.export(options, session)
    (untuned,) = tmp_path.iterdir()
    assert untuned.name.startswith(".m.untuned-") and "quantize" in record.stages
    record.stages.clear()
    exported = stage.export(options, session)
    assert "quantize" not in record.stages and [path.name for path in tmp_path.iterdir()] == ["m"]
    assert {path.name for path in exported.files} == {path.name for path in (tmp_path / "m").iterdir()}
    card = (tmp_path / "m" / "README.md").read_text()
    (outcome,) = (note for note in notes if "closing pass on" in note)
    assert f"## Closing pass\n\n{outcome[0].upper()}{outcome[1:]}.\n" in card


@pytest.mark.nightly
def test_the_command_tunes_a_finished_checkpoint(small_moe, crushed, tmp_path):
    command = ("tune", crushed, "--reference", small_moe, "--tokens", 4096, "--window", 128)
    said = succeed(*command, "-o", tmp_path / "tuned")
    assert "closing pass on" in said and "Closing pass" in (tmp_path / "tuned" / "README.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["tuned"]
