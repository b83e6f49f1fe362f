"""Base of every encoder, and the refusals that all of them share.

An encoder turns float weights into the packed blocks of a quant type. What shapes and the importance matrix alone tell
is checked here; whether the weights themselves are finite is for the encoder to see while it reads them, so that a
tensor larger than the cache is not walked twice.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch

from dynquant.errors import EncodeError
from dynquant.formats.quant_types import QuantType
from dynquant.session import Progress, ignore_progress

RowsDone = Callable[[int], None]
"""Called with the number of weights that were encoded since the last call."""


@dataclass(frozen=True)
class ProtectedWeight:
    """One scalar whose value matters more than all others of its row: a super weight. `expert` None: a matrix."""

    row: int
    column: int
    expert: int | None = None


class Sides(NamedTuple):
    """E[x xᵀ] of the input of a weight and E[g gᵀ] of gradients of its outputs, [E or 1, R, R], as far as known."""

    inputs: torch.Tensor | None = None
    outputs: torch.Tensor | None = None

    @classmethod
    def of(cls, hessian: "torch.Tensor | Sides | None") -> "Sides":
        """Return both sides of an encoder's argument, which is that of the input alone where there is no other."""
        return hessian if isinstance(hessian, Sides) else cls(hessian)


@dataclass(frozen=True)
class Request:
    """Checked arguments of `Encoder.encode`; a matrix is a stack of one expert."""

    quant_type: QuantType
    weights: torch.Tensor  # [experts, rows, row_length], of any floating dtype
    importance: torch.Tensor | None  # float32 [experts, row_length], on the CPU
    hessian: torch.Tensor | None
    output_hessian: torch.Tensor | None
    protected: Sequence[ProtectedWeight]
    name: str
    threads: int | None
    progress: RowsDone


class Encoder(ABC):
    """Weights to packed blocks. Equal inputs give equal bytes."""

    name: ClassVar[str]
    uses_hessians: ClassVar[bool]
    """True when `hessian` and `protected` change the bytes."""
    device = torch.device("cpu")
    """The place where blocks are searched."""

    def encode(
        self,
        quant_type: QuantType,
        weights: torch.Tensor,
        importance: torch.Tensor | None = None,
        threads: int | None = None,
        *,
        name: str = "tensor",
        hessian: torch.Tensor | Sides | None = None,
        protected: Sequence[ProtectedWeight] = (),
        progress: RowsDone | None = None,
    ) -> torch.Tensor:
        """Encode all rows of `weights`.

        Weights of an encoder that converts nothing (F32 from float32, on a CPU) share memory with the result.

        Args:
            quant_type: The byte layout to produce.
            weights: [rows, row_length], or [experts, rows, row_length]; any floating dtype, read as float32.
            importance: E[x^2] per input channel, [row_length] or [experts, row_length]; None where the type allows it.
            threads: How many threads to use on a CPU; None for one per core.
            name: The tensor's name, for error messages.
            hessian: E[x xᵀ] of the input, positive definite, [1, row_length, row_length] for all experts or one for
                each; what error feedback works with. With `Sides`, errors are made up for across rows too.
            protected: Scalars that must keep their values as well as the type can store them.
            progress: Told how many weights are done, by whichever thread did them.

        Returns:
            uint8 [..., rows, row_bytes].

        Raises:
            EncodeError: not a 2-D or 3-D floating tensor, a row length that the block size does not divide, a type that
                needs an importance matrix without one, an importance of the wrong shape or with NaN, Inf or negative
                values, or a hessian of the wrong shape; NaN, Inf or weights too large for the type.
        """
        inputs, outputs = Sides.of(hessian) if self.uses_hessians else Sides()
        _check_shapes(quant_type, weights, inputs, name=name)
        _check_moments("output hessian", outputs, weights, weights.shape[-2], name)
        if importance is not None:
            importance = _checked_importance(weights, importance, name=name)
        elif quant_type.needs_imatrix and inputs is None:
            raise EncodeError(
                f"`{name}` cannot be encoded as {quant_type.name} without an importance matrix. Calibrate the model "
                "first, or choose a type that does not need one."
            )
        stack = weights.detach() if weights.dim() == 3 else weights.detach()[None]
        progress = progress or (lambda count: None)
        request = Request(quant_type, stack, importance, inputs, outputs, protected, name, threads, progress)
        packed = self.encode_stack(request)
        return packed.view(*weights.shape[:-1], packed.shape[-1])

    def prepare(self, quant_types: Iterable[QuantType], progress: Progress = ignore_progress) -> None:  # noqa: B027
        """Do now what the first blocks of each type would wait for; most encoders have nothing to do."""

    @abstractmethod
    def encode_stack(self, request: Request) -> torch.Tensor:
        """Return the blocks of a request, uint8 [experts, rows, row_bytes], contiguous."""


def _check_shapes(quant_type: QuantType, weights: torch.Tensor, hessian: torch.Tensor | None, *, name: str) -> None:
    if weights.dim() not in (2, 3) or not weights.is_floating_point():
        raise EncodeError(
            f"`{name}` is {weights.dtype} of shape {tuple(weights.shape)}; only floating tensors [rows, row_length] or "
            "[experts, rows, row_length] can be encoded. Keep it as F32."
        )
    row_length = weights.shape[-1]
    if row_length % quant_type.block_size:
        raise EncodeError(
            f"`{name}` has rows of {row_length}, which blocks of {quant_type.block_size} ({quant_type.name}) do not "
            f"divide. Use a type with smaller blocks, such as {quant_type.fallback or 'F16'}."
        )
    _check_moments("hessian", hessian, weights, row_length, name)


def _check_moments(what: str, moments: torch.Tensor | None, weights: torch.Tensor, width: int, name: str) -> None:
    counts = dict.fromkeys((1, weights.shape[0] if weights.dim() == 3 else 1))
    shapes = [(count, width, width) for count in counts]
    if moments is not None and tuple(moments.shape) not in shapes:
        raise EncodeError(
            f"The {what} of `{name}` has shape {tuple(moments.shape)}, but the weights {tuple(weights.shape)} need "
            f"{' or '.join(map(str, shapes))}. It is of another model; calibrate this one."
        )


def _checked_importance(weights: torch.Tensor, importance: torch.Tensor, *, name: str) -> torch.Tensor:
    experts = weights.shape[0] if weights.dim() == 3 else 1
    row_length = weights.shape[-1]
    if tuple(importance.shape) not in ((row_length,), (experts, row_length)):
        raise EncodeError(
            f"The importance matrix of `{name}` has shape {tuple(importance.shape)}, but the weights "
            f"{tuple(weights.shape)} need [{row_length}] or [{experts}, {row_length}]. The statistics are of another "
            "model; calibrate this one."
        )
    importance = importance.detach().to(device="cpu", dtype=torch.float32)
    if not torch.isfinite(importance).all() or (importance < 0).any():
        raise EncodeError(
            f"The importance matrix of `{name}` holds NaN, Inf or negative values, but it is a mean of squares. "
            "Calibrate again; if that repeats, the model's activations overflow."
        )
    return importance.expand(experts, row_length).contiguous()


def check_finite(weights: torch.Tensor, *, name: str) -> float:
    """Return the largest magnitude in `weights`; 0 when there are none.

    Raises:
        EncodeError: NaN or Inf; the tensor is named.
    """
    if not weights.numel():
        return 0.0
    low, high = (float(x) for x in weights.aminmax())
    peak = max(-low, high)
    if not peak <= torch.finfo(torch.float32).max:  # true of NaN as well
        raise EncodeError(
            f"`{name}` holds NaN or Inf weights, so nothing that is encoded from it can work. The checkpoint is "
            "damaged or was saved after an overflow; fetch it again or repair this tensor."
        )
    return peak
