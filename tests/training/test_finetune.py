"""Supervised fine-tuning of packed models by TRL, as a library call and as a command."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from dynquant.cli.terminal.record import RunRecord
from dynquant.errors import DataError, OptionError, TrainingError

pytest.importorskip("trl", reason="trl is not installed")
from contextlib import nullcontext

from dynquant.families.open import open_model
from dynquant.lora import add_adapter, load_adapter
from dynquant.session import Session, ignore_progress
from dynquant.training import base as packed_base
from dynquant.training import finetune as training
from dynquant.training.base import open_packed_model, open_tokenizer
from dynquant.training.options import FinetuneOptions, TrainOptions
from dynquant.training.trl_head import use_packed_head
from tests.helpers.commands import refused
from tests.helpers.exports import export_safetensors
from tests.helpers.packed_models import plan_of
from tests.helpers.tiny_gguf import GGML


def finetune(packed, data, output, options, *, device=None, progress=ignore_progress, **more):
    session = Session(device, stage=lambda kept: nullcontext(progress))
    return training.finetune(
        FinetuneOptions(packed=packed, data=data, output=output, training=options, **more), session
    )


OPTIONS = TrainOptions(rank=8, learning_rate=5e-3, max_steps=12, batch_size=16, evaluations=4)
SHORT = replace(OPTIONS, max_steps=4)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Path:
    """A format to learn: words as a bracketed list."""
    vocabulary = "river stone garden candle market bridge letter window harbor forest engine teacher silver mirror"
    vocabulary, lines = vocabulary.split(), []
    for i in range(80):
        words = [vocabulary[(i * 5 + j * (i % 3 + 1)) % len(vocabulary)] for j in range(3)]
        lines.append({"prompt": "Words: " + " ".join(words) + "\nList:", "completion": f" [{'] ['.join(words)}]"})
    path = tmp_path_factory.mktemp("data") / "lists.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path


@pytest.fixture(scope="module")
def tuned(crushed, lists, tmp_path_factory):
    output = tmp_path_factory.mktemp("tuned") / "adapter"
    weights = crushed.packed / "model.safetensors"
    before = hashlib.sha256(weights.read_bytes()).hexdigest()
    report = finetune(str(crushed.packed), lists, output, OPTIONS)
    assert hashlib.sha256(weights.read_bytes()).hexdigest() == before
    return output, report


def test_twelve_steps_lower_the_held_out_loss(tuned):
    output, report = tuned
    loss, perplexity, moved = report.changes
    assert loss.after.high < loss.before.low and perplexity.after.value < perplexity.before.value
    assert moved.before.value == 0 < moved.after.value
    assert (report.trained_examples, report.held_out_examples, report.steps) == (72, 8, 12)
    assert {"adapter_model.safetensors", "tokenizer.json", "training.json", "loss.png"} <= {
        file.name for file in output.iterdir()
    }


@pytest.fixture(scope="module")
def short(crushed, lists, tmp_path_factory):
    output = tmp_path_factory.mktemp("short") / "adapter"
    return output, finetune(str(crushed.packed), lists, output, SHORT)


@pytest.mark.nightly
def test_an_adapter_in_half_the_bytes_is_the_rounded_one(crushed, lists, short, tmp_path):
    output = tmp_path / "adapter"
    report = finetune(str(crushed.packed), lists, output, replace(SHORT, store="bfloat16"))
    whole, half = (load_file(path / "adapter_model.safetensors") for path in (short[0], output))
    assert {tensor.dtype for tensor in half.values()} == {torch.bfloat16}
    for name, tensor in whole.items():
        torch.testing.assert_close(half[name].float(), tensor, rtol=1e-2, atol=1e-4)
    assert report.changes[0].after.value == pytest.approx(short[1].changes[0].after.value, rel=0.01)
    model = load_adapter(open_packed_model(crushed.packed), output)
    assert {p.dtype for name, p in model.named_parameters() if "lora_" in name} == {torch.float32}
    with pytest.raises(OptionError, match="--store float8 is not known; give one of float32, bfloat16"):
        replace(OPTIONS, store="float8")


@pytest.mark.gpu
def test_training_on_a_gpu_lowers_the_held_out_loss(crushed, lists, cuda, tmp_path):
    report = finetune(str(crushed.packed), lists, tmp_path / "adapter", OPTIONS, device=str(cuda))
    assert report.changes[0].after.high < report.changes[0].before.low


def test_the_report_is_of_the_adapter_that_was_saved(crushed, lists, tuned):
    """Loss over the completions' tokens, as the saved adapter gives it on the same held-out lines."""
    from dynquant.inputs.chats import read_training_data

    output, report = tuned
    tokenizer = open_tokenizer(output)
    model = load_adapter(open_packed_model(crushed.packed), output)
    losses = []
    for row in read_training_data(lists).split(0.1, seed=0)[1].rows:
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor([tokenizer(row["prompt"] + row["completion"] + tokenizer.eos_token)["input_ids"]])
        with torch.no_grad():
            log_probs = model(input_ids=ids).logits[0].log_softmax(-1)
        losses += [-log_probs[i - 1, ids[0, i]] for i in range(len(prompt), ids.shape[1])]
    assert float(torch.stack(losses).mean()) == pytest.approx(report.changes[0].after.value, rel=1e-4)


@pytest.mark.nightly
def test_an_interrupted_run_goes_on_to_the_same_losses(crushed, lists, short, tmp_path):
    def interrupt(stage, done, total, **_):
        if stage == "train" and done == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        finetune(str(crushed.packed), lists, tmp_path / "adapter", SHORT, progress=interrupt)
    record = RunRecord()
    resumed = finetune(str(crushed.packed), lists, tmp_path / "adapter", SHORT, progress=record.report)
    train, measure = record.stages["train"], record.stages["measure"]
    assert (train.amount, train.done, train.total) == (2, 4, 4)
    assert measure.amount == measure.total > 0
    for found, expected in zip(resumed.history, short[1].history, strict=True):
        assert (found.step, found.train is None) == (expected.step, expected.train is None)
        assert (found.train or found.held_out) == pytest.approx(expected.train or expected.held_out, rel=1e-3)


def test_conversations_train_without_a_chat_template(crushed, tmp_path):
    chats = tmp_path / "chats.jsonl"
    turns = [[{"role": "user", "content": f"say {i}"}, {"role": "assistant", "content": f"{i}"}] for i in range(12)]
    chats.write_text("".join(json.dumps({"messages": turn}) + "\n" for turn in turns))
    short = TrainOptions(rank=4, learning_rate=5e-3, max_steps=2, batch_size=8, evaluations=1)
    report = finetune(str(crushed.packed), chats, tmp_path / "adapter", short)
    assert any("no chat template" in note for note in report.notes)
    saved = open_tokenizer(tmp_path / "adapter")
    text = saved.apply_chat_template(turns[0][:1], tokenize=False, add_generation_prompt=True)
    assert text == "user: say 0\n\nassistant: "


@pytest.mark.nightly  # tests/lora compares the gradients
def test_gradient_checkpointing_gives_the_same_losses(crushed, lists, short, tmp_path):
    checkpointed = finetune(str(crushed.packed), lists, tmp_path, replace(SHORT, gradient_checkpointing=True))
    for a, b in zip(checkpointed.history, short[1].history, strict=True):
        assert (a.train or a.held_out) == pytest.approx(b.train or b.held_out, rel=1e-3)


def test_a_packed_head_is_scored_like_trls_own(crushed):
    """The same float model through TRL's fused head and through ours, with gradients; and the packed one's logits."""
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    fields = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")
    ids = torch.randint(1, 8000, (2, 20), generator=torch.Generator().manual_seed(0))
    labels = ids.masked_fill(torch.arange(20) < 5, -100)
    model = AutoModelForCausalLM.from_pretrained(crushed.original, dtype=torch.float32)
    add_fused_lm_head(model, temperature=0.7, outputs=fields)
    found = []
    for ours in (False, True):
        if ours:
            use_packed_head(SimpleNamespace(model=model), temperature=0.7)
        model.zero_grad()
        output = model(input_ids=ids, labels=labels, fused_lm_head=True)
        output.loss.backward()
        found.append((output, model.model.embed_tokens.weight.grad.clone()))
    for name in ("loss", *fields):
        torch.testing.assert_close(getattr(found[0][0], name), getattr(found[1][0], name), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(found[0][1], found[1][1], atol=1e-5, rtol=1e-3)

    packed = add_adapter(open_packed_model(crushed.packed), rank=4)
    add_fused_lm_head(packed.get_base_model())
    use_packed_head(SimpleNamespace(model=packed))
    expected = packed(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(2, ids[:, 1:, None])[..., 0]
    output = packed(input_ids=ids, labels=labels, fused_lm_head=True)
    torch.testing.assert_close(output.log_probs[:, 4:], expected[:, 4:], atol=1e-4, rtol=1e-4)
    assert not output.log_probs[:, :4].any()


def test_the_balance_of_experts_is_trls_own(tiny_moe):
    from transformers import AutoModelForCausalLM
    from trl.trainer.utils import add_fused_lm_head

    model = AutoModelForCausalLM.from_pretrained(tiny_moe, dtype=torch.float32)
    model.config.output_router_logits, model.config.router_aux_loss_coef = True, 0.5
    add_fused_lm_head(model)
    ids = torch.randint(1, 8000, (2, 20), generator=torch.Generator().manual_seed(0))
    expected = model(input_ids=ids, labels=ids, fused_lm_head=True)
    use_packed_head(SimpleNamespace(model=model))
    found = model(input_ids=ids, labels=ids, fused_lm_head=True)
    assert found.aux_loss > 1
    torch.testing.assert_close((found.aux_loss, found.loss), (expected.aux_loss, expected.loss))


@pytest.mark.nightly
@pytest.mark.parametrize("name", ["qwen3-moe", "qwen2-moe", "mixtral"])
def test_experts_whose_configuration_has_a_balance_loss_train(name, lists, tiny_text, tmp_path):
    model = open_model(tiny_text(name))
    export_safetensors(model, plan_of(model, "Q4_0"), None, tmp_path / "packed", encoder=GGML)
    report = finetune(str(tmp_path / "packed"), lists, tmp_path / "adapter", SHORT)
    assert report.history[-1].held_out < report.history[0].held_out


def test_a_trainer_without_a_fused_head_is_refused(crushed):
    with pytest.raises(ValueError, match=r"no fused head of TRL"):
        use_packed_head(SimpleNamespace(model=open_packed_model(crushed.packed)))


def test_bad_input_is_one_paragraph(crushed, lists, tmp_path):
    broken = tmp_path / "broken.jsonl"
    broken.write_text('{"text": "a"}\n{"text": \n')
    paragraph = refused("finetune", crushed.packed, "--data", broken, "-o", tmp_path / "a")
    assert "broken.jsonl, line 2 is not JSON" in paragraph
    with pytest.raises(TrainingError, match=r"holds no packed weights.*dynquant export"):
        finetune(str(crushed.original), lists, tmp_path / "a", OPTIONS)
    with pytest.raises(TrainingError, match=r"--max-length 2000 is beyond the context of packed, 1024 tokens"):
        finetune(str(crushed.packed), lists, tmp_path / "a", OPTIONS, max_length=2000)
    assert not (tmp_path / "a").exists()


def test_a_missing_package_is_named(crushed, lists, tmp_path, monkeypatch):
    found = packed_base.find_spec
    monkeypatch.setattr(packed_base, "find_spec", lambda name: None if name == "trl" else found(name))
    with pytest.raises(TrainingError, match=r"needs the package `trl`.*pip install 'dynquant-toolchain\[train\]'"):
        finetune(str(crushed.packed), lists, tmp_path / "a", OPTIONS)


def test_prompts_that_leave_nothing_to_learn_are_left_out_or_refused(crushed, lists, tmp_path):
    with pytest.raises(DataError, match=r"All 72 training examples of lists\.jsonl have prompts of 4 tokens or more"):
        finetune(str(crushed.packed), lists, tmp_path / "a", OPTIONS, max_length=4)
    longer = tmp_path / "longer.jsonl"
    line = json.dumps({"prompt": "word " * 200, "completion": "x"})
    longer.write_text("\n".join([*lists.read_text().splitlines()[:12], line]))
    short = TrainOptions(rank=4, max_steps=1, batch_size=4, evaluations=1)
    report = finetune(str(crushed.packed), longer, tmp_path / "b", short, max_length=64)
    assert any(note.startswith("1 of 12 training examples have prompts of 64 tokens or more") for note in report.notes)
