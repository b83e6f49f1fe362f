"""The way back: a llama-quantize command line, or a list of `regex=type`, as types for a model.

A command line means what llama-quantize would do with it (`recipe_text.py` has the order): tensors that no pattern
names get the mixture of its base type. A list of patterns, as recipes for ik_llama.cpp are published (one a line or
separated by commas, `#` begins a comment line), has no base type and must name every matrix.
"""

import os
import re
import shlex
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError
from dynquant.formats.quant_types import QUANT_TYPES, quant_type
from dynquant.recipes.build_plan import stays_f32
from dynquant.recipes.llama_mixtures import (
    EMBEDDING_NAMES,
    LLAMA_FTYPES,
    OUTPUT_NAME,
    file_type_name,
    kept_because,
    llama_tensor_types,
)
from dynquant.recipes.recipe_text import Recipe

_TYPE_OPTIONS = {"--token-embedding-type": "token_embedding", "--output-tensor-type": "output"}
_PATTERN_OPTIONS = ("--tensor-type", "--custom-q")
_MAX_REPEATS = 3
_WITHOUT_MEANING = {
    "--imatrix": 1, "--include-weights": 1, "--exclude-weights": 1, "--override-kv": 1,
    "--allow-requantize": 0, "--keep-split": 0, "--dry-run": 0,
}  # fmt: skip
"""Options that do not decide types -> number of values."""


def recipe_types(recipe: str, model: Model) -> dict[str, tuple[str, str]]:
    """Type and reason of the model's tensors by a recipe: a file's name, or the text itself. F32 vectors are left out.

    Raises:
        PlanError: no such file, a malformed recipe, an unknown type, a pattern that is found in no tensor, or a matrix
            without a type; it is named.
    """
    return types_by(parse_recipe(read_recipe(recipe)), model)


def read_recipe(recipe: str) -> str:
    """The text of a file, or `recipe` itself when it has the form of one.

    Raises:
        PlanError: neither, or not text.
    """
    if os.path.isfile(recipe):
        try:
            return Path(recipe).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise PlanError(f"The recipe {recipe} cannot be read as text: {error}.") from error
    if "=" not in recipe and "--" not in recipe:
        raise PlanError(
            f"There is no file `{recipe}`, and it is not a recipe either. Give --recipe a file or text with "
            "`regex=type` lines or a llama-quantize command line; `dynquant recipe PLAN` prints one."
        )
    return recipe


def parse_recipe(text: str) -> Recipe:
    """The arguments in a text.

    Raises:
        PlanError: an option that is not known or changes other things than types, an unknown type, a broken regex, or
            nothing at all.
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    words = "\n".join(lines)
    if re.search(r"(^|\s)--[a-z]", words):
        return _command(words)
    recipe = Recipe(base=None, patterns=tuple(_listed(words)))
    if not recipe.patterns:
        raise PlanError("The recipe is empty: it has no `regex=type` line and is no llama-quantize command line.")
    return recipe


def types_by(recipe: Recipe, model: Model) -> dict[str, tuple[str, str]]:
    """What llama-quantize would store, as `recipe_types`."""
    shapes = {name: tuple(model.source.info(name).shape) for name in model.source.names()}
    rules = [(re.compile(pattern.lower()), pattern, type_name) for pattern, type_name in recipe.patterns]
    for regex, pattern, _ in rules:
        if not any(regex.search(name) for name in shapes):
            raise PlanError(
                f"The pattern `{pattern}` of the recipe is found in no tensor of {model.name}. Correct or remove it; "
                "`dynquant inspect` and plan.json show the names."
            )
    types: dict[str, tuple[str, str]] = {}
    missing = []
    for name, shape in shapes.items():
        kept = kept_because(name, shape, model.arch)
        if kept is None:
            named = _named_type(recipe, rules, name, is_tied=OUTPUT_NAME not in shapes)
            if named is None:
                missing.append(name)
            else:
                types[name] = named
        elif not stays_f32(name, shape):
            types[name] = ("F32", f"recipe: not changed by llama.cpp, {kept}")
    return types | _by_base(recipe, model, shapes, missing)


def _named_type(
    recipe: Recipe, rules: list[tuple[re.Pattern[str], str, str]], name: str, *, is_tied: bool
) -> tuple[str, str] | None:
    is_embedding = name in EMBEDDING_NAMES
    if is_embedding and recipe.token_embedding:
        return recipe.token_embedding, "recipe: --token-embedding-type"
    if name == OUTPUT_NAME and recipe.output:
        return recipe.output, "recipe: --output-tensor-type"
    for regex, pattern, type_name in rules:
        if regex.search(name):
            return type_name, f"recipe: {pattern}"
    uses_mixture = not recipe.is_pure and not _has_float_base(recipe)
    if is_embedding and is_tied and recipe.output and uses_mixture:
        return recipe.output, "recipe: --output-tensor-type, to which the token embedding is tied"
    return None


def _by_base(
    recipe: Recipe, model: Model, shapes: dict[str, tuple[int, ...]], missing: list[str]
) -> dict[str, tuple[str, str]]:
    """Types of the tensors that nothing names."""
    if not missing:
        return {}
    if recipe.base is None:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PlanError(
            f"The recipe has no pattern for `{missing[0]}`{more} of {model.name}. Add one (`.*=q6_k` as the last line "
            "names all that is left), or give a llama-quantize command line, whose base type is for the rest."
        )
    if recipe.is_pure or _has_float_base(recipe):
        return dict.fromkeys(missing, (LLAMA_FTYPES[recipe.base].base, "recipe: base type"))
    named = shapes.keys() - set(missing)
    mixture = llama_tensor_types(recipe.base, shapes.items(), model.hyper, overridden=named)
    return {name: (type_name, f"recipe, by no pattern: {why}") for name, (type_name, why) in mixture.items()}


def _has_float_base(recipe: Recipe) -> bool:
    return recipe.base is not None and QUANT_TYPES[LLAMA_FTYPES[recipe.base].base].is_float


def _command(text: str) -> Recipe:
    try:
        words = shlex.split(text.replace("\\\n", " "))
    except ValueError as error:
        raise PlanError(f"The recipe is no command line that a shell understands: {error}.") from error
    program = next((i for i, word in enumerate(words) if re.search(r"quantize(\.exe)?$", word)), -1)
    rest = iter(words[program + 1 :])
    types: dict[str, str] = {}
    patterns: list[tuple[str, str]] = []
    is_pure = False
    positional: list[str] = []
    for word in rest:
        if positional or not word.startswith("--"):
            positional.append(word)
        elif word == "--pure":
            is_pure = True
        elif word in _TYPE_OPTIONS:
            types[_TYPE_OPTIONS[word]] = _type_name(_value(rest, word), word)
        elif word in _PATTERN_OPTIONS:
            patterns += _listed(_value(rest, word))
        elif word == "--tensor-type-file":
            patterns += _listed(_listed_file(_value(rest, word)))
        elif word in _WITHOUT_MEANING:
            for _ in range(_WITHOUT_MEANING[word]):
                _value(rest, word)
        else:
            raise PlanError(
                f"The recipe has the option `{word}`, which dynquant cannot follow. Take it out, and say what it did "
                "with --tensor-type PATTERN=TYPE."
            )
    recipe = Recipe(_base(positional), tuple(patterns), is_pure=is_pure, **types)
    if patterns and _has_float_base(recipe):
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
    numbers = {str(file_type.id): name for name, file_type in reversed(LLAMA_FTYPES.items())}
    for word in positional[:3]:
        if word in numbers:
            return numbers[word]
        with suppress(PlanError):
            return file_type_name(word)
    if positional:
        raise PlanError(
            f"The command line ends in `{' '.join(positional[:4])}`, without a file type of llama.cpp that dynquant "
            "knows. It must end in MODEL OUT TYPE, as in.gguf out.gguf Q4_K_M."
        )
    return None


def _listed_file(name: str) -> str:
    if not os.path.isfile(name):
        raise PlanError(f"The recipe refers to the file `{name}` with --tensor-type-file, and there is none.")
    return read_recipe(name)


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
    """Refuse what does not compile, and what could keep Python's matcher busy for years on one name."""
    plain = re.sub(r"\\.|\[\^?\]?(\\.|[^\]\\])*\]", "x", pattern)
    if re.search(r"\)[*+{]", plain) or len(re.findall(r"[*+]|\{\d*,\d*\}", plain)) > _MAX_REPEATS:
        raise PlanError(
            f"The pattern `{pattern:.200}` of the recipe repeats a group, or repeats more than {_MAX_REPEATS} things: "
            "such an expression can take years on one name. Write it with alternatives, as ffn_(gate|up|down)_exps."
        )
    try:
        re.compile(pattern.lower())
    except (re.error, RecursionError, OverflowError) as error:
        raise PlanError(f"The pattern `{pattern:.200}` of the recipe is no regular expression: {error}.") from error


def _type_name(name: str, where: str) -> str:
    try:
        return quant_type(name).name
    except PlanError as error:
        raise PlanError(
            f"The recipe gives `{where}` the type `{name}`. {error} Types of forks (as IQ4_KS of ik_llama.cpp) cannot "
            "be written; take the type of stock llama.cpp with the nearest bits per weight."
        ) from error
