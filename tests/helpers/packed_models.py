"""The small MoE in a mixture of packed types, exported to GGUF and to safetensors from one plan."""

from dataclasses import dataclass
from pathlib import Path

from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import load_encoder
from dynquant.exporters.gguf import export_gguf
from dynquant.exporters.safetensors import export_safetensors
from dynquant.families.open import open_model
from dynquant.recipes.build_plan import plan_from_types, stays_f32
from dynquant.recipes.plan import Plan

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


def mixed_plan(model: Model) -> Plan:
    """`MIXTURE` by parts of names; vectors and routers stay F32."""
    names = [name for name in model.source.names() if not stays_f32(name, model.source.info(name).shape)]
    types = {name: (next((t for part, t in MIXTURE.items() if part in name), "Q8_0"), "test") for name in names}
    return plan_from_types(model, types, recipe="preset test")


def export_both(checkpoint: Path, folder: Path) -> PackedExports:
    """Both exports in `folder`, encoded by ggml."""
    model, encoder = open_model(checkpoint), load_encoder("ggml")
    plan = mixed_plan(model)
    export_gguf(model, plan, None, folder / "model.gguf", encoder=encoder)
    export_safetensors(model, plan, None, folder / "out", encoder=encoder)
    return PackedExports(model, plan, folder / "model.gguf", folder / "out")
