"""Compiles Triton kernels for a GPU, an H100 unless told, on a machine without one, with the tools of Triton."""

import re
import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.experimental.gluon._runtime import GluonASTSource

TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


def compiled(
    kernel,
    types: dict[str, str],
    constants: dict[str, object],
    multiples_of_16: set[str],
    *,
    capability: int = 90,
    **options,
) -> CompiledKernel:
    """Return a compiled kernel: `types` as Triton spells them, for arguments that are not constants."""
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = [(i,) for i, name in enumerate(kernel.arg_names) if name.endswith("_ptr") or name in multiples_of_16]
    attributes = {index: [["tt.divisibility", 16]] for index in aligned if kernel.arg_names[index[0]] in types}
    form = GluonASTSource if kernel.is_gluon() else ASTSource
    source = form(kernel, signature, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def opcodes(*arguments, **options) -> list[str]:
    """The machine instructions of a kernel, with the arguments of `compiled`."""
    with TemporaryDirectory() as folder:
        binary = Path(folder) / "kernel.cubin"
        binary.write_bytes(compiled(*arguments, **options).asm["cubin"])
        listing = subprocess.run([TOOLS / "nvdisasm", "-c", binary], capture_output=True, text=True, check=True).stdout
    return re.findall(r"^\s+/\*[0-9a-f]+\*/\s+(?:@!?U?P\w+ )?([A-Z0-9_.]+)", listing, re.MULTILINE)


def count(codes: list[str], *prefixes: str) -> int:
    """How many instructions begin with one of the prefixes."""
    return sum(code.startswith(prefixes) for code in codes)
