"""Streamed models: the same statistics, sensitivities and plans with one decoder layer in memory, and after a kill."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from dynquant.analysis.outliers.super_weights import Criteria, find_super_weights
from dynquant.analysis.sensitivity.closed_form import output_sensitivity, streamed_sensitivity
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.run import StatisticsOptions, provenance_of, text_inputs
from dynquant.calibration.stage import run_calibration, streaming_limit
from dynquant.calibration.streamed import StreamingOptions, calibrate_streamed
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.safetensors_source import StoredValues
from dynquant.errors import CheckpointError, StatsError
from dynquant.families.open import open_model
from dynquant.running.load import load_hf
from dynquant.running.stored_experts import StoredExperts
from dynquant.running.streaming.layer_stream import LayerStream
from dynquant.running.streaming.staged_passes import HiddenStates, StagedPasses
from dynquant.running.streaming.stream_memory import Workload, fit_within
from dynquant.running.weight_inputs import weight_inputs
from dynquant.session import Session, ignore_progress
from tests.helpers.calibrating import calibrate
from tests.helpers.commands import run
from tests.helpers.representatives import represented_by
from tests.helpers.tiny_models import TINY, save_tiny

OPTIONS = {"tokens": 450, "window": 64}
QUICK = ("llama", "qwen3-moe", "gemma3-period-3")


@pytest.fixture(scope="module")
def whole(moe_model: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Files of a calibration that loaded the model whole."""
    return calibrated_whole(moe_model, tmp_path_factory.mktemp("whole"), "two-sided")


def calibrated_whole(model: Model, directory: Path, hessians: str, **options) -> Path:
    found = calibrate(model, options=StatisticsOptions(hessians), **OPTIONS, **options)
    found.stats.save(directory / "stats.safetensors")
    if found.moments is not None:
        found.moments.save(directory / "hessians.safetensors")
    return directory


def streamed(model: Model, directory: Path, hessians: str, *, batch_size=4, progress=ignore_progress, **options):
    inputs = text_inputs(model, None, batch_size=batch_size, **OPTIONS)
    provenance = provenance_of(model, inputs, tokens=OPTIONS["tokens"], seed=0)
    streaming = StreamingOptions(**options)
    output = directory / "stats.safetensors"
    return calibrate_streamed(model, inputs, provenance, output, StatisticsOptions(hessians), streaming, progress)


def same_files(first: Path, second: Path) -> bool:
    return all(
        (first / name).read_bytes() == (second / name).read_bytes()
        for name in ("stats.safetensors", "hessians.safetensors")
    )


def stopping_after(stages: int) -> Callable[..., None]:
    def progress(_stage: str, done: int, _total: int, **_where: object) -> None:
        if done == stages:
            raise KeyboardInterrupt

    return progress


@pytest.mark.parametrize("name", represented_by(QUICK, TINY))
def test_files_are_byte_equal_to_those_of_a_whole_model(name, tmp_path, tiny_text):
    model = open_model(tiny_text(name))
    (tmp_path / "whole").mkdir()
    streamed(model, tmp_path, "two-sided")
    assert same_files(calibrated_whole(model, tmp_path / "whole", "two-sided"), tmp_path)


def test_a_trained_moe_gives_the_same_files_within_the_least_memory(moe_model, whole, tmp_path):
    with pytest.raises(StatsError, match="is too small") as refused:
        streamed(moe_model, tmp_path, "two-sided", limit_bytes=10**8)
    assert not any(tmp_path.iterdir())
    least = float(str(refused.value).split("--max-memory ")[1].split("GB")[0])
    streamed(moe_model, tmp_path, "two-sided", limit_bytes=int(1e9 * (least + 0.1)))
    assert same_files(whole, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hessians.safetensors", "stats.safetensors"]


@pytest.mark.nightly
def test_second_moments_of_activations_are_the_same(moe_model, tmp_path):
    (tmp_path / "whole").mkdir()
    streamed(moe_model, tmp_path, "activations")
    assert same_files(calibrated_whole(moe_model, tmp_path / "whole", "activations"), tmp_path)


@pytest.mark.gpu
def test_a_gpu_streams_the_same_files_too(moe_model, cuda, tmp_path, monkeypatch):
    # A model that is loaded whole on a GPU is run in bfloat16 otherwise.
    monkeypatch.setattr("tests.helpers.calibrating.load_hf", partial(load_hf, dtype=torch.float32))
    (tmp_path / "whole").mkdir()
    streamed(moe_model, tmp_path, "activations", device=str(cuda), dtype=torch.float32)
    assert same_files(calibrated_whole(moe_model, tmp_path / "whole", "activations", device=str(cuda)), tmp_path)


@pytest.mark.parametrize(
    "stages", represented_by((3,), (3, 9))
)  # in the middle of the layers, and before the last one runs backward
def test_a_killed_run_goes_on(stages, moe_model, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        streamed(moe_model, tmp_path, "two-sided", progress=stopping_after(stages))
    assert streamed(moe_model, tmp_path, "two-sided").first_stage == stages
    assert same_files(whole, tmp_path)


def test_a_line_of_something_else_is_run_again(moe_model, whole, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        streamed(moe_model, tmp_path, "two-sided", spill=tmp_path / "spill", progress=stopping_after(4))
    (journal,) = (tmp_path / "spill").rglob("progress.jsonl")
    *lines, _ = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join([*lines, b'{"stage": 3, "aliases": 5, "moment_bytes": []}\n']))
    assert streamed(moe_model, tmp_path, "two-sided", spill=tmp_path / "spill").first_stage == 3
    assert same_files(whole, tmp_path)


def test_another_calibration_starts_anew(moe_model, tmp_path):
    with pytest.raises(KeyboardInterrupt):
        streamed(moe_model, tmp_path, "none", progress=stopping_after(3))
    assert streamed(moe_model, tmp_path, "none", batch_size=2).first_stage == 0


def test_one_stage_is_in_memory_at_a_time(moe_model):
    stream = LayerStream(moe_model)
    seen = []

    def loaded(_module, _args) -> None:
        there = [
            any(not p.is_meta for n, p in layer.named_parameters() if "experts." not in n) for layer in stream.layers
        ]
        held = [hasattr(layer.mlp, "experts") and "down_proj" in vars(layer.mlp.experts) for layer in stream.layers]
        embedding = stream.hf_model.get_input_embeddings().weight.untyped_storage().nbytes() < 100
        seen.append((there, held, embedding, stream.hf_model.lm_head.weight.is_meta))

    hooks = [layer.mlp.register_forward_pre_hook(loaded) for layer in stream.layers]
    with stream.running(), torch.no_grad():
        stream.hf_model(input_ids=torch.arange(20)[None])
    for hook in hooks:
        hook.remove()
    for number, (there, held, embedding, head) in enumerate(seen):
        assert there == [index == number for index in range(6)]
        assert held == [index == number and number > 0 for index in range(6)]  # the first layer is dense
        assert embedding and head
    held = [n for n, p in stream.hf_model.named_parameters() if not p.is_meta and p.untyped_storage().nbytes() > 100]
    assert len(seen) == 6 and held == ["model.norm.weight"]


@pytest.mark.parametrize("keeps_experts, dtype", [(True, torch.bfloat16), (False, torch.float32)])
@pytest.mark.parametrize(
    "name",
    represented_by(("qwen2-moe-tied", "deepseek-v2-lite"), ("qwen2-moe-tied", "mixtral", "deepseek-v2-lite", "gemma3")),
)
def test_logits_are_bit_equal(name, keeps_experts, dtype, tiny_text):
    model = open_model(tiny_text(name))
    tokens = torch.randint(0, 8000, (2, 110), generator=torch.Generator().manual_seed(0))
    hf_model = load_hf(model, dtype=dtype)
    if hasattr(hf_model.config, "_experts_implementation"):
        hf_model.config._experts_implementation = "eager"
    stream = LayerStream(model, dtype=dtype, keeps_experts=keeps_experts)
    with stream.running(), torch.no_grad():
        assert torch.equal(stream.hf_model(input_ids=tokens).logits, hf_model(input_ids=tokens).logits)


@pytest.mark.parametrize("name", ["llama-tied", "qwen2-moe-tied", pytest.param("moe", marks=pytest.mark.nightly)])
def test_sensitivities_are_equal(name, moe_model, tiny_text, tmp_path):
    model = moe_model if name == "moe" else open_model(tiny_text(name))
    inputs = text_inputs(model, None, tokens=300, window=100, batch_size=2)
    (tmp_path / "states").mkdir()
    stream = LayerStream(model)
    with stream.running():
        found = streamed_sensitivity(
            StagedPasses(stream, inputs.windows.split(2), tmp_path / "states"),
            weight_inputs(model, stream.hf_model), seed=3,
        )  # fmt: skip
    whole = load_hf(model)
    assert found == output_sensitivity(whole, weight_inputs(model, whole), inputs, seed=3)
    assert not any((tmp_path / "states").iterdir())


@pytest.mark.gpu
def test_a_gpu_streams_sensitivities_too(moe_model, cuda, tmp_path):
    inputs = text_inputs(moe_model, None, tokens=300, window=100, batch_size=2)
    stream, whole = LayerStream(moe_model, device=str(cuda)), load_hf(moe_model, dtype=torch.float32, device=str(cuda))
    with stream.running():
        passes = StagedPasses(stream, inputs.windows.split(2), tmp_path)
        found, _ = streamed_sensitivity(passes, weight_inputs(moe_model, stream.hf_model), seed=3)
    expected, _ = output_sensitivity(whole, weight_inputs(moe_model, whole), inputs, seed=3)
    assert found == pytest.approx(expected, rel=1e-3)


def test_super_weights_are_ablated_in_a_stream(moe_model):
    windows = text_inputs(moe_model, None, tokens=128, window=128).windows
    low = {"criteria": Criteria(threshold=1.1, min_share=0.01, min_effect=1e-5, max_iterations=3)}
    stream = LayerStream(moe_model)
    with stream.running():
        found = find_super_weights(
            stream.hf_model, weight_inputs(moe_model, stream.hf_model), windows[0], zeroed=stream.zeroed, **low
        )
    assert len(found) == 3
    whole = load_hf(moe_model)
    assert found == find_super_weights(whole, weight_inputs(moe_model, whole), windows[0], **low)


@pytest.mark.parametrize("keeps_experts", [True, False])
def test_a_weight_of_an_expert_reads_as_zero(moe_model, keeps_experts):
    stream, hf_model, tokens = (
        LayerStream(moe_model, keeps_experts=keeps_experts),
        load_hf(moe_model),
        torch.arange(100)[None],
    )
    hf_model.set_experts_implementation("eager")
    weights = hf_model.model.layers[2].mlp.experts.down_proj.data[3]
    with stream.running(), torch.no_grad():
        before = stream.hf_model(input_ids=tokens).logits
        with stream.zeroed("model.layers.2.mlp.experts", 3, 5, 7) as value:
            zeroed = stream.hf_model(input_ids=tokens).logits
        assert value == float(weights[5, 7])
        weights[5, 7] = 0
        assert torch.equal(zeroed, hf_model(input_ids=tokens).logits) and not torch.equal(zeroed, before)
        assert torch.equal(stream.hf_model(input_ids=tokens).logits, before)


def test_reading_ahead_and_experts_are_given_up_for_memory(small_moe, tmp_path, monkeypatch):
    monkeypatch.setattr("dynquant.running.streaming.stream_memory.resident_memory", lambda: 10**8)
    directory = save_tiny("qwen3-moe", tmp_path / "model", small_moe, moe_intermediate_size=2048)
    stream, work = LayerStream(open_model(directory)), Workload(64)
    with pytest.raises(StatsError, match=r"--max-memory \d+\.\dGB") as refused:
        fit_within(stream, 1, work)
    least = int(str(refused.value).split("model takes ")[1].split(" ")[0].replace(",", ""))
    chosen = []
    for limit in range(least, least + 2 * 10**8, 10**7):
        fit_within(stream, limit, work)
        chosen.append((stream.keeps_experts, stream.reads_ahead))
    assert list(dict.fromkeys(chosen)) == [(False, False), (False, True), (True, False), (True, True)]


_PRODUCTS = """
import torch
from torch.nn import functional
from dynquant.running.streaming.stream_memory import resident_memory
from dynquant.running.stored_experts import StoredExperts
from dynquant.checkpoints.safetensors_source import StoredValues
from dynquant.running.weight_inputs import weight_inputs

kept = StoredValues(torch.zeros(64, 2048, 1024, dtype=torch.bfloat16))
experts = StoredExperts((64, 2048, 1024), None, torch.empty(2048 * 1024), (kept,))
x = torch.zeros(64, 1024, requires_grad=True)
before, outputs = resident_memory(), []
for expert in range(64):
    product = experts.product(x.clone(), expert)
    outputs.append(functional.silu(product) * product)
print(resident_memory() - before)
"""


@pytest.mark.nightly
def test_matrices_of_experts_leave_no_holes_among_what_a_backward_pass_keeps():
    done = subprocess.run([sys.executable, "-c", _PRODUCTS], capture_output=True, text=True, check=True, cwd="/")
    matrix, outputs = 4 * 2048 * 1024, 3 * 64 * 64 * 4 * 2048
    assert int(done.stdout) < outputs + 8 * matrix  # 64 matrices lay there once


def test_a_matrix_of_an_expert_outlives_the_next_product():
    values = torch.arange(24, dtype=torch.bfloat16).view(2, 3, 4)
    experts = StoredExperts((2, 3, 4), None, torch.empty(12), (StoredValues(values),))
    first, x = experts[0], torch.ones(1, 4)
    assert torch.equal(experts.product(x, 1), x @ values[1].float().T)
    assert torch.equal(first, values[0].float())


def test_hidden_states_need_space(tmp_path, monkeypatch):
    states = HiddenStates(tmp_path, "states", [(2, 8, 16)], torch.float32)
    states.check_space(3)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 3000))
    with pytest.raises(StatsError, match=r"3,072 bytes, but .* 3,000 free.*--spill"):
        states.check_space(3)


def test_a_gguf_file_cannot_be_streamed(packed_moe, tmp_path):
    model = open_model(packed_moe.gguf)
    with pytest.raises(CheckpointError, match=r"layer by layer.*leave out --max-memory"):
        LayerStream(model)


def test_what_fits_is_loaded_whole_and_the_rest_is_streamed(moe_model, monkeypatch):
    notes = []
    assert streaming_limit(moe_model, CalibrationOptions(), "cpu") is None
    assert streaming_limit(moe_model, CalibrationOptions(max_memory="8GB"), "cpu") == 8 * 10**9
    monkeypatch.setattr("dynquant.running.streaming.stream_memory.free_memory", lambda: 80 * 10**6)
    assert streaming_limit(moe_model, CalibrationOptions(), "cpu", Session(note=notes.append)) == 68 * 10**6
    assert "streamed layer by layer within 68.00 MB" in " ".join(notes)


@pytest.mark.nightly
def test_a_streamed_plan_is_that_of_a_whole_model(tiny_moe, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("The heart pumps blood through the arteries to all parts of the body. " * 40)
    plans = {}
    for name, extra in {"whole": (), "streamed": ("--max-memory", "8GB", "--spill", tmp_path / "spill")}.items():
        made = run("plan", tiny_moe, "--bpw", "5", "--types", "q4_0,q8_0", "--calibration", text, "--window", "128",
                   "--no-report", "-o", tmp_path / name, *extra)  # fmt: skip
        assert made.returncode == 0, made.stderr
        plans[name] = json.loads((tmp_path / name / "plan.json").read_text())
    assert plans["whole"] == plans["streamed"]
    refused = run("plan", tiny_moe, "--bpw", "5", "--select", "--max-memory", "8GB", "-o", tmp_path / "whole")
    assert refused.returncode == 1 and "Without --select, plans are priced by the closed form" in refused.stderr


@pytest.mark.nightly
def test_an_export_that_calibrates_keeps_the_limit_too(tiny_moe, tmp_path):
    made = [
        run("export", tiny_moe, "--preset", "uniform-iq2_xxs", "--encoder", "ggml", "--tune", "0", "--tokens", "1024",
            *more, "-o", tmp_path / f"{name}.gguf")
        for name, more in (("whole", ()), ("streamed", ("--max-memory", "6GB")))
    ]  # fmt: skip
    assert all(one.returncode == 0 for one in made), made[-1].stderr
    assert (tmp_path / "whole.gguf").read_bytes() == (tmp_path / "streamed.gguf").read_bytes()
    assert "layers" in made[1].stdout + made[1].stderr


def test_hidden_states_of_an_interrupted_run_go_when_a_run_without_a_limit_ends(moe_model, tmp_path):
    for folder in (tmp_path, tmp_path / "spill"):
        for name in (".s.safetensors.streaming", ".other.safetensors.streaming"):
            (folder / name).mkdir(parents=True)
            (folder / name / "states").write_text("of gigabytes")
            (folder / name / "progress.jsonl").write_text('{"identity": {}}\n')
    (tmp_path / ".s.hessians.safetensors.0123abcd.partial").write_text("a part")
    run_calibration(moe_model, CalibrationOptions(spill=tmp_path / "spill", **OPTIONS), tmp_path / "s.safetensors")
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"s.safetensors", "s.hessians.safetensors", "spill", ".other.safetensors.streaming"}
    # Another folder's output of that name may be on its way there.
    spilled = {path.name for path in (tmp_path / "spill").iterdir()}
    assert spilled == {".s.safetensors.streaming", ".other.safetensors.streaming"}


def test_a_limit_is_a_size(moe_model, tmp_path):
    run_calibration(
        moe_model, CalibrationOptions(max_memory="8GB", hessians="none", **OPTIONS), tmp_path / "s.safetensors"
    )
    assert [path.name for path in tmp_path.iterdir()] == ["s.safetensors"]
