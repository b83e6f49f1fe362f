"""Lets TRL's trainers score tokens with a packed output head.

TRL (1.16) adds a fused head to the model: it multiplies hidden states by `lm_head.weight` itself, a matrix of numbers.
A packed head has bytes there and multiplies by calling the head. `use_packed_head` puts a forward pass in place that
returns the same `FusedCausalLMOutput` from the head's own logits, a chunk of tokens at a time.
"""

import functools
import types
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

_CHUNK_LOGITS = 2**25
"""Logits in memory at a time; they are recomputed in the backward pass."""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_FIELDS = ("log_probs", "entropy", "log_sum_sq_probs", "mean_logits", "is_top1")


def use_packed_head(trainer: Any, *, temperature: float = 1.0) -> None:
    """Make a TRL trainer (SFTTrainer, GRPOTrainer, RLOOTrainer) work with a packed output head; call it once, after the
    trainer was made. `temperature` is the one that the trainer samples with.

    Raises:
        ValueError: TRL has not added its fused head, as in releases other than those that dynquant was tested with.
    """
    base = trainer.model.get_base_model() if hasattr(trainer.model, "get_base_model") else trainer.model
    fused = getattr(base.forward, "__func__", None)
    if fused is None or "fused_lm_head" not in fused.__code__.co_varnames:
        raise ValueError("`trainer` has no fused head of TRL on its model; dynquant was tested with trl 1.16")

    @functools.wraps(type(base).forward)  # `generate` checks its arguments against this signature
    def forward(self: Any, *args: Any, fused_lm_head: bool = False, **kwargs: Any) -> Any:
        if not fused_lm_head:
            return fused(self, *args, **kwargs)
        return _score(self, temperature, *args, **kwargs)

    base.forward = types.MethodType(forward, base)


def _score(
    model: Any,
    temperature: float,
    *args: Any,
    labels: Tensor | None = None,
    shift_labels: Tensor | None = None,
    num_items_in_batch: Any = None,
    **kwargs: Any,
) -> Any:
    from trl.trainer.utils import FusedCausalLMOutput

    kwargs["use_cache"] = False
    text = model.config.get_text_config()
    if getattr(text, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    outputs = model.base_model(*args, **kwargs)
    hidden = outputs.last_hidden_state
    if shift_labels is None:
        hidden, labels = hidden[:, :-1], labels[:, 1:]
    else:
        labels = shift_labels
    mask = labels != -100
    head = model.get_output_embeddings()
    rows = max(1, _CHUNK_LOGITS // text.vocab_size)
    parts = [
        checkpoint(_measure, head, text, temperature, h, y, use_reentrant=False)
        for h, y in zip(hidden[mask].split(rows), labels[mask].split(rows), strict=True)
    ]
    measured = {}
    for name, values in zip(_FIELDS, zip(*parts, strict=True), strict=True):
        flat = torch.cat(values)
        measured[name] = flat.new_zeros(mask.shape).masked_scatter(mask, flat)
    count = mask.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
    loss, balance = -measured["log_probs"].sum() / count, None
    if kwargs.get("output_router_logits"):
        balance = _balance_loss(text, outputs.router_logits, kwargs.get("attention_mask"))
        loss = loss + getattr(text, "router_aux_loss_coef", 0.0) * balance
    return FusedCausalLMOutput(loss=loss, label_mask=mask, aux_loss=balance, **measured)


def _balance_loss(text: Any, router_logits: tuple[Tensor, ...], attention_mask: Tensor | None) -> Tensor:
    """Return the loss by which a mixture of experts is trained to spread its tokens, as transformers computes it."""
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    count = next(number for name in _EXPERT_COUNTS if (number := getattr(text, name, None)))
    return load_balancing_loss_func(router_logits, count, text.num_experts_per_tok, attention_mask)


def _measure(head: nn.Module, text: Any, temperature: float, hidden: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    logits = head(hidden).float()
    cap = getattr(text, "final_logit_softcapping", None)
    if cap:
        logits = cap * torch.tanh(logits / cap)
    logits = logits / temperature
    log_probs = logits.log_softmax(-1)
    probs = log_probs.exp()
    entropy = -(probs * log_probs).sum(-1)
    with torch.no_grad():
        rest = (2 * log_probs).logsumexp(-1), logits.mean(-1), logits.argmax(-1) == labels
    return (log_probs.gather(1, labels[:, None])[:, 0], entropy, *rest)
