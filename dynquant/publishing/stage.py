"""The release: one calibration and one table for all sizes, then a file, its measurement and its row for each.

Model-Q2_K-dq-2.10bpw.gguf    a size: the type of most weights, and the bits of the whole file
Model-imatrix.gguf            the statistics, as llama-quantize reads them
README.md, kl_against_size.*  the card
evaluation/                   reports of `eval`, from which the card has its numbers
release.json                  what is done: a run that was stopped goes on at the first missing file
work/                         statistics, error table, encoded blocks; for more sizes, not to be published
"""

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from importlib import metadata
from math import prod
from pathlib import Path
from typing import Any, NamedTuple

from dynquant import __version__
from dynquant.analysis.plots import style
from dynquant.analysis.plots.frontier import draw_measured_frontier
from dynquant.calibration.imatrix import export_imatrix
from dynquant.calibration.run import given_tokens
from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.encoding.store import ENCODED_NAME
from dynquant.encoding.stream import load_encoder
from dynquant.errors import DynquantError, OptionError
from dynquant.evaluation.evaluate import check_readable, evaluate
from dynquant.evaluation.options import EvalOptions, TaskOptions
from dynquant.evaluation.report import EvalReport
from dynquant.exporters.closing_pass import check_can_tune
from dynquant.exporters.stage import export
from dynquant.families.open import open_model
from dynquant.formats.storage_format import Choice
from dynquant.inputs.text import pack_windows, read_text
from dynquant.llama_library import llama_cpp
from dynquant.options import command_words, shown_values
from dynquant.planning.selecting.selection import Candidate, Selection
from dynquant.planning.stage import make_plans
from dynquant.planning.target import Target
from dynquant.publishing.card import release_card
from dynquant.publishing.hub import Upload, push, recipe_file
from dynquant.publishing.options import (
    CARD_NAME,
    PLOT_NAME,
    RECORD_NAME,
    REPORTS_NAME,
    WORK_NAME,
    ReleaseOptions,
    ReleaseTasks,
)
from dynquant.publishing.record import Release, ReleasedFile, ReleaseRun
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.plan import Plan
from dynquant.recipes.type_lists import like_types
from dynquant.resources import chosen_device
from dynquant.running.load import load_tokenizer
from dynquant.session import SILENT, Session
from dynquant.storage.atomic import file_hash, write_atomically
from dynquant.storage.documents import recorded_settings
from dynquant.storage.file_names import STATS_NAME, request_in_name

_SIZES = {"--sizes", "--bpw", "--fits", "--context", "--kv-type"}
_MEASURING = {option for _, option, *_ in shown_values(ReleaseTasks())}
_ON_THE_CARD = {"--like", "--packed", "--base-model", "--quantized-by", "--push", "--yes"}
_FREE = {"--model", "--output", "--max-memory"} | _SIZES | _MEASURING | _ON_THE_CARD
"""Options that may change from run to run of one release."""
_LEAST_MEASURED = 2048  # tokens; and calibrated at least, where a text is short
_PACKAGES = ("torch", "transformers", "llama-cpp-python", "xllamacpp")


class _Behind(NamedTuple):
    """The rest of a text, behind what calibration and selection take."""

    name: str
    text: str


@dataclass(frozen=True)
class Released:
    """Result of a release: the record of its folder, and with --push what goes to the Hub."""

    record: Release
    uploads: list[Upload]


def release(options: ReleaseOptions, session: Session = SILENT) -> Released:
    """Make and measure every file that is not there yet, write the card of all, and push it where that is asked for.

    Raises:
        OptionError: the folder holds something else, a release of another model or with other options, or too little
            text is left to measure on.
        PlanError: a size below what is possible; before anything is measured where that can be known.
    """
    model = open_model(options.model)
    options, behind = _divided(options, model, session)
    record = _begun(options, model, session)
    with _nothing_left_of_a_refusal(options.output):
        record.save(options.output / RECORD_NAME)  # before plans, which are of these settings
        making = _Making(options, model, session, _texts(options, behind))
        making.check(record)
        record = making.planned(record)
        plans = making.missing(record) | making.followed(record)
    for request, path in plans.items():
        row = making.row(request, Plan.load(path), record)
        if row is not None:
            record = record.with_file(making.exported(row, path))
            record.save(options.output / RECORD_NAME)
    for row in record.files:
        record = record.with_file(making.measured(row))
        record.save(options.output / RECORD_NAME)
    record = making.finished(record)
    uploads = [] if options.push is None else push(options.output, record, options.push, session, is_real=options.yes)
    return Released(record, uploads)


@contextmanager
def _nothing_left_of_a_refusal(folder: Path) -> Iterator[None]:
    """Context manager: an error before anything was measured leaves the folder as it was before the release."""
    is_begun, work = (folder / RECORD_NAME).is_file(), folder / WORK_NAME
    before = {*work.iterdir()} if work.is_dir() else set()
    try:
        yield
    except DynquantError:
        if not is_begun and not (work / STATS_NAME).is_file():
            for path in {*work.iterdir()} - before if work.is_dir() else ():
                if path.is_dir():
                    shutil.rmtree(path, ignore_errors=True)
                else:
                    path.unlink()
            (folder / RECORD_NAME).unlink(missing_ok=True)
            for each in (work, folder):
                with suppress(OSError):  # something else is in it
                    each.rmdir()
        raise


def _begun(options: ReleaseOptions, model: Model, session: Session) -> Release:
    """Return the record of the folder, or a new one; refuse a folder that holds something else."""
    settings = json.loads(json.dumps(recorded_settings(options, _FREE) | {"--seed": session.seed}))
    record = Release.load(options.output)
    if record is not None and record.files:
        # An option that is newer than the folder was at its default there.
        told = {option for _, option, _, is_changed in shown_values(options) if is_changed} | record.settings.keys()
        record.check_same(options.output, model, {option: settings[option] for option in told & settings.keys()})
        return record
    if record is not None and (record.fingerprint, record.settings) == (model.fingerprint, settings):
        return record
    plans = [f"{WORK_NAME}/{plan.name}" for plan in (options.output / WORK_NAME).glob("*.plan.json")]
    taken = next((name for name in (CARD_NAME, "config.json", *plans) if (options.output / name).exists()), None)
    if record is None and taken is not None:
        raise OptionError(
            f"{options.output} holds a {taken} that no release wrote, and would be mixed with other files. Give a new "
            "folder as -o."
        )
    for plan in plans:  # of a run with other options that made no file
        (options.output / plan).unlink()
    about = {"model": model.name, "arch": model.arch, "fingerprint": model.fingerprint, "settings": settings}
    return Release(num_weights=model.num_weights, **about)


def _divided(options: ReleaseOptions, model: Model, session: Session) -> tuple[ReleaseOptions, _Behind | None]:
    """Return the options and, unless other texts are measured on, what calibration and selection leave of their own
    text. Of a text that is shorter than --tokens asks for, calibration takes what leaves enough to measure on."""
    if options.asked.text or model.has_vision:
        return options, None
    calibration, search, tokenizer = options.calibration, options.of_plans.search, load_tokenizer(model)
    window, measured, usual = calibration.window, options.asked.max_tokens, ReleaseTasks.max_tokens
    read = given_tokens(calibration)  # without given text, what is written begins with some of it
    while True:  # a data set is read as far as calibration reads it: in which order it comes depends on that
        documents = read_text(calibration.text, seed=session.seed, max_tokens=read)
        enough = read + 2 * window + search.selection_span + max(measured, search.selection_span)
        windows = pack_windows(documents, tokenizer, window=window, max_tokens=enough)
        # Whatever --max-tokens says: a later run may say otherwise, and calibration and selection are one for all.
        kept = max(_LEAST_MEASURED, min(usual, windows.numel() // 8))
        most = windows.numel() - 2 * window - search.selection_tokens - kept
        if read > most < _LEAST_MEASURED:
            raise OptionError(
                f"{documents.name} gives {windows.numel():,} tokens, too few to calibrate, choose plans and measure "
                "files on different parts. Give a longer --calibration, of a data set more --tokens, or a text to "
                "measure on as --text FILE."
            )
        if read <= most or not calibration.tokens:
            break
        read = most
    if read < calibration.tokens:
        session.note(
            f"{documents.name} has {windows.numel():,} tokens: calibration takes {read:,} of them instead of "
            f"{calibration.tokens:,}, for plans are chosen and files measured on the rest. A longer --calibration "
            "gives more"
        )
        options = options.changed_to({"calibration": calibration.changed_to({"tokens": read})})
    first = min(read, most) + 2 * window
    span = min(search.selection_span, max(search.selection_tokens, (windows.numel() - first) // 2))
    left = windows[(first + span) // window : (first + span + measured) // window]
    behind = _Behind(documents.name, tokenizer.decode(left.flatten().tolist(), skip_special_tokens=True))
    return options.changed_to({"selection_span": span}), behind


def _texts(options: ReleaseOptions, behind: _Behind | None) -> tuple[Path, ...]:
    """Return the texts to measure on, of which what calibration left is written among the work."""
    if behind is None:
        return options.asked.text
    path = options.output / WORK_NAME / f"behind-{Path(behind.name).stem}.txt".replace(" ", "-")
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, behind.text)
    return (path,)


@dataclass(frozen=True)
class _Making:
    """A release on its way: what is made, and the texts that it is measured on."""

    options: ReleaseOptions
    model: Model
    session: Session
    texts: tuple[Path, ...]

    @property
    def folder(self) -> Path:
        return self.options.output

    @property
    def work(self) -> Path:
        return self.options.output / WORK_NAME

    @cached_property
    def asked(self) -> TaskOptions:
        """All that files are measured on."""
        asked = self.options.asked
        tasks = ("kl", "ppl") * bool(self.texts) + ("mmlu",) * (asked.mmlu_data is not None)
        tasks += ("generate",) * (bool(self.texts) and asked.prompts > 0)
        return replace(asked, text=self.texts, tasks=tasks)

    @cached_property
    def settings(self) -> dict[str, Any]:
        """Settings that decide the measurements of a file."""
        return json.loads(json.dumps(recorded_settings(self.asked, ())))

    def planned(self, record: Release) -> Release:
        """Plan every size that has not all of its files; return the record with the run of those that had none.

        The sizes of a run are planned together or not at all, so that a file that is made again has the same bytes.
        """
        options = self.options
        missing = {target.recipe: target for target in options.targets if not self._has_files(record, target.recipe)}
        new = {request: target for request, target in missing.items() if record.run_of(request) is None}
        runs = list(record.runs)
        if new:
            fields = ("fits", "context", "kv_type") if options.fits else ("bpw",)
            sizes = {request: {field: getattr(new[request], field) for field in fields} for request in new}
            command, device = _command(options.asking_for(new), self.session), chosen_device(self.session.device)
            runs.append(ReleaseRun(command=command, sizes=sizes, device=device, versions=_versions()))
        for run in runs:
            is_there = (request not in missing or self.plan_path(request).is_file() for request in run.sizes)
            if run in record.runs and all(is_there):
                continue
            targets = [Target(types=options.types, **size) for size in run.sizes.values()]
            plans = make_plans(options.of_plans, targets, self.session)
            if run not in record.runs:
                added = {"runs": (*record.runs, run), "commands": (*record.commands, run.command)}
                record = record.model_copy(update=added)
                record.save(self.folder / RECORD_NAME)
            for request, plan in zip(run.sizes, plans, strict=True):
                plan.save(self.plan_path(request))
        return record

    def missing(self, record: Release) -> dict[str, Path]:
        """Return the plan of every size that has not all of its files, by what was asked for."""
        requests = (target.recipe for target in self.options.targets)
        return {request: self.plan_path(request) for request in requests if not self._has_files(record, request)}

    @cached_property
    def likes(self) -> dict[str, dict[str, Choice]]:
        """Types of every published recipe to compare with; their hash tells files of one name apart."""
        if self.options.like and not self.asked.tasks:
            self.session.note("--like: nothing is measured without --text or --mmlu-data, so there is no comparison")
            return {}
        likes = {}
        for path in self.options.like:
            with recipe_file(path) as recipe:
                types = like_types(recipe, self.model)
            digest = hashlib.sha256(repr(sorted((name, each.type) for name, each in types.items())).encode())
            likes[f"{Target(like=path).recipe}, types {digest.hexdigest()[:6]}"] = types
        return likes

    def check(self, record: Release) -> None:
        """Refuse, before hours of planning, recipes that cannot be followed, a closing pass that cannot run, and to
        measure without llama.cpp, texts or questions."""
        if (tokens := self.options.tune) > 0:
            encoder = load_encoder(self.options.encoder, chosen_device(self.session.device))
            check_can_tune(self.model, tokens, self.options.calibration, self.session.seed, encoder)
        rows = map(record.row, [*(target.recipe for target in self.options.targets), *self.likes])
        if self.asked.tasks and any(row is None or row.measured_with != self.settings for row in rows):
            llama_cpp()
            check_readable(self.asked)

    def followed(self, record: Release) -> dict[str, Path]:
        """Return a plan with the types of every published recipe that was not measured."""
        paths = {}
        for request, types in self.likes.items():
            row = record.row(request)
            if row is not None and row.measured_with == self.settings:
                continue
            path = paths[request] = self.plan_path(request)
            if not path.is_file():
                stats = StatsFile(self.work / STATS_NAME).of(self.model)
                origin = {"recipe": request, "stats": stats.stats, "stats_hash": stats.hash}
                plan_from_types(self.model, types, **origin).save(path)
        return paths

    def plan_path(self, request: str) -> Path:
        return self.work / f"{request_in_name(request)}.plan.json"

    def _has_files(self, record: Release, request: str) -> bool:
        row = record.row(request)
        if row is None or not all((self.folder / name).is_file() for name in row.files):
            return False
        return len(row.packed) > 0 or not self.options.packed

    def row(self, request: str, plan: Plan, record: Release) -> ReleasedFile | None:
        """Return the row of a plan; None, and say so, where it is the plan of another row."""
        if row := record.row(request):
            return row
        is_released = not request.startswith("like ")
        other = next((row for row in record.files if row.plan_hash == plan.hash and row.is_released), None)
        if other is not None and is_released:
            self.session.note(f"{request}: the plan of {other.name}, which serves both")
            return None
        return ReleasedFile(
            request=request,
            name=_file_name(self.options.name or self.model.name, plan, record)
            if is_released
            else f"{request_in_name(request)}.gguf",
            bytes=plan.predicted_bytes,
            bits_per_weight=plan.bits_per_weight,
            types=plan.histogram(),
            plan_hash=plan.hash,
            predicted_kl=plan.predicted_kl,
            is_released=is_released,
        )

    def exported(self, row: ReleasedFile, plan: Path) -> ReleasedFile:
        """Return the row with its files, which are written unless they are there; those of a comparison stay among
        the work."""
        output = (self.folder if row.is_released else self.work) / row.name
        asked = replace(self.options.of_export(output, plan), blocks=self.work / ENCODED_NAME)
        if not row.is_released:
            export(asked, self.session)
            return row
        if not row.files or not all((self.folder / name).is_file() for name in row.files):
            row = row.with_files(self.folder, export(replace(asked, modelfile=True), self.session).files)
        if self.options.packed and not row.packed:
            packed = replace(asked, output=output.with_suffix(""), format="safetensors")
            row = row.with_files(self.folder, export(packed, self.session).files)
        return row

    def measured(self, row: ReleasedFile) -> ReleasedFile:
        """Return the row with what its report was measured with; measured is what was not, or not with that."""
        candidate = (self.folder if row.is_released else self.work) / row.name
        if not self.asked.tasks or self.settings == row.measured_with or not candidate.is_file():
            return row
        asked = EvalOptions(
            candidate=str(candidate),
            reference=self.options.model,
            asked=self.asked,
            reference_cache=self.work / "reference",
        )
        report = evaluate(asked, self.session)
        write_atomically(self.folder / REPORTS_NAME / f"{row.name}.json", report.to_json())
        if not row.is_released:
            candidate.unlink()
        return row.model_copy(update={"measured_with": self.settings})

    def finished(self, record: Release) -> Release:
        """Return the record with what belongs to all files; card, plot and imatrix are written."""
        options, stats_path = self.options, self.work / STATS_NAME
        imatrix = f"{options.name or self.model.name}-imatrix.gguf"
        update: dict[str, Any] = {"command": _command(options, self.session), "versions": _versions()}
        is_recorded = imatrix in record.extra_files and (self.folder / imatrix).is_file()
        if stats_path.is_file() and not is_recorded:
            stats = StatsFile(stats_path)
            export_imatrix(stats.stats, self.folder / imatrix, model=self.model)
            text = stats.stats.provenance
            calibration = f"{text.num_tokens:,} tokens of {text.text_name} (SHA-256 {text.text_hash[:16]})"
            update |= {"stats_hash": stats.hash, "extra_files": {imatrix: file_hash(self.folder / imatrix)}}
            update["calibration"] = calibration
        rows = tuple(row for row in record.files if row.is_released or row.measured_with == self.settings)
        record = record.model_copy(update=update | {"files": rows})
        record.save(self.folder / RECORD_NAME)
        reports = {row.name: report for row in record.files if (report := record.report(self.folder, row.name))}
        plot = _draw(record, reports, self.folder)
        write_atomically(self.folder / CARD_NAME, release_card(record, reports, self.model, options, plot))
        return record


def _command(options: ReleaseOptions, session: Session) -> tuple[str, ...]:
    """Return the words of the command, and of absolute paths, which are this machine's, the last component."""
    words = [*command_words(options, {"--push", "--yes"}), *(["--seed", str(session.seed)] if session.seed else [])]
    return tuple(os.path.basename(word.rstrip("/")) if os.path.isabs(word) else word for word in words)


def _file_name(model: str, plan: Plan, record: Release) -> str:
    """Return a name as people expect it, of the type of most weights and the bits of the whole file, that is free."""
    weights = {name: sum(prod(entry.shape) for entry in entries) for name, entries in plan.by_type().items()}
    dominant, taken = max(weights, key=lambda name: weights[name]), {row.name for row in record.files}
    names = (f"{model}-{dominant}-dq-{plan.bits_per_weight:.{digits}f}bpw.gguf" for digits in range(2, 9))
    return next(name for name in names if name not in taken)


def _versions() -> dict[str, str]:
    versions = {"dynquant": __version__, "python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _draw(record: Release, reports: Mapping[str, EvalReport], folder: Path) -> style.PlotFiles | None:
    """Draw KL and top-1 agreement of all files over their sizes, where they were measured."""
    points, texts = [], []
    for row in record.files:
        text = reports[row.name].texts[0] if row.name in reports and reports[row.name].texts else None
        if text is not None and text.kl is not None:
            label = f"planner, {row.bits_per_weight:.2f} bpw" if row.is_released else row.request
            scores = {"kl": text.kl.mean, "top1": text.kl.top1_agreement}
            points.append(Candidate(label=label, bytes=row.bytes, types={}, **scores))
            texts.append(text)
    if not points:
        return None
    about = {"text": texts[0].name, "num_tokens": texts[0].scored_tokens}
    with style.plot_settings():
        drawn = draw_measured_frontier(Selection(candidates=(), chosen=0, frontier=tuple(points), **about))
        assert drawn is not None
        return style.save_figure(drawn[0], folder, PLOT_NAME, drawn[1])
