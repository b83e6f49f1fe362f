"""Held-out text as windows of token ids for KL divergence and perplexity. Calibration text has its own module."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

from dynquant.errors import EvaluationError
from dynquant.evaluation.runners import TextEncoder
from dynquant.storage.strict_json import parse_json


@dataclass(frozen=True)
class EvalText:
    """A text cut into windows of token ids."""

    name: str
    sha256: str
    windows: list[list[int]]

    @property
    def scored_lengths(self) -> list[int]:
        return [len(window) - 1 for window in self.windows]


def load_text(path: Path, encode: TextEncoder, *, window: int, max_tokens: int) -> EvalText:
    """Read and tokenize a text and cut its first `max_tokens` tokens into windows.

    Every window starts with the BOS token if the tokenizer adds one, and then has one text token less. The lines of a
    .jsonl file are joined by an empty line. A last window of a single token is left out.
    """
    content = _read_text(Path(path))
    plain = encode("a", add_special=False)
    special = encode("a")
    bos = special[:1] if special[:1] != plain[:1] else []
    tokens = encode(content, add_special=False)[:max_tokens]
    step = window - len(bos)
    windows = [bos + tokens[i : i + step] for i in range(0, len(tokens), step)]
    windows = [w for w in windows if len(w) > 1]
    if not windows:
        raise EvaluationError(f"{Path(path).name} gives {len(tokens)} tokens; at least 2 are needed to score anything.")
    return EvalText(Path(path).name, hashlib.sha256(content.encode()).hexdigest(), windows)


def _read_text(path: Path) -> str:
    try:
        content = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise EvaluationError(f"The text {path} cannot be read: {error}") from error
    if path.suffix != ".jsonl":
        return content
    parts = []
    # Not splitlines(): it also splits at U+2028 and the like, which JSON strings may hold.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            parts.append(parse_json(line)["text"])
        except (ValueError, KeyError, TypeError) as error:
            raise EvaluationError(f'{path.name}, line {number} is not a JSON object with a "text" field.') from error
    return "\n\n".join(parts)
