"""A list of types as the arguments of llama-quantize that give the same types, and the way back.

For a matrix that it quantizes at all (`llama_mixtures.kept_because`), llama-quantize takes the first of: the types for
token embedding and output; the first `--tensor-type PATTERN=TYPE` whose pattern is found in the name (ECMAScript,
searched, lower-cased by the command line), if the base type is no float; the mixture of the base type. Every tensor
gets exactly one pattern here, anchored at both ends, so neither their order nor the mixture matters.

The way back reads a command line, or a list of patterns as recipes for ik_llama.cpp are published (one a line or
separated by commas, `#` begins a comment line). A list has no base type and must name every matrix.

The facts are those of `tools/quantize/quantize.cpp` and `src/llama-quant.cpp`; the tests run the latter.
"""

import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.inspect import TensorRecord
from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, QuantType, quant_type
from dynquant.formats.storage_format import Choice
from dynquant.inputs.records import check_is_file, check_start
from dynquant.patterns import compile_pattern
from dynquant.recipes import llama_mixtures as llama
from dynquant.recipes.build_plan import stays_f32
from dynquant.recipes.plan_notes import consecutive_runs
from dynquant.recipes.presets import with_fallbacks
from dynquant.recipes.type_lists import TypeList
from dynquant.storage.file_kinds import JSON, content_of

_FLOATS = ("F32", "F16", "BF16")
_BLOCK = re.compile(r"^((?:\w+\.)?blk)\.(\d+)\.(.+)$")
_TYPE_OPTIONS = {"--token-embedding-type": "token_embedding", "--output-tensor-type": "output"}
_PATTERN_OPTIONS = ("--tensor-type", "--custom-q")
_NUM_VALUES = {
    **dict.fromkeys(("--imatrix", "--include-weights", "--exclude-weights", "--override-kv"), 1),
    **dict.fromkeys(("--allow-requantize", "--keep-split", "--dry-run"), 0),
}
"""Options that do not decide types -> number of values, which are skipped."""


@dataclass(frozen=True)
class Recipe:
    """Arguments of llama-quantize. Types are registry names; patterns are as the command line takes them."""

    base: str | None  # a key of `LLAMA_FTYPES`; None in a list of patterns alone
    patterns: tuple[tuple[str, str], ...] = ()  # (regex, type); the first that is found in a name decides
    token_embedding: str | None = None
    output: str | None = None
    is_pure: bool = False  # True when tensors that nothing names get the base type itself, without llama.cpp's mixture

    @property
    def has_float_base(self) -> bool:
        return self.base is not None and QUANT_TYPES[llama.LLAMA_FTYPES[self.base].base].is_float


def recipe_of(types: TypeList) -> Recipe:
    """Return the recipe of a plan or file. Tensors that llama-quantize never changes are not in it (`left_alone`)."""
    tensors = [tensor for tensor in types.tensors if llama.kept_because(tensor.name, tensor.shape, types.arch) is None]
    used = {tensor.type for tensor in tensors}
    if used <= {"F32"} or (len(used) == 1 and used <= set(_FLOATS)):
        return Recipe(base=next(iter(used), "F32").lower())
    embedding = {tensor.type for tensor in tensors if tensor.name in llama.EMBEDDING_NAMES}
    # The option speaks of both embeddings at once; where they differ, patterns must tell them apart.
    has_option = len(embedding) == 1
    by_option = {llama.OUTPUT_NAME, *(llama.EMBEDDING_NAMES if has_option else ())}
    return Recipe(
        base=_commonest_base(tensors),
        patterns=_patterns(tensor for tensor in tensors if tensor.name not in by_option),
        token_embedding=embedding.pop() if has_option else None,
        output=next((tensor.type for tensor in tensors if tensor.name == llama.OUTPUT_NAME), None),
    )


def left_alone(types: TypeList) -> list[tuple[TensorRecord, str]]:
    """Return the tensors that llama-quantize copies from its input and that should not be F32, each with the reason."""
    kept = ((tensor, llama.kept_because(tensor.name, tensor.shape, types.arch)) for tensor in types.tensors)
    return [(tensor, why) for tensor, why in kept if why is not None and tensor.type != "F32"]


def uses_imatrix(recipe: Recipe) -> bool:
    """Return whether an importance matrix changes the file that the recipe makes."""
    base = () if recipe.base is None else (llama.LLAMA_FTYPES[recipe.base].base,)
    named = (*base, recipe.token_embedding, recipe.output, *(name for _, name in recipe.patterns))
    return any(QUANT_TYPES[name].uses_imatrix for name in named if name in QUANT_TYPES)


def command_line(recipe: Recipe, *, model: str, imatrix: str | None, output: str) -> str:
    """Write a recipe with a base type as a command for a shell, one option a line."""
    options = [] if imatrix is None else [("--imatrix", imatrix)]
    types = {option: getattr(recipe, field) for option, field in _TYPE_OPTIONS.items()}
    options += [(option, name.lower()) for option, name in types.items() if name]
    options += [("--tensor-type", f"{pattern}={name.lower()}") for pattern, name in recipe.patterns]
    lines = ["llama-quantize", *(f"  {shlex.join(option)}" for option in options)]
    return " \\\n".join([*lines, f"  {shlex.join((model, output, str(recipe.base).upper()))}"])


def _commonest_base(tensors: list[TensorRecord]) -> str:
    """The file type of the quantized type with most weights; Q8_0 when llama-quantize has no file type for any."""
    weights: Counter[str] = Counter()
    for tensor in tensors:
        weights[tensor.type] += tensor.num_weights
    for name, _ in weights.most_common():
        bases = [key for key, file_type in llama.LLAMA_FTYPES.items() if file_type.base == name]
        if bases and name not in _FLOATS:
            return name.lower() if name.lower() in bases else bases[0]
    return "q8_0"


def _patterns(tensors: Iterable[TensorRecord]) -> tuple[tuple[str, str], ...]:
    """Return disjoint patterns, one for the layers of a part and type; parts with the same layers share one."""
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
    inside = []
    for (block, where, type_name), names in parts.items():
        ending = ".weight" if len(names) > 1 and all(name.endswith(".weight") for name in names) else ""
        either = _any_of([_escaped(name.removesuffix(ending)) for name in names])  # a common ending is written once
        inside.append((rf"^{_escaped(block)}\.{where}\.{either}{_escaped(ending)}$", type_name))
    return (*outside, *inside)


def _any_of(choices: list[str]) -> str:
    return choices[0] if len(choices) == 1 else f"({'|'.join(choices)})"


def numbers_pattern(numbers: Iterable[int]) -> str:
    """Return a regex for exactly these numbers, decade by decade: 3 4 5 10 11 -> `([3-5]|1[01])`."""
    digits: dict[str, list[int]] = {}
    for number in sorted(set(numbers)):
        digits.setdefault(str(number)[:-1], []).append(number % 10)
    prefixes: dict[tuple[int, str], list[str]] = {}
    for prefix, last in digits.items():
        prefixes.setdefault((len(prefix), _digit_class(last)), []).append(prefix)
    choices = []
    for (length, last), starts in prefixes.items():
        if length == 1:
            choices.append(_digit_class([int(start) for start in starts]) + last)
        else:
            choices += [start + last for start in starts]
    return _any_of(choices)


def _digit_class(digits: list[int]) -> str:
    if len(digits) == 1:
        return str(digits[0])
    runs = consecutive_runs(digits)
    spans = [f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(map(str, run)) for run in runs]
    return f"[{''.join(spans)}]"


def _escaped(name: str) -> str:
    return re.sub(r"([^A-Za-z0-9_-])", r"\\\1", name)


def recipe_types(recipe: str, model: Model, *, fallbacks: Collection[QuantType] = ()) -> dict[str, Choice]:
    """Return type and reason of the model's tensors by a recipe: a file's name, or the text itself.

    F32 vectors are left out; `fallbacks` are as in `preset_types`.

    Raises:
        PlanError: no such file, a malformed recipe, an unknown type, a pattern that is found in no tensor, or a matrix
            without a type; it is named.
    """
    parsed = parse_recipe(_read_recipe(recipe))
    shapes = {name: tuple(model.source.info(name).shape) for name in model.source.names()}
    rules = [(compile_pattern(pattern.lower()), pattern, type_name) for pattern, type_name in parsed.patterns]
    for regex, pattern, _ in rules:
        if not any(regex.search(name) for name in shapes):
            raise PlanError(
                f"The pattern `{pattern}` of the recipe is found in no tensor of {model.name}. Correct or remove it; "
                "`dynquant inspect` and plan.json show the names."
            )

    def by_name(name: str) -> Choice | None:
        """Return what an option or a pattern says of a tensor; None for those that take the base type."""
        is_embedding = name in llama.EMBEDDING_NAMES
        if is_embedding and parsed.token_embedding:
            return Choice(parsed.token_embedding, "recipe: --token-embedding-type")
        if name == llama.OUTPUT_NAME and parsed.output:
            return Choice(parsed.output, "recipe: --output-tensor-type")
        for regex, pattern, type_name in rules:
            if regex.search(name):
                return Choice(type_name, f"recipe: {pattern}")
        is_tied, uses_mixture = llama.OUTPUT_NAME not in shapes, not parsed.is_pure and not parsed.has_float_base
        if is_embedding and is_tied and parsed.output and uses_mixture:
            return Choice(parsed.output, "recipe: --output-tensor-type, to which the token embedding is tied")
        return None

    reasons = {name: llama.kept_because(name, shape, model.arch) for name, shape in shapes.items()}
    named = {name: by_name(name) for name, reason in reasons.items() if reason is None}
    copied = {
        name: Choice("F32", f"recipe: not changed by llama.cpp, {reason}")
        for name, reason in reasons.items()
        if reason is not None and not stays_f32(name, shapes[name])
    }
    chosen = copied | {name: choice for name, choice in named.items() if choice}
    unnamed = [name for name, choice in named.items() if choice is None]
    return with_fallbacks(chosen, model, fallbacks) | _by_base(parsed, model, shapes, unnamed, fallbacks)


def _read_recipe(recipe: str) -> str:
    """Return the text of a file, or `recipe` itself when it has the form of one."""
    if os.path.exists(recipe):
        path = Path(recipe)
        check_is_file(path, PlanError)
        if (content := content_of(path)) not in ("", JSON):  # patterns may begin with a bracket, too
            raise PlanError(
                f"{recipe} is {content}, not a recipe. --like FILE takes the types of a plan or GGUF file, and "
                "`dynquant recipe FILE` prints its recipe."
            )
        try:
            check_start(path, PlanError)
            return path.read_text("utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"The recipe {recipe} cannot be read as text: {error}.") from error
    if "=" not in recipe and "--" not in recipe:
        raise PlanError(
            f"There is no file `{recipe}`, and it is not a recipe either. Give --recipe a file or text with "
            "`regex=type` lines or a llama-quantize command line; `dynquant recipe PLAN` prints one."
        )
    return recipe


def parse_recipe(text: str) -> Recipe:
    """Read the arguments in a text. Raises PlanError: an option that is not known or changes other things than types,
    an unknown type, a broken regex, or nothing at all."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    statement = "\n".join(lines)
    if re.search(r"(^|\s)--[a-z]", statement):
        return _parse_command(statement)
    recipe = Recipe(base=None, patterns=tuple(_listed(statement)))
    if not recipe.patterns:
        raise PlanError("The recipe is empty: it has no `regex=type` line and is no llama-quantize command line.")
    return recipe


def _by_base(
    recipe: Recipe,
    model: Model,
    shapes: dict[str, tuple[int, ...]],
    unnamed: list[str],
    fallbacks: Collection[QuantType],
) -> dict[str, Choice]:
    """Return the types of the tensors that nothing names."""
    if not unnamed:
        return {}
    if recipe.base is None:
        more = f" and {len(unnamed) - 1} more" if len(unnamed) > 1 else ""
        raise PlanError(
            f"The recipe has no pattern for `{unnamed[0]}`{more} of {model.name}. Add one (`.*=q6_k` as the last line "
            "names all that is left), or give a llama-quantize command line, whose base type is for the rest."
        )
    if recipe.is_pure or recipe.has_float_base:
        everywhere = Choice(llama.LLAMA_FTYPES[recipe.base].base, "recipe: base type")
        return with_fallbacks(dict.fromkeys(unnamed, everywhere), model, fallbacks)
    named = shapes.keys() - set(unnamed)
    mixture = llama.llama_tensor_types(recipe.base, shapes.items(), model.hyper, overridden=named, fallbacks=fallbacks)
    return {name: Choice(by.type, f"recipe, by no pattern: {by.reason}") for name, by in mixture.items()}


def _parse_command(text: str) -> Recipe:
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise PlanError(f"The recipe is no command line that a shell understands: {error}.") from error
    program = next((i for i, word in enumerate(words) if re.search(r"quantize(\.exe)?$", word)), -1)
    rest = iter(words[program + 1 :])
    types: dict[str, str] = {}
    patterns: list[tuple[str, str]] = []
    positional: list[str] = []
    is_pure = False
    for word in rest:
        if positional or not word.startswith("--"):  # options end at the first other word
            positional.append(word)
        elif word in _TYPE_OPTIONS:
            types[_TYPE_OPTIONS[word]] = _type_name(_value(rest, word), word)
        elif word in _PATTERN_OPTIONS:
            patterns += _listed(_value(rest, word))
        elif word == "--tensor-type-file":
            if not os.path.isfile(file := _value(rest, word)):
                raise PlanError(f"The recipe refers to the file `{file}` with --tensor-type-file, and there is none.")
            patterns += _listed(_read_recipe(file))
        elif word in _NUM_VALUES:
            for _ in range(_NUM_VALUES[word]):
                _value(rest, word)
        elif word == "--pure":
            is_pure = True
        else:
            raise PlanError(
                f"The recipe has the option `{word}`, which dynquant cannot follow. Take it out, and say what it did "
                "with --tensor-type PATTERN=TYPE."
            )
    recipe = Recipe(_base(positional), tuple(patterns), is_pure=is_pure, **types)
    if patterns and recipe.has_float_base:
        raise PlanError(
            f"llama-quantize ignores --tensor-type when the base type is a float, and the recipe's is {recipe.base}. "
            "Give a quantized base type, as Q8_0."
        )
    return recipe


def _value(rest: Iterator[str], option: str) -> str:
    value = next(rest, None)
    if value is None:
        raise PlanError(f"The option `{option}` at the end of the recipe has no value.")
    return value


def _base(positional: list[str]) -> str | None:
    """The file type among `MODEL [OUT] TYPE [THREADS]`, as a name or number; None when there are no such words."""
    numbers = {str(file_type.id): name for name, file_type in reversed(llama.LLAMA_FTYPES.items())}
    for word in positional[:3]:
        if word in numbers:
            return numbers[word]
        with suppress(PlanError):
            return llama.file_type_name(word)
    if positional:
        raise PlanError(
            f"The command line ends in `{' '.join(positional[:4])}`, without a file type of llama.cpp that dynquant "
            "knows. It must end in MODEL OUT TYPE, as in.gguf out.gguf Q4_K_M."
        )
    return None


def _listed(text: str) -> Iterator[tuple[str, str]]:
    """`regex=type` entries between white space, or between commas where each part is one."""
    for word in text.split():
        parts = [part for part in word.split(",") if part]
        for part in parts if all("=" in part for part in parts) else [word]:
            pattern, equals, type_name = part.partition("=")
            if not pattern or not equals or not type_name:
                raise PlanError(f"`{part}` in the recipe is not of the form `regex=type`, as ffn_down_exps=iq2_xxs.")
            _check_pattern(pattern)
            yield pattern, _type_name(type_name, pattern)


def _check_pattern(pattern: str) -> None:
    try:
        compile_pattern(pattern.lower())
    except ValueError as error:
        raise PlanError(
            f"The pattern `{pattern:.200}` of the recipe is no regular expression to follow: {error!s:.200}. "
            "Look-ahead and back references are not known; write alternatives, as ffn_(gate|up|down)_exps."
        ) from error


def _type_name(name: str, where: str) -> str:
    try:
        return quant_type(name).name
    except PlanError as error:
        raise PlanError(
            f"The recipe gives `{where}` the type `{name}`. {error} Types of forks (as IQ4_KS of ik_llama.cpp) cannot "
            "be written; take the type of stock llama.cpp with the nearest bits per weight."
        ) from error
