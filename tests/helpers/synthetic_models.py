"""Plans, error tables and statistics of made-up models, for tests of what is drawn and reported.

The numbers are shaped like real ones: error halves per bit, first layers and planted spikes are worse, routing is
log-normal with some starved experts. Nothing here is measured.
"""

import math
from dataclasses import dataclass, field
from math import prod

import numpy as np
import torch

from dynquant.analysis.errors.table import ErrorRow, ErrorTable
from dynquant.analysis.plots.groups import PlanResults
from dynquant.analysis.plots.style import PlotFiles
from dynquant.calibration.statistics import CalibrationStats, InputStats, StatsProvenance
from dynquant.checkpoints.tensor_roles import Role, layer_of, role_of
from dynquant.formats.quant_types import QUANT_TYPES, fit_to_row
from dynquant.planning.frontier import FrontierPoint
from dynquant.recipes.folder import SuperWeight
from dynquant.recipes.plan import Plan, PlanEntry

FINGERPRINT = "f" * 64
TYPES = ("IQ1_S", "IQ2_XXS", "Q2_K", "IQ3_XXS", "Q4_K", "Q6_K", "Q8_0")


@dataclass
class Synthetic:
    plan: Plan
    table: ErrorTable
    stats: CalibrationStats
    super_weights: list[SuperWeight] = field(default_factory=list)
    frontier: list[FrontierPoint] = field(default_factory=list)

    @property
    def results(self) -> PlanResults:
        return PlanResults(self.plan, self.table, self.stats, self.super_weights, self.frontier)


@dataclass(frozen=True)
class DrawnModel:
    """A made-up model, its plots by name, and what drawing them reported."""

    made: Synthetic
    files: dict[str, PlotFiles]
    steps: list[tuple[str, int, int]]


@dataclass(frozen=True)
class Shape:
    """Sizes of a model; `experts` 0 makes it dense."""

    layers: int
    hidden: int = 256
    experts: int = 0
    dense: int = 0
    vocab: int = 1024
    with_per_expert: bool = True


DENSE = Shape(layers=30, hidden=512)
SMALL_MOE = Shape(layers=11, hidden=512, experts=16, dense=1)
LARGE_MOE = Shape(layers=61, hidden=2048, experts=256, dense=3, vocab=129280)


def synthetic_model(
    shape: Shape,
    *,
    model: str = "made-up/model",
    types: tuple[str, ...] = TYPES,
    spikes: dict[str, float] | None = None,
    seed: int = 0,
) -> Synthetic:
    """A model of `shape`; `spikes` multiplies the errors of named tensors and makes them super weights."""
    random = np.random.default_rng(seed)
    spikes = spikes or {}
    tensors = _tensors(shape)
    plan = _plan(tensors, shape, model, spikes)
    stats = _stats(tensors, shape, spikes, random)
    rows = [
        row
        for name, size in tensors.items()
        if len(size) > 1 and role_of(name) is not Role.ROUTER
        for row in _rows(name, size, types, shape, spikes.get(name, 1.0), stats, random)
    ]
    table = ErrorTable(
        model=model, fingerprint=FINGERPRINT, stats_hash="a" * 64, encoder="ggml", types=types, rows=rows
    )
    found = [_super_weight(name, factor) for name, factor in spikes.items() if role_of(name).is_down_projection]
    return Synthetic(plan, table, stats, found, _frontier(plan, table))


def _tensors(shape: Shape) -> dict[str, tuple[int, ...]]:
    h = shape.hidden
    tensors: dict[str, tuple[int, ...]] = {"token_embd.weight": (shape.vocab, h)}
    for layer in range(shape.layers):
        block = {"attn_norm": (h,), "ffn_norm": (h,), "attn_output": (h, h)}
        if shape.experts:
            block |= {"attn_q_a": (h, h), "attn_q_b": (2 * h, h), "attn_kv_a_mqa": (h, h), "attn_k_b": (h, h)}
            block |= {"attn_v_b": (h, h)}
        else:
            block |= {"attn_q": (h, h), "attn_k": (h // 2, h), "attn_v": (h // 2, h)}
        if layer < shape.dense or not shape.experts:
            block |= {"ffn_gate": (3 * h, h), "ffn_up": (3 * h, h), "ffn_down": (h, 3 * h)}
        else:
            e, m = shape.experts, max(h // 2, 256)
            block |= {"ffn_gate_inp": (e, h), "ffn_gate_exps": (e, m, h), "ffn_up_exps": (e, m, h)}
            block |= {"ffn_down_exps": (e, h, m), "ffn_gate_shexp": (m, h), "ffn_up_shexp": (m, h)}
            block |= {"ffn_down_shexp": (h, m)}
        tensors |= {f"blk.{layer}.{part}.weight": size for part, size in block.items()}
    return tensors | {"output_norm.weight": (h,), "output.weight": (shape.vocab, h)}


def _plan(tensors: dict, shape: Shape, model: str, spikes: dict[str, float]) -> Plan:
    entries = []
    for name, size in tensors.items():
        role, layer = role_of(name), layer_of(name)
        if len(size) == 1 or role is Role.ROUTER:
            chosen, reason = "F32", "vectors, norms and routers stay F32, as in llama.cpp"
        elif name in spikes:
            chosen, reason = "Q8_0", "holds a super weight"
        elif role is Role.EXPERT_DOWN and layer < shape.dense + 6:
            chosen, reason = "IQ2_XXS", "down projection of the first MoE layers"
        elif role.is_routed_expert:
            chosen, reason = "IQ1_S", "routed expert: crushed"
        else:
            chosen, reason = {"output": "Q6_K"}.get(role.value, "Q4_K"), "role floor"
        fitted = fit_to_row(QUANT_TYPES[chosen], size[-1])[0].name
        num_bytes = QUANT_TYPES[fitted].tensor_bytes(size)
        error = None if fitted == "F32" else _error(fitted, 1.0) ** 2
        entries.append(
            PlanEntry(
                name=name, shape=size, role=role, type=fitted, reason=reason, bytes=num_bytes, weighted_error=error
            )
        )
    return Plan(
        model=model, arch="deepseek2" if shape.experts else "llama", fingerprint=FINGERPRINT, stats_hash="a" * 64,
        errors_hash="b" * 64, recipe="preset r1-iq1_s", types=TYPES,
        predicted_bytes=sum(entry.bytes for entry in entries) + 100_000, entries=tuple(entries),
    )  # fmt: skip


def _error(type_name: str, factor: float) -> float:
    return min(0.9, 0.55 * 2.0 ** (1.5 - QUANT_TYPES[type_name].bits_per_weight)) * factor


def _rows(name: str, size: tuple, types: tuple, shape: Shape, spike: float, stats: CalibrationStats, random) -> list:
    layer, role = layer_of(name), role_of(name)
    depth = 1.0 if layer is None else 1 + 0.5 * math.exp(-layer / 2)
    base = depth * random.lognormal(0, 0.05) * {"mla_kv_a": 0.7, "attn_output": 1.3}.get(role.value, 1.0)
    rows = []
    for type_name in types:
        fitted = fit_to_row(QUANT_TYPES[type_name], size[-1])[0]
        error = _error(fitted.name, base)
        per_expert, weighted = (), ()
        if len(size) == 3 and shape.with_per_expert:
            counts = stats.input_of(name).counts.numpy()
            spread = random.lognormal(0, 0.25, size[0]) * error * (1 + 8 / np.sqrt(1 + counts))
            per_expert = tuple(float(v) if n else None for v, n in zip(spread, counts, strict=True))
            weighted = tuple(float(v) ** 2 for v in spread)
        place = {"name": name, "role": role, "layer": layer, "type": fitted.name, "bytes": fitted.tensor_bytes(size)}
        errors = {"relative_rms": error * 0.9, "weighted_error": (error * spike) ** 2 * 0.8, "weighted_energy": 1.0}
        experts = {"per_expert_weighted_error": weighted, "per_expert_activation_error": per_expert}
        rows.append(ErrorRow(**place, **errors, **experts, activation_error=error * spike))
    return rows


def _stats(tensors: dict, shape: Shape, spikes: dict[str, float], random) -> CalibrationStats:
    stats = CalibrationStats(
        StatsProvenance(fingerprint=FINGERPRINT, text_hash="c" * 64, text_name="calibration.jsonl", num_tokens=200_000)
    )
    for name, size in tensors.items():
        if not role_of(name).is_down_projection:
            continue
        e = prod(size[:-2])
        counts = random.lognormal(7, 1.2, e).astype(int) if e > 1 else np.array([200_000])
        if e > 1:
            counts[random.random(e) < 0.01] = random.integers(0, 40)
        peak_in, peak_out = random.lognormal(1.5, 0.4, e), random.lognormal(1.0, 0.4, e)
        if name in spikes:
            peak_in[0], peak_out[0] = 350.0, -900.0
        stats.inputs[name] = InputStats(
            in_sum2=torch.ones(e, 4, dtype=torch.float64), counts=torch.tensor(counts),
            max_in=torch.tensor(peak_in, dtype=torch.float32), max_out=torch.tensor(peak_out, dtype=torch.float32),
        )  # fmt: skip
        for other in ("gate", "up"):
            stats.aliases[name.replace("ffn_down_exps", f"ffn_{other}_exps")] = name
    stats.aliases = {name: key for name, key in stats.aliases.items() if name != key}
    return stats


def _super_weight(name: str, factor: float) -> SuperWeight:
    expert = 0 if role_of(name) is Role.EXPERT_DOWN else None
    place = {"name": name, "module": "", "expert": expert, "layer": layer_of(name), "row": 507, "col": 1229}
    seen = {"max_in": 350.0, "max_out": -900.0, "position": 0, "ratio": 100.0, "share": 1.0, "effect": 1.0}
    return SuperWeight(value=-0.4 * factor, **place, **seen)


def _frontier(plan: Plan, table: ErrorTable) -> list[FrontierPoint]:
    rows = table.tensors()
    points = []
    for name in table.types:
        kept = [found[name] for found in rows.values() if name in found]
        size, error = sum(row.bytes for row in kept), sum(row.weighted_error for row in kept)
        points.append(FrontierPoint(f"uniform-{name.lower()}", size, error, "uniform"))
    error = sum(entry.weighted_error or 0 for entry in plan.entries)
    for scale in (0.98, 1.3, 1.8, 2.6, 3.9):
        points.append(FrontierPoint(str(scale), int(plan.predicted_bytes * scale), error / scale**2.2, "plan"))
    points.append(FrontierPoint("llama-iq1_s", int(plan.predicted_bytes * 0.99), error * 1.3, "preset"))
    points.append(FrontierPoint("llama-iq2_xxs", int(plan.predicted_bytes * 1.25), error * 0.9, "preset"))
    return points
