"""A GGUF file and the directory that it is given for: what they compute is compared, told and refused."""

import shutil
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file, save_file

from dynquant.checkpoints.model import Model
from dynquant.errors import CheckpointError, EvaluationError, OtherGraphError
from dynquant.evaluation.agreement import same_computation
from dynquant.evaluation.agreement.same_computation import SameComputation, check_computation, check_written
from dynquant.evaluation.llama_cpp_alone import separate_window_logits
from dynquant.families import open as families_open
from dynquant.families.open import open_model
from dynquant.session import Session
from tests.helpers.commands import run, succeed
from tests.helpers.edited_checkpoints import edited_config
from tests.helpers.tiny_models import llama_logits, write_f32


@pytest.fixture(scope="module")
def base(tiny_moe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An F32 GGUF of the tiny Qwen3-MoE, which llama.cpp runs with experts' weights that sum to 1."""
    return write_f32(open_model(tiny_moe), tmp_path_factory.mktemp("base") / "base.gguf")


@pytest.fixture(autouse=True)
def in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """A process of its own imports PyTorch first."""
    monkeypatch.setattr(same_computation, "separate_window_logits", lambda file, tokens, _: llama_logits(file, tokens))


def notes_on(directory: Path, file: Path, **options: object) -> tuple[SameComputation | None, list[str]]:
    notes: list[str] = []
    session = Session(note=notes.append, threads=1, device="cpu")
    return check_computation(open_model(directory, base_gguf=file), session, **options), notes


def test_a_file_of_the_same_computation_passes_silently(tiny_moe: Path, base: Path) -> None:
    compared, notes = notes_on(tiny_moe, base)
    assert compared is not None and compared.kl < 1e-9 and compared.rounding_kl == 0
    assert notes == []


def test_another_configuration_is_refused_with_its_cause(tiny_moe: Path, base: Path, tmp_path: Path) -> None:
    directory = edited_config(tiny_moe, tmp_path / "edited", lambda config: config.update(norm_topk_prob=False))
    with pytest.raises(CheckpointError, match=r"does not compute what edited .*norm_topk_prob is false.*--allow-diff"):
        notes_on(directory, base)
    compared, (note,) = notes_on(directory, base, allow_difference=True)
    assert compared is not None and compared.kl > 0.01
    assert f"mean KL is {compared.kl:.2g} nats" in note and "norm_topk_prob is false" in note


def test_small_differences_are_told(tiny_moe: Path, base: Path, tmp_path: Path) -> None:
    directory = edited_config(tiny_moe, tmp_path / "edited", lambda config: config.update(rms_norm_eps=1.2e-4))
    compared, (note,) = notes_on(directory, base)
    assert compared is not None and 1e-6 < compared.kl < 1e-3
    assert "Likely causes: a setting of config.json" in note


@pytest.mark.parametrize("type_name", ["bf16", "q8_0"])
def test_rounding_is_no_difference(type_name: str, tiny_moe: Path, tmp_path: Path) -> None:
    file = tmp_path / f"{type_name}.gguf"
    preset = type_name if type_name != "q8_0" else "uniform-q8_0"
    succeed("export", tiny_moe, "--preset", preset, "-o", file)
    compared, notes = notes_on(tiny_moe, file)
    assert compared is not None and compared.rounding_kl > 0 and compared.kl > 1e-9
    assert notes == []


def test_what_cannot_be_compared_is_told(tiny_moe: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(same_computation, "_main_type", lambda source: "Q4_K")
    compared, (note,) = notes_on(tiny_moe, base)
    assert compared is None and "was not compared" in note and "Q4_K" in note


def test_a_limit_of_memory_holds_for_the_comparison(tiny_moe: Path, base: Path) -> None:
    compared, (note,) = notes_on(tiny_moe, base, max_memory="1MB")
    assert compared is None and "was not compared" in note and "more than --max-memory 1MB" in note


def test_an_imported_imatrix_is_not_compared_and_the_model_is_opened_once(
    tiny_moe: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    output, imatrix = tmp_path / "stats.safetensors", tmp_path / "imatrix.gguf"
    model = ("calibrate", tiny_moe, "--base-gguf", base, "-o", output)
    succeed(*model, "--tokens", 512, "--hessians", "none", "--imatrix-out", imatrix)
    monkeypatch.setattr(same_computation, "compare", None)
    with patch.object(families_open, "open_model", wraps=open_model) as opened:
        assert "was not compared" not in succeed(*model, "--imatrix", imatrix)
    assert opened.call_count == 1


def test_plan_compares_once(tiny_moe: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory, plan = edited_config(tiny_moe, tmp_path / "edited"), tmp_path / "plan"
    arguments = (
        directory,
        "--base-gguf",
        base,
        "--preset",
        "f16",
        "--types",
        "q8_0",
        "--encoder",
        "ggml",
        "--tokens",
        512,
        "--no-report",
        "-o",
        plan,
    )
    succeed("plan", *arguments)
    assert SameComputation.model_validate_json((plan / "same_computation.json").read_bytes()).kl < 1e-9
    monkeypatch.setattr(same_computation, "compare", None)
    succeed("plan", *arguments)
    succeed("export", directory, "--base-gguf", base, "--plan", plan / "plan.json", "-o", tmp_path / "f16.gguf")


def test_a_comparison_is_remembered_with_both_sides_and_programs(
    tiny_moe: Path, base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared, _ = notes_on(tiny_moe, base)
    assert compared is not None
    compared.save(tmp_path / "same_computation.json")
    monkeypatch.setattr(same_computation, "compare", lambda *_, **__: anew)
    anew = compared.model_copy(update={"tokens": 1})
    assert notes_on(tiny_moe, base, folder=tmp_path) == (compared, [])
    other = tmp_path / "other"
    shutil.copytree(tiny_moe, other)
    weights = load_file(other / "model.safetensors")
    save_file({name: values + 1 for name, values in weights.items()}, other / "model.safetensors", {"format": "pt"})
    assert notes_on(other, base, folder=tmp_path) == (anew, [])
    monkeypatch.setattr(same_computation, "version", lambda package: "0")
    assert notes_on(tiny_moe, base, folder=tmp_path) == (anew, [])


def test_commands_refuse_before_they_measure(tiny_moe: Path, base: Path, tmp_path: Path) -> None:
    directory = edited_config(tiny_moe, tmp_path / "edited", lambda config: config.update(norm_topk_prob=False))
    output = tmp_path / "stats.safetensors"
    for command in (
        ("calibrate", directory, "--base-gguf", base, "-o", output),
        ("export", directory, "--base-gguf", base, "--preset", "f16", "-o", tmp_path / "out.gguf"),
    ):
        refused = run(*command)
        assert refused.returncode == 1 and "does not compute what edited computes" in refused.stderr
    assert not output.exists() and not (tmp_path / "out.gguf").exists()


@pytest.mark.nightly
def test_a_process_of_its_own_gives_logits_and_reasons(base: Path, tmp_path: Path) -> None:
    assert torch.equal(separate_window_logits(base, [5, 6, 7], 1), llama_logits(base, [5, 6, 7]))
    with pytest.raises(EvaluationError, match=r"^llama\.cpp cannot run it: .*none\.gguf"):
        separate_window_logits(tmp_path / "none.gguf", [5], 1)


def test_a_file_that_no_llama_cpp_loads_is_refused(tiny_moe: Path, base: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def ends(*_: object) -> None:
        raise OtherGraphError("llama.cpp cannot run it: wrong number of tensors; expected 34, got 28")

    monkeypatch.setattr(same_computation, "separate_window_logits", ends)
    with pytest.raises(CheckpointError, match=r"graph of `qwen3moe` has other tensors .*expected 34.*--allow-diff"):
        notes_on(tiny_moe, base)
    compared, (note,) = notes_on(tiny_moe, base, allow_difference=True)
    assert compared is None and "was not compared" in note


@pytest.fixture
def as_converted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes a model of a family pass for one that llama.cpp's converter describes."""
    monkeypatch.setattr(Model, "is_converted", True)


def test_what_the_converter_describes_is_compared_before_and_after(
    tiny_moe: Path, base: Path, as_converted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, notes = open_model(tiny_moe), []
    session = Session(note=notes.append, threads=1, device="cpu")
    compared = check_computation(model, session)
    assert notes == [] and compared is not None and compared.kl < 1e-9
    monkeypatch.setattr(same_computation, "_MOST_BYTES", 1)
    assert check_computation(model, session) is None
    assert "was not compared" in notes.pop() and not notes
    check_written(model, base, session)
    assert notes == []


def test_a_written_file_is_compared_with_its_own_weights(tiny_moe: Path, tmp_path: Path, as_converted: None) -> None:
    file = tmp_path / "few.gguf"
    succeed("export", tiny_moe, "--preset", "uniform-mxfp4", "--encoder", "ggml", "-o", file)
    check_written(open_model(tiny_moe), file, Session(threads=1, device="cpu"))
    edited = edited_config(tiny_moe, tmp_path / "edited", lambda config: config.update(norm_topk_prob=False))
    model = replace(open_model(tiny_moe), hf_directory=edited)
    with pytest.raises(CheckpointError, match=r"few\.gguf is written, but .* does not compute .* --allow-diff"):
        check_written(model, file, Session(threads=1, device="cpu"))
