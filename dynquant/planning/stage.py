"""Planning: chooses a type for every tensor of a model. Statistics, error table and probe are files that it reuses."""

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from dynquant.analysis.errors.options import DEFAULT_TYPES, TableOptions
from dynquant.analysis.errors.stage import check_table_name, error_table, scheme_table
from dynquant.analysis.errors.table import ErrorTable
from dynquant.analysis.outliers.token_errors import write_token_errors
from dynquant.analysis.sensitivity.stage import run_probe
from dynquant.calibration.second_moments import kind_beside
from dynquant.calibration.stage import StatsFile, statistics_in, streaming_limit
from dynquant.calibration.statistics import CalibrationStats
from dynquant.checkpoints.model import Model
from dynquant.checkpoints.tensor_roles import Role
from dynquant.checkpoints.tensor_source import TensorSource
from dynquant.checkpoints.vision_names import VISION, part_of
from dynquant.errors import CheckpointError, PlanError
from dynquant.evaluation.agreement.same_computation import check_computation
from dynquant.evaluation.statistics import shown_kl
from dynquant.families.linear_layers import LinearCheckpoint, linear_checkpoint
from dynquant.families.open import open_and_announce, open_language_model
from dynquant.formats.checksum import checksum
from dynquant.formats.quant_types import quant_type
from dynquant.formats.storage_format import Choice
from dynquant.formats.vllm_schemes import DEFAULT_SCHEMES, SCHEMES, unread_scheme, vllm_scheme
from dynquant.inputs.text import read_measured
from dynquant.planning.chooser import Chooser, SchemeChooser, check_budget, rules_of
from dynquant.planning.options import CLOSED_FORM, PlanOptions, SearchOptions
from dynquant.planning.planner import FLOOR_PRICE
from dynquant.planning.pruning import (
    linears_without_experts,
    remove_pruned,
    sized_without_experts,
    without_experts,
)
from dynquant.planning.selecting.search import (
    Search,
    SearchResult,
    encoded_store,
    scheme_store,
    search_plans,
)
from dynquant.planning.selecting.selection import Selection
from dynquant.planning.selecting.text import check_selection_text
from dynquant.planning.target import Target
from dynquant.planning.vision_modules import ModuleChoice, held_to, module_choices
from dynquant.recipes.build_plan import plan_for_vllm, plan_from_types, uniform_schemes
from dynquant.recipes.command_line import recipe_types
from dynquant.recipes.folder import SuperWeight, SuperWeights, load_super_weights, save_plan
from dynquant.recipes.held_types import held_types
from dynquant.recipes.plan import Plan
from dynquant.recipes.presets import R1_RECIPES, preset_types
from dynquant.recipes.type_lists import like_types
from dynquant.resources import chosen_device, human_bytes
from dynquant.session import SILENT, Session
from dynquant.storage import file_names
from dynquant.storage.atomic import file_hash

_CLEARLY_LESS = 0.9  # of the predicted KL: then a plan with mixed experts is worth a word


def make_plan(options: PlanOptions, session: Session = SILENT) -> Plan:
    """Choose a type for every tensor; write stats.safetensors, errors.json and plan.json into a folder, in which the
    plan of another budget stays under the name of that.

    Types that are asked for one by one (a preset, recipe or like file) need no choice, and no search.
    """
    if options.model is None:
        raise PlanError("Give a MODEL to plan, or --config-only DIR with --preset NAME.")
    if options.target.serves is not None:
        plan = _plan_schemes(options, session)
    else:
        (plan,) = make_plans(options, (options.target,), session)
    save_plan(plan, options.output / file_names.PLAN_NAME, session)
    return plan


def make_plans(options: PlanOptions, targets: Sequence[Target], session: Session = SILENT) -> list[Plan]:
    """Choose types for every target instead of `options.target`, with one calibration, one table and one probe.

    The targets have the same candidate types, and each a budget, or all have their types. What is measured is kept in
    the folder, the plans are not; selection.json is of the last one.
    """
    target, directory, path = targets[0], options.output, options.output / file_names.ERRORS_NAME
    search = None if target.has_types else _search_of(options)  # before hours of measuring
    check_table_name(path)
    model = open_and_announce(str(options.model), session, base_gguf=options.base_gguf, mtp=options.mtp)
    if target.vision != "auto" and not model.has_vision:
        raise PlanError(f"--vision {target.vision} would do nothing: {model.name} has no vision tower. Leave it out.")
    if search is not None:
        _check_runs(model, options, search, session)
    model, options = _pruned(model, options, session, [each for each in targets if not each.has_types])
    recipes = [_fixed_types(target, model) for target in targets]
    fixed = tuple(dict.fromkeys(choice.type for recipe in recipes for choice in (recipe or {}).values()))
    types = tuple(quant_type(name).name for name in target.types) or fixed or DEFAULT_TYPES
    types = tuple(dict.fromkeys((*types, *fixed)))
    budgets = [target for target, recipe in zip(targets, recipes, strict=True) if recipe is None]
    given = StatsFile(options.stats).stats if options.stats is not None and budgets else None
    _check_budgets(model, options, types, budgets, given)
    comparison = {"allow_difference": options.allow_difference, "max_memory": options.calibration.max_memory}
    compared = check_computation(model, session, folder=directory, **comparison)
    if compared is not None:
        directory.mkdir(parents=True, exist_ok=True)
        compared.save(directory / file_names.SAME_COMPUTATION_NAME)
    stats = statistics_in(directory, model, options.calibration, session, stats_path=options.stats)
    with stats.guarded():
        _check_budgets(model, options, types, budgets, stats.stats)
    with stats.finishing():
        store = encoded_store(model, stats, directory, options.encoder, session) if search is not None else None
        ray = options.calibration.ray if store is None else None  # a store of encoded blocks is filled on this machine
        how = {"encoder": options.encoder, "exact": options.exact, "base_gguf": options.base_gguf}
        table = error_table(model, stats, path, TableOptions(types=types, ray=ray, **how), session)
    supers, table = _probe(model, table, options, session)
    write_token_errors(model, options.stats or stats.path, directory, types, options.encoder, session)
    rules = rules_of(supers, stats.stats)
    choosers = [Chooser(model, target, stats, table, rules, session) for target in targets]
    results: Sequence[SearchResult | None] = [None] * len(targets)
    if search is not None and store is not None:
        tools = [Search(store, search, each, each.target, stats, options.calibration, session) for each in choosers]
        table, results = _searched(tools, table, path)
    else:
        _forget_selection(directory)
    return [_built(*each, table=table, path=path) for each in zip(choosers, recipes, results, strict=True)]


def _searched(searches: Sequence[Search], table: ErrorTable, path: Path) -> tuple[ErrorTable, list[SearchResult]]:
    """Search, and write what was found: prices, which take long, into the table at `path`, and selection.json beside
    it, of the last search."""
    results = search_plans(searches, table)
    for priced, _, _ in results:
        table = table.remembering(priced)
    table.save(path)
    results[-1][1].save(path.with_name(file_names.SELECTION_NAME))
    return table, results


def _forget_selection(folder: Path) -> None:
    """Remove what a search found for an earlier plan of a folder, whose next plan comes of none."""
    (folder / file_names.SELECTION_NAME).unlink(missing_ok=True)


def _pruned(
    model: Model, options: PlanOptions, session: Session, budgets: Sequence[Target] = ()
) -> tuple[Model, PlanOptions]:
    """Return the model without the experts that are to go, and the options for it: it has statistics of its own."""
    if not options.prune_experts:
        remove_pruned(options.output, session)
        return model, options
    if options.target.preset and options.target.serves is None:
        _fixed_types(options.target, model)  # refuses what no model takes before experts are ranked
    sized = sized_without_experts(model, options.prune_experts)
    for target in budgets:
        types = tuple(quant_type(name).name for name in target.types) or DEFAULT_TYPES
        check_budget(sized, target, types, None)
    model = without_experts(
        model, options.prune_experts, options.output, options.calibration, session, stats=options.stats
    )
    return model, replace(options, stats=None)


def _built(
    chooser: Chooser, recipe: dict[str, Choice] | None, result: SearchResult | None, *, table: ErrorTable, path: Path
) -> Plan:
    """Return the plan of one target: its recipe's types, those that a search found, or those of the table's prices."""
    target, session, model, selection = chooser.target, chooser.session, chooser.model, None
    if result is not None:
        table, selection, choices = result
        chosen = _explained_modules(chooser, selection.winner.types, choices, session)
    else:
        chosen = recipe or _with_modules(chooser, table, target.vision, session)
    errors = {"weighted_errors": _weighted_errors(table), "exact": target.preset is None}
    held = held_types(model, target.mtp_type) if recipe is None else {}
    plan = plan_from_types(model, held | chosen, **errors, **chooser.context)
    promise = _promise(table, chosen, selection) if recipe is None else {}
    plan = _of_table(plan, table, path, model.source, model.source.names(), types=table.types, **promise)
    if chooser.memory is not None:
        session.note(chooser.memory.describe(plan.predicted_bytes))
    return plan


def _plan_schemes(options: PlanOptions, session: Session) -> Plan:
    """Choose a scheme for every linear layer; return the plan, and leave the table of their errors in the folder."""
    _check_vllm(options)
    target, path = options.target, options.output / file_names.SCHEME_ERRORS_NAME
    search = None if target.has_types else _search_of(options)
    check_table_name(path)
    schemes = tuple(vllm_scheme(name).name for name in target.types) or _readable_schemes(session)
    whole, places = open_language_model(str(options.model), session), (target.tensor_parallel, target.group_size)
    if search is not None:
        _check_runs(whole, options, search, session)
    if gone := options.prune_experts:
        linears = linears_without_experts(linear_checkpoint(whole, *places), whole, gone)
        _chooser(sized_without_experts(whole, gone), linears, target, schemes)
    model, options = _pruned(whole, options, session)
    checkpoint = linear_checkpoint(model, *places)
    chooser, uniform = _chooser(model, checkpoint, target, schemes)
    stats = statistics_in(options.output, model, options.calibration, session, stats_path=options.stats)
    request = {"recipe": target.recipe, "stats_hash": stats.hash}
    if uniform is not None:
        with stats.finishing():
            plan = plan_for_vllm(model, checkpoint, uniform, **request)
        _forget_selection(options.output)
        return _with_kind_of_moments(plan, options.output)
    with stats.finishing():
        table = scheme_table(model, checkpoint, schemes, stats, path, session)
    _, table = _probe(model, table, options, session)
    if not target.mixed_experts:
        mixed = SchemeChooser(checkpoint, schemes, mixed_experts=True, budget=target.budget(model.num_weights))
        _tell_gain(table.priced(CLOSED_FORM), chooser, mixed, session)
    selection: Selection | None = None
    if search is not None:
        store = scheme_store(model, checkpoint, chooser.candidates, stats, options.output, session)
        tools = Search(store, search, chooser, target, stats, options.calibration, session)
        _, ((table, selection, _),) = _searched([tools], table, path)
    else:
        _forget_selection(options.output)
    chosen = chooser.choose(table) if selection is None else chooser.explained(selection.winner.types)
    errors = {"weighted_errors": _weighted_errors(table), "mixed_experts": target.mixed_experts}
    plan = plan_for_vllm(model, checkpoint, chosen, **errors, **request)
    others, promise = (tensor.key for tensor in checkpoint.others), _promise(table, chosen, selection)
    return _of_table(plan, table, path, checkpoint.source, others, types=schemes, **promise)


def _tell_gain(table: ErrorTable, chooser: SchemeChooser, mixed_chooser: SchemeChooser, session: Session) -> None:
    """Say what experts with schemes of their own would gain by the closed form, where it is clear."""
    if not table.sensitivity:
        return
    one_scheme, mixed = (table.price_of(choose(table)).kl for choose in (chooser, mixed_chooser))
    if mixed < _CLEARLY_LESS * one_scheme:
        session.note(
            f"one scheme for the routed experts of all layers costs KL here: with --mixed-experts the same bytes are "
            f"predicted to have a KL of {shown_kl(mixed)} instead of {shown_kl(one_scheme)}; vLLM loads that, "
            "transformers does not"
        )


def _chooser(
    model: Model, checkpoint: LinearCheckpoint, target: Target, schemes: Sequence[str]
) -> tuple[SchemeChooser, dict[str, Choice] | None]:
    """Return what chooses schemes, and those of a preset, before anything is measured.

    Raises:
        PlanError: no choice meets the budget, or a layer has no scheme.
    """
    chooser = SchemeChooser(checkpoint, schemes, target.mixed_experts, budget=target.budget(model.num_weights))
    chooser.check_budget(model)
    return chooser, uniform_schemes(target.preset, checkpoint) if target.preset else None


def _readable_schemes(session: Session) -> tuple[str, ...]:
    """Return the default schemes but those for which an installed reader is too old; these are named."""
    unread = {name: words for name in DEFAULT_SCHEMES if (words := unread_scheme(SCHEMES[name]))}
    if unread:
        session.note(f"left out, since the installed version does not read them: {'; '.join(unread.values())}")
    return tuple(name for name in DEFAULT_SCHEMES if name not in unread)


def _of_table(
    plan: Plan, table: ErrorTable, path: Path, source: TensorSource, names: Iterable[str], **fields: object
) -> Plan:
    """Return the plan with the hash of its error table, the kind of second moments that are beside it, and checksums:
    the table's, and now of the others by name."""
    others = {name: f"{checksum(source.load(name)):016x}" for name in names if name not in table.tensors()}
    update = {"errors_hash": file_hash(path), "checksums": {**table.checksums, **others}, **fields}
    return _with_kind_of_moments(plan.model_copy(update=update), path.parent)


def _with_kind_of_moments(plan: Plan, folder: Path) -> Plan:
    """Return the plan with the kind of the second moments in its folder, which must be whole; without any as it is."""
    kind = kind_beside(folder / file_names.STATS_NAME)
    return plan if kind == "none" else plan.model_copy(update={"hessians": kind})


def _weighted_errors(table: ErrorTable) -> dict[tuple[str, str], float]:
    return {(row.name, row.type): row.weighted_error for row in table.rows}


def _check_vllm(options: PlanOptions) -> None:
    """Refuse options that plans for vLLM have no place for."""
    target = options.target
    flags = {
        "--data": options.calibration.data,
        "--fits": target.fits,
        "--couple": target.couple,
        "--like": target.like,
        "--recipe": target.patterns,
        "--base-gguf": options.base_gguf,
        "--no-mtp": not options.mtp,
        "--vision": target.vision != "auto",
    }
    if refused := [flag for flag, value in flags.items() if value]:
        raise PlanError(
            f"{' and '.join(refused)} is for plans of GGUF types; --for vllm goes with --bpw, --size, --preset, "
            "--types, --select and options of calibration."
        )


def _search_of(options: PlanOptions) -> SearchOptions | None:
    """Return the search with its methods, or None when the closed form prices and chooses alone."""
    on_text = options.calibration.data is None
    search = options.search.with_methods(on_text=on_text)
    if not search.runs_model:
        return None
    if not on_text and search.runs_on_text:
        raise PlanError(
            "--frontier, --check-plans and the sensitivities fisher-probe and unit-kl run on text; with --data leave "
            "them out. --select chooses among plans for vision tower and projector."
        )
    return search


def _check_runs(model: Model, options: PlanOptions, search: SearchOptions, session: Session) -> None:
    """Refuse a model that a search cannot run as a whole, and a text of which calibration leaves it too little."""
    if streaming_limit(model, options.calibration, chosen_device(session.device), session) is not None:
        raise PlanError(_why_not_streamed(model, options))
    if search.text is not None and options.calibration.data is None:
        read_measured(search.text, max_tokens=1)
    if search.select and options.calibration.data is None and (options.stats is None or options.prune_experts):
        check_selection_text(model, search, options.calibration, session)


def _why_not_streamed(model: Model, options: PlanOptions) -> str:
    """Say which options need a model that is in memory whole, and all that would be left out without it."""
    search, limit = options.search, options.calibration.max_memory
    asked = search.changed("select", "frontier", "check_plans")
    if not {*search.methods} <= {CLOSED_FORM}:
        asked.append(f"--sensitivity {','.join(search.methods)}")
    asked += [f"--effort {options.effort}"] * (options.effort != "normal")
    if options.calibration.sampled_tokens:
        asked += options.calibration.changed("sampled_tokens")
    whole, without = (_listed(flags) for flags in (asked, [*asked, *search.changed("text", "probes")]))
    is_streamed = "there is less memory here" if limit is None else f"with --max-memory {limit} it is streamed"
    return (
        f"{whole} run{'s' * (len(asked) == 1)} {model.name} as a whole, which takes "
        f"{human_bytes(4 * model.num_weights)} on a CPU and half of it on a GPU, and {is_streamed}. Without "
        f"{without}, plans are priced by the closed form, which is streamed, too. Otherwise plan on a machine that has "
        f"the memory{', without --max-memory' * (limit is not None)}."
    )


def _listed(flags: Sequence[str]) -> str:
    *others, last = flags
    return f"{', '.join(others)} and {last}" if others else last


def _check_budgets(
    model: Model, options: PlanOptions, types: Sequence[str], budgets: Sequence[Target], stats: CalibrationStats | None
) -> None:
    """Refuse budgets that cannot be met, as far as shapes tell, or statistics."""
    path = options.output / file_names.ERRORS_NAME  # a table that is there already may have more types
    measurable = tuple(dict.fromkeys((*types, *(ErrorTable.load(path).types if path.is_file() else ()))))
    for target in budgets:
        try:
            check_budget(model, target, measurable, stats)
        except PlanError as error:
            raise PlanError(f"{target.recipe}: {error}" if target is not options.target else str(error)) from error


def _with_modules(chooser: Chooser, table: ErrorTable, level: str, session: Session) -> dict[str, Choice]:
    """Types and reasons after a decision for vision tower and projector as wholes, the highest that the budget holds.

    With measured sensitivities, what `auto` decides may raise the predicted KL no more than floors may.
    """
    plans: list[tuple[tuple[ModuleChoice, ...], dict[str, str]]] = []
    error: PlanError | None = None
    for choices in module_choices(table, level):
        try:
            plans.append((choices, chooser(held_to(table, choices))))
        except PlanError as refused:
            error = refused
    if not plans:
        assert error is not None
        raise error if level == "auto" else PlanError(f"With --vision {level}: {error}")
    is_priced = any(part_of(name) == VISION for name in table.sensitivity)
    predicted = [table.price_of(types).kl for _, types in plans]
    chosen = next(i for i, kl in enumerate(predicted) if not is_priced or kl <= FLOOR_PRICE * predicted[-1])
    if chosen > 0:
        session.note(
            f"the predicted KL is {predicted[chosen]:.3g} nats per token; with modules held as their errors say it "
            f"would be {predicted[0]:.3g} at the same bytes"
        )
    choices, types = plans[chosen]
    return _explained_modules(chooser, types, choices, session)


def _explained_modules(
    chooser: Chooser, types: Mapping[str, str], choices: tuple[ModuleChoice, ...], session: Session
) -> dict[str, Choice]:
    """Types and reasons of a plan; what was decided for a whole module is the reason of its tensors, and is told."""
    for choice in choices:
        session.note(choice.reason)
    reasons = {choice.part: choice.reason for choice in choices if choice.level != "lower"}
    return {
        name: Choice(choice.type, reasons.get(part_of(name), choice.reason))
        for name, choice in chooser.explained(types).items()
    }


def _promise(table: ErrorTable, choices: Mapping[str, Choice], selection: Selection | None) -> dict[str, object]:
    """Return what a plan states about itself: its objective, and the KL as it was predicted and measured."""
    if selection is not None:
        winner = selection.winner
        predicted, error, measured = winner.predicted_kl, winner.predicted_kl_se, winner.kl
        if selection.fit is not None:
            predicted, error = selection.fit.predicted(predicted)
    else:
        total = table.total(row for name, choice in choices.items() if (row := table.row(name, choice.type)))
        predicted, error, measured = total.kl, total.se, None
    return {
        "objective": table.cost_name,
        "predicted_kl": predicted if table.sensitivity else None,
        "predicted_kl_se": error if table.sensitivity else None,
        "selected_kl": measured.value if measured else None,
    }


def plan_from_config(directory: Path, target: Target, session: Session = SILENT) -> Plan:
    """Size and types of a preset, recipe or like file from config.json (and tokenizer and index, if they are there).

    No weights are needed. The R1 recipes are sized as published, with MLA's `attn_kv_b` in one piece; what `export`
    makes of them today, with that tensor split, is said beside it.

    Raises:
        PlanError: a target that depends on measurement.
    """
    from dynquant.families.open import open_config

    if target.serves is not None:
        raise PlanError("--config-only DIR sizes plans of GGUF types; leave out --for vllm, whose plans need weights.")

    def sized(model: Model) -> Plan:
        types = _fixed_types(target, model)
        if types is None:
            raise PlanError(
                "--config-only DIR goes with --preset, --recipe or --like: a budget needs weights to measure."
            )
        return plan_from_types(model, types, recipe=target.recipe, exact=target.preset is None)

    plan = sized(open_config(directory))
    is_r1 = target.preset is not None and target.preset.lower() in R1_RECIPES
    if not is_r1 or not any(entry.role == Role.MLA_K_B for entry in plan.entries):
        return plan
    session.note(
        "attn_kv_b is counted in one piece, as in the published files. `export` splits it, as llama.cpp now does: "
        f"{len(plan.entries):,} tensors, {plan.predicted_bytes / 2**30:.2f} GiB"
    )
    with warnings.catch_warnings(action="ignore"):
        return sized(open_config(directory, whole_kv_b=True))


def _fixed_types(target: Target, model: Model) -> dict[str, Choice] | None:
    """Types that need no measurement, or None when the planner chooses."""
    if target.preset:
        return preset_types(target.preset, model, mtp_type=target.mtp_type, fallbacks=target.fallbacks)
    if target.like is not None:
        return like_types(target.like, model)
    if target.patterns is None:
        return None
    return recipe_types(target.patterns, model, fallbacks=target.fallbacks)


def _probe(
    model: Model, table: ErrorTable, options: PlanOptions, session: Session
) -> tuple[list[SuperWeight], ErrorTable]:
    """Measure what needs the running model: the sensitivity of the output to every tensor, and super weights.

    Both are kept in the directory. A model that transformers cannot run (a GGUF with imported statistics) has neither;
    the plan then counts every tensor's relative error alike, and says so. Plans for vLLM have no floors, and so no use
    for super weights.
    """
    path, for_vllm = options.output / file_names.SUPER_NAME, options.target.serves is not None
    if table.sensitivity:
        if for_vllm:
            return [], table
        kept = load_super_weights(path)
        if kept.stats_hash == table.stats_hash:
            return list(kept.super_weights), table
    try:
        finds = {"finds_super_weights": not for_vllm}
        supers, *sensitivities = run_probe(model, options.calibration, options.output, session, **finds)
    except CheckpointError as error:
        session.note(f"no super weights and no sensitivities, every tensor's relative error counts alike: {error}")
        return [], table
    table = table.with_sensitivity(*sensitivities)
    table.save(options.output / (file_names.SCHEME_ERRORS_NAME if for_vllm else file_names.ERRORS_NAME))
    if not for_vllm:
        SuperWeights(stats_hash=table.stats_hash, super_weights=tuple(supers)).save(path)
    return supers, table
