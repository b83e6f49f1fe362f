"""A transformers Trainer whose loss is a lower bound of KL(original || model), from stored distributions."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dynquant.evaluation.reference_cache import distributions_of


class DistillationTrainer(Trainer):
    """Trains on batches of `TeacherWindows`; `eval_loss` is the mean KL of the held-out windows in nats per token.

    The held-out windows need draws from the tail, so that their KL is unbiased.

    Args:
        num_columns: leading logits that both models have.
    """

    def __init__(self, *args: Any, num_columns: int, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._num_columns = num_columns
        # The loss is a mean over the micro-batch, so the Trainer has to divide by their number.
        self.model_accepts_loss_kwargs = False

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Tensor], return_outputs: bool = False, **_: Any
    ) -> Tensor | tuple[Tensor, None]:
        loss = distributions_of(inputs).kl_lower_bound(self._logits(model, inputs)).mean()
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad():
            return distributions_of(inputs).kl(self._logits(model, inputs)).mean().float(), None, None

    def _logits(self, model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[..., : self._num_columns]
        return logits.float().flatten(0, 1)
