"""The closing pass on the small model: weights in their places, a lower KL on unseen text, no code changed."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.second_moments import SecondMoments
from dynquant.calibration.statistics import StatsProvenance
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.tensor_roles import Role, role_of
from dynquant.cli.terminal.record import RunRecord
from dynquant.encoding.stream import load_encoder
from dynquant.errors import CheckpointError, ExportError, OptionError, StatsError, WriteError
from dynquant.exporters.closing_pass import closing_pass_of, too_large_to_tune, tune_file, tune_options
from dynquant.exporters.gguf import write_patched
from dynquant.exporters.options import TUNABLE_PARTS, ClosingPassOptions, ExportOptions
from dynquant.exporters.output import Encoding
from dynquant.exporters.stage import export
from dynquant.exporters.tuning import training
from dynquant.exporters.tuning.gguf_file import QuantizedGGUF
from dynquant.exporters.tuning.tensors import Correction
from dynquant.exporters.tuning.training import TuneOptions, tune
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.scale_fields import num_scales, with_scales
from dynquant.inputs.text import pack_windows, read_text
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.presets import preset_types
from dynquant.running.live_weights import LiveWeights
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import SILENT, ignore_progress
from tests.helpers.commands import refused, succeed
from tests.helpers.exports import export_gguf
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY

QUICK = ("llama-rope3", "mixtral", "qwen2-moe-tied", "qwen3-moe", "gemma3-period-3", "deepseek-v3-yarn")


@pytest.mark.parametrize("family", represented_by(QUICK, sorted(TINY)))
def test_every_tensor_finds_its_place_in_the_running_model(family, tiny_text):
    """Written with zeros and then with the checkpoint's own values, through permutations, splits and shifted norms."""
    model = open_model(tiny_text(family))
    hf_model = load_hf(model)
    tokens = torch.arange(1, 40).unsqueeze(0)
    with torch.no_grad():
        expected = hf_model(input_ids=tokens).logits
        live = LiveWeights(model, hf_model)
        matrices = {name for name in model.source.names() if len(model.source.info(name).shape) > 1}
        tied_copy = {"output.weight"} if family == "qwen2-moe-tied" else set()
        assert matrices - tied_copy <= set(live.names())
        for name in live.names():
            assert torch.equal(live.read(name).reshape(-1), model.source.load(name).reshape(-1)), name
            live.write(name, torch.zeros_like(model.source.load(name)))
        for name in live.names():
            live.write(name, model.source.load(name))
        assert torch.equal(hf_model(input_ids=tokens).logits, expected)


@pytest.fixture(scope="module")
def windows(moe_model):
    tokenizer = load_tokenizer(moe_model)
    text = read_text(None, max_tokens=4096)
    return pack_windows(text, tokenizer, window=128, max_tokens=4096)


@pytest.fixture(scope="module")
def crushed(moe_model, tmp_path_factory) -> Path:
    """Experts that ggml made ternary, by their largest weights: damage enough for a short run to mend some of it."""
    path = tmp_path_factory.mktemp("crushed") / "ternary.gguf"
    plan = plan_from_types(moe_model, preset_types("experts-tq2_0", moe_model), recipe="preset experts-tq2_0")
    export_gguf(moe_model, plan, None, path, encoder=load_encoder("ggml"))
    return path


def opened(model, path) -> QuantizedGGUF:
    return QuantizedGGUF(GGUFSource(path), model)


OPTIONS = TuneOptions(tokens=3072, step_tokens=256, held_out_tokens=640, parts=TUNABLE_PARTS)


@pytest.fixture(scope="module")
def tuned(moe_model, crushed, windows):
    return tune(moe_model, load_hf(moe_model), opened(moe_model, crushed), windows, OPTIONS)


def test_kl_falls_on_windows_that_decided_nothing(tuned):
    assert 0 < tuned.after.kl < 0.97 * tuned.before.kl
    assert tuned.after.agreement > tuned.before.agreement
    assert tuned.tokens == 3072 and tuned.held_tokens == 640
    assert tuned.ended == "all text was used"


def test_tokens_that_go_to_other_experts_become_fewer(tuned):
    assert 0 < tuned.after.rerouted < tuned.before.rerouted < 1


def test_only_what_has_no_codes_changes(moe_model, crushed, tuned):
    source = GGUFSource(crushed)
    roles = {role_of(name) for name in tuned.replacements}
    assert roles >= {Role.NORM, Role.ROUTER, Role.EXPERT_DOWN}
    assert "blk.2.exp_probs_b.bias" in tuned.replacements
    for name, packed in tuned.replacements.items():
        stored = source.info(name).dtype
        if not num_scales(stored):
            assert role_of(name) in (Role.NORM, Role.ROUTER)
            assert stored == "F32" and packed.numel() == 4 * source.info(name).numel
            continue
        layout, before = QUANT_TYPES[stored], source.load_packed(name)
        zeros = torch.zeros(before.numel() // layout.block_bytes, num_scales(stored))
        codes = [with_scales(stored, p.reshape(-1, layout.block_bytes), zeros) for p in (before, packed)]
        assert torch.equal(*codes), name


def test_the_patched_file_has_the_new_bytes_and_nothing_else(crushed, tuned, tmp_path):
    source, path = GGUFSource(crushed), tmp_path / "tuned.gguf"
    assert write_patched(source, path, tuned.replacements, encoder="ggml+tune") == [path]
    assert path.stat().st_size == crushed.stat().st_size
    written = GGUFSource(path)
    for name in source.names():
        expected = tuned.replacements.get(name, source.load_packed(name))
        assert torch.equal(written.load_packed(name).reshape(-1), expected.reshape(-1)), name
    keys = {field.key: field.value for field in written.metadata}
    assert keys.pop("dynquant.encoder").strip() == "ggml+tune"
    before = {field.key: field.value for field in source.metadata}
    assert keys == {key: value for key, value in before.items() if key != "dynquant.encoder"}


def test_written_text_and_steps_grow_with_the_given_text():
    given = torch.zeros(256, 512, dtype=torch.int64)
    options = ClosingPassOptions()
    cpu, gpu = (tune_options(options, given, device) for device in ("cpu", "cuda"))
    assert (cpu.sampled_tokens, gpu.sampled_tokens) == (0, 3 * given.numel())
    assert tune_options(replace(options, tune_sampled=7), given, "cuda").sampled_tokens == 7
    short, long = (training._split(given, given.repeat(times, 1), cpu).train for times in (0, 3))
    assert max(len(windows) for _, windows in short) * 512 == 1024
    assert max(len(windows) for _, windows in long) * 512 == 4096


SHORT = replace(OPTIONS, tokens=512, held_out_tokens=256)


@pytest.mark.nightly
def test_the_same_run_gives_the_same_bytes(moe_model, crushed, windows):
    """With text that the original writes, which is held out in part, and with routers alone."""
    options = replace(SHORT, tokens=256, held_out_tokens=256, sampled_tokens=240, parts=("routers",))
    short = windows[:, :48]
    first, again = (tune(moe_model, load_hf(moe_model), opened(moe_model, crushed), short, options) for _ in range(2))
    assert first.before.kls.keys() == {"given text", "text that the original wrote"}
    assert first.before == again.before and first.after == again.after
    assert {role_of(name) for name in first.replacements} <= {Role.ROUTER}
    assert all(torch.equal(again.replacements[name], packed) for name, packed in first.replacements.items())


def test_a_pass_that_does_not_help_changes_nothing(moe_model, crushed, windows):
    reckless = replace(SHORT, scale_rate=30.0, norm_rate=30.0, router_rate=30.0)
    result = tune(moe_model, load_hf(moe_model), opened(moe_model, crushed), windows, reckless)
    assert not result.replacements and not result.after.kl < result.before.kl


def test_steps_that_go_too_far_are_taken_back_in_part(moe_model, crushed, windows):
    record, options = RunRecord(), replace(SHORT, scale_rate=0.6, norm_rate=0.24)
    file = opened(moe_model, crushed)
    result = tune(moe_model, load_hf(moe_model), file, windows, options, progress=record.report)
    assert result.fraction < 1
    assert record.stages["tune"].amount == result.tokens > 0


def test_a_part_that_the_file_lacks_is_not_trained(moe_model, crushed, windows):
    totals = set()
    options, hear = replace(SHORT, parts=("biases",)), lambda _stage, _done, total, **_: totals.add(total)
    result = tune(moe_model, load_hf(moe_model), opened(moe_model, crushed), windows, options, progress=hear)
    assert not result.replacements and result.tokens == 0 and "none of the parts" in result.ended
    assert totals == {128, 256}, "text that would be trained on was run all the same"
    with pytest.raises(OptionError, match="--tune-parts codes is not known; give some of scales, norms, biases, ro"):
        ClosingPassOptions(tune_parts=("codes",))


def test_routers_stay_unless_they_are_asked_for():
    """Training them made models of experts worse on text that was held out."""
    assert ClosingPassOptions().tune_parts == TuneOptions().parts == ("scales", "norms", "biases")


def test_training_ends_when_the_time_is_over(moe_model, crushed, windows):
    file, options = opened(moe_model, crushed), replace(OPTIONS, minutes=0.001)
    result = tune(moe_model, load_hf(moe_model), file, windows, options)
    assert result.ended == "time was over" and result.tokens == result.held_tokens == OPTIONS.step_tokens


@pytest.mark.nightly
def test_training_ends_when_the_held_out_kl_stops_falling(moe_model, crushed, windows, monkeypatch):
    """Looked at after 2, 3 and 5 steps."""
    rising = iter(range(100))
    monkeypatch.setattr("dynquant.exporters.tuning.training._FULL_RATE_STEPS", 2)
    monkeypatch.setattr("dynquant.exporters.tuning.training._Tuning._placed", lambda *_: float(next(rising)))
    options = replace(OPTIONS, step_tokens=128, held_out_tokens=256, patience=2)
    result = tune(moe_model, load_hf(moe_model), opened(moe_model, crushed), windows, options)
    assert result.ended == "the held-out KL stopped falling" and result.tokens == 5 * 128 and result.fraction == 0.25


def test_a_little_gain_is_not_worth_the_rest_of_the_way(moe_model, monkeypatch):
    kls = iter([1.0, 0.7, 0.5, 0.42, 0.45])  # at the start and at each quarter of the way
    monkeypatch.setattr("dynquant.exporters.tuning.training._Tuning._placed", lambda *_: next(kls))
    tuning = training._Tuning(load_hf(moe_model), {}, SHORT, ignore_progress, None)
    assert tuning.move_to_best_fraction([], [], []) == 0.5


def test_a_correction_lowers_the_scores_of_experts_that_get_too_many_tokens(moe_model, crushed):
    hf_model, file = load_hf(moe_model), opened(moe_model, crushed)
    live, routes = LiveWeights(moe_model, hf_model), {2: torch.tensor([[0, 1], [0, 2], [0, 3]])}
    correction = Correction(live, file, "blk.2.exp_probs_b.bias", 1.0, routes)
    correction.expected = {2: torch.tensor([[4, 1], [0, 2], [4, 3]])}
    correction.pull_gradient()
    assert torch.equal(correction.parameter.grad.sign(), torch.tensor([1.0, 0, 0, 0, -1, 0, 0, 0]))


@pytest.mark.gpu
def test_kl_falls_on_a_gpu_too(moe_model, crushed, windows, tuned, cuda):
    hf_model = load_hf(moe_model, dtype=torch.float32, device=str(cuda))
    found = tune(moe_model, hf_model, opened(moe_model, crushed), windows, OPTIONS)
    assert found.before.kl == pytest.approx(tuned.before.kl, rel=5e-3)  # products of the model are in TF32
    assert found.after.kl == pytest.approx(tuned.after.kl, rel=2e-2)


def test_too_little_text_is_refused(moe_model, crushed, windows):
    with pytest.raises(StatsError, match=r"needs at least 5 windows of 128 tokens, but the text has 3"):
        tune(moe_model, load_hf(moe_model), opened(moe_model, crushed), windows[:3], OPTIONS)


def test_what_cannot_run_the_original_is_refused_before_calibration(small_moe, tmp_path):
    how = {"model": str(small_moe), "output": tmp_path / "model.gguf", "preset": "uniform-q4_k"}
    for options, reason in (
        (
            ExportOptions(**how, encoder="ggml", tune=600),
            r"The closing pass \(--tune 600\) cannot run: it goes with --encoder dynquant\. Give --tune 0 to go",
        ),
        (
            ExportOptions(**how, asymmetric=600, calibration=CalibrationOptions(hessians="none")),
            r"no second moments, .*\. Leave out --asymmetric to go without\.$",
        ),
        (
            ExportOptions(**how, tune=600, asymmetric=300, calibration=CalibrationOptions(hessians="none")),
            r"^The closing pass \(--tune 600\) and asymmetric calibration \(--asymmetric 300\) cannot run: there are "
            r"no .*\. Give --tune 0 and leave out --asymmetric to go without\.$",
        ),
    ):
        with pytest.raises(ExportError, match=reason):
            export(options)
    assert not any(tmp_path.iterdir())


@pytest.fixture(scope="module")
def short(moe_model, windows, tmp_path_factory) -> Path:
    """Text of four windows and a half: calibration holds one back."""
    path = tmp_path_factory.mktemp("short") / "short.txt"
    path.write_text(load_tokenizer(moe_model).decode(windows.flatten()[: 9 * 256], skip_special_tokens=True))
    return path


@pytest.mark.parametrize(
    "words",
    [
        "export {m} --preset uniform-q4_k --tune 600 --calibration {s} -o {t}/m.gguf",
        "export {m} --preset uniform-q4_k -f safetensors --tune 600 --calibration {s} -o {t}/m",
        "export {m} --preset uniform-w4a16 -f compressed-tensors --tune 600 --calibration {s} -o {t}/m",
        "export {m} --preset uniform-q4_k --tune 600 --tokens 2k -o {t}/new/m.gguf",
        "export {m} --preset uniform-q4_k --tune 600 --tokens 0 --sampled-tokens 2k -o {t}/m.gguf",
        "compare-encoders {m} --presets uniform-q4_k --calibration {s} --text {s} -o {t}/c",
        "release {m} --bpw 4.5 --tune 600 --calibration {s} --text {s} -o {t}/r",
    ],
)
def test_text_that_is_too_short_is_refused_before_calibration(words, small_moe, short, tmp_path, monkeypatch):
    def calibrate(*_: object, **__: object) -> None:
        raise AssertionError("it calibrates")

    monkeypatch.setattr("dynquant.calibration.stage.run_calibration", calibrate)
    said = refused(*(word.format(m=small_moe, s=short, t=tmp_path) for word in words.split()))
    assert "takes 5 windows of 512 tokens beside those that calibration holds back, and " in said
    assert "gives 3. Calibrate on more text, or give --tune 0" in said
    assert not any(tmp_path.iterdir())


def test_statistics_of_too_few_windows_are_refused_before_anything_is_written(small_moe, short, tmp_path):
    stats = tmp_path / "stats.safetensors"
    succeed("calibrate", small_moe, "--calibration", short, "-o", stats)
    before = {*tmp_path.iterdir()}
    how = {"preset": "uniform-q4_k", "stats": stats, "tune": 600}
    for more in ({}, {"asymmetric": 512}):
        with pytest.raises(ExportError, match=r"calibration had 3\. Calibrate on more text, or give --tune 0 to"):
            export(ExportOptions(model=str(small_moe), output=tmp_path / "new" / "m.gguf", **how, **more))
        assert {*tmp_path.iterdir()} == before


def test_a_finished_file_is_not_tuned_on_too_little_text(crushed, small_moe, short, tmp_path, monkeypatch):
    monkeypatch.setattr("dynquant.exporters.stage.tune_file", None)
    command = ("tune", crushed, "--reference", small_moe, "-o", tmp_path / "m.gguf")
    for options, words in (
        (("--calibration", short), "takes 5 windows of 512 tokens, and short.txt gives 4"),
        (("--tokens", "512", "--window", "8k"), "takes 5 windows of 8192 tokens, and dynquant-mix-2 gives 2"),
    ):
        said = refused(*command, *options)
        assert f"{words}. Give a longer --calibration, a smaller --window, or more --tokens." in said
        assert not any(tmp_path.iterdir())


def test_a_release_whose_files_cannot_be_tuned_is_refused_before_calibration(small_moe, tmp_path):
    said = refused("release", small_moe, "--bpw", "4.5", "--tune", "600", "--encoder", "ggml", "-o", tmp_path / "r")
    assert "cannot run: it goes with --encoder dynquant. Give --tune 0" in said and not any(tmp_path.iterdir())


def test_a_calibration_of_few_windows_is_refused_before_anything_is_encoded(moe_model, windows):
    moments = SecondMoments(StatsProvenance(fingerprint="f", text_hash="0", text_name="t"), windows[:3])
    encoding = Encoding(model=moe_model, plan=None, encoder=load_encoder("dynquant", "cpu"), moments=moments)
    with pytest.raises(ExportError, match=r"calibration had 3\. Calibrate on more text, or give --tune 0 to"):
        closing_pass_of(encoding, 600, ClosingPassOptions())
    assert closing_pass_of(encoding, None, ClosingPassOptions()) is None


def test_weights_of_a_gguf_original_are_found(tiny_text, tmp_path):
    """transformers undoes the order in which llama.cpp stores the rows of rotary heads."""
    checkpoint = open_model(tiny_text("llama"))
    path = tmp_path / "llama.gguf"
    plan = plan_from_types(checkpoint, preset_types("f32", checkpoint), recipe="f32")
    export_gguf(checkpoint, plan, None, path, encoder=load_encoder("ggml"))
    original = open_model(path)
    live = LiveWeights(original, load_hf(original))
    assert {name for name in original.source.names() if name.endswith("weight")} <= set(live.names())
    for name in live.names():
        assert torch.equal(live.read(name).reshape(-1), original.source.load(name).reshape(-1)), name
        live.write(name, 2 * original.source.load(name))
        assert torch.equal(live.read(name).reshape(-1), 2 * original.source.load(name).reshape(-1)), name


def test_a_gguf_that_is_not_what_runs_is_refused(crushed, moe_model):
    with pytest.raises(CheckpointError, match="in an order that dynquant does not know"):
        LiveWeights(open_model(crushed), load_hf(moe_model))


def test_models_beyond_the_memory_are_not_tuned_unasked(moe_model, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)  # a GPU that --device cpu leaves alone
    assert too_large_to_tune(moe_model, "cpu") is None
    monkeypatch.setattr("dynquant.exporters.closing_pass.BYTES_PER_WEIGHT", 10**6)
    assert "this machine has" in too_large_to_tune(moe_model, "cpu")


def test_no_file_is_left_when_the_disk_is_full(crushed, tuned, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dynquant.exporters.gguf.os.fsync", full)
    with pytest.raises(WriteError, match="could not be written"):
        write_patched(GGUFSource(crushed), tmp_path / "tuned.gguf", tuned.replacements, encoder="x")
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_known_before_a_file_is_tuned(crushed, moe_model, windows, tmp_path, monkeypatch):
    monkeypatch.setattr("dynquant.exporters.closing_pass.load_hf", lambda *_, **__: pytest.fail("it runs the model"))
    size = crushed.stat().st_size
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9 - size, size - 1))
    with pytest.raises(WriteError, match=rf"{size:,} bytes are still .*, but only {size - 1:,} are free"):
        tune_file(moe_model, crushed, windows, OPTIONS, tmp_path / "new" / "m.gguf", SILENT, encoder="ggml")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", ["qwen3-moe", "llama"])
def test_a_file_of_another_model_is_not_tuned(crushed, tiny_text, tmp_path, family):
    """Once a RuntimeError about sizes of PyTorch tensors, after loading the reference."""
    with pytest.raises(ExportError, match=r"is not of .*`.*` is \[.*\] and \[.*as --reference"):  # no fingerprint
        opened(open_model(tiny_text(family)), crushed).check_original()
    message = refused("tune", crushed, "--reference", tiny_text(family), "-o", tmp_path / "tuned.gguf")
    assert "--reference" in message and not list(tmp_path.iterdir())


def test_a_file_is_of_its_own_model(crushed, moe_model):
    opened(moe_model, crushed).check_original()
