"""The packed model that an adapter is trained on, from an exported directory or a GGUF file, and its tokenizer."""

from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from dynquant.checkpoints.gguf_source import is_gguf
from dynquant.errors import CheckpointError, TrainingError
from dynquant.evaluation.options import TRANSFORMERS
from dynquant.evaluation.runners import describe_model, load_model
from dynquant.families.common.config import quantization_of
from dynquant.packed.layers import PackedModule, choose_layout
from dynquant.registration import QUANT_METHOD
from dynquant.running.load import load_tokenizer
from dynquant.training.options import TrainOptions

if TYPE_CHECKING:
    from peft import PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def require_training_packages() -> None:
    """Raises TrainingError when a package of the extra `train` is missing."""
    for package in ("transformers", "peft", "trl", "accelerate", "datasets"):
        if find_spec(package) is None:
            raise TrainingError(
                f"Training adapters needs the package `{package}`, which is not installed. "
                "Run `pip install 'dynquant-toolchain[train]'`."
            )


def open_packed_model(path: Path, *, device: str = "cpu", original: Path | None = None) -> "PreTrainedModel":
    """Load a packed model for training: activations are float32 on a CPU, bfloat16 on a GPU.

    Args:
        path: resolved directory of `export -f safetensors`, or a GGUF file.
        original: the checkpoint that it was made from, which GGUF files of architectures without a family need.

    Raises:
        CheckpointError: it cannot be loaded.
        TrainingError: its weights are not packed.
    """
    dtype = torch.float32 if torch.device(device).type == "cpu" else torch.bfloat16
    model = load_model(path, dtype, base=original)
    if not any(isinstance(module, PackedModule) for module in model.modules()):
        raise _not_packed(path)
    model = model.to(device)
    choose_layout(model)
    model.config.use_cache = False
    return model


def open_with_adapter(path: Path, options: TrainOptions, *, device: str, original: Path | None = None) -> "PeftModel":
    """`open_packed_model` with the fresh adapter that `options` describe; `options.seed` decides it."""
    from dynquant.lora import add_adapter

    model = open_packed_model(path, device=device, original=original)
    torch.manual_seed(options.seed)
    return add_adapter(
        model, rank=options.rank, alpha=options.lora_alpha, experts=options.experts, rslora=options.rslora,
        llama_cpp=options.llama_cpp,
    )  # fmt: skip


def check_packed(path: Path) -> None:
    """Refuse a resolved model that cannot be packed, from its configuration alone.

    Raises:
        TrainingError: a directory that is no export of packed weights.
        CheckpointError: its config.json is missing or damaged.
    """
    if not is_gguf(path) and quantization_of(path).get("quant_method") != QUANT_METHOD:
        raise _not_packed(path)


def check_context(path: Path, tokens: int, option: str, original: Path | None) -> None:
    """Refuse sequences of `tokens`, as `option` asks for, beyond the context of a resolved model.

    Raises:
        CheckpointError: a GGUF file that cannot be loaded without its `original`, which is missing.
        TrainingError: naming both numbers.
    """
    context = describe_model(path, runner=TRANSFORMERS, base=original).context_length
    if tokens > context:
        raise TrainingError(f"{option} {tokens} is beyond the context of {path.name}, {context} tokens; give less.")


def _not_packed(path: Path) -> TrainingError:
    return TrainingError(
        f"{path} holds no packed weights, so PEFT and TRL can train on it as it is. Make a packed model with "
        f"`dynquant export {path} --plan PLAN -f safetensors -o OUT` and train on OUT."
    )


def open_tokenizer(path: Path) -> "PreTrainedTokenizerBase":
    """The tokenizer of a resolved directory or GGUF file.

    Raises:
        CheckpointError: there is none that transformers can load.
    """
    try:
        return load_tokenizer(path)
    except CheckpointError as error:
        if not is_gguf(path):
            raise
        raise CheckpointError(
            f"transformers cannot read the tokenizer of {path}. Give the Hugging Face directory of the original, "
            "as --base or --tokenizer to finetune, or as --reference to heal."
        ) from error
