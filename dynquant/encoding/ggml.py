"""The reference encoder: ggml's own quantizers, called in the library of llama.cpp.

Bytes equal those of llama-quantize: both call `ggml_quantize_chunk` on float32 rows with the importance of the row's
expert. ggml treats each row by itself, so tensors are cut into chunks of rows that run on all cores (`share`); ctypes
gives up the GIL during a call. F32, F16 and BF16 are plain casts (ggml rounds to nearest even, as torch does).

Left out: types outside the registry, and llama-quantize's file handling.
"""

import ctypes
from collections.abc import Iterable
from functools import cache
from itertools import product
from threading import Lock
from typing import ClassVar

import torch

from dynquant.checkpoints.tensor_source import is_finite
from dynquant.encoding.interface import Encoder, Request, check_finite
from dynquant.encoding.parts import as_slice, ranges
from dynquant.errors import EncodeError
from dynquant.formats.plain_quants import FLOAT_DTYPES
from dynquant.formats.quant_types import QuantType
from dynquant.llama_library import is_installed, library_path
from dynquant.session import Progress, ignore_progress
from dynquant.workers import share

CHUNK_WEIGHTS = 1 << 17
"""Weights per task: 10 to 100 ms of a slow quantizer, so that threads stay busy and Python's share stays small."""

_FLOAT32_MAX = torch.finfo(torch.float32).max


class GgmlEncoder(Encoder):
    """Encodes with the ggml library of the installed llama.cpp."""

    name: ClassVar[str] = "ggml"
    uses_hessians: ClassVar[bool] = False

    def prepare(self, quant_types: Iterable[QuantType], progress: Progress = ignore_progress) -> None:
        """Build ggml's search tables, which take seconds."""
        for quant_type in quant_types:
            _library().prepare(quant_type)

    def encode_stack(self, request: Request) -> torch.Tensor:
        """Encode chunks of rows, each widened to float32 by itself, so that a bfloat16 tensor needs no such copy."""
        quant_type, weights = request.quant_type, request.weights.to(device="cpu")
        if quant_type.is_float:
            values = _cast(quant_type, weights, name=request.name)
            request.progress(weights.numel())
            return values
        packed = torch.empty((*weights.shape[:-1], quant_type.row_bytes(weights.shape[-1])), dtype=torch.uint8)
        _library().prepare(quant_type)
        runs = list(map(as_slice, ranges(weights.shape[1], max(1, CHUNK_WEIGHTS // max(1, weights.shape[-1])))))
        places = list(product(range(len(weights)), runs))

        def encode_rows(place: tuple[int, slice]) -> None:
            importance = None if request.importance is None else request.importance[place[0]]
            _encode_rows(quant_type, weights[place], packed[place], importance, name=request.name)
            request.progress(weights[place].numel())

        share(encode_rows, places, request.threads)
        return packed


encode = GgmlEncoder().encode


def _encode_rows(
    quant_type: QuantType, weights: torch.Tensor, packed: torch.Tensor, importance: torch.Tensor | None, *, name: str
) -> None:
    """Write the blocks of some rows of one expert to `packed`, under the importance [row_length] of the expert.

    Weights so large that ggml's float32 sums overflow are refused: it would abort the process.
    """
    library, rows = _library(), weights.to(torch.float32).contiguous()
    peak = check_finite(rows, name=name)
    heaviest = 1.0 if importance is None else max(1.0, float(importance.max()))
    if quant_type.uses_imatrix and peak * peak * heaviest * rows.shape[-1] > _FLOAT32_MAX:
        raise EncodeError(
            f"`{name}` cannot be encoded as {quant_type.name}: its largest weight {peak:.3g}, squared and weighted by "
            f"an importance of {heaviest:.3g}, overflows float32. Keep this tensor as F32 or BF16."
        )
    importance_ptr = None if importance is None else importance.data_ptr()  # ggml takes NULL for none
    written = library.quantize_chunk(
        quant_type.ggml_id, rows.data_ptr(), packed.data_ptr(), 0, *rows.shape, importance_ptr
    )
    is_valid = library.validate_row_data(quant_type.ggml_id, packed.data_ptr(), packed.numel())
    if written != packed.numel() or not is_valid:
        raise EncodeError(
            f"`{name}` cannot be encoded as {quant_type.name}: the scale of a block is beyond float16 (the largest "
            f"weight here is {peak:.3g}). Keep this tensor as F32 or BF16."
        )


def _cast(quant_type: QuantType, weights: torch.Tensor, *, name: str) -> torch.Tensor:
    values = weights.to(torch.float32).to(FLOAT_DTYPES[quant_type.name]).contiguous()
    if not is_finite(values):
        raise EncodeError(
            f"`{name}` as {quant_type.name} holds NaN or Inf. If the checkpoint itself is sound, a weight is beyond "
            f"the range of {quant_type.name}; keep this tensor as F32."
        )
    return values.view(torch.uint8)


class _Library:
    """The ggml functions used here, bound once."""

    def __init__(self) -> None:
        try:
            library = ctypes.CDLL(str(library_path("ggml-base")))
        except (ImportError, OSError) as error:
            raise EncodeError(f"The `ggml` encoder needs the library of llama.cpp. {error}") from error
        self._lock = Lock()
        self._prepared: set[int] = set()
        self._quantize_init = library.ggml_quantize_init
        self._quantize_init.argtypes, self._quantize_init.restype = [ctypes.c_int], None
        self._library = library
        self.quantize_chunk = library.ggml_quantize_chunk
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self.quantize_chunk.restype = ctypes.c_size_t
        self.validate_row_data = library.ggml_validate_row_data
        self.validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self.validate_row_data.restype = ctypes.c_bool
        library.ggml_version.restype = ctypes.c_char_p
        self.version: str = library.ggml_version().decode()

    def has(self, quant_type: QuantType) -> bool:
        """Tell whether this release knows the type; ggml itself takes ids that it does not know, and crashes."""
        return quant_type.is_float or hasattr(self._library, f"quantize_{quant_type.name.lower().replace('_k', '_K')}")

    def prepare(self, quant_type: QuantType) -> None:
        """Build ggml's search tables of this type (codebook neighbours), once per process.

        Raises:
            EncodeError: the library does not know the type.
        """
        if not self.has(quant_type):
            raise EncodeError(
                f"The installed llama.cpp (ggml {self.version}) does not know {quant_type.name}, so that it can "
                "neither encode nor run it. Install llama-cpp-python 0.3.36 or a later release, or choose other types."
            )
        with self._lock:
            if quant_type.ggml_id not in self._prepared:
                self._quantize_init(quant_type.ggml_id)
                self._prepared.add(quant_type.ggml_id)


@cache
def _library() -> _Library:
    return _Library()


@cache  # asked for every type of every tensor
def is_known(quant_type: QuantType) -> bool:
    """Tell whether the installed llama.cpp runs a type; without one, all types pass."""
    return not is_installed() or _library().has(quant_type)


def ggml_version() -> str:
    """The version of the ggml library that encodes, for provenance records."""
    return _library().version
