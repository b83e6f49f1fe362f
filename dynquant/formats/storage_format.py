"""What GGUF types and compressed-tensors schemes have in common."""

from typing import NamedTuple


class Choice(NamedTuple):
    """The format of one tensor, and why it was taken."""

    type: str
    """Name of a quant type or of a scheme."""
    reason: str
    """For people; it is written into the plan."""
