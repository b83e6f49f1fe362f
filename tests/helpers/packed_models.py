"""Small models in packed types: a plan by a rule, its exports, and one crushed far enough that training shows."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import load_encoder
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types, stays_f32
from dynquant.recipes.plan import Plan
from tests.helpers.exports import export_gguf, export_safetensors

MIXTURE = {
    "ffn_gate_exps": "Q2_K", "ffn_up_exps": "IQ4_NL", "ffn_down_exps": "Q4_K", "token_embd": "Q6_K",
    "attn_k_b": "Q4_0", "attn_v_b": "F16", "ffn_down.": "BF16", "attn_output": "MXFP4",
}  # fmt: skip
"""Gate, up and down of the experts differ, and so do the halves of `kv_b_proj`. Everything else is Q8_0."""


@dataclass(frozen=True)
class PackedExports:
    model: Model
    plan: Plan
    gguf: Path
    directory: Path


def plan_of(model: Model, type_of: str | Callable[[str], str], *, recipe: str = "preset test") -> Plan:
    """Return a plan with every matrix in the type, or in `type_of(its name)`; vectors and routers stay F32."""
    names = [name for name in model.source.names() if not stays_f32(name, model.source.info(name).shape)]
    types = {name: (type_of if isinstance(type_of, str) else type_of(name), "test") for name in names}
    return plan_from_types(model, types, recipe=recipe)


def mixed_plan(model: Model) -> Plan:
    """Return the plan of `MIXTURE`, by parts of names."""
    return plan_of(model, lambda name: next((t for part, t in MIXTURE.items() if part in name), "Q8_0"))


def exported_both(checkpoint: Path, folder: Path) -> PackedExports:
    """Return what `export_both` wrote in `folder`."""
    model = open_model(checkpoint)
    return PackedExports(model, mixed_plan(model), folder / "model.gguf", folder / "out")


def export_both(checkpoint: Path, folder: Path) -> PackedExports:
    """Write the GGUF file and the packed safetensors of `mixed_plan` in `folder`, encoded by ggml."""
    made, encoder = exported_both(checkpoint, folder), load_encoder("ggml")
    export_gguf(made.model, made.plan, None, made.gguf, encoder=encoder)
    export_safetensors(made.model, made.plan, None, made.directory, encoder=encoder)
    return made


@dataclass(frozen=True)
class Crushed:
    """`original` is a float checkpoint, `packed` its export with 2-bit experts and attention."""

    original: Path
    packed: Path
    text: Path
    held_out: Path


def crush(original: Path, folder: Path, text_from: Path) -> None:
    """Write the packed export of `original`, 30 documents of text, and another text."""
    model = open_model(original)
    plan = plan_of(model, lambda name: "Q4_0" if model.source.info(name).shape[-1] % 256 else "Q2_K")
    export_safetensors(model, plan, None, folder / "packed", encoder=load_encoder("ggml"))
    paragraphs = text_from.read_text("utf-8").split("\n\n")
    documents = ["\n\n".join(paragraphs[i::31]) for i in range(31)]
    lines = "".join(json.dumps({"text": document}) + "\n" for document in documents[:30])
    (folder / "text.jsonl").write_text(lines, "utf-8")
    (folder / "held-out.txt").write_text(documents[30], "utf-8")
