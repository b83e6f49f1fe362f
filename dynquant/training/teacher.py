"""A transformers Trainer whose loss is KL(original || model) per token, from the original's stored distributions."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer

from dynquant.evaluation.teacher_cache import distribution_of


class DistillationTrainer(Trainer):
    """Trains on batches of `TeacherWindows`; `eval_loss` is the mean KL of the held-out windows in nats per token.

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
        logits = model(input_ids=inputs["input_ids"], use_cache=False).logits[..., : self._num_columns]
        loss = distribution_of(inputs).divergences(logits.float().flatten(0, 1)).mean()
        return (loss, None) if return_outputs else loss

    def prediction_step(
        self, model: nn.Module, inputs: dict[str, Tensor], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Tensor, None, None]:
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None
