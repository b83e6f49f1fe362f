"""Makes Triton's interpreter, which is chosen by TRITON_INTERPRET=1, run loops over arguments under NumPy 2.4."""

import triton.runtime.interpreter as interpreter

_patched = interpreter._patch_lang_tensor


def _patch_lang_tensor(tensor, scope):
    """NumPy 2.4 no longer turns arrays of one element into an index, which loops over arguments need."""
    _patched(tensor, scope)
    scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))


interpreter._patch_lang_tensor = _patch_lang_tensor
