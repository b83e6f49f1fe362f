"""Reinforcement learning on a packed model: a LoRA adapter learns to answer with one letter and stop.

    dynquant export dynquant/data/textbook-moe-16m --preset r1-iq1_s --encoder ggml --tune 0 -f safetensors -o packed
    python tests/examples/grpo_answers.py packed -o adapter

TRL's GRPOTrainer samples `num_generations` answers to each question, rewards each by two functions that can be checked
(is it a letter and nothing else? is it the right one?), and raises the probability of those that beat the mean of their
group. What differs from any other model is two lines: `add_adapter` puts the adapter on the packed weights, routed
experts included, and `use_packed_head` lets the trainer score tokens with a packed output head.

Settings that matter:

num_generations  answers in a group. The advantage of an answer is its reward less the group's mean, so a group of equal
                 rewards teaches nothing: with few answers, a format that the model hits once in ten tries is rarely
                 seen. Costs memory and time in proportion.
temperature      of sampling. Low values give equal answers, and again equal rewards; above 1 answers leave the
                 language. It must be the same for sampling and scoring: `use_packed_head` is told.
beta             weight of the KL to the base, which is the same model with its adapter off, so it takes no memory but
                 another forward pass. 0 learns fastest; raise it when answers degenerate into what the reward
                 functions happen to accept.
"""

import argparse
import json
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch

import dynquant  # noqa: F401  (tells transformers and PEFT what packed weights are)

LETTERS = "ABCD"


def format_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """1 for one letter and nothing else, 0.25 for a letter to begin with."""
    rewards = []
    for text in completions:
        answer = text.strip()
        rewards.append(1.0 if answer in LETTERS and len(answer) == 1 else 0.25 if answer[:1] in tuple(LETTERS) else 0.0)
    return rewards


def answer_reward(completions: Sequence[str], answer: Sequence[str], **_: Any) -> list[float]:
    """1 for beginning with the right letter."""
    return [float(text.strip()[:1] == right) for text, right in zip(completions, answer, strict=True)]


def questions(first: int, count: int) -> list[dict[str, str]]:
    """Prompts and right letters, from the questions that ship with dynquant."""
    file = resources.files("dynquant") / "data" / "demo_questions.jsonl"
    lines = file.read_text("utf-8").splitlines()[first : first + count]
    rows = []
    for line in map(json.loads, lines):
        choices = "\n".join(f"{letter}. {text}" for letter, text in zip(LETTERS, line["choices"], strict=True))
        rows.append({"prompt": f"{line['question']}\n{choices}\nAnswer:", "answer": LETTERS[line["answer"]]})
    return rows


def make_trainer(packed: Path, output: Path, *, steps: int, num_questions: int = 8, seed: int = 0, **changes: Any):
    """The trainer, ready to run; `changes` are settings of GRPOConfig."""
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import GRPOConfig, GRPOTrainer

    from dynquant.lora import add_adapter
    from dynquant.training.trl_head import use_packed_head

    on_cpu = not torch.cuda.is_available()
    dtype = torch.float32 if on_cpu else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(packed, dtype=dtype, device_map=None if on_cpu else "cuda")
    torch.manual_seed(seed)
    adapted = add_adapter(model, rank=16, alpha=32)
    settings = {
        "num_generations": 8, "temperature": 1.0, "beta": 0.0, "max_completion_length": 6,
        "per_device_train_batch_size": 8 * num_questions, "learning_rate": 1e-3, "lr_scheduler_type": "constant",
        "max_steps": steps, "logging_steps": 1, "save_strategy": "no", "report_to": "none", "seed": seed,
        "bf16": False, "use_cpu": on_cpu, "gradient_checkpointing": False, "disable_tqdm": True,
    } | changes  # fmt: skip
    config = GRPOConfig(str(output), **settings)
    trainer = GRPOTrainer(
        adapted, [format_reward, answer_reward], args=config,
        train_dataset=Dataset.from_list(questions(0, num_questions)),
        processing_class=AutoTokenizer.from_pretrained(packed),
    )  # fmt: skip
    use_packed_head(trainer, temperature=config.temperature)
    return trainer


def rewards(log: Sequence[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """(step, format reward, answer reward), means over the samples of a step."""
    names = [f"rewards/{function.__name__}/mean" for function in (format_reward, answer_reward)]
    return [(entry["step"], *(entry[name] for name in names)) for entry in log if names[0] in entry]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("packed", type=Path, help="directory of `dynquant export -f safetensors`")
    parser.add_argument("-o", "--output", type=Path, required=True, help="directory of the adapter")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--num-generations", type=int, default=8)
    parser.add_argument("--temperature", type=float, default=1.0)
    parser.add_argument("--beta", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    trainer = make_trainer(
        given.packed, given.output, steps=given.steps, seed=given.seed, num_generations=given.num_generations,
        temperature=given.temperature, beta=given.beta,
    )  # fmt: skip
    trainer.train()
    trainer.model.save_pretrained(str(given.output))
    print("step  format  answer")
    for step, form, right in rewards(trainer.state.log_history):
        print(f"{step:4d}  {form:6.3f}  {right:6.3f}")


if __name__ == "__main__":
    main()
