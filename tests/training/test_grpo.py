"""The reinforcement-learning example on the bundled MoE, packed: the reward rises, and the base stays as it is."""

import pytest
import torch

pytest.importorskip("trl", reason="trl is not installed")
from dynquant.packed.layers import PackedModule
from tests.examples.grpo_answers import answer_reward, format_reward, make_trainer, questions, rewards
from tests.helpers.representatives import represented_by


def test_rewards_can_be_checked_by_hand():
    answers = [" B", "B\n", " B\n\nWhich", " because", "", " AB"]
    assert format_reward(answers) == [1.0, 1.0, 0.25, 0.0, 0.0, 0.25]
    assert answer_reward(answers, answer=["B", "A", "B", "B", "B", "A"]) == [1.0, 0.0, 1.0, 0.0, 0.0, 1.0]
    rows = questions(0, 3)
    assert all(row["prompt"].endswith("\nAnswer:") and row["answer"] in "ABCD" for row in rows)


@pytest.mark.nightly
@pytest.mark.parametrize("num_questions", represented_by((1,), (1, 4)))
def test_the_format_reward_rises(num_questions, packed_moe, tmp_path):
    trainer = make_trainer(packed_moe.directory, tmp_path, steps=7, num_questions=num_questions)
    before = _packed_bytes(trainer.model)
    trainer.train()
    curve = [form for _, form, _ in rewards(trainer.state.log_history)]
    assert len(curve) == 7
    assert sum(curve[-2:]) / 2 > curve[0] + 0.3
    after = _packed_bytes(trainer.model)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.nightly
def test_beta_holds_the_adapter_to_the_base(packed_moe, tmp_path):
    """The KL to the base, which is the same model with its adapter off, is zero before the first step and then not."""
    trainer = make_trainer(packed_moe.directory, tmp_path, steps=2, num_questions=2, beta=0.1)
    trainer.train()
    kl = [entry["kl"] for entry in trainer.state.log_history if "kl" in entry]
    assert len(kl) == 2 and abs(kl[0]) < 1e-5 < kl[1]


def _packed_bytes(model) -> dict[str, torch.Tensor]:
    return {
        f"{path}.{name}": getattr(module, name).detach().clone()
        for path, module in model.named_modules()
        if isinstance(module, PackedModule)
        for name in module.packed_names
    }
