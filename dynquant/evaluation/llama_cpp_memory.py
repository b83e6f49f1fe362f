"""Bytes that llama.cpp would allocate beside the weights: it lays out its buffers for a context, and allocates nothing.

It does so in a process of its own, because it ends the process on models that it cannot run.
"""

import ctypes
import os
import re
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from dynquant.errors import DynquantError
from dynquant.evaluation.llama_cpp import load_llama_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.llama_library import llama_cpp
from dynquant.workers import run_module

_MIB = 1 << 20


def reserved_bytes(file: Path, context: int, kv_type: str) -> tuple[int, int] | None:
    """Return the bytes of the cache and of the compute buffer of all layers on one device.

    None where no llama.cpp is installed, or where it cannot load the file or lay out the context.
    """
    with TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        run_module(
            __name__,
            [str(file.resolve()), str(context), str(QUANT_TYPES[kv_type.upper()].ggml_id), str(log)],
            GGML_NO_BACKTRACE="1",  # it would start a debugger
        )
        said = log.read_text("utf-8") if log.is_file() else ""
    caches = re.findall(r"^llama_(?:kv_cache|memory)\w*: size = +([\d.]+) MiB", said, re.MULTILINE)
    buffers = re.findall(r"compute buffer size = +([\d.]+) MiB", said)
    if not buffers:
        return None
    return round(sum(map(float, caches)) * _MIB), round(sum(map(float, buffers)) * _MIB)


def _main() -> None:
    """Write what llama.cpp says of one file, context and type of the cache."""
    try:
        api = llama_cpp()
        lines: list[str] = []
        log = api.llama_log_callback(lambda _level, text, _data: lines.append(text.decode("utf-8", "replace")))
        params = api.llama_model_default_params()
        params.no_alloc, params.load_mode = True, api.LLAMA_LOAD_MODE_NONE
        load_llama_model(Path(sys.argv[1]), vocab_only=True)  # refuses what would end this process
        api.llama_log_set(log, ctypes.c_void_p(0))
        model = api.llama_model_load_from_file(os.fsencode(sys.argv[1]), params)
        settings = api.llama_context_default_params()
        settings.n_ctx, settings.swa_full = int(sys.argv[2]), False
        settings.type_k = settings.type_v = int(sys.argv[3])
        if model:
            api.llama_init_from_model(model, settings)
        Path(sys.argv[4]).write_text("".join(lines), "utf-8")
    except (DynquantError, ImportError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":  # of `reserved_bytes`
    _main()
