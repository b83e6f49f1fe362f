"""Options of training an adapter."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynquant.errors import TrainingError

if TYPE_CHECKING:
    import torch

STORED = ("float32", "bfloat16")


@dataclass(frozen=True)
class TrainOptions:
    """The adapter and its training. Rates follow a cosine with `warmup` as a share of all steps.

    `batch_size` counts the examples of an optimizer step, which are run `micro_batch` at a time. The held-out loss is
    measured `evaluations` times; after `patience` measurements without a new minimum the run stops, and the adapter of
    the minimum is kept. `gradient_checkpointing` None recomputes activations on a GPU from 10^9 weights.

    Raises:
        TrainingError: `store` is not one of STORED.
    """

    rank: int = 16
    alpha: int | None = None
    """None is twice the rank."""
    rslora: bool = False
    experts: bool = True
    llama_cpp: bool = False
    """Adapt only what llama.cpp applies adapters to, so that `export-adapter` takes the result."""
    learning_rate: float = 5e-4
    epochs: float = 3.0
    max_steps: int | None = None
    batch_size: int = 8
    micro_batch: int | None = None
    warmup: float = 0.05
    evaluations: int = 10
    patience: int = 3
    gradient_checkpointing: bool | None = None
    seed: int = 0
    store: str = "float32"
    """One of STORED: what the adapter's file holds. It is trained in float32."""

    def __post_init__(self) -> None:
        if self.store not in STORED:
            raise TrainingError(f"An adapter cannot be stored as {self.store!r}; give {' or '.join(STORED)}.")

    @property
    def lora_alpha(self) -> int:
        return 2 * self.rank if self.alpha is None else self.alpha

    @property
    def stored_dtype(self) -> "torch.dtype":
        """`store` as PyTorch has it."""
        import torch

        return getattr(torch, self.store)
