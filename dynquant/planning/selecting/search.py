"""Plans priced by running the model, and the choice among them by the KL on inputs that no price has seen.

Surrogate costs propose, held-out KL selects (PrismaQuant's rule). On text, each method of pricing gives candidates at
the same budget, with and without floors; around the best of them large tensors are moved by a step. With pictures,
vision tower and projector are kept, at 8 bits or lower, in every combination; each is a plan of the same budget, so
what a module keeps is paid for by the language model. Types of GGUF and schemes of vLLM have choosers and stores of
their own, and all else in common. Plans are rendered from weights that are encoded once, and scored on pieces from all
over the calibration source behind what calibration used, or over what it held back, or on a file of the user's.
`check` draws plans around the chosen one and says how well predicted and measured KL agree. Every KL is the unbiased
one of `distributions`.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import accumulate, chain
from pathlib import Path

import numpy as np
import torch

from dynquant.analysis.errors.table import ErrorTable, Price, lower_hull
from dynquant.analysis.sensitivity.fisher_probe import fisher_probe, probe_prices
from dynquant.analysis.sensitivity.unit_kl import refine
from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.run import HELD_BACK
from dynquant.calibration.stage import StatsFile, calibration_inputs
from dynquant.checkpoints.model import Model
from dynquant.encoding.scheme_store import SchemeStore, open_scheme_store
from dynquant.encoding.store import ENCODED_NAME, EncodedStore, WeightStore, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.errors import PlanError
from dynquant.evaluation.rendered_model import RenderedModel, ScoredInputs
from dynquant.evaluation.statistics import Estimate, bootstrap_mean
from dynquant.families.linear_layers import LinearCheckpoint
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.formats.vllm_schemes import Scheme
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.planning.chooser import Chooser, SchemeChooser
from dynquant.planning.options import CLOSED_FORM, FISHER, UNIT_KL, SearchOptions
from dynquant.planning.selecting.selection import Candidate, Fit, Selection, rank_correlation
from dynquant.planning.selecting.text import Extent, selection_windows
from dynquant.planning.target import Target
from dynquant.planning.vision_modules import ModuleChoice, every_choice, held_to, with_measured_reasons
from dynquant.resources import chosen_device, human_bytes
from dynquant.running.load import load_hf
from dynquant.running.streaming.stream_memory import COMFORTABLE_SHARE, free_memory_of
from dynquant.session import Progress, Session

PICTURE_TOKENS = 16384  # image and text tokens that plans are scored on, at most: every plan runs on all of them
SearchResult = tuple[ErrorTable, Selection, tuple[ModuleChoice, ...]]
"""The table with all prices that were asked for, priced by the winner's; the scored plans; decisions on modules."""
_USUAL_SLOPE = 1.35
"""Growth of log KL with the log of added up prices where no plans are drawn to measure it; 1.29 to 1.43 were seen."""
_LARGE = 0.1
"""Share of what a plan decides from which one tensor is tried in other types than its price says."""
_CLEAR = 0.95
"""Share of the KL under which such a try counts: of the best of several, a few per cent are chance."""
_KEEPS = "Errors and encoded tensors are kept; what the search measured is lost."


def encoded_store(model: Model, stats: StatsFile, directory: Path, encoder_name: str, session: Session) -> EncodedStore:
    """Return the blocks of this model beside the plan, encoded as `export` will."""
    encoder = load_encoder(encoder_name, chosen_device(session.device))
    return open_store(model, stats, encoder, directory / ENCODED_NAME, session.threads)


def scheme_store(
    model: Model,
    checkpoint: LinearCheckpoint,
    schemes: Mapping[str, Sequence[Scheme]],
    stats: StatsFile,
    directory: Path,
    session: Session,
) -> SchemeStore:
    """Return the linear layers of a checkpoint beside the plan, in the schemes of each, encoded as `export` will."""
    place = torch.device(chosen_device(session.device))
    return open_scheme_store(model, checkpoint, schemes, stats, directory / ENCODED_NAME, place, session.threads)


@dataclass(frozen=True)
class Search:
    """Tools with which candidates are made, rendered and scored."""

    store: WeightStore
    options: SearchOptions
    chooser: Chooser | SchemeChooser
    target: Target
    stats: StatsFile
    calibration: CalibrationOptions
    session: Session

    @property
    def model(self) -> Model:
        return self.store.model

    def running(self, model: Model) -> torch.nn.Module:
        """Return a running model in float32, or in bfloat16 on a GPU that has no room for that."""
        device, dtype = chosen_device(self.session.device), torch.float32
        needed, free = 4 * model.num_weights, free_memory_of(device)
        if device != "cpu" and needed > COMFORTABLE_SHARE * free:
            dtype = torch.bfloat16
            self.session.note(
                f"plans are rendered in bfloat16, whose rounding is in every KL: float32 weights take "
                f"{human_bytes(needed)}, and {human_bytes(free)} are free"
            )
        return load_hf(model, dtype=dtype, device=device)

    def plan_bytes(self, table: ErrorTable) -> int:
        """Return the size of the file that the table's own prices lead to."""
        return self.chooser.file_bytes(self.chooser(table))

    def candidate(self, label: str, types: Mapping[str, str], table: ErrorTable) -> Candidate:
        total, size = table.price_of(types), self.chooser.file_bytes(types)
        return Candidate(label=label, bytes=size, predicted_kl=total.kl, predicted_kl_se=total.se, types=dict(types))


def search_plans(searches: Sequence[Search], table: ErrorTable) -> list[SearchResult]:
    """Price, propose and select for every search, on the kind of input that calibration had.

    Searches differ in their targets alone: one running model, one probe and one scoring text, or samples, serve all.

    Raises:
        PlanError: the budget holds no combination of levels.
        StatsError: too little text is left to select on.
        DataError: the samples cannot be used.
        CheckpointError: transformers cannot run the model, or it is a GGUF file.
    """
    if searches[0].calibration.data is not None:
        return _search_modules(searches, table)
    return _search_text(searches, table)


@dataclass(frozen=True)
class _Scorer:
    """Inputs that plans are scored on, by the running model that takes on their weights."""

    inputs: ScoredInputs
    progress: Progress
    keeps_floats: bool = False  # leave tensors in float types as the original has them

    def scored(self, candidates: Sequence[Candidate], stage: str) -> list[Candidate]:
        scored, left_out = [], {name for name, form in QUANT_TYPES.items() if self.keeps_floats and form.is_float}
        if candidates:  # a step of no plans would be listed as one that was taken
            self.progress(stage, 0, len(candidates), unit="plans")
        for candidate in candidates:
            self.inputs.rendered.install({name: form for name, form in candidate.types.items() if form not in left_out})
            divergences, agreements = self.inputs.score()
            kl, top1 = (bootstrap_mean(values.numpy(), self.inputs.lengths) for values in (divergences, agreements))
            scored.append(candidate.model_copy(update={"kl": kl, "top1": top1}))
            self.progress(stage, len(scored), len(candidates), unit="plans")
        return scored


def _lowest(candidates: Sequence[Candidate]) -> int:
    return min(range(len(candidates)), key=lambda index: candidates[index].kl.value)  # type: ignore[union-attr]


def _search_modules(searches: Sequence[Search], table: ErrorTable) -> list[SearchResult]:
    """Score every combination of levels of vision tower and projector, and take the one with the lowest KL."""
    plans, search = [_of_every_choice(each, table) for each in searches], searches[0]
    inputs = _selection_samples(search)
    rendered = RenderedModel(search.running(search.model), search.store)
    results: list[SearchResult] = []
    with search.session.stage(_KEEPS) as progress:
        scorer = _Scorer(ScoredInputs(rendered, inputs), progress, keeps_floats=True)
        for by_choices in plans:
            candidates = scorer.scored(list(by_choices.values()), "selecting by KL")
            chosen = _lowest(candidates)
            measured = {choices: plan.kl.value for choices, plan in zip(by_choices, candidates, strict=True)}  # type: ignore[union-attr]
            samples = f"{len(inputs)} samples of {inputs.name}"
            choices = with_measured_reasons(list(by_choices)[chosen], measured, samples)
            about = {"text": inputs.name, "num_tokens": scorer.inputs.num_tokens}
            results.append((table, Selection(candidates=tuple(candidates), chosen=chosen, **about), choices))
    return results


def _of_every_choice(search: Search, table: ErrorTable) -> dict[tuple[ModuleChoice, ...], Candidate]:
    """Return a plan for every combination of levels that the budget holds. Raises PlanError: it holds none."""
    plans: dict[tuple[ModuleChoice, ...], Candidate] = {}
    refused = ""
    for choices in every_choice(table, search.target.vision):
        try:
            types = search.chooser(held_to(table, choices))
        except PlanError as error:
            refused = str(error)
            continue
        label = " / ".join(f"{choice.part} {choice.level}" for choice in choices)
        plans[choices] = search.candidate(label, types, table)
    if not plans:
        raise PlanError(refused)
    return plans


def _selection_samples(search: Search) -> ModelInputs:
    """Return samples of a file of the user's, or those that calibration held back."""
    options, other = search.calibration, search.options.text
    if other is not None:
        options = replace(options, data=str(other), tokens=PICTURE_TOKENS)
        return calibration_inputs(search.model, options, search.session)
    inputs = calibration_inputs(search.model, options, search.session)
    held = inputs.hold_back(HELD_BACK)[1] or inputs
    before = accumulate((batch.num_tokens for batch in held), initial=0)
    count = sum(total < PICTURE_TOKENS for total, _ in zip(before, held, strict=False))
    return replace(held[:count], name=f"{inputs.name}, held back")


def _search_text(searches: Sequence[Search], table: ErrorTable) -> list[SearchResult]:
    search = searches[0]
    table, options, provenance = search.chooser.allowed(table), search.options, search.stats.stats.provenance
    window = provenance.window or 512
    extent = Extent(provenance.max_tokens, window, provenance.seed, provenance.sampled_tokens)
    windows, calibrated = selection_windows(search.model, options, search.calibration, extent)
    hf_model = search.running(search.model)
    with search.session.stage(_KEEPS) as progress:
        if FISHER in options.methods and table.is_priced_by(FISHER):
            search.session.note(f"reusing the prices of {FISHER}, whatever --probes says")
        elif FISHER in options.methods:
            probes = _evenly(calibrated, options.probes)[:, : options.probe_window]  # the beginnings
            costs = fisher_probe(hf_model, search.store, table, probes, seed=search.session.seed, progress=progress)
            table = table.with_prices(FISHER, probe_prices(table, costs))
        rendered = RenderedModel(hf_model, search.store)
        original = search.model.original and search.running(search.model.original)
        scorer = _Scorer(ScoredInputs(rendered, windows, original), progress)
        del original
        unit_text = None
        if UNIT_KL in options.methods:
            unit_windows = _evenly(calibrated, max(1, options.unit_tokens // window))
            unit_text = ScoredInputs(rendered, ModelInputs(unit_windows))
        results: dict[int, SearchResult] = {}
        before: ErrorTable | None = None
        sizes = [each.plan_bytes(table) for each in searches] if len(searches) > 1 else [0]
        for index in sorted(range(len(searches)), key=lambda index: -sizes[index]):
            results[index] = _selected(searches[index], before or table, scorer, unit_text, is_first=before is None)
            if unit_text is not None:
                before = results[index][0].priced(UNIT_KL)
        return [results[index] for index in range(len(searches))]


def _evenly(windows: torch.Tensor, count: int) -> torch.Tensor:
    return windows[:: max(1, len(windows) // count)][:count]


def _selected(
    search: Search, table: ErrorTable, scorer: _Scorer, unit_text: ScoredInputs | None, *, is_first: bool
) -> SearchResult:
    """Propose plans at the budget of one search, and take one of them. All but the first start from a table with the
    unit KL of the next larger size."""
    options = search.options
    if is_first or unit_text is None:
        table, candidates, chosen = _proposed(search, table, unit_text, scorer.progress)
    else:
        table, candidates, chosen = _proposed_from_neighbour(search, table, unit_text, scorer.progress)
    if options.select:
        candidates = scorer.scored(candidates, "selecting by KL")
        table, candidates = _with_moves(search, table, candidates, scorer, unit_text)
        chosen = _lowest(candidates)
    checked = scorer.scored(_drawn(search, table), "checking predictions")
    frontier = scorer.scored(_frontier(search, table, unit_text), "measuring the frontier")
    pairs = np.array([(plan.predicted_kl, plan.kl.value) for plan in checked or candidates if plan.kl]).reshape(-1, 2)
    rho = rank_correlation(pairs) if checked else None
    agreement: dict[str, Estimate | Fit | None] = {"rank_correlation": rho}
    positive = pairs[(pairs > 0).all(1)]  # near the original, the unbiased KL may be below 0
    if len(positive):
        agreement["fit"] = Fit.of(*positive.T, slope=None if rho and len(positive) > 1 else _USUAL_SLOPE)
    plans = {"candidates": tuple(candidates), "checked": tuple(checked), "frontier": tuple(frontier)}
    about = {"text": scorer.inputs.name, "num_tokens": scorer.inputs.num_tokens}
    selection = Selection(**about, chosen=chosen, **plans, **agreement)
    return table.priced(candidates[chosen].method), selection, ()


def _proposed(
    search: Search, table: ErrorTable, unit_text: ScoredInputs | None, progress: Progress
) -> tuple[ErrorTable, list[Candidate], int]:
    """Return the table priced by the last method, and the candidates in its prices, no two of them alike; and which of
    them is taken where nothing is selected: the last one with floors by the last method that was asked for."""
    plans: list[tuple[str, dict[str, str]]] = []
    last: dict[str, str] = {}
    for method in (CLOSED_FORM, FISHER):
        if method == CLOSED_FORM or table.is_priced_by(method):
            table = table.priced(method)
            plans += _with_and_without_floors(method, search, table)
            if method in search.options.methods:
                last = plans[-2][1]
    if unit_text is not None:
        rounds = refine(unit_text, table, search.chooser, search.options.rounds, progress)
        for number, table in enumerate(rounds, start=1):
            plans += _with_and_without_floors(f"{UNIT_KL}, round {number}", search, table)
            last = plans[-2][1]
    unlike = _unlike(plans)
    candidates = [search.candidate(label, types, table) for label, types in unlike]
    return table, candidates, [types for _, types in unlike].index(last)


def _with_and_without_floors(label: str, search: Search, table: ErrorTable) -> list[tuple[str, dict[str, str]]]:
    return [(label, search.chooser(table, floors=True)), (f"{label}, no floors", search.chooser(table, floors=False))]


def _unlike(plans: Iterable[tuple[str, dict[str, str]]]) -> list[tuple[str, dict[str, str]]]:
    """Return the plans, label and types, that differ from all before them."""
    unlike: dict[tuple[tuple[str, str], ...], str] = {}
    for label, types in plans:
        unlike.setdefault(tuple(sorted(types.items())), label)
    return [(label, dict(types)) for types, label in unlike.items()]


def _proposed_from_neighbour(
    search: Search, table: ErrorTable, unit_text: ScoredInputs, progress: Progress
) -> tuple[ErrorTable, list[Candidate], int]:
    """Return what `_proposed` does, for a table with the unit KL of the next larger size.

    Tensors' worth changes little from size to size: its plan, one more round from there and the two candidates that
    promise most lose no more than a search from the beginning. On textbook-moe-16m at six sizes of 1.8 to 5 bits the
    mean KL is the same (-0.1 +- 0.6 %, 8,192 held-out tokens; -5 to +2.6 % of a size), in half the time of a size.
    """
    choose = partial(search.chooser, floors=False)
    (refined,) = refine(unit_text, table, choose, 1, progress)
    plans = [(f"{UNIT_KL}, with floors", search.chooser(refined)), (f"{UNIT_KL}, no floors", choose(refined))]
    plans.append((f"{UNIT_KL}, next size's", choose(table)))
    candidates = [search.candidate(label, types, refined) for label, types in _unlike(plans)]
    if search.options.select:
        candidates = sorted(candidates, key=lambda candidate: candidate.predicted_kl or 0.0)[:2]
    return refined, candidates, 0  # with floors, where nothing is selected


def _with_moves(
    search: Search,
    table: ErrorTable,
    candidates: Sequence[Candidate],
    scorer: _Scorer,
    unit_text: ScoredInputs | None,
) -> tuple[ErrorTable, list[Candidate]]:
    """Return scored candidates with those that moving a large tensor clearly betters; where there is one, the table has
    the unit KL at the best, and the plan of these prices is a candidate too."""
    best = candidates[_lowest(candidates)]
    moved = scorer.scored(_moved(search, table.priced(best.method), best), "moving large tensors")
    clear = [plan for plan in moved if plan.kl.value < _CLEAR * best.kl.value]  # type: ignore[union-attr]
    candidates = [*candidates, *clear]
    winner = candidates[_lowest(candidates)]
    if winner not in clear or unit_text is None:
        return table, candidates
    (table,) = refine(unit_text, table, lambda _: dict(winner.types), 1, scorer.progress)
    scores = [{"kl": plan.kl, "top1": plan.top1} for plan in candidates]
    priced = (search.candidate(plan.label, plan.types, table) for plan in candidates)
    candidates = [plan.model_copy(update=score) for plan, score in zip(priced, scores, strict=True)]
    types = search.chooser(table, floors=False)
    if all(types != plan.types for plan in candidates):
        after = search.candidate(f"{UNIT_KL}, after the move", types, table)
        candidates += scorer.scored([after], "selecting by KL")
    return table, candidates


def _moved(search: Search, table: ErrorTable, best: Candidate) -> list[Candidate]:
    """Return plans in which one large tensor, or tensors that share their type, have the next smaller or larger type
    that is worth its bytes, and the rest is chosen around it.

    Such a tensor, mostly an embedding or an output matrix, is one choice of many bytes, and the one whose price is
    least certain: unit KL is measured among the errors of all others, whose directions count the more, the more precise
    the tensor is, so that what is precise seems to be worth it. Qwen2.5-Coder-0.5B at 4.17 bits kept both in IQ4_NL and
    took Q2_0 for a quarter of its layers: KL 0.09 to 0.15 on four texts, where 0.04 to 0.07 was to be had with the
    embedding in Q2_0 (reports/damage.md). Routed experts, which have one scheme in a plan for vLLM, are such a choice.
    """
    least, plans = _LARGE * (best.bytes - search.chooser.file_bytes({})), []
    for unit, options in search.chooser.units(table).items():
        held = next(option.bytes for option in options if option.type == best.types[unit[0]])
        if held < least:
            continue
        hull = lower_hull(options)
        near = (
            [option for option in hull if option.bytes < held][-1:],
            [option for option in hull if option.bytes > held][:1],
        )
        label = unit[0] + f" and {len(unit) - 1} with it" * (len(unit) > 1)
        for option in chain(*near):
            rows = [row for row in table.rows if row.name not in unit or row.type == option.type]
            try:
                types = search.chooser(table.with_rows(rows), floors=False)
            except PlanError:
                continue  # the rest has no room for it, or nothing to spend what it frees
            plans.append((f"{best.method}, {label} in {option.type}", types))
    return [search.candidate(label, types, table) for label, types in _unlike(plans) if types != best.types]


def _drawn(search: Search, table: ErrorTable) -> list[Candidate]:
    """Return plans around the frontier: prices of tensors are shaken by a factor of about 2, sizes by up to 10 %."""
    random = np.random.default_rng(search.session.seed)
    around = search.plan_bytes(table)
    drawn = []
    for number in range(search.options.check_plans):
        factors = {name: float(np.exp(random.normal(0, 0.7))) for name in table.tensors()}  # a factor of about 2
        shaken = {
            name: {row.type: Price(kl=factors[name] * table.cost(row), se=0.0) for row in rows.values()}
            for name, rows in table.tensors().items()
        }
        size = int(random.uniform(0.9, 1.1) * around)
        types = search.chooser(table.with_prices("shaken", shaken), floors=False, file_bytes=size)
        drawn.append(search.candidate(f"drawn {number + 1}", types, table))
    return drawn


def _frontier(search: Search, table: ErrorTable, unit_text: ScoredInputs | None) -> list[Candidate]:
    """Return the planner at sizes evenly spaced in logarithm, and every fixed recipe in the range.

    Prices by unit KL are those of each size.
    """
    if search.options.frontier is None:
        return []
    num_weights = search.model.num_weights
    low, high = (int(bits * num_weights / 8) for bits in search.options.frontier)
    planned: dict[int, Candidate] = {}
    for size in np.geomspace(low, high, search.options.frontier_points):
        choose = partial(search.chooser, floors=False, file_bytes=int(size))
        if unit_text is not None:
            (table,) = refine(unit_text, table, choose, rounds=1)
        plan = search.candidate(f"planner, {8 * size / num_weights:.2f} bpw", choose(table), table)
        if plan.bytes <= size:
            planned.setdefault(plan.bytes, plan)
    points = list(planned.values())
    if missing := search.options.frontier_points - len(points):
        search.session.note(
            f"--frontier: {missing} of its {search.options.frontier_points} sizes have no plan of their "
            "own with these --types"
        )
    for label, types in search.chooser.recipes(table).items():
        size = search.chooser.file_bytes(types)
        if low <= size <= high:
            points.append(Candidate(label=label, bytes=size, types=types))
    return points
