"""Options of a step are one dataclass beside its door; `Flag` says what the command line shows of a field.

    tokens: Annotated[int, Flag("Calibrate on this many tokens.")] = 131072

`cli/terminal/parameters.py` turns such fields into parameters of a command, so that a flag, its default and its help
stand once.
A field without a `Flag` is for callers in Python; a field that is itself such a dataclass shows its fields, or those
that `Only` names. `Options`, their base, checks numbers, choices and names of outputs for the command line and for
callers in Python alike.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, fields
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal, Self, TypeVar, get_args, get_type_hints

from dynquant.errors import OptionError
from dynquant.resources import parse_size, parse_tokens, shown_value

LARGEST = 2**31 - 1
"""Largest number of an option without a maximum of its own, and of a C int, which counts tokens in llama.cpp."""

_Note = TypeVar("_Note")
_FILE_ENDINGS = frozenset({
    ".bin", ".csv", ".dat", ".gguf", ".gz", ".html", ".json", ".jsonl", ".md", ".npz", ".parquet", ".pt", ".pth",
    ".safetensors", ".txt", ".zip",
})  # fmt: skip
"""Ends of names, in lower case, that are of files; `.5` of `model-2.5` is no such."""


@dataclass(frozen=True)
class Flag:
    """Appearance of a field of an options dataclass on the command line."""

    help: str
    names: tuple[str, ...] = ()
    """Such as `("-o", "--output")`; empty for the field's own name with dashes."""
    is_argument: bool = False
    show_default: bool = True
    min: float | None = None
    """Every number, and every size in bytes, has one."""
    max: float = LARGEST
    is_size: bool = False
    """A text such as `140GB`."""
    is_tokens: bool = False
    """A number of tokens, which may be typed as `16k`."""
    choices: tuple[str, ...] = ()
    """All values that there are, for a field of several each of them; empty for a field of any."""
    parse: Callable[[str], Any] | None = None
    """Makes the value of what was typed; a field of type tuple[str, ...] is split at commas without it."""

    def option(self, field: str) -> str:
        """Return the longest name on the command line."""
        return max(self.names, key=len, default=f"--{field.replace('_', '-')}")

    @property
    def range(self) -> str:
        """The range in words, or nothing where everybody expects it; and what k is of tokens."""
        tokens = " 16k is 16,384." * self.is_tokens
        if self.min is None or (self.max == LARGEST and self.min <= 1):
            return tokens.strip()
        return (f"At least {self.min:,}." if self.max == LARGEST else f"From {self.min:,} to {self.max:,}.") + tokens

    def tokens(self, typed: str, field: str) -> int:
        """Return the number of tokens that was typed, or raise OptionError for none."""
        try:
            return parse_tokens(typed)
        except OptionError as error:
            raise OptionError(f"{self.option(field)} {error}") from error

    def check(self, value: Any, field: str, *, is_whole: bool) -> None:
        """Raise OptionError for a number or size outside the range, or none of the choices."""
        if self.choices:
            self._check_choice(value, field)
            return
        try:
            number = parse_size(value) if self.is_size else value
        except OptionError as error:
            raise OptionError(f"{self.option(field)} {error}") from error
        assert self.min is not None
        if self.is_size and number >= self.min:
            return
        if not self.is_size and self.min <= number <= self.max and (isinstance(number, int) or not is_whole):
            return
        allowed = f"a {'whole ' * is_whole}number from {self.min:,} to {self.max:,}"
        allowed = f"a size of at least {self.min} B, as 140GB" if self.is_size else allowed
        raise OptionError(f"{self.option(field)} {shown_value(value)} is out of range; give {allowed}.")

    def _check_choice(self, value: Any, field: str) -> None:
        is_one, listed = isinstance(value, str), ", ".join(self.choices)
        way_out = f"give {'one' if is_one else 'some'} of {listed}."
        if len(self.choices) == 1:
            way_out = f"give {listed}, or leave it out."
        for each in [value] if is_one else value:
            if each not in self.choices:
                raise OptionError(f"{self.option(field)} {each} is not known; {way_out}")
        if not value:
            raise OptionError(f"{self.option(field)} names none; {way_out}")


@dataclass(frozen=True)
class Writes:
    """Note on the path of an output: no other process writes it meanwhile, and it is none of what the command reads."""

    kind: Literal["file", "folder", "new folder", "either"] = "file"
    """A folder may hold inputs, too; a new folder is deleted and made again."""
    unless: str = ""
    """Parameter under which the command does not write it."""
    beside: Callable[[Path, Mapping[str, Any]], Iterable[Path]] = lambda output, typed: ()
    """Names the files that may be written beside it, or into it, by what was typed: they are guarded alike."""
    reuses: tuple[str, ...] = ()
    """Parameters that may name such a file, which is then left as it is."""
    ending: str = ""
    """The end of names of such files; another is refused."""

    def check_name(self, output: Path, option: str) -> None:
        """Raise OptionError for the name of a file where a folder is written, or of anything but such a file."""
        if self.ending:
            check_ending(output, self.ending, option)
        if self.kind.endswith("folder"):
            check_folder_name(output, option)


def check_ending(output: Path, ending: str, option: str) -> None:
    """Raise OptionError, with a name that would do, for one that does not end as such files do, or is of a folder."""
    if output.is_dir():
        raise OptionError(f"{output} ({option}) is a directory; give the name of the {ending} file to write.")
    if output.suffix == ending:
        return
    if not output.suffix:
        raise OptionError(
            f"{output} ({option}) is to be a file, and its name reads like that of a folder. Give one that ends in "
            f"{ending}, as {output / 'NAME'}{ending}."
        )
    is_known = output.suffix.lower() in _FILE_ENDINGS
    name = output.with_suffix(ending) if is_known else output.with_name(output.name + ending)
    raise OptionError(f"{output} ({option}) does not end in {ending}, as such files do; name it {name}.")


def check_folder_name(output: Path, option: str) -> None:
    """Raise OptionError for a folder, not there yet, that would have the name of a file."""
    if output.suffix.lower() in _FILE_ENDINGS and not output.is_dir():
        raise OptionError(
            f"{output} ({option}) has the name of a file, and a folder is written. Give a name without "
            f"{output.suffix}, as {output.with_suffix('')}."
        )


_TYPED: ContextVar[frozenset[str]] = ContextVar("typed", default=frozenset())


@contextmanager
def typed_fields(names: Iterable[str]) -> Iterator[None]:
    """Context manager: options that are made within had these fields on the command line."""
    token = _TYPED.set(frozenset(names))
    try:
        yield
    finally:
        _TYPED.reset(token)


@dataclass(frozen=True)
class Options:
    """Base of options dataclasses: whoever makes one, numbers lie in the ranges of their flags, values are among their
    choices, and outputs have names of what they are."""

    _typed = frozenset[str]()  # no field: names of fields that stood on the command line, be it with their defaults
    _filled = frozenset[str]()  # no field: names of fields whose values are those of an effort

    def __post_init__(self) -> None:
        object.__setattr__(self, "_typed", _TYPED.get())
        defaults = {field.name: field.default for field in fields(self)}
        for name, (kind, flag) in flags(type(self)).items():
            value = getattr(self, name)
            if (flag.min is not None or flag.choices) and value not in (None, defaults[name]):
                flag.check(value, name, is_whole=int in (kind, *get_args(kind)))
        for name, (flag, writes) in _outputs(type(self)).items():
            if (output := getattr(self, name)) is not None:
                writes.check_name(output, flag.option(name))

    def changed(self, *names: str) -> list[str]:
        """Return the flags of fields, among these or all, that were typed or have another value than their default."""
        shown, defaults = flags(type(self)), {field.name: field.default for field in fields(self)}
        asked = [
            name
            for name in names or shown
            if name in self._typed or (name not in self._filled and getattr(self, name) != defaults[name])
        ]
        is_off = {name: defaults[name] is True and not getattr(self, name) for name in asked}
        return [shown[name][1].option(f"no_{name}" if is_off[name] else name) for name in asked]

    def filled(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with these values of fields that are at their defaults and were not typed; to `changed` they
        stay as they were."""
        defaults = {field.name: field.default for field in fields(self)}
        free = {name for name in values if name not in self._typed and getattr(self, name) == defaults[name]}
        copied = self.changed_to({name: values[name] for name in free})
        object.__setattr__(copied, "_filled", self._filled | free)
        return copied

    def changed_to(self, values: Mapping[str, Any]) -> Self:
        """Return a copy with other values of fields, in which those that were typed still count as typed."""
        copied = copy(self)
        for name, value in values.items():
            object.__setattr__(copied, name, value)
        return copied

    def refuse_unused(self, why: str, *names: str) -> None:
        """Raise OptionError for fields that were asked for, and that nothing would read."""
        if unused := self.changed(*names):
            raise OptionError(f"{' and '.join(unused)} would do nothing: {why} Leave it out.")


@cache
def flags(options: type) -> dict[str, tuple[Any, Flag]]:
    """Return type and flag of each field that has one."""
    hints = get_type_hints(options, include_extras=True).items()
    return {name: (hint.__origin__, flag) for name, hint in hints if (flag := note_of(hint, Flag)) is not None}


@cache
def _outputs(options: type) -> dict[str, tuple[Flag, Writes]]:
    """Return flag and note of each field that is an output."""
    hints, shown = get_type_hints(options, include_extras=True).items(), flags(options)
    return {name: (shown[name][1], writes) for name, hint in hints if (writes := note_of(hint, Writes)) is not None}


def note_of(hint: Any, kind: type[_Note]) -> _Note | None:
    """Return the note of a kind that an Annotated type has; None where it has none, and of another type."""
    return next((note for note in getattr(hint, "__metadata__", ()) if isinstance(note, kind)), None)


def shown_values(options: Options) -> Iterator[tuple[Flag, str, Any, bool]]:
    """Yield flag, its name on the command line, value, and whether it was asked for, of options and nested ones."""
    shown = flags(type(options))
    for field in fields(options):
        value = getattr(options, field.name)
        if isinstance(value, Options):
            yield from shown_values(value)
        elif field.name in shown:
            flag = shown[field.name][1]
            yield flag, flag.option(field.name), value, bool(options.changed(field.name))


def command_words(options: Options, leave_out: Collection[str]) -> list[str]:
    """Return the words of a command line that give these options; `leave_out` are flags."""
    words: list[str] = []
    for flag, option, value, is_changed in shown_values(options):
        if option in leave_out or not is_changed or value is None:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"{option[:2]}no-{option[2:]}")
            continue
        is_paths = isinstance(value, tuple) and any(isinstance(each, Path) for each in value)
        texts = list(map(str, value)) if is_paths else [",".join(value) if isinstance(value, tuple) else str(value)]
        words += texts if flag.is_argument else [word for text in texts for word in (option, text)]
    return words


@dataclass(frozen=True)
class Only:
    """Fields of a nested options dataclass that a command shows; the others keep their defaults."""

    names: tuple[str, ...]


@dataclass(frozen=True)
class Former:
    """Note on an option: a name that it had before, or that others have for the same; it works and is not shown."""

    name: str


MODEL_HELP = "Hugging Face directory or hub id, or a .gguf file."
ModelPath = Annotated[str, Flag(MODEL_HELP, is_argument=True, show_default=False)]
BaseGguf = Annotated[
    Path | None, Flag("F32/F16/BF16 GGUF by llama.cpp's converter, for architectures dynquant does not convert.")
]
Mtp = Annotated[
    bool, Flag("Keep the layers that predict tokens ahead (MTP); without them a file is smaller and drafts nothing.")
]
AllowDifference = Annotated[
    bool,
    Flag(
        "Go on where llama.cpp computes something else from the GGUF than transformers; tells the mean KL.",
        ("--allow-difference",),
    ),
]
Preset = Annotated[
    str | None,
    Flag(
        "f32, f16, bf16, uniform-TYPE, experts-TYPE, llama-FTYPE (llama.cpp's mixtures), r1-iq1_s, r1-iq1_m, "
        "r1-iq2_xxs or r1-q2_k_xl; for vLLM uniform-SCHEME, as uniform-w4a16."
    ),
]
Fallback = Annotated[
    tuple[str, ...],
    Flag(
        "Where rows do not fit a type's blocks, presets and recipes take the one nearest in bits of these types and "
        "llama.cpp's own replacement, as q2_0,q1_0.",
        show_default=False,
    ),
]
TensorParallel = Annotated[
    int,
    Flag(
        "GPUs that vLLM splits every layer over: groups and zero points divide what each of them has of a layer.", min=1
    ),
]
GroupSize = Annotated[
    int,
    Flag(
        "With schemes of vLLM: at most so many weights share a scale, 128, 64 or 32; fewer take more bits.",
        min=32,
        max=128,
    ),
]
ENCODERS = ("dynquant", "ggml")
EncoderName = Annotated[
    str,
    Flag(
        "dynquant: loses less at the same bytes. ggml: byte-equal to llama-quantize.",
        ("--encoder",),
        choices=ENCODERS,
    ),
]
MeasuringEncoder = Annotated[
    str,
    Flag(
        "Encoder that errors are measured with; give `export` the same one. dynquant: loses less at the same bytes. "
        "ggml: byte-equal to llama-quantize.",
        ("--encoder",),
        choices=ENCODERS,
    ),
]
Exact = Annotated[
    bool,
    Flag("Measure every weight in every type, not rows drawn at random until errors that matter are known to 2 %."),
]
CalibrationText = Annotated[
    str | None,
    Flag(
        "Calibration text: .txt, .jsonl, .json, .csv, .parquet or a datasets id. Default: dynquant-mix-2, which ships.",
        ("--calibration",),
    ),
]
Strict = Annotated[
    bool, Flag("With --data: refuse images that cannot be decoded instead of skipping them.", ("--strict",))
]
Window = Annotated[int, Flag("Tokens in a window.", min=2, is_tokens=True)]
Ray = Annotated[
    str | None,
    Flag(
        "Spread the work over a Ray cluster: its address HOST:PORT, or auto for one that Ray finds, else all of this "
        "machine.",
        show_default=False,
    ),
]
"""Fields that several steps share."""
