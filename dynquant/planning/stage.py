"""The stages behind the commands, joined by files: calibrate -> analyze -> plan. `export_workflow` has the rest.

Each stage reuses its output file when that file was made from the same inputs, and says so.
"""

import json
import shutil
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

from dynquant.analysis.errors.error_journal import ErrorJournal
from dynquant.analysis.errors.measure import build_error_table
from dynquant.analysis.errors.remote import RemoteErrors
from dynquant.analysis.errors.stage import measure_table
from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.super_weights import SuperWeight
from dynquant.analysis.report.stage import (
    ERRORS_NAME,
    PLAN_NAME,
    SELECTION_NAME,
    STATS_NAME,
    SUPER_NAME,
    load_super_weights,
    write_report,
)
from dynquant.analysis.sensitivity.unit_kl import METHOD as UNIT_KL
from dynquant.calibration.importance import coverage_report
from dynquant.calibration.picture_stage import write_token_errors
from dynquant.calibration.second_moments import path_beside
from dynquant.calibration.stage import CalibrationOptions, run_calibration, run_probe, streaming_limit
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.checkpoints.vision_names import VISION, part_of
from dynquant.cli.terminal import console
from dynquant.encoding.interface import Encoder
from dynquant.encoding.remote import EncoderChoice, StoredFiles
from dynquant.encoding.store import EncodedStore
from dynquant.encoding.stream import encoder_version, load_encoder
from dynquant.errors import CheckpointError, ExportError, PlanError
from dynquant.families.open import open_model
from dynquant.formats.quant_types import quant_type
from dynquant.planning.chooser import Chooser, check_budget
from dynquant.planning.planner import FLOOR_PRICE
from dynquant.planning.search import SearchOptions
from dynquant.planning.search_stage import encoded_store, search_plans
from dynquant.planning.selection import Selection
from dynquant.planning.target import Target
from dynquant.planning.vision_modules import ModuleChoice, held_to, module_choices
from dynquant.planning.vision_search import search_modules
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.command_line import recipe_types
from dynquant.recipes.plan import Plan
from dynquant.recipes.presets import R1_RECIPES, preset_types
from dynquant.recipes.type_lists import like_types
from dynquant.resources import chosen_device
from dynquant.running.cluster import open_ray
from dynquant.session import Progress
from dynquant.storage.atomic import file_hash, write_atomically

DEFAULT_TYPES = (
    "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_S", "Q2_K", "IQ3_XXS", "IQ3_S", "IQ4_XS", "Q5_K", "Q6_K", "Q8_0",
)  # fmt: skip
"""Candidates of `plan`: the useful types of each size. IQ2_XS and Q3_K lose to their neighbours at equal bytes."""


def open_and_announce(path: str | Path, base_gguf: Path | None = None) -> Model:
    """Open a model and say what it is."""
    model = open_model(path, base_gguf=base_gguf)
    experts = f", {model.hyper.n_expert} experts" if model.hyper.n_expert else ""
    console.note(
        f"{model.name}: {model.arch}, {model.hyper.n_layer} layers{experts}, {model.num_weights / 1e6:,.1f} M weights"
    )
    return model


def open_language_model(path: str | Path, base_gguf: Path | None = None) -> Model:
    """`open_and_announce` for stages that have no place for a vision tower.

    Raises:
        ExportError: the model has one.
    """
    model = open_and_announce(path, base_gguf)
    if model.has_vision:
        raise ExportError(
            f"{model.name} has a vision tower, for which this command has no place. Such models are calibrated, "
            "planned and evaluated on pictures (--data FILE) and exported as GGUF or packed safetensors."
        )
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
    from dynquant.calibration.imatrix import export_imatrix, import_imatrix

    model = open_and_announce(path, base_gguf)
    if imatrix:
        stats = import_imatrix(imatrix, model)
        stats.save(output)
    else:
        stats = run_calibration(model, options, output, base_gguf=base_gguf)
    if imatrix_out:
        export_imatrix(stats, imatrix_out, model=model)
        console.note(f"wrote {imatrix_out}")
    print_coverage(stats, model)
    console.out.print(f"{output}: {stats.provenance.num_tokens:,} tokens, {len(stats.inputs)} inputs")
    return stats


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
    ray: str | None = None,
) -> ErrorTable:
    """Write errors.json and errors.csv."""
    model = open_and_announce(path, base_gguf)
    stats = CalibrationStats.load(stats_path)
    cluster = _Cluster(ray, stats_path, base_gguf) if ray else None
    table = _measure(
        model, stats, file_hash(stats_path), types or DEFAULT_TYPES, output, encoder, threads, cluster=cluster
    )
    console.out.print(f"{output}: {len(table.tensors())} tensors, {len(table.rows)} rows")
    return table


@dataclass(frozen=True)
class _Cluster:
    """Where an error table is measured, and what its nodes read."""

    address: str
    stats: Path
    base_gguf: Path | None

    @contextmanager
    def measuring(self, model: Model, encoder: Encoder, threads: int) -> Iterator[RemoteErrors]:
        files = StoredFiles.of(model, base_gguf=self.base_gguf, stats=self.stats, use_moments=False, protected={})
        with open_ray(self.address) as pool:
            yield RemoteErrors(pool, EncoderChoice.of(encoder, "cpu", threads), files)


def _measure(
    model: Model,
    stats: CalibrationStats,
    stats_hash: str,
    types: Sequence[str],
    output: Path,
    encoder: str,
    threads: int | None,
    store: EncodedStore | None = None,
    known: ErrorTable | None = None,
    cluster: _Cluster | None = None,
) -> ErrorTable:
    """Write the table, with the rows of `known` for other types; goes on where an interrupted run stopped."""
    names, loaded = [quant_type(name).name for name in types], load_encoder(encoder)
    identity = {
        "types": " ".join(names), "encoder": f"{loaded.name} {encoder_version(loaded)}",
        "store": store.directory.name if store else "",
    }  # fmt: skip

    def measure(journal: ErrorJournal, progress: Progress) -> ErrorTable:
        table = build_error_table(
            model, stats, names, loaded, stats_hash=stats_hash, threads=threads, store=store, journal=journal,
            elsewhere=elsewhere, progress=progress,
        )  # fmt: skip
        return table if known is None else known.extended_by(table)

    with cluster.measuring(model, loaded, threads or 1) if cluster else nullcontext() as elsewhere:
        return measure_table(output, model, stats_hash, identity, measure)


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
    memory = target.memory(model)
    types = _candidates(target, fixed_types)
    check = partial(check_budget, model, target, _known_types(directory, types), memory)
    if fixed_types is None:
        check(CalibrationStats.load(stats_path) if stats_path is not None else None)
    stats, stats_hash = statistics_of(model, options, directory, stats_path)
    if fixed_types is None:
        check(stats)
    searches = search is not None and search.runs_model and fixed_types is None
    if searches and options.samples is not None and search.runs_on_text:
        raise PlanError(
            "--frontier, --check-plans and the sensitivities fisher-probe and unit-kl run on text; with --data leave "
            "them out. --select chooses among plans for vision tower and projector."
        )
    if searches and streaming_limit(model, options, chosen_device(options.device)) is not None:
        raise PlanError(
            f"--select, --frontier and the sensitivities fisher-probe and unit-kl run {model.name} as a whole, which "
            f"takes {console.human_bytes(4 * model.num_weights)} on a CPU. Plan with --sensitivity closed-form, which "
            "is streamed, or on a machine with that much memory and without --max-memory."
        )
    store = encoded_store(model, stats, stats_hash, directory, encoder, threads) if searches else None
    cluster = _Cluster(options.ray, directory / STATS_NAME, base_gguf) if options.ray and store is None else None
    table = _table_of(model, stats, stats_hash, types, directory, encoder, threads, store, cluster)
    supers, table = _probe(model, stats, table, options, directory)
    write_token_errors(model, stats_path or directory / STATS_NAME, directory, types, encoder)
    chooser = Chooser(model, target, stats, stats_hash, table, supers, memory)
    selection = None
    if search is not None and store is not None and options.samples is not None:
        selection, choices = search_modules(
            model, table, store, chooser, options.samples,
            wanted=target.vision, other=search.text, device=options.device,
        )  # fmt: skip
        selection.save(directory / SELECTION_NAME)
        chosen = _explained_modules(chooser, selection.winner.types, choices)
    elif search is not None and store is not None:
        measured = table
        table, selection = search_plans(
            model, stats, chooser.allowed(table), store, search, chooser,
            text=options.text, seed=options.seed, device=options.device,
        )  # fmt: skip
        measured.remembering(table).save(directory / ERRORS_NAME)
        selection.save(directory / SELECTION_NAME)
        chosen = chooser.explained(selection.winner.types)
    else:
        (directory / SELECTION_NAME).unlink(missing_ok=True)
        chosen = fixed_types or _with_modules(chooser, table, target.vision)
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
    if memory is not None:
        console.note(memory.describe(made.predicted_bytes))
    return made


def _with_modules(chooser: Chooser, table: ErrorTable, wanted: str) -> dict[str, tuple[str, str]]:
    """Types and reasons after a decision for vision tower and projector as wholes, the highest that the budget holds.

    With measured sensitivities, what `auto` decides may raise the predicted KL no more than floors may.
    """
    plans: list[tuple[tuple[ModuleChoice, ...], dict[str, str]]] = []
    error: PlanError | None = None
    for choices in module_choices(table, wanted):
        try:
            plans.append((choices, chooser(held_to(table, choices))))
        except PlanError as refused:
            error = refused
    if not plans:
        assert error is not None
        raise error if wanted == "auto" else PlanError(f"With --vision {wanted}: {error}")
    is_priced = any(part_of(name) == VISION for name in table.sensitivity)
    predicted = [table.price_of(types).kl for _, types in plans]
    chosen = next(i for i, kl in enumerate(predicted) if not is_priced or kl <= FLOOR_PRICE * predicted[-1])
    if chosen > 0:
        console.note(
            f"the predicted KL is {predicted[chosen]:.3g} nats per token; with modules held as their errors say it "
            f"would be {predicted[0]:.3g} at the same bytes"
        )
    choices, types = plans[chosen]
    return _explained_modules(chooser, types, choices)


def _explained_modules(
    chooser: Chooser, types: Mapping[str, str], choices: tuple[ModuleChoice, ...]
) -> dict[str, tuple[str, str]]:
    """Types and reasons of a plan; what was decided for a whole module is the reason of its tensors, and is told."""
    for choice in choices:
        console.note(choice.reason)
    reasons = {choice.part: choice.reason for choice in choices if choice.level != "lower"}
    found = chooser.explained(types)
    return {name: (type_name, reasons.get(part_of(name), reason)) for name, (type_name, reason) in found.items()}


def _promise(table: ErrorTable, types: Mapping[str, str], selection: Selection | None) -> dict[str, object]:
    """What a plan states about itself: its objective, the KL that was predicted, and the one that was measured."""
    if selection is not None:
        winner = selection.winner
        predicted, error, measured = winner.predicted_kl, winner.predicted_kl_se, winner.kl
        if selection.fit is not None and winner.method != UNIT_KL:
            predicted, error = selection.fit.predicted(predicted)
    else:
        rows = [row for name, wanted in types.items() if (row := table.row(name, wanted)) is not None]
        total = table.total(rows)
        predicted, error, measured = total.kl, total.se, None
    return {
        "objective": table.cost_name,
        "predicted_kl": predicted if table.sensitivity else None,
        "predicted_kl_se": error if table.sensitivity else None,
        "selected_kl": measured.value if measured else None,
    }


def plan_from_config(directory: Path, target: Target) -> Plan:
    """Size and types of a preset, recipe or like file from config.json (and tokenizer and index, if they are there).

    No weights are needed. The R1 recipes are sized as published, with MLA's `attn_kv_b` in one piece; what `export`
    makes of them today, with that tensor split, is said beside it.

    Raises:
        PlanError: a target that depends on measurement.
    """
    from dynquant.families.text.registry import open_config

    def sized(model: Model) -> Plan:
        types = _fixed_types(target, model)
        if types is None:
            raise PlanError(
                "--config-only DIR goes with --preset, --recipe or --like: a budget needs weights to measure."
            )
        return plan_from_types(model, types, recipe=target.recipe, exact=target.preset is None)

    made = sized(open_config(directory))
    is_r1 = target.preset is not None and target.preset.lower() in R1_RECIPES
    if not is_r1 or not any(entry.role == Role.MLA_K_B for entry in made.entries):
        return made
    console.note(
        "attn_kv_b is counted in one piece, as in the published files. `export` splits it, as llama.cpp now does: "
        f"{len(made.entries):,} tensors, {made.predicted_bytes / 2**30:.2f} GiB"
    )
    with warnings.catch_warnings(action="ignore"):
        return sized(open_config(directory, whole_kv_b=True))


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


def _known_types(directory: Path, types: Sequence[str]) -> tuple[str, ...]:
    """Candidate types, and those of a table that is there already."""
    path = directory / ERRORS_NAME
    return tuple(dict.fromkeys((*types, *(ErrorTable.load(path).types if path.is_file() else ()))))


def statistics_of(
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
    from dynquant.inputs.text import read_text

    known = stats.provenance
    if options.samples is not None:
        made = (known.fingerprint, known.max_tokens, known.seed, known.text_hash)
        return made == (model.fingerprint, options.tokens, options.seed, options.samples.file.sha256)
    made = (known.fingerprint, known.window, known.max_tokens, known.seed)
    if made != (model.fingerprint, options.window, options.tokens, options.seed):
        return False
    text = read_text(options.text, seed=options.seed, max_tokens=options.tokens)
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
    cluster: _Cluster | None,
) -> ErrorTable:
    """The error table in the directory, extended by types that it lacks; measured anew when the statistics changed."""
    path = directory / ERRORS_NAME
    known = ErrorTable.load(path) if path.is_file() else None
    if known is None or (known.stats_hash, known.encoder, known.fingerprint) != (
        stats_hash,
        encoder,
        model.fingerprint,
    ):
        return _measure(model, stats, stats_hash, types, path, encoder, threads, store, cluster=cluster)
    missing = [name for name in types if name not in known.types]
    console.note(f"reusing {path}" + (f", adding {', '.join(missing)}" if missing else ""))
    if missing:
        return _measure(model, stats, stats_hash, missing, path, encoder, threads, store, known, cluster)
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
    try:
        probe = run_probe(model, options, directory)
    except CheckpointError as error:
        console.note(f"no super weights and no sensitivities: {error}")
        return [], table
    table = table.with_sensitivity(probe.sensitivity, probe.sensitivity_se)
    table.save(directory / ERRORS_NAME)
    write_atomically(path, json.dumps([one.model_dump() for one in probe.super_weights], indent=1) + "\n")
    return probe.super_weights, table
