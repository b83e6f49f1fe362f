"""Text that a model writes itself, drawn at temperature 1, so that it follows the model's own distribution."""

import inspect

import torch
from torch import Tensor, nn

START_TOKENS = 16
"""Tokens of given text that a written one starts with."""


@torch.inference_mode()
def continued(
    model: nn.Module, starts: Tensor, length: int, draws: torch.Generator, columns: int | None = None
) -> Tensor:
    """Return `starts` [n, s] and what the model writes after them, [n, length]. An end of text ends no window.

    Args:
        columns: leading logits that may be drawn; by default all.
    """
    ids, past, name = starts, None, cache_name(model)
    new = starts
    while ids.shape[1] < length:
        output = model(input_ids=new, **{name: past}, use_cache=True, logits_to_keep=1)
        past = output[name]
        probabilities = output.logits[:, -1, :columns].float().softmax(-1)
        new = torch.multinomial(probabilities, 1, generator=draws)
        ids = torch.cat([ids, new], dim=1)
    return ids


def random_starts(text: Tensor, count: int, size: int, generator: torch.Generator) -> Tensor:
    """Return `count` times `size` consecutive tokens of text [n, T], from random places."""
    rows = torch.randint(len(text), (count,), generator=generator)
    places = torch.randint(text.shape[1] - size + 1, (count,), generator=generator)
    return text[rows[:, None], places[:, None] + torch.arange(size)]


def cache_name(model: nn.Module) -> str:
    """Return what a model calls the keys and values of earlier tokens; transformers 5.24 warns at the older name."""
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
