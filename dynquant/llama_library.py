"""The shared library of llama.cpp: where it is, and the C functions and structures that are called in it.

Any of three serves: a file or folder named by DYNQUANT_LLAMA_CPP, the libraries inside llama-cpp-python, which is built
on the machine that installs it, and the one inside xllamacpp, which comes built. Structures are passed by value, and
their fields differ between releases; a layout is taken only if all defaults of the library stand where it puts them.
"""

import ctypes
import importlib.util
import os
import sys
from collections.abc import Mapping, Sequence
from ctypes import POINTER, Structure, c_bool, c_char_p, c_float, c_int, c_int8, c_int32, c_size_t, c_uint32, c_void_p
from functools import cache
from pathlib import Path
from typing import Any

from dynquant.errors import LibraryError

VARIABLE = "DYNQUANT_LLAMA_CPP"
_NAMES = {
    "linux": ("lib{}.so",),
    "darwin": ("lib{}.so", "lib{}.dylib"),
    "win32": ("{}.dll", "lib{}.dll"),
}.get(sys.platform, ("lib{}.so",))
# The name that llama.cpp's own libraries link to: under another one ggml would be opened a second time, with search
# tables of its own, which take 10 seconds for IQ1_S.
_GGML_NAMES = {"linux": "libggml-base.so.0", "darwin": "libggml-base.0.dylib"}
_TAIL = ("tail", ctypes.c_char * 128)
"""Room for fields behind the known ones, where the library returns a larger structure."""

llama_token = llama_pos = llama_seq_id = c_int32
llama_log_callback = ctypes.CFUNCTYPE(None, c_int, c_char_p, c_void_p)


class llama_batch(Structure):
    """Tokens of one call, as llama.h has them."""

    _fields_ = (
        ("n_tokens", c_int32),
        ("token", POINTER(c_int32)),
        ("embd", POINTER(c_float)),
        ("pos", POINTER(c_int32)),
        ("n_seq_id", POINTER(c_int32)),
        ("seq_id", POINTER(POINTER(c_int32))),
        ("logits", POINTER(c_int8)),
    )


class mtmd_input_text(Structure):
    """Text around pictures, as mtmd.h has it."""

    _fields_ = (("text", c_char_p), ("text_len", c_size_t), ("add_special", c_bool), ("parse_special", c_bool))


def _structure(fields: str, defaults: Mapping[str, object]) -> type[Structure]:
    """Return a structure of fields such as `n_ctx:u`, and the values that a library's defaults must have."""
    kinds = {"i": c_int, "u": c_uint32, "f": c_float, "b": c_bool, "p": c_void_p, "z": c_size_t}
    pairs = [word.split(":") for word in fields.split()]
    typed_fields = tuple((name, kinds[kind]) for name, kind in pairs)
    return type("Parameters", (Structure,), {"_fields_": (*typed_fields, _TAIL), "defaults": dict(defaults)})


_MODEL = _structure(
    "devices:p tensor_buft_overrides:p n_gpu_layers:i split_mode:i load_mode:i lazy_mode:i main_gpu:i tensor_split:p "
    "progress_callback:p progress_callback_user_data:p kv_overrides:p vocab_only:b check_tensors:b use_extra_bufts:b "
    "no_host:b no_alloc:b load_mtp:b",
    {"load_mode": -1, "split_mode": 1, "vocab_only": False, "use_extra_bufts": True, "no_alloc": False},
)
_CONTEXT = (
    "n_ctx:u n_batch:u n_ubatch:u n_seq_max:u n_rs_seq:u n_outputs_max:u n_outputs_max_per_seq:u n_threads:i "
    "n_threads_batch:i ctx_type:i rope_scaling_type:i pooling_type:i attention_type:i flash_attn_type:i "
    "rope_freq_base:f rope_freq_scale:f yarn_ext_factor:f yarn_attn_factor:f yarn_beta_fast:f yarn_beta_slow:f "
    "yarn_orig_ctx:u defrag_thold:f cb_eval:p cb_eval_user_data:p type_k:i type_v:i abort_callback:p "
    "abort_callback_data:p {}embeddings:b offload_kqv:b no_perf:b op_offload:b swa_full:b kv_unified:b"
)
_CONTEXT_DEFAULTS = {
    **{"n_ctx": 512, "n_batch": 2048, "n_ubatch": 512, "n_seq_max": 1, "n_threads": 4, "n_threads_batch": 4},
    **{"rope_scaling_type": -1, "pooling_type": -1, "flash_attn_type": -1, "yarn_ext_factor": -1.0, "type_k": 1},
    **{"type_v": 1, "embeddings": False, "offload_kqv": True, "no_perf": True, "op_offload": True, "swa_full": True},
    "kv_unified": False,
}
# Releases from September 2026 on have eight bytes more before the switches.
_CONTEXTS = [_structure(_CONTEXT.format(more), _CONTEXT_DEFAULTS) for more in ("", "unknown:p ")]
_MTMD = _structure(
    "use_gpu:b device:p print_timings:b n_threads:i image_marker:p media_marker:p flash_attn_type:i warmup:b "
    "image_min_tokens:i image_max_tokens:i cb_eval:p cb_eval_user_data:p batch_max_tokens:i",
    {"use_gpu": True, "n_threads": 4, "flash_attn_type": -1, "warmup": True, "image_min_tokens": -1},
)

_LETTERS = {
    **{"n": None, "p": c_void_p, "s": c_char_p, "i": c_int32, "u": c_uint32, "z": c_size_t, "b": c_bool},
    **{"F": POINTER(c_float), "B": llama_batch, "M": _MODEL, "V": _MTMD},
}
_DECLARATIONS = """
llama_backend_init n
llama_log_set n pp
llama_model_load_from_file p sM
llama_model_free n p
llama_model_get_vocab p p
llama_model_meta_val_str i pspz
llama_model_is_recurrent b p
llama_model_is_hybrid b p
llama_model_n_layer i p
llama_model_n_embd i p
llama_tokenize i psipibb
llama_detokenize i ppipibb
llama_vocab_eos i p
llama_vocab_bos i p
llama_vocab_n_tokens i p
llama_vocab_get_text s pi
llama_vocab_is_eog b pi
llama_init_from_model p pC
llama_free n p
llama_n_ctx u p
llama_get_memory p p
llama_memory_clear n pb
llama_memory_seq_cp n piiii
llama_memory_seq_rm b piii
llama_decode i pB
llama_get_logits F p
mtmd_log_set n pp
mtmd_helper_log_set n pp
mtmd_init_from_file p spV
mtmd_free n p
mtmd_bitmap_init p uup
mtmd_bitmap_free n p
mtmd_default_marker s
mtmd_tokenize i ppppz
mtmd_input_chunks_init p
mtmd_input_chunks_free n p
mtmd_input_chunks_size z p
mtmd_input_chunks_get p pz
mtmd_input_chunk_get_type i p
mtmd_input_chunk_get_n_tokens z p
mtmd_helper_eval_chunk_single i pppiiibp
"""
_FUNCTIONS = dict(line.split(" ", 1) for line in _DECLARATIONS.strip().splitlines())
"""Result and arguments of every function that is called, a letter each."""


class LlamaCpp:
    """Functions of the library, bound when they are first asked for, and structures in the layout that it has."""

    llama_token, llama_pos, llama_seq_id = llama_token, llama_pos, llama_seq_id
    llama_batch, mtmd_input_text, llama_log_callback = llama_batch, mtmd_input_text, llama_log_callback
    LLAMA_FLASH_ATTN_TYPE_DISABLED, LLAMA_FLASH_ATTN_TYPE_ENABLED = 0, 1
    LLAMA_LOAD_MODE_NONE = 0
    MTMD_INPUT_CHUNK_TYPE_IMAGE = 1

    def __init__(self) -> None:
        self._path = library_path("llama")
        self._context = self._fitting("llama_context_default_params", _CONTEXTS)
        self._fitting("llama_model_default_params", [_MODEL])
        self._load_backends()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_") or name not in _FUNCTIONS:
            raise AttributeError(name)
        result, _, arguments = _FUNCTIONS[name].partition(" ")
        letters = _LETTERS | {"C": self._context}
        self.__dict__[name] = function = self._symbol(name)
        function.restype, function.argtypes = letters[result], [letters[letter] for letter in arguments]
        return function

    def llama_model_default_params(self) -> Any:
        """Return the library's defaults."""
        return self._defaults("llama_model_default_params", _MODEL)

    def llama_context_default_params(self) -> Any:
        """Return the library's defaults."""
        return self._defaults("llama_context_default_params", self._context)

    def mtmd_context_params_default(self) -> Any:
        """Return the library's defaults."""
        return self._defaults("mtmd_context_params_default", self._fitting("mtmd_context_params_default", [_MTMD]))

    def _load_backends(self) -> None:
        """Load what computes, where it lies beside the library in files of its own, as in llama.cpp's releases."""
        for path in (self._path, _in_folder(self._path.parent, "ggml")):
            library = path and _opened(path)
            if hasattr(library, "ggml_backend_load_all_from_path") and not library.ggml_backend_reg_count():
                library.ggml_backend_load_all_from_path(os.fsencode(self._path.parent))

    def _symbol(self, name: str) -> Any:
        path = library_path("mtmd") if name.startswith("mtmd") else self._path
        try:
            return getattr(_opened(path), name)
        except AttributeError as error:
            raise LibraryError(f"{path} has no function {name}: it is of another release. {_WAY_OUT}") from error

    def _defaults(self, name: str, layout: type[Structure]) -> Any:
        function = self._symbol(name)
        function.restype, function.argtypes = layout, []
        return function()

    def _fitting(self, name: str, layouts: Sequence[type[Structure]]) -> type[Structure]:
        """Return the layout in which all defaults have their known values."""
        for layout in layouts:
            values = self._defaults(name, layout)
            if all(getattr(values, field) == value for field, value in layout.defaults.items()):  # type: ignore[attr-defined]
                return layout
        raise LibraryError(f"The structures of {self._path} ({name}) are of another release. {_WAY_OUT}")


_WAY_OUT = (
    "Install llama-cpp-python 0.3.36 (pip install 'dynquant-toolchain[llama]', which needs a compiler) or xllamacpp "
    "2026.10 (dynquant-toolchain[llama-prebuilt])."
)


@cache
def llama_cpp() -> LlamaCpp:
    """Return the library that this process uses. Raises LibraryError: there is none, or it is of another release."""
    return LlamaCpp()


@cache
def library_path(name: str) -> Path:
    """Return the file that has the functions of `llama`, `mtmd` or `ggml-base`; no Python package is imported for it.

    Raises:
        LibraryError: there is none.
    """
    if chosen := os.environ.get(VARIABLE):
        place = Path(chosen)
        file = place if place.is_file() else _in_folder(place, name)
        if name != "llama" and place.is_file():  # a build of several libraries has them in one folder
            file = _in_folder(place.parent, name) or place
        if file is None:
            raise LibraryError(
                f"{VARIABLE} is {chosen}, which is no library of llama.cpp and no folder with one. Correct it."
            )
        return file
    if (package := _package("llama_cpp")) is not None:
        if (file := _in_folder(package / "lib", name)) is None:
            raise LibraryError(
                f"llama-cpp-python is installed, but {package / 'lib'} has no library {name}. {_WAY_OUT}"
            )
        return file
    files = [] if (package := _package("xllamacpp")) is None else sorted(package.glob("xllamacpp*.[sp][oy]*"))
    file = next((file for file in files if file.suffix in (".so", ".pyd")), None)
    if file is None:
        raise LibraryError(
            f"Neither llama-cpp-python nor xllamacpp is installed, one of which brings llama.cpp. {_WAY_OUT}"
        )
    return file


def is_installed() -> bool:
    """Tell whether there is a library of llama.cpp."""
    return bool(os.environ.get(VARIABLE)) or any(map(_package, ("llama_cpp", "xllamacpp")))


def _package(name: str) -> Path | None:
    try:
        spec = importlib.util.find_spec(name)
    except ImportError:  # said by a finder
        return None
    return None if spec is None or spec.origin is None else Path(spec.origin).parent


def _in_folder(folder: Path, name: str) -> Path | None:
    linked = [_GGML_NAMES[sys.platform]] if name == "ggml-base" and sys.platform in _GGML_NAMES else []
    files = (folder / file for file in (*linked, *(form.format(name) for form in _NAMES)))
    return next((file for file in files if file.is_file()), None)


@cache
def _opened(path: Path) -> ctypes.CDLL:
    try:
        return ctypes.CDLL(str(path))
    except OSError as error:
        way_out = f"It is what {VARIABLE} names: correct that." if os.environ.get(VARIABLE) else _WAY_OUT
        raise LibraryError(f"{path} cannot be loaded ({error}). {way_out}") from error
