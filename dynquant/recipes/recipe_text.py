"""A list of types as the arguments of llama-quantize that give the same types.

For a matrix that it quantizes at all (`llama_presets.kept_because`), llama-quantize takes the first of: the types for
token embedding and output; the first `--tensor-type PATTERN=TYPE` whose pattern is found in the name (ECMAScript,
searched, lower-cased by the command line), if the base type is no float; the mixture of the base type. Every tensor
gets exactly one pattern here, anchored at both ends, so neither their order nor the mixture matters.

The facts are those of `tools/quantize/quantize.cpp` and `src/llama-quant.cpp`; the tests run the latter.
"""

import re
import shlex
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from dynquant.checkpoints.inspect import TensorRecord
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.recipes.llama_mixtures import EMBEDDING_NAMES, LLAMA_FTYPES, OUTPUT_NAME, kept_because
from dynquant.recipes.type_lists import TypeList, consecutive_runs

_FLOATS = ("F32", "F16", "BF16")
_BLOCK = re.compile(r"^((?:\w+\.)?blk)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Recipe:
    """Arguments of llama-quantize. Types are registry names; patterns are as the command line takes them."""

    base: str | None
    """A key of `LLAMA_FTYPES`; None in a list of patterns alone."""
    patterns: tuple[tuple[str, str], ...] = ()
    """(regex, type); the first that is found in a name decides."""
    token_embedding: str | None = None
    output: str | None = None
    is_pure: bool = False
    """What nothing names gets the base type itself, without llama.cpp's mixture."""


def recipe_of(types: TypeList) -> Recipe:
    """The recipe of a plan or file. Tensors that llama-quantize never changes are not in it (`left_alone`)."""
    tensors = [tensor for tensor in types.tensors if kept_because(tensor.name, tensor.shape, types.arch) is None]
    used = {tensor.type for tensor in tensors}
    if used <= {"F32"} or (len(used) == 1 and used <= set(_FLOATS)):
        return Recipe(base=next(iter(used), "F32").lower())
    embedding = {tensor.type for tensor in tensors if tensor.name in EMBEDDING_NAMES}
    # The option speaks of both embeddings at once; where they differ, patterns must tell them apart.
    has_option = len(embedding) == 1
    by_option = {OUTPUT_NAME, *(EMBEDDING_NAMES if has_option else ())}
    return Recipe(
        base=_base(tensors),
        patterns=_patterns(tensor for tensor in tensors if tensor.name not in by_option),
        token_embedding=embedding.pop() if has_option else None,
        output=next((tensor.type for tensor in tensors if tensor.name == OUTPUT_NAME), None),
    )


def left_alone(types: TypeList) -> list[tuple[TensorRecord, str]]:
    """Tensors that llama-quantize copies from its input and that should not be F32, each with the reason."""
    kept = ((tensor, kept_because(tensor.name, tensor.shape, types.arch)) for tensor in types.tensors)
    return [(tensor, why) for tensor, why in kept if why is not None and tensor.type != "F32"]


def uses_imatrix(recipe: Recipe) -> bool:
    """Whether an importance matrix changes the file that the recipe makes."""
    base = () if recipe.base is None else (LLAMA_FTYPES[recipe.base].base,)
    named = (*base, recipe.token_embedding, recipe.output, *(name for _, name in recipe.patterns))
    return any(QUANT_TYPES[name].uses_imatrix for name in named if name in QUANT_TYPES)


def command_line(recipe: Recipe, *, model: str, imatrix: str | None, output: str) -> str:
    """The command for a shell, one option a line, of a recipe with a base type."""
    options = []
    if imatrix is not None:
        options.append(("--imatrix", imatrix))
    if recipe.token_embedding:
        options.append(("--token-embedding-type", recipe.token_embedding.lower()))
    if recipe.output:
        options.append(("--output-tensor-type", recipe.output.lower()))
    options += [("--tensor-type", f"{pattern}={name.lower()}") for pattern, name in recipe.patterns]
    lines = ["llama-quantize", *(f"  {shlex.join(option)}" for option in options)]
    return " \\\n".join([*lines, f"  {shlex.join((model, output, str(recipe.base).upper()))}"])


def _base(tensors: list[TensorRecord]) -> str:
    """The file type of the quantized type with most weights; Q8_0 when llama-quantize has no file type for any."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += tensor.num_weights
    for name, _ in weights.most_common():
        found = [key for key, file_type in LLAMA_FTYPES.items() if file_type.base == name]
        if found and name not in _FLOATS:
            return name.lower() if name.lower() in found else found[0]
    return "q8_0"


def _patterns(tensors: Iterable[TensorRecord]) -> tuple[tuple[str, str], ...]:
    """Disjoint patterns: layers of one part and type become one class, parts with the same layers one alternation."""
    layers: dict[tuple[str, str], dict[str, list[int]]] = {}
    outside: list[tuple[str, str]] = []
    for tensor in tensors:
        match = _BLOCK.match(tensor.name)
        if match is None:
            outside.append((f"^{_escaped(tensor.name)}$", tensor.type))
        else:
            block, layer, part = match.groups()
            layers.setdefault((block, part), {}).setdefault(tensor.type, []).append(int(layer))
    parts: dict[tuple[str, str, str], list[str]] = {}
    for (block, part), by_type in layers.items():
        for name, numbers in by_type.items():
            where = "[0-9]+" if len(by_type) == 1 else numbers_pattern(numbers)
            parts.setdefault((block, where, name), []).append(part)
    inside = [
        (rf"^{_escaped(block)}\.{where}\.{_alternatives(found)}$", name)
        for (block, where, name), found in parts.items()
    ]
    return (*outside, *inside)


def _alternatives(parts: list[str]) -> str:
    stems = [part.removesuffix(".weight") for part in parts]
    if len(parts) == 1 or not all(part.endswith(".weight") for part in parts):
        whole = [_escaped(part) for part in parts]
        return whole[0] if len(whole) == 1 else f"({'|'.join(whole)})"
    return rf"({'|'.join(map(_escaped, stems))})\.weight"


def numbers_pattern(numbers: Iterable[int]) -> str:
    """A regex for exactly these numbers, decade by decade: 3 4 5 10 11 -> `([3-5]|1[01])`."""
    digits: dict[str, list[int]] = {}
    for number in sorted(set(numbers)):
        digits.setdefault(str(number)[:-1], []).append(number % 10)
    prefixes: dict[tuple[int, str], list[str]] = {}
    for prefix, last in digits.items():
        prefixes.setdefault((len(prefix), _digit_class(last)), []).append(prefix)
    choices = []
    for (length, last), found in prefixes.items():
        if length == 1:
            choices.append(_digit_class([int(prefix) for prefix in found]) + last)
        else:
            choices += [prefix + last for prefix in found]
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"


def _digit_class(digits: list[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    runs = consecutive_runs(digits)
    words = [f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs]
    return f"[{''.join(words)}]"


def _escaped(name: str) -> str:
    return re.sub(r"([^A-Za-z0-9_-])", r"\\\1", name)
