"""Backward passes whose gradients are those of the KL divergence: labels are drawn from the model's own distribution.

E[g gᵀ] over such gradients g is the Fisher information, the Hessian of the KL to the model itself (K-FAC,
arXiv:1503.05671). The model's weights get no gradients; hooks on activations see theirs.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn


@contextmanager
def activation_gradients(hf_model: nn.Module) -> Iterator[None]:
    """Context manager: lets gradients flow through activations and not into weights, whatever the grad mode was."""
    hook = hf_model.get_input_embeddings().register_forward_hook(lambda _module, _args, out: out.requires_grad_(True))
    try:
        with frozen_weights(hf_model), torch.enable_grad():
            yield
    finally:
        hook.remove()


@contextmanager
def frozen_weights(hf_model: nn.Module) -> Iterator[None]:
    """Context manager: freezes all weights and restores `requires_grad` on exit."""
    trained = [parameter for parameter in hf_model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def backward_from_sampled_labels(
    hf_model: nn.Module, arguments: Mapping[str, torch.Tensor], generator: torch.Generator
) -> None:
    """Compute gradients of the summed log-probability of one drawn token at every position of a batch.

    Gradients reach a vision tower when its pixels ask for one.
    """
    sampled_log_probability(hf_model(**arguments, use_cache=False).logits, generator).backward()


def sampled_log_probability(logits: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Summed log-probability of one token drawn at every position of `logits` [..., vocabulary], a scalar."""
    log_probs = logits.float().log_softmax(-1).flatten(0, -2)
    cumulative = log_probs.detach().exp().cumsum(-1)
    points = torch.rand(len(cumulative), 1, generator=generator).to(cumulative.device) * cumulative[:, -1:]
    drawn = torch.searchsorted(cumulative, points).clamp_(max=cumulative.shape[1] - 1)
    return log_probs.gather(1, drawn).sum()
