"""The folder of a plan: the plan of another request stays there when a new one is written."""

import pytest

from dynquant.recipes.folder import save_plan
from dynquant.recipes.plan import Plan
from dynquant.session import Session
from tests.helpers.commands import succeed
from tests.helpers.tiny_gguf import tiny_model, tiny_plan


@pytest.fixture
def saved(tmp_path):
    """Save plans of these requests, one after the other, to one plan.json; returns what was said."""
    plan = tiny_plan(tiny_model())

    def save(*requests, **fields):
        said = []
        for request in requests:
            changed = plan.model_copy(update={"recipe": request, **fields})
            save_plan(changed, tmp_path / "plan.json", Session(note=said.append))
        return said

    return save


def in_folder(folder):
    return {path.name: Plan.load(path).recipe for path in folder.iterdir()}


def test_plans_of_other_requests_stay_under_their_names(saved, tmp_path):
    said = saved("bpw 2.5", "bpw 2.5", "fits 8, context 9", "bpw 2.5", "bpw 3")
    plans = {"plan.json": "bpw 3", "bpw-2.5.plan.json": "bpw 2.5", "fits-8-context-9.plan.json": "fits 8, context 9"}
    assert in_folder(tmp_path) == plans and len(said) == 3
    path, kept = tmp_path / "plan.json", tmp_path / "bpw-2.5.plan.json"
    assert said[0] == f"{path} was the plan of bpw 2.5, which is kept as {kept}; `export --plan` takes it as well"


def test_a_kept_plan_of_other_second_moments_is_not_told_to_be_as_good(saved):
    saved("bpw 2", hessians="two-sided")
    assert saved("bpw 3", hessians="activations")[0].endswith(
        "takes it as well, but encodes it with activations second moments instead of the two-sided ones that it was "
        "made with"
    )
    assert "no second moments instead" in saved("bpw 4", hessians=None)[0]
    assert saved("bpw 5", hessians="two-sided")[0].endswith("takes it as well"), "no moments were there to lose"


def test_no_plan_that_was_kept_is_replaced(saved, tmp_path):
    saved("bpw 2.5", "bpw 3")
    before = (tmp_path / "bpw-2.5.plan.json").read_bytes()
    assert "bpw-2.5-2.plan.json" in saved("bpw 2.5", "bpw 3", predicted_kl=0.5)[-1]
    assert (tmp_path / "bpw-2.5.plan.json").read_bytes() == before
    assert Plan.load(tmp_path / "bpw-2.5-2.plan.json").predicted_kl == 0.5


def test_all_plans_whose_statistics_were_replaced_are_told_once(saved, tmp_path):
    saved("bpw 1", stats_hash=None)  # needs none
    saved("bpw 2", "bpw 3", "bpw 4", stats_hash="0" * 64)
    kept, lost = saved("bpw 5", stats_hash="1" * 64)
    assert kept.endswith(f"kept as {tmp_path / 'bpw-4.plan.json'}"), "of no use, so nothing is said of its use"
    assert lost.startswith(f"bpw-2.plan.json, bpw-3.plan.json, bpw-4.plan.json in {tmp_path} were made from")
    assert not saved("bpw 5", stats_hash="1" * 64)
    assert not saved("bpw 5", stats_hash="2" * 64), "it is made anew, and the others were told"


def test_plans_whose_request_is_planned_again_do_not_hide_the_others(saved):
    saved("bpw 2", "bpw 3", stats_hash="0" * 64)
    (lost,) = saved("bpw 3", stats_hash="1" * 64)
    assert lost.startswith("bpw-2.plan.json in ") and "so it cannot be exported" in lost


def test_calibrating_anew_tells_of_all_plans_in_the_folder(saved, tiny_moe, tmp_path):
    saved("bpw 2", "bpw 3", stats_hash="0" * 64)
    again = ("calibrate", tiny_moe, "--tokens", 600, "--window", 64, "--hessians", "none", "-o")
    lost = f"bpw-2.plan.json, plan.json in {tmp_path} were made from the statistics that were there before"
    assert lost in succeed(*again, tmp_path / "stats.safetensors")
    assert "plan.json" not in succeed(*again, tmp_path / "stats.safetensors", "--seed", 1), "they were told"
    assert "plan.json" not in succeed(*again, tmp_path / "others.safetensors")


def test_plans_for_both_runtimes_and_of_long_requests_have_names(saved, tmp_path):
    saved("bpw 2", target="vllm")
    saved("bpw 2", f"bpw 2, coupled{' gate-up' * 50}", "floors")
    names = sorted(path.name for path in tmp_path.iterdir())
    assert "bpw-2-vllm.plan.json" in names and "bpw-2.plan.json" in names and max(map(len, names)) < 120


def test_what_is_no_plan_is_replaced(saved, tmp_path):
    (tmp_path / "plan.json").write_text('{"tool_version": 1}')
    assert not saved("bpw 2") and in_folder(tmp_path) == {"plan.json": "bpw 2"}
