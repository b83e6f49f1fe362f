"""A small MoE whose experts are crushed far enough that training an adapter shows: original, packed, and text."""

import json
from dataclasses import dataclass
from pathlib import Path

from dynquant.encoding.stream import load_encoder
from dynquant.exporters.safetensors import export_safetensors
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types, stays_f32
from tests.helpers.tiny_models import save_tiny

WORDS = [
    "river",
    "stone",
    "garden",
    "candle",
    "market",
    "bridge",
    "letter",
    "window",
    "harbor",
    "forest",
    "engine",
    "teacher",
    "silver",
    "mirror",
]


@dataclass(frozen=True)
class Crushed:
    """`original` is a float checkpoint, `packed` its export with 2-bit experts and attention."""

    original: Path
    packed: Path
    text: Path
    held_out: Path


def crush(tokenizer_from: Path, folder: Path, text_from: Path) -> Crushed:
    """Three layers of DeepSeek-V3 with random weights, 300 windows of text in 30 documents, and another text."""
    original = save_tiny("deepseek-v3", folder / "original", tokenizer_from)
    model = open_model(original)
    names = [name for name in model.source.names() if not stays_f32(name, model.source.info(name).shape)]
    types = {name: (_type(model.source.info(name).shape[-1]), "test") for name in names}
    plan = plan_from_types(model, types, recipe="preset test")
    export_safetensors(model, plan, None, folder / "packed", encoder=load_encoder("ggml"), threads=2)
    paragraphs = text_from.read_text("utf-8").split("\n\n")
    documents = ["\n\n".join(paragraphs[i::31]) for i in range(31)]
    text, held_out = folder / "text.jsonl", folder / "held-out.txt"
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents[:30]), "utf-8")
    held_out.write_text(documents[30], "utf-8")
    return Crushed(original, folder / "packed", text, held_out)


def _type(columns: int) -> str:
    return "Q2_K" if columns % 256 == 0 else "Q4_0"


def write_lists(path: Path, count: int) -> Path:
    """A format to learn: words as a bracketed list."""
    lines = []
    for i in range(count):
        words = [WORDS[(i * 5 + j * (i % 3 + 1)) % len(WORDS)] for j in range(3)]
        lines.append({"prompt": "Words: " + " ".join(words) + "\nList:", "completion": f" [{'] ['.join(words)}]"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), "utf-8")
    return path
