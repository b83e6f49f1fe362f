"""Labels that are the same on every device."""

from torch import Tensor


def likeliest_log_probability(logits: Tensor, generator: object) -> Tensor:
    """Return the summed log-probability of the likeliest tokens, in place of drawn ones.

    A label drawn at a border between two tokens is another one on a GPU, and a rare one has a large gradient.
    """
    return logits.float().log_softmax(-1).amax(-1).sum()
