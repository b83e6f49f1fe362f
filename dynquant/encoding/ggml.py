"""The reference encoder: ggml's own quantizers, called in the library inside llama-cpp-python.

Bytes equal those of llama-quantize: both call `ggml_quantize_chunk` on float32 rows with the importance of the row's
expert. ggml treats each row by itself, so tensors are cut into chunks of rows that run on all cores; ctypes gives up
the GIL during a call. F32, F16 and BF16 are plain casts (ggml rounds to nearest even, as torch does).

Left out: Q1_0 and other types outside the registry, and llama-quantize's file handling.
"""

import ctypes
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from threading import Lock
from typing import ClassVar

import torch

from dynquant.checkpoints.tensor_source import is_finite
from dynquant.encoding.interface import ProtectedWeight, RowsDone, check_finite, check_request
from dynquant.errors import EncodeError
from dynquant.formats.quant_types import QuantType
from dynquant.resources import usable_cores

CHUNK_WEIGHTS = 1 << 17
"""Weights per task: 10 to 100 ms of a slow quantizer, so that threads stay busy and Python's share stays small."""

_FLOAT_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# The file that llama.cpp's own libraries link to comes first: one loaded copy, so that ggml's search tables (10 seconds
# for IQ1_S) are built once per process.
_LIBRARY_NAMES = {
    "linux": ("libggml-base.so.0", "libggml-base.so"),
    "darwin": ("libggml-base.0.dylib", "libggml-base.dylib"),
    "win32": ("ggml-base.dll", "libggml-base.dll"),
}
_FLOAT32_MAX = torch.finfo(torch.float32).max


class GgmlEncoder:
    """Encodes with the ggml library of the installed llama-cpp-python."""

    name: ClassVar[str] = "ggml"
    uses_hessians: ClassVar[bool] = False

    def encode(
        self,
        quant_type: QuantType,
        weights: torch.Tensor,
        importance: torch.Tensor | None = None,
        threads: int | None = None,
        *,
        name: str = "tensor",
        hessian: torch.Tensor | None = None,
        protected: Sequence[ProtectedWeight] = (),
        progress: RowsDone | None = None,
    ) -> torch.Tensor:
        """Encode all rows of `weights`; see `dynquant.encoding.interface.Encoder.encode`.

        ggml knows nothing of `hessian` and `protected`.
        Weights stay in their own dtype and are widened chunk by chunk, so a bfloat16 tensor needs no float32 copy. When
        nothing has to be converted (F32 from float32), the result shares memory with `weights`.
        """
        by_expert = check_request(quant_type, weights, importance, name=name)
        weights = weights.detach().to(device="cpu")
        if quant_type.is_float:
            values = _cast(quant_type, weights, name=name)
            if progress is not None:
                progress(values.numel() // quant_type.block_bytes)
            return values
        packed = torch.empty((*weights.shape[:-1], quant_type.row_bytes(weights.shape[-1])), dtype=torch.uint8)
        library = _library()
        library.prepare(quant_type)
        tasks = list(_tasks(weights, packed, by_expert))
        threads = min(threads or usable_cores(), len(tasks))

        def run(task: "_Task") -> None:
            _encode_rows(library, quant_type, task, name=name)

        with ThreadPoolExecutor(max(1, threads)) as pool:
            for task, _ in zip(tasks, pool.map(run, tasks), strict=True):
                if progress is not None:
                    progress(task.rows.numel())
        return packed


encode = GgmlEncoder().encode


@dataclass(frozen=True)
class _Task:
    """A run of rows of one expert, and where their blocks go."""

    rows: torch.Tensor  # [rows, row_length]
    packed: torch.Tensor  # [rows, row_bytes]
    importance: torch.Tensor | None  # [row_length]


def _tasks(weights: torch.Tensor, packed: torch.Tensor, importance: torch.Tensor | None) -> Iterator[_Task]:
    if weights.dim() == 2:
        weights, packed = weights[None], packed[None]
    rows_per_task = max(1, CHUNK_WEIGHTS // max(1, weights.shape[-1]))
    for expert in range(weights.shape[0]):
        for start in range(0, weights.shape[1], rows_per_task):
            rows = slice(start, start + rows_per_task)
            yield _Task(weights[expert, rows], packed[expert, rows], None if importance is None else importance[expert])


def _encode_rows(library: "_Library", quant_type: QuantType, task: _Task, *, name: str) -> None:
    rows = task.rows.to(torch.float32).contiguous()
    _check_magnitude(quant_type, rows, task.importance, name=name)
    num_rows, row_length = rows.shape
    importance = None if task.importance is None else task.importance.data_ptr()
    written = library.quantize_chunk(
        quant_type.ggml_id, rows.data_ptr(), task.packed.data_ptr(), 0, num_rows, row_length, importance
    )
    is_valid = library.validate_row_data(quant_type.ggml_id, task.packed.data_ptr(), task.packed.numel())
    if written != task.packed.numel() or not is_valid:
        raise EncodeError(
            f"`{name}` cannot be encoded as {quant_type.name}: the scale of a block is beyond float16 (the largest "
            f"weight here is {float(rows.abs().max()):.3g}). Keep this tensor as F32 or BF16."
        )


def _check_magnitude(quant_type: QuantType, rows: torch.Tensor, importance: torch.Tensor | None, *, name: str) -> None:
    """Refuse NaN, Inf, and weights so large that ggml's float32 sums overflow, on which it aborts the process."""
    peak = check_finite(rows, name=name)
    heaviest = 1.0 if importance is None else max(1.0, float(importance.max()))
    if quant_type.uses_imatrix and peak * peak * heaviest * rows.shape[-1] > _FLOAT32_MAX:
        raise EncodeError(
            f"`{name}` cannot be encoded as {quant_type.name}: its largest weight {peak:.3g}, squared and weighted by "
            f"an importance of {heaviest:.3g}, overflows float32. Keep this tensor as F32 or BF16."
        )


def _cast(quant_type: QuantType, weights: torch.Tensor, *, name: str) -> torch.Tensor:
    values = weights.to(torch.float32).to(_FLOAT_DTYPES[quant_type.name]).contiguous()
    if not is_finite(values):
        raise EncodeError(
            f"`{name}` as {quant_type.name} holds NaN or Inf. If the checkpoint itself is sound, a weight is beyond "
            f"the range of {quant_type.name}; keep this tensor as F32."
        )
    return values.view(torch.uint8)


class _Library:
    """The ggml functions used here, bound once."""

    def __init__(self, path: Path) -> None:
        try:
            library = ctypes.CDLL(str(path))
        except OSError as error:
            raise EncodeError(
                f"The ggml library {path} cannot be loaded ({error}). Reinstall llama-cpp-python."
            ) from error
        self._lock = Lock()
        self._prepared: set[int] = set()
        self._quantize_init = library.ggml_quantize_init
        self._quantize_init.argtypes, self._quantize_init.restype = [ctypes.c_int], None
        self.quantize_chunk = library.ggml_quantize_chunk
        pointer, number = ctypes.c_void_p, ctypes.c_int64
        self.quantize_chunk.argtypes = [ctypes.c_int, pointer, pointer, number, number, number, pointer]
        self.quantize_chunk.restype = ctypes.c_size_t
        self.validate_row_data = library.ggml_validate_row_data
        self.validate_row_data.argtypes = [ctypes.c_int, ctypes.c_void_p, ctypes.c_size_t]
        self.validate_row_data.restype = ctypes.c_bool
        library.ggml_version.restype = ctypes.c_char_p
        self.version: str = library.ggml_version().decode()

    def prepare(self, quant_type: QuantType) -> None:
        """Build ggml's search tables of this type (codebook neighbours), once per process."""
        with self._lock:
            if quant_type.ggml_id not in self._prepared:
                self._quantize_init(quant_type.ggml_id)
                self._prepared.add(quant_type.ggml_id)


@cache
def _library() -> _Library:
    return _Library(library_path())


def ggml_version() -> str:
    """The version of the ggml library that encodes, for provenance records."""
    return _library().version


def library_path() -> Path:
    """Return the path of `ggml-base` inside the installed llama_cpp package; found without importing that package.

    Raises:
        EncodeError: llama-cpp-python is not installed or has no such library.
    """
    spec = importlib.util.find_spec("llama_cpp")
    if spec is None or spec.origin is None:
        raise EncodeError(
            "The `ggml` encoder needs the library inside llama-cpp-python, which is not installed. Install "
            "`dynquant-toolchain[llama]`."
        )
    folder = Path(spec.origin).parent / "lib"
    names = _LIBRARY_NAMES.get(sys.platform, _LIBRARY_NAMES["linux"])
    path = next((folder / name for name in names if (folder / name).is_file()), None)
    if path is None:
        raise EncodeError(
            f"llama-cpp-python is installed, but {folder} holds no {' or '.join(names)}. Reinstall a release that "
            "ships its libraries (0.3.36 does)."
        )
    return path
