"""The fine-tuning of `dynquant finetune`, on the float original with stock PEFT and TRL: what packing is compared with.

    python tests/examples/float_lora.py ORIGINAL --data d.jsonl --max-steps 40 --batch-size 16

Same lines held out, same batches, rates, rank and targets (all linear layers but the output head, and routed experts).
Prints the held-out loss before and after in nats per learned token, with intervals.
"""

import argparse
from pathlib import Path

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

from dynquant.inputs.chats import read_training_data
from dynquant.training.finetune import measure_adapter
from dynquant.training.options import TrainOptions
from dynquant.training.trainer import trainer_settings


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("original", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--max-steps", type=int, required=True)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--learning-rate", type=float, default=TrainOptions.learning_rate)
    parser.add_argument("--evaluations", type=int, default=TrainOptions.evaluations)
    given = parser.parse_args()
    options = TrainOptions(
        max_steps=given.max_steps, batch_size=given.batch_size, learning_rate=given.learning_rate,
        evaluations=given.evaluations, gradient_checkpointing=False,
    )  # fmt: skip
    train, held = read_training_data(given.data).split(0.1, seed=options.seed)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model = AutoModelForCausalLM.from_pretrained(given.original, dtype=dtype).to(device)
    directory = Path(f".{given.data.stem}.float")
    settings = trainer_settings(model, options, directory, num_examples=len(train.rows), device=device)
    settings |= {"eval_on_start": True}
    trainer = SFTTrainer(
        model, SFTConfig(**settings),
        train_dataset=Dataset.from_list(list(train.rows)), eval_dataset=Dataset.from_list(list(held.rows)),
        processing_class=AutoTokenizer.from_pretrained(given.original), peft_config=_config(model, options),
    )  # fmt: skip
    trainer.train()
    for change in measure_adapter(trainer.model, trainer.get_eval_dataloader(), lambda *_, **__: None):
        before, after = (f"{one.value:.4f} [{one.low:.4f}, {one.high:.4f}]" for one in (change.before, change.after))
        print(f"{change.name}: {before} to {after}")


def _config(model: nn.Module, options: TrainOptions) -> LoraConfig:
    head = model.get_output_embeddings()
    names = {path.rpartition(".")[2] for path, module in model.named_modules()
             if isinstance(module, nn.Linear) and module is not head}  # fmt: skip
    experts = [f"experts.{part}" for part in ("gate_up_proj", "down_proj")]
    in_experts = {"gate_proj", "up_proj", "down_proj"}  # PEFT takes these names for those of fused experts
    return LoraConfig(
        r=options.rank, lora_alpha=options.lora_alpha, target_modules=sorted(names - in_experts),
        target_parameters=[*experts, *(f"{name}.weight" for name in sorted(names & in_experts))],
        task_type="CAUSAL_LM",
    )  # fmt: skip


if __name__ == "__main__":
    main()
