"""Chooses a scheme for every unit within a byte budget, by what each scheme is measured to lose.

The error table has the form of the GGUF planner's (errors.json): one row for a linear layer in a scheme, encoded under
the importance of its inputs. Rows of a matrix are rounded alike, so a sample of them is measured. A cost is sensitivity
times relative weighted error, the predicted KL; a unit's cost in a scheme is the sum over its layers. `allocate` spends
the budget.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial

import torch

from dynquant.analysis.errors.measure import ErrorPart, WaitingSums, parts_of, ratio_of, routed_mean
from dynquant.analysis.errors.sums import ErrorJournal, ErrorSums, Sums
from dynquant.analysis.errors.table import ErrorRow, ErrorTable, Option
from dynquant.calibration.importance import importance
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import layer_of
from dynquant.encoding.vllm import encode_layers, nvfp4_global_scale
from dynquant.errors import PlanError
from dynquant.families.linear_layers import LinearCheckpoint, LinearLayer
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import SCHEMES, Scheme
from dynquant.planning.allocate import allocate, largest_total, smallest_total, total_cost
from dynquant.recipes.sizes import fixed_safetensors_bytes, safetensors_bytes_at_most
from dynquant.session import Progress, ignore_progress

HEADROOM = 1.05
"""Size of the default plan over the smallest checkpoint."""
ENCODER = "dynquant, diagonal"
_WEIGHTS_IN_MEMORY = 1 << 23
_SAMPLED_ROWS = 64
"""Rows of each matrix that are measured, evenly spaced."""


def candidates_of(linears: Sequence[LinearLayer], schemes: Iterable[str], *, mixed_experts: bool) -> list[Scheme]:
    """Return the schemes among `schemes` that a unit may have, with their group sizes; BF16 when there is none.

    Unless `mixed_experts`, routed experts have only schemes that transformers merges, and are quantized.
    """
    candidates = []
    for scheme in (SCHEMES[name] for name in schemes):
        if linears[0].is_expert:
            merges = scheme.merges_experts and scheme.is_quantized
            if not scheme.holds_experts or not (merges or mixed_experts):
                continue
        fitting = scheme.for_rows([linear.shape[-1] for linear in linears])
        if fitting is not None:
            candidates.append(fitting)
    return candidates or [SCHEMES["BF16"]]


def measure_schemes(
    model: Model,
    checkpoint: LinearCheckpoint,
    stats: CalibrationStats,
    *,
    stats_hash: str,
    journal: ErrorJournal,
    device: torch.device | None = None,
    progress: Progress | None = None,
) -> ErrorTable:
    """Measure what every scheme that a linear layer may have does to it.

    Parts that `journal` holds are not measured again, others are added to it.

    Raises:
        PlanError: the journal cannot be written.
        StatsError: the statistics belong to another checkpoint.
        EncodeError: NaN or Inf weights; the layer is named.
    """
    stats.check_belongs_to(model.fingerprint, model.name)
    work = []
    for linears in checkpoint.units(mixed_experts=True).values():
        found = candidates_of(linears, SCHEMES, mixed_experts=True)
        names = [scheme.name for scheme in found]
        work += [(one, found, parts_of(one.name, one.shape, names, _WEIGHTS_IN_MEMORY)) for one in linears]
    total, done = sum(part.num_weights * len(part.types) for *_, parts in work for part in parts), 0
    report = progress or ignore_progress

    def measured(part: ErrorPart, num_schemes: int) -> None:
        nonlocal done
        done += part.num_weights * num_schemes
        report("measuring errors", done, total, unit="weights", tensor=part.name)

    rows: list[ErrorRow] = []
    for linear, found, parts in work:
        waiting = WaitingSums(parts)
        for part in parts:
            sums = journal.get(part.name, part.experts, part.types)
            measured(part, 0 if sums is None else len(part.types))
            if sums is None:
                sums = _sums(linear, found, part.experts, stats, device, partial(measured, part, 1))
                journal.add(part.name, part.experts, sums)
            waiting.add(part, sums)
        rows += [_row(linear, scheme, waiting.joined(scheme.name), stats) for scheme in found]
    return ErrorTable(
        model=model.name,
        fingerprint=model.fingerprint,
        stats_hash=stats_hash,
        encoder=ENCODER,
        types=tuple(SCHEMES),
        rows=tuple(rows),
    )


def choose_schemes(
    table: ErrorTable, checkpoint: LinearCheckpoint, schemes: Sequence[str], budget: int | None, *, mixed_experts: bool
) -> tuple[dict[str, Choice], float]:
    """Return scheme and reason of every linear layer for files of at most `budget` bytes, and the summed cost.

    Without a budget, the smallest checkpoint gets HEADROOM more.

    Raises:
        PlanError: the budget is below the smallest possible size; the range is named.
    """
    units = checkpoint.units(mixed_experts=mixed_experts)
    options = {
        unit: _options(table, linears, candidates_of(linears, schemes, mixed_experts=mixed_experts))
        for unit, linears in units.items()
    }
    fixed = fixed_safetensors_bytes(checkpoint)
    smallest, largest = fixed + smallest_total(options), fixed + largest_total(options)
    limit = min(int(smallest * HEADROOM), largest) if budget is None else budget
    _check_range(limit, smallest, largest, schemes)
    chosen = allocate(options, limit - fixed)
    wanted = {
        linear.name: Choice(option.type, _reason(table, units[unit], option.type))
        for unit, option in chosen.items()
        for linear in units[unit]
    }
    return wanted, total_cost(chosen)


def check_schemes_budget(
    checkpoint: LinearCheckpoint, schemes: Sequence[str], budget: int, *, mixed_experts: bool
) -> None:
    """Refuse a budget that `choose_schemes` would refuse, before anything is measured.

    Raises:
        PlanError: as `choose_schemes`.
    """
    sizes = [
        [_layer_bytes(linears, scheme) for scheme in candidates_of(linears, schemes, mixed_experts=mixed_experts)]
        for linears in checkpoint.units(mixed_experts=mixed_experts).values()
    ]
    smallest, largest = (fixed_safetensors_bytes(checkpoint) + sum(map(extreme, sizes)) for extreme in (min, max))
    _check_range(budget, smallest, largest, schemes)


def _layer_bytes(linears: Sequence[LinearLayer], scheme: Scheme) -> int:
    return sum(safetensors_bytes_at_most(linear.stored_as(scheme)) for linear in linears)


def _options(table: ErrorTable, linears: Sequence[LinearLayer], found: Iterable[Scheme]) -> list[Option]:
    options = []
    for scheme in found:
        rows = [table.row(linear.name, scheme.name) for linear in linears]
        size = _layer_bytes(linears, scheme)
        options.append(Option(size, sum(table.cost(row) for row in rows if row is not None), scheme.name))
    return options


def _sums(
    linear: LinearLayer,
    schemes: Iterable[Scheme],
    experts: range,
    stats: CalibrationStats,
    device: torch.device | None,
    on_scheme: Callable[[], None],
) -> Sums:
    """Sums of some experts' sampled rows in each scheme; `on_scheme` is called after each."""
    rows, columns = linear.shape[-2:]
    sampled = slice(0, None, max(1, rows // _SAMPLED_ROWS))
    weights = torch.stack([linear.load(expert)[sampled] for expert in experts])
    metric = importance(stats, linear.name, linear.shape)
    metric = None if metric is None else metric[experts.start : experts.stop]
    weighting = torch.ones(len(weights), columns) if metric is None else metric
    peak, found = float(weights.abs().max()), {}
    for scheme in schemes:
        scale = nvfp4_global_scale(peak) if scheme.strategy == "tensor_group" else None
        encoded = encode_layers(
            scheme, weights, importance=metric, global_scale=scale, device=device,
            name=linear.modules[experts.start],
        )  # fmt: skip
        decoded = torch.stack([one.decoded() for one in encoded])
        found[scheme.name] = ErrorSums.measured(weights, decoded, weighting, None)
        on_scheme()
    return found


def _row(linear: LinearLayer, scheme: Scheme, sums: ErrorSums, stats: CalibrationStats) -> ErrorRow:
    weighted = routed_mean(sums.weighted, stats.input_of(linear.name))
    return ErrorRow(
        name=linear.name,
        role=linear.role,
        layer=layer_of(linear.name),
        type=scheme.name,
        bytes=scheme.tensor_bytes(linear.shape),
        relative_rms=ratio_of(sums.squared.sum(0)).sqrt().item(),
        weighted_error=ratio_of(weighted).item(),
        weighted_energy=float(weighted[1]),
    )


def _reason(table: ErrorTable, linears: Sequence[LinearLayer], scheme: str) -> str:
    found = [row for linear in linears if (row := table.row(linear.name, scheme)) is not None]
    cost = sum(table.cost(row) for row in found)
    with_others = f", with {len(linears) - 1} others that share its scheme" if len(linears) > 1 else ""
    return f"best use of the budget{with_others}; {table.cost_name} {cost:.2e}"


def _check_range(budget: int, smallest: int, largest: int, schemes: Sequence[str]) -> None:
    if budget < smallest:
        raise PlanError(
            f"The budget of {budget:,} bytes is below the smallest possible size. With the schemes "
            f"{', '.join(schemes)}, and embedding, head and routers in BF16, this model takes between {smallest:,} and "
            f"{largest:,} bytes. Ask for a size between them, or quantize embedding and head as well with GGUF types "
            "(-f gguf)."
        )
