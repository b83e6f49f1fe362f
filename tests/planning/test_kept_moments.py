"""Second moments of a plan folder: those with gradients stay for later plans, and plans made with others say so."""

import pytest

from dynquant.calibration import stage
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.second_moments import SecondMoments
from dynquant.families.open import open_model
from dynquant.options import typed_fields
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from tests.conftest import CALIBRATION_16M
from tests.helpers.commands import linked_copy, succeed


def relabelled(folder, kind):
    """Replace the second moments of a folder by ones of another kind, with the same sums."""
    path = folder / "hessians.safetensors"
    moments = SecondMoments.load(path)
    moments.kind = kind
    moments.save(path)


@pytest.mark.parametrize("asked, reused", [(False, True), (True, False)])
def test_what_select_measured_serves_a_plan_without_it_unless_other_moments_are_asked_for(
    calibrated_16m, small_moe, tmp_path, monkeypatch, asked, reused
):
    folder = linked_copy(calibrated_16m, tmp_path)
    relabelled(folder, "two-sided")
    as_before = dict(zip(("text", "tokens", "window"), CALIBRATION_16M[1::2], strict=True))
    with typed_fields({"hessians"} if asked else ()):
        options = CalibrationOptions(**as_before)
    monkeypatch.setattr(stage, "run_calibration", lambda *_, **__: stage.StatsFile(folder / "stats.safetensors"))
    notes = []
    stage.statistics_in(folder, open_model(small_moe), options, Session(note=notes.append))
    assert notes[0].startswith(
        "reusing" if reused else f"{folder / 'stats.safetensors'} was made with other --hessians"
    )


@pytest.mark.nightly
def test_a_plan_made_with_other_second_moments_is_exported_with_a_word(planned_16m, small_moe, tmp_path):
    folder = linked_copy(planned_16m, tmp_path / "plan")
    assert Plan.load(folder / "plan.json").hessians == "activations"
    arguments = ("export", small_moe, "--plan", folder / "plan.json", "--tune", 0, "-o")
    assert "second moments" not in succeed(*arguments, tmp_path / "same.gguf")
    relabelled(folder, "two-sided")
    said = succeed(*arguments, tmp_path / "other.gguf")
    assert "was made with activations second moments" in said and "those of two-sided" in said


def test_a_preset_for_vllm_knows_the_second_moments_of_its_folder(calibrated_16m, small_moe, tmp_path):
    """Else plans that stay beside it would be said to have lost theirs, and its export would not tell of others."""
    folder = linked_copy(calibrated_16m, tmp_path / "plan")
    succeed("plan", small_moe, "--for", "vllm", "--preset", "uniform-w4a16", *CALIBRATION_16M, "-o", folder)
    assert Plan.load(folder / "plan.json", target="vllm").hessians == "activations"
