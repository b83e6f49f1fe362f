"""Compilation of the loops of this folder by numba, kept on disk where there is a place for it.

Loops release the GIL. Sums keep the order in which they are written, so that equal rows get equal bytes wherever they
stand in a batch; only where it is said may a product and a sum be one instruction (which is as deterministic).
"""

import zlib
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numba
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

ROWS = 128
"""Rows of weights side by side in a tile, arrays [columns, ROWS]: what is done to one is done to all, in vectors."""
NUM_LINKS = 5
"""Functions that are called by their addresses; see `Linked`."""

_MARK = f"_{zlib.crc32(b''.join(path.read_bytes() for path in sorted(Path(__file__).parent.glob('*.py')))):08x}"
"""Part of the names under which compiled functions are kept: numba sees a change of a function's own file, not of the
functions in others that it took in."""


def compiled(function: Callable[..., Any]) -> Any:
    """Return the function, compiled when it is first called."""
    return _jit(function)


def inner(function: Callable[..., Any]) -> Any:
    """Like `compiled`, for functions that only compiled ones call."""
    return _jit(function, no_cpython_wrapper=True)


def inner_fused(function: Callable[..., Any]) -> Any:
    """Like `inner`, with products and sums fused where the processor can."""
    return _jit(function, no_cpython_wrapper=True, fastmath={"contract"})


def _jit(function: Callable[..., Any], **options: Any) -> Any:
    function.__qualname__ += _MARK
    build = partial(numba.njit, nogil=True, error_model="numpy", no_cfunc_wrapper=True, **options)
    try:
        kept = build(cache=True)(function)
    except RuntimeError:  # nowhere to write: neither beside the source nor in the user's cache
        return build()(function)
    if not numba.config.DISABLE_JIT:
        kept._cache.save_overload = partial(_save_where_possible, kept._cache.save_overload)
    return kept


def _save_where_possible(save: Callable[..., None], *compiled_code: Any) -> None:
    """Keep compiled code, unless the disk is full: the next run compiles again."""
    with suppress(OSError):
        save(*compiled_code)


class Linked:
    """A compiled function that others call by its address instead of taking in its code, which would be compiled again
    with each of them.

    `place` is that of the address in the tuple that all of them are handed; `arguments` are examples of the arguments.
    """

    def __init__(self, function: Any, place: int, arguments: Callable[[], tuple[Any, ...]]) -> None:
        self._function, self._place, self._arguments = function, place, arguments
        self.call = intrinsic(self._typed)
        """Called as `call(links, (argument, ...))` in compiled functions."""

    @cached_property
    def _built(self) -> Any:
        signature = tuple(map(numba.typeof, self._arguments()))
        self._function.compile(signature)
        return self._function.overloads[signature]

    @property
    def address(self) -> int:
        """Place of the function in memory; it is compiled if it was not yet."""
        return self._built.library.get_pointer_to_function(self._built.fndesc.llvm_func_name)

    def _typed(self, typing_context, links, arguments):  # type: ignore[no-untyped-def]
        expected = self._built.signature.args
        given = tuple(map(types.unliteral, arguments.types))
        if given != expected:
            raise TypeError(f"linked function takes {expected}, not {given}")

        def generate(context, builder, signature, values):  # type: ignore[no-untyped-def]
            address = builder.extract_value(values[0], self._place)
            kind = context.call_conv.get_function_type(types.none, expected)
            function = builder.inttoptr(address, kind.as_pointer())
            passed = cgutils.unpack_tuple(builder, values[1])
            status, _ = context.call_conv.call_function(builder, function, types.none, expected, passed)
            with cgutils.if_unlikely(builder, status.is_error):
                context.call_conv.return_status_propagate(builder, status)
            return context.get_dummy_value()

        return types.none(links, arguments), generate
