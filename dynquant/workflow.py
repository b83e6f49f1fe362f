"""The stages behind the commands, joined by files: calibrate -> analyze -> plan. `export_workflow` has the rest.

Each stage reuses its output file when that file was made from the same inputs, and says so.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from dynquant import console
from dynquant.analysis.error_table import ErrorTable
from dynquant.analysis.measure_errors import build_error_table, file_hash
from dynquant.analysis.sensitivity import output_sensitivity
from dynquant.analysis.super_weights import SuperWeight, find_super_weights
from dynquant.analysis.unit_kl import METHOD as UNIT_KL
from dynquant.calibration import Hessians
from dynquant.checkpoint import open_model
from dynquant.devices import chosen_device
from dynquant.encoded_store import EncodedStore
from dynquant.errors import CheckpointError, PlanError
from dynquant.exporters.gguf_header import padded
from dynquant.importance import coverage_report
from dynquant.model import Model
from dynquant.plan import Plan, write_atomically
from dynquant.plan_building import fixed_bytes, plan_from_types
from dynquant.plan_report import (
    ERRORS_NAME,
    PLAN_NAME,
    STATS_NAME,
    SUPER_NAME,
    load_super_weights,
    rules_of,
    write_report,
)
from dynquant.plan_search import SearchOptions, Selection
from dynquant.planner import plan_types, size_range
from dynquant.presets import preset_types
from dynquant.quant_types import quant_type
from dynquant.quantize import load_encoder
from dynquant.recipe_parser import recipe_types
from dynquant.search_stage import SELECTION_NAME, encoded_store, search_plans
from dynquant.second_moments import path_beside
from dynquant.statistics import CalibrationStats
from dynquant.type_lists import like_types

DEFAULT_TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
"""Candidates of `plan`: the useful types of each size. IQ2_XS and Q3_K lose to their neighbours at equal bytes."""

PROBE_TOKENS = 4096
"""Tokens of the backward pass that measures sensitivities."""


@dataclass(frozen=True)
class CalibrationOptions:
    """What to run the model on (`text=None` is the built-in text), and what to measure there."""

    text: str | None = None
    tokens: int = 131072
    window: int = 512
    seed: int = 0
    hessians: Hessians = "activations"
    hessian_memory: str = "8GiB"
    device: str | None = None


@dataclass(frozen=True)
class Target:
    """What the plan should reach: at most one of preset, bits per weight, size, another file's types, and a recipe.

    `like` is a .gguf or plan.json; `patterns` a llama-quantize command line, `regex=type` lines, or a file with either.
    """

    preset: str | None = None
    bpw: float | None = None
    size: str | None = None
    like: Path | None = None
    patterns: str | None = None
    types: tuple[str, ...] | None = None
    floors: bool = True

    def __post_init__(self) -> None:
        fields = {"preset": "preset", "bpw": "bpw", "size": "size", "like": "like", "patterns": "recipe"}
        given = [f"--{option}" for field, option in fields.items() if getattr(self, field) is not None]
        if len(given) > 1:
            raise PlanError(
                f"Give one of --preset, --bpw, --size, --like and --recipe, not {' and '.join(given)}: each says alone "
                "which types the plan has."
            )
        if self.bpw is not None and not 0 < self.bpw <= 32:
            raise PlanError(f"--bpw {self.bpw} is not a number of bits per weight; give one between 1.6 and 16.")
        if self.size is not None:
            parse_size(self.size)

    @property
    def recipe(self) -> str:
        """The words under which plan and file record what was asked for."""
        if self.preset:
            return f"preset {self.preset.lower()}"
        if self.like is not None:
            return f"like {self.like.name}"
        if self.patterns is not None:
            return f"recipe {os.path.basename(self.patterns)}" if os.path.isfile(self.patterns) else "recipe"
        if self.bpw is not None:
            return f"bpw {self.bpw:g}"
        return f"size {parse_size(self.size)}" if self.size else "floors"

    def budget(self, num_weights: int) -> int | None:
        """File bytes, or None for the planner's default."""
        if self.bpw is not None:
            return int(self.bpw * num_weights / 8)
        return parse_size(self.size) if self.size else None


_SIZE = re.compile(r"^\s*([\d.]+)\s*([kMGT]i?)?B?\s*$", re.IGNORECASE)
_POWER = {"k": 1, "m": 2, "g": 3, "t": 4}


def parse_size(text: str) -> int:
    """Bytes of `31002144`, `140GB` (decimal) or `130.6GiB` (binary).

    Raises:
        PlanError: not a size.
    """
    match = _SIZE.match(text)
    try:
        number = float(match.group(1)) if match else None
    except ValueError:
        number = None
    if match is None or number is None:
        raise PlanError(f"`{text}` is not a size; write bytes, or a number with a unit as 140GB, 31.5MB or 12GiB.")
    unit = (match.group(2) or "").lower()
    return int(number * (1024 if unit.endswith("i") else 1000) ** _POWER.get(unit[:1], 0))


def open_and_announce(path: str | Path, base_gguf: Path | None = None) -> Model:
    """Open a model and say what it is."""
    model = open_model(path, base_gguf=base_gguf)
    weights = sum(model.source.info(name).numel for name in model.source.names())
    experts = f", {model.hyper.n_expert} experts" if model.hyper.n_expert else ""
    console.note(f"{model.name}: {model.arch}, {model.hyper.n_layer} layers{experts}, {weights / 1e6:,.1f} M weights")
    return model


def calibrate(
    path: str,
    options: CalibrationOptions,
    output: Path,
    *,
    base_gguf: Path | None = None,
    imatrix: Path | None = None,
    imatrix_out: Path | None = None,
) -> CalibrationStats:
    """Write stats.safetensors; import or export a llama.cpp imatrix when asked."""
    from dynquant.imatrix import export_imatrix, import_imatrix

    model = open_and_announce(path, base_gguf)
    if imatrix:
        stats = import_imatrix(imatrix, model)
        stats.save(output)
    else:
        stats = run_calibration(model, options, output)
    if imatrix_out:
        export_imatrix(stats, imatrix_out, model=model)
        console.note(f"wrote {imatrix_out}")
    print_coverage(stats, model)
    console.out.print(f"{output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")
    return stats


def run_calibration(model: Model, options: CalibrationOptions, output: Path) -> CalibrationStats:
    """Write the statistics, and the second moments beside them when they are asked for."""
    from dynquant.calibration import calibrate as run

    device, hessian_bytes = chosen_device(options.device), parse_size(options.hessian_memory)
    with console.stage_progress() as progress:
        found = run(
            model, options.text, tokens=options.tokens, window=options.window, seed=options.seed,
            device=device, batch_size=16 if device.startswith("cuda") else 4, hessians=options.hessians,
            hessian_bytes=hessian_bytes, progress=progress,
        )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    moments_path = path_beside(output)
    if found.moments is not None:
        found.moments.save(moments_path)
        size = console.human_bytes(moments_path.stat().st_size)
        pooled = ", one for each layer's experts" if found.pools_experts else ""
        console.note(f"wrote {moments_path}: {len(found.moments.sums)} second moments{pooled}, {size}")
    else:
        moments_path.unlink(missing_ok=True)
    if found.left_out:
        console.note(
            f"no second moments for {len(found.left_out)} inputs, because --hessian-memory {options.hessian_memory} is "
            f"used up; they are encoded without error feedback: {', '.join(found.left_out)}"
        )
    found.stats.save(output)
    return found.stats


def print_coverage(stats: CalibrationStats, model: Model) -> None:
    """Tokens per expert, and every layer with starved experts."""
    rows = coverage_report(stats, model.hyper)
    if not rows:
        return
    fewest = min(min(row.tokens) for row in rows)
    starved = sum(len(row.starved) for row in rows)
    console.note(
        f"experts: {sum(len(row.tokens) for row in rows)} in {len(rows)} layers, fewest tokens {fewest:,}, "
        f"{starved} starved (their statistics lean on the layer's mean)"
    )
    for row in rows:
        if row.starved:
            listed = ", ".join(f"{expert} ({row.tokens[expert]})" for expert in row.starved)
            console.note(f"  layer {row.layer}: starved experts (tokens) {listed}")


def analyze(
    path: str,
    stats_path: Path,
    output: Path,
    *,
    types: Sequence[str] | None = None,
    encoder: str = "ggml",
    threads: int | None = None,
    base_gguf: Path | None = None,
) -> ErrorTable:
    """Write errors.json and errors.csv."""
    model = open_and_announce(path, base_gguf)
    stats = CalibrationStats.load(stats_path)
    table = _measure(model, stats, file_hash(stats_path), types or DEFAULT_TYPES, output, encoder, threads)
    console.out.print(f"{output}: {len(table.tensors())} tensors, {len(table.rows)} rows")
    return table


def _measure(
    model: Model,
    stats: CalibrationStats,
    stats_hash: str,
    types: Sequence[str],
    output: Path,
    encoder: str,
    threads: int | None,
    store: EncodedStore | None = None,
) -> ErrorTable:
    names = [quant_type(name).name for name in types]
    with console.stage_progress() as progress:
        table = build_error_table(
            model, stats, names, load_encoder(encoder), stats_hash=stats_hash, threads=threads, store=store,
            progress=progress,
        )  # fmt: skip
    output.parent.mkdir(parents=True, exist_ok=True)
    table.save(output)
    return table


def plan(
    path: str,
    target: Target,
    options: CalibrationOptions,
    directory: Path,
    *,
    stats_path: Path | None = None,
    encoder: str = "ggml",
    threads: int | None = None,
    base_gguf: Path | None = None,
    search: SearchOptions | None = None,
    report: bool = True,
) -> Plan:
    """Write stats.safetensors, errors.json, plan.json, plots and report.html into `directory`.

    `search` prices and selects by running the model; None, or a target with fixed types, leaves the closed form.
    """
    model = open_and_announce(path, base_gguf)
    fixed_types = _fixed_types(target, model)
    types = _candidates(target, fixed_types)
    stats, stats_hash = _stats_of(model, options, directory, stats_path)
    searches = search is not None and search.runs_model and fixed_types is None
    store = encoded_store(model, stats, stats_hash, directory, encoder, threads) if searches else None
    table = _table_of(model, stats, stats_hash, types, directory, encoder, threads, store)
    supers, table = _probe(model, stats, table, options, directory)
    chooser = _Chooser(model, target, stats, stats_hash, table, supers)
    selection = None
    if search is not None and store is not None:
        table, selection = search_plans(
            model, stats, chooser.allowed(table), store, search, chooser, chooser.file_bytes,
            text=options.text, seed=options.seed, device=options.device,
        )  # fmt: skip
        table.save(directory / ERRORS_NAME)
        selection.save(directory / SELECTION_NAME)
        chosen = chooser.explained(selection.winner.types)
    else:
        (directory / SELECTION_NAME).unlink(missing_ok=True)
        chosen = fixed_types or chooser.explained(chooser(table))
    made = plan_from_types(
        model,
        chosen,
        errors_hash=file_hash(directory / ERRORS_NAME),
        candidates=table.types,
        weighted_errors={(row.name, row.type): row.weighted_error for row in table.rows},
        exact=target.preset is None,
        **chooser.context,
    )
    if fixed_types is None:
        made = made.model_copy(
            update=_promise(table, {name: wanted for name, (wanted, _) in chosen.items()}, selection)
        )
    made.save(directory / PLAN_NAME)
    if report:
        write_report(model, made, table, stats, supers, directory)
    return made


class _Chooser:
    """Types at the target's budget for any pricing of a table, with the reason of each kept."""

    def __init__(
        self,
        model: Model,
        target: Target,
        stats: CalibrationStats,
        stats_hash: str,
        table: ErrorTable,
        supers: Sequence[SuperWeight],
    ) -> None:
        self.context = {"recipe": target.recipe, "stats": stats, "stats_hash": stats_hash}
        self._model, self._target = model, target
        self._fixed = fixed_bytes(model, table.tensors(), **self.context)
        self._rules = {floors: rules_of(supers, stats, floors=floors) for floors in (True, False)}
        self._reasons: dict[tuple[tuple[str, str], ...], dict[str, tuple[str, str]]] = {}

    def allowed(self, table: ErrorTable) -> ErrorTable:
        """The rows of the candidate types that were asked for."""
        types = self._target.types
        return table.restricted_to([name.upper() for name in types]) if types else table

    def __call__(self, table: ErrorTable, *, floors: bool = True, scale: float = 1.0) -> dict[str, str]:
        weights = sum(self._model.source.info(name).numel for name in self._model.source.names())
        budget = self._target.budget(weights)
        allowed = self.allowed(table)
        if budget is not None and scale != 1.0:
            smallest, largest = size_range(allowed, self._fixed)
            budget = max(smallest, min(largest, int(scale * budget)))
        rules = self._rules[floors and self._target.floors]
        found = plan_types(allowed, budget, rules, fixed_bytes=self._fixed)
        types = {name: type_name for name, (type_name, _) in found.items()}
        self._reasons[tuple(sorted(types.items()))] = found
        return types

    def explained(self, types: Mapping[str, str]) -> dict[str, tuple[str, str]]:
        """Types that were chosen before, with their reasons."""
        return self._reasons[tuple(sorted(types.items()))]

    def file_bytes(self, types: Mapping[str, str]) -> int:
        """Bytes of the whole file."""
        shapes = {name: self._model.source.info(name).shape for name in types}
        return self._fixed + sum(padded(quant_type(types[name]).tensor_bytes(shape)) for name, shape in shapes.items())


def _promise(table: ErrorTable, types: Mapping[str, str], selection: Selection | None) -> dict[str, object]:
    """What a plan states about itself: its objective, the KL that was predicted, and the one that was measured."""
    if selection is not None:
        winner = selection.winner
        predicted, error, measured = winner.predicted_kl, winner.predicted_kl_se, winner.kl
        if selection.fit is not None and not winner.label.startswith(UNIT_KL):
            predicted, error = selection.fit.predicted(predicted)
    else:
        rows = [row for name, wanted in types.items() if (row := table.row(name, wanted)) is not None]
        predicted, measured = sum(table.cost(row) for row in rows), None
        error = sum(table.cost_se(row) ** 2 for row in rows) ** 0.5
    return {
        "objective": table.cost_name,
        "predicted_kl": predicted if table.sensitivity else None,
        "predicted_kl_se": error if table.sensitivity else None,
        "selected_kl": measured.value if measured else None,
    }


def plan_from_config(directory: Path, target: Target) -> Plan:
    """Size and types of a preset, recipe or like file from config.json (and the tokenizer, if it is there).

    No weights are needed.

    Raises:
        PlanError: a target that depends on measurement.
    """
    from dynquant.families import open_config

    model = open_config(directory)
    types = _fixed_types(target, model)
    if types is None:
        raise PlanError("--config-only DIR goes with --preset, --recipe or --like: a budget needs weights to measure.")
    return plan_from_types(model, types, recipe=target.recipe, exact=target.preset is None)


def _fixed_types(target: Target, model: Model) -> dict[str, tuple[str, str]] | None:
    """Types that need no measurement, or None when the planner chooses."""
    if target.preset:
        return preset_types(target.preset, model)
    if target.like is not None:
        return like_types(target.like, model)
    return None if target.patterns is None else recipe_types(target.patterns, model)


def _candidates(target: Target, preset: dict[str, tuple[str, str]] | None) -> tuple[str, ...]:
    wanted = tuple(quant_type(name).name for name in target.types) if target.types else DEFAULT_TYPES
    of_preset = dict.fromkeys(name for name, _ in (preset or {}).values())
    return tuple(dict.fromkeys((*wanted, *of_preset)))


def _stats_of(
    model: Model, options: CalibrationOptions, directory: Path, stats_path: Path | None
) -> tuple[CalibrationStats, str]:
    """Given statistics, those already in the directory when they fit, or a new calibration."""
    own = directory / STATS_NAME
    if stats_path is not None:
        stats = CalibrationStats.load(stats_path)
        stats.check_belongs_to(model.fingerprint, model.name)
        directory.mkdir(parents=True, exist_ok=True)
        if stats_path.resolve() != own.resolve():
            stats.save(own)
            _copy_moments(stats_path, own)
        return stats, file_hash(own)
    if own.is_file():
        stats = CalibrationStats.load(own)
        has_moments = options.hessians == "none" or path_beside(own).is_file()
        if has_moments and _was_made_with(stats, model, options):
            console.note(f"reusing {own}")
            return stats, file_hash(own)
    stats = run_calibration(model, options, own)
    print_coverage(stats, model)
    return stats, file_hash(own)


def _copy_moments(stats_path: Path, own: Path) -> None:
    source, target = path_beside(stats_path), path_beside(own)
    target.unlink(missing_ok=True)
    if source.is_file():
        try:
            target.hardlink_to(source)
        except OSError:
            shutil.copyfile(source, target)


def _was_made_with(stats: CalibrationStats, model: Model, options: CalibrationOptions) -> bool:
    from dynquant.calibration_text import read_text
    from dynquant.hf_loading import load_tokenizer

    known = stats.provenance
    made = (known.fingerprint, known.window, known.max_tokens, known.seed)
    if made != (model.fingerprint, options.window, options.tokens, options.seed):
        return False
    text = read_text(options.text, tokenizer=load_tokenizer(model), seed=options.seed, max_tokens=options.tokens)
    return known.text_hash == text.sha256


def _table_of(
    model: Model,
    stats: CalibrationStats,
    stats_hash: str,
    types: Sequence[str],
    directory: Path,
    encoder: str,
    threads: int | None,
    store: EncodedStore | None,
) -> ErrorTable:
    """The error table in the directory, extended by types that it lacks; measured anew when the statistics changed."""
    path = directory / ERRORS_NAME
    known = ErrorTable.load(path) if path.is_file() else None
    if known is None or (known.stats_hash, known.encoder, known.fingerprint) != (
        stats_hash,
        encoder,
        model.fingerprint,
    ):
        return _measure(model, stats, stats_hash, types, path, encoder, threads, store)
    missing = [name for name in types if name not in known.types]
    console.note(f"reusing {path}" + (f", adding {', '.join(missing)}" if missing else ""))
    if missing:
        added = _measure(model, stats, stats_hash, missing, path, encoder, threads, store)
        known = known.extended_by(added)
        known.save(path)
    return known


def print_histogram(plan: Plan) -> None:
    """Size in GiB and the number of tensors of each type."""
    console.print_table(
        f"{plan.model}: {plan.recipe}", ("type", "tensors"), [(name, count) for name, count in plan.histogram().items()]
    )
    console.out.print(
        f"{plan.predicted_bytes / 2**30:.2f} GiB ({plan.predicted_bytes:,} bytes), {len(plan.entries):,} tensors, "
        f"{plan.bits_per_weight:.3f} bits per weight"
    )


def print_plan(plan: Plan, directory: Path) -> None:
    """What was kept, what was crushed, and the size."""
    by_role: dict[str, list] = {}
    for entry in plan.entries:
        by_role.setdefault(entry.role.value, []).append(entry)
    rows = []
    for role, entries in sorted(by_role.items(), key=lambda item: -sum(e.bytes for e in item[1])):
        types = sorted({e.type for e in entries}, key=lambda name: -quant_type(name).bits_per_weight)
        size = sum(e.bytes for e in entries)
        weights = sum(prod(e.shape) for e in entries)
        share = f"{size / plan.predicted_bytes:.1%}"
        rows.append(
            (role, len(entries), " ".join(types), f"{8 * size / weights:.3f}", console.human_bytes(size), share)
        )
    console.print_table(f"{plan.model}: {plan.recipe}", ("role", "tensors", "types", "bpw", "size", "share"), rows)
    exceptions = [e for e in plan.entries if "super " in e.reason or "stands out" in e.reason]
    for entry in exceptions:
        console.out.print(f"  {entry.name}: {entry.type}, {entry.reason}")
    fallbacks = [e for e in plan.entries if e.wanted_type]
    if fallbacks:
        console.out.print(f"  {len(fallbacks)} tensors took another type because of their row length (see the plan)")
    if plan.predicted_kl is not None:
        error = f" ± {plan.predicted_kl_se:.4f}" if plan.predicted_kl_se else ""
        measured = "" if plan.selected_kl is None else f", measured {plan.selected_kl:.4f}"
        console.out.print(f"  KL to the original, nats per token: predicted {plan.predicted_kl:.4f}{error}{measured}")
    console.out.print(
        f"{console.human_bytes(plan.predicted_bytes)} ({plan.predicted_bytes:,} bytes), "
        f"{plan.bits_per_weight:.3f} bits per weight. Plan: {directory / PLAN_NAME}"
    )


def _probe(
    model: Model, stats: CalibrationStats, table: ErrorTable, options: CalibrationOptions, directory: Path
) -> tuple[list[SuperWeight], ErrorTable]:
    """What needs the running model: super weights, and the sensitivity of the output to every tensor.

    Both are kept in the directory. A model that transformers cannot run (a GGUF with imported statistics) has neither;
    the plan then counts every tensor's relative error alike, and says so.
    """
    path = directory / SUPER_NAME
    fresh = path.is_file() and path.stat().st_mtime >= (directory / STATS_NAME).stat().st_mtime
    if fresh and table.sensitivity:
        return load_super_weights(path), table
    from dynquant.calibration_text import pack_windows, read_text
    from dynquant.hf_loading import load_hf, load_tokenizer

    try:
        tokenizer, hf_model = load_tokenizer(model), load_hf(model)
    except CheckpointError as error:
        console.note(f"no super weights and no sensitivities: {error}")
        return [], table
    text = read_text(options.text, tokenizer=tokenizer, seed=options.seed, max_tokens=PROBE_TOKENS)
    windows = pack_windows(text, tokenizer, window=options.window, max_tokens=PROBE_TOKENS)
    arch, n_layer = model.arch, model.hyper.n_layer
    found = find_super_weights(hf_model, arch, n_layer, windows[0])
    with console.stage_progress() as progress:
        found_and_errors = output_sensitivity(hf_model, arch, n_layer, windows, seed=options.seed, progress=progress)
    table = table.with_sensitivity(*found_and_errors)
    table.save(directory / ERRORS_NAME)
    write_atomically(path, json.dumps([one.model_dump() for one in found], indent=1) + "\n")
    return found, table
