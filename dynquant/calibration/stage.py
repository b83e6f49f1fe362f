"""Calibration: runs the original over text or pictures, and writes what its matrices see.

The model is loaded whole where it fits, and streamed layer by layer where it does not or a limit is given.
"""

import gc
import hashlib
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from pathlib import Path
from threading import Event

import torch
from safetensors import SafetensorError
from torch import nn

from dynquant.calibration.imatrix import export_imatrix, import_imatrix
from dynquant.calibration.importance import coverage_report
from dynquant.calibration.options import CalibrateOptions, CalibrationOptions
from dynquant.calibration.recorders import moment_limits
from dynquant.calibration.run import (
    Calibration,
    StatisticsOptions,
    collect_statistics,
    given_tokens,
    other_options,
    provenance_of,
    text_inputs,
    with_kept_moments,
)
from dynquant.calibration.second_moments import SecondMoments, kind_beside, load_beside
from dynquant.calibration.sharded import calibrate_in_shards
from dynquant.calibration.statistics import CalibrationStats
from dynquant.calibration.streamed import StreamingOptions, calibrate_streamed
from dynquant.checkpoints.model import Model
from dynquant.errors import PlanError, StatsError, WriteError
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.open import open_and_announce
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.pictures import picture_inputs
from dynquant.inputs.written import Writer
from dynquant.resources import chosen_device, human_bytes, parse_size, total_memory
from dynquant.running.cluster import open_ray
from dynquant.running.load import computing_type, load_hf, load_tokenizer
from dynquant.running.streaming.stream_memory import COMFORTABLE_SHARE, free_memory_of
from dynquant.running.weight_inputs import weight_inputs
from dynquant.running.weights import add_layer_ahead
from dynquant.session import SILENT, Session
from dynquant.storage.atomic import file_hash, read_tensors_header
from dynquant.storage.file_names import KINDS, STATS_NAME, kind_path, path_beside, written_path
from dynquant.storage.work_files import remove_work

TEXT_ONLY = (
    "This model has a vision tower, but the calibration is text alone: nothing of the vision tower, the projector and "
    "cross-attention will be measured. Their inputs are then taken to be even, types below 2.5 bits are closed to "
    "them, their sensitivities are guessed, and the language model is fitted to text tokens, whose statistics differ "
    "from those of image tokens. Give pictures with --data FILE."
)
FEW_TOKENS = 8192  # below so many tokens a calibration is warned about; the default is 16 times that
_LOGIT_BYTES, _LAYER_BYTES = 28, 200
"""Memory of a backward pass, for every token: of each logit, and of each channel of each layer's hidden state. They
make 4.9 MB for SmolLM2-135M, which takes 4.5 on a CPU."""
_BACKWARD_SHARE = 0.15  # of all memory, for what a backward pass keeps
_LIMIT_SHARE = 0.85  # share of the free memory within which a model is streamed that does not fit into it


@dataclass(frozen=True)
class StatsFile:
    """Statistics with the file that holds them; tables and plans name them by its hash."""

    path: Path
    measured: CalibrationStats | None = None  # content that was just written to the file, so that nobody reads it again
    measured_moments: SecondMoments | None = None  # likewise, of the file beside
    writing: Future[None] | None = None  # done when the file beside is whole
    stop: Event = field(default_factory=Event)  # ends that writing

    def finish(self) -> None:
        """Wait until the second moments beside are written. Raises WriteError: they could not be."""
        if self.writing is not None:
            self.writing.result()

    def check(self) -> None:
        """Raise the WriteError of second moments beside that could not be written, if that is known already."""
        if self.writing is not None and self.writing.done():
            self.writing.result()

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Context manager: for other work meanwhile; an exception leaves no half of the file beside."""
        try:
            yield
        except BaseException:
            self.stop.set()  # an interruption ends the process, and a thread that writes would not clean up
            if self.writing is not None:
                wait((self.writing,))
            raise

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """Context manager: `guarded`, with `finish` on exit."""
        with self.guarded():
            yield
        self.finish()

    @cached_property
    def stats(self) -> CalibrationStats:
        return self.measured or CalibrationStats.load(self.path)

    @cached_property
    def hash(self) -> str:
        return file_hash(self.path)

    @cached_property
    def moments(self) -> SecondMoments | None:
        """Second moments of the file beside, or None where there is none."""
        return self.measured_moments or load_beside(self.path, self.stats)

    def of(self, model: Model) -> "StatsFile":
        """Return itself, or raise StatsError when the statistics are those of another checkpoint."""
        self.stats.check_belongs_to(model.fingerprint, model.name, model.settings)
        return self


def calibrate(
    options: CalibrateOptions, session: Session = SILENT, *, check: Callable[[Model], object] | None = None
) -> StatsFile:
    """Write stats.safetensors; import or export a llama.cpp imatrix when asked.

    `check` gets a model that is to be run, and may refuse it.
    """
    model = open_and_announce(options.model, session, base_gguf=options.base_gguf)
    if options.imatrix:
        stats = import_imatrix(options.imatrix, model)
        stats.save(options.output)
    else:
        if check is not None:
            check(model)
        stats = run_calibration(model, options.calibration, options.output, session).stats
    if options.imatrix_out:
        export_imatrix(stats, options.imatrix_out, model=model)
        session.note(f"wrote {options.imatrix_out}")
    tell_coverage(stats, model, session)
    return StatsFile(options.output, stats)


def tell_coverage(stats: CalibrationStats, model: Model, session: Session) -> None:
    """Say how many tokens the experts saw, and which layers have starved experts."""
    rows = coverage_report(stats, model)
    if not rows:
        return
    fewest = min(min(row.tokens) for row in rows)
    starved = sum(len(row.starved) for row in rows)
    leaning = " (their statistics lean on the layer's mean)" * (starved > 0)
    session.note(
        f"experts: {sum(len(row.tokens) for row in rows)} in {len(rows)} layers, fewest tokens {fewest:,}, "
        f"{starved} starved{leaning}"
    )
    for row in filter(lambda row: row.starved, rows):
        experts = ", ".join(f"{expert} ({row.tokens[expert]})" for expert in row.starved)
        session.note(f"  layer {row.layer}: starved experts (tokens) {experts}")


def statistics_in(
    directory: Path, model: Model, options: CalibrationOptions, session: Session, *, stats_path: Path | None = None
) -> StatsFile:
    """Return the statistics of a plan folder: a copy of `stats_path`, or those of `statistics_at`, whose second moments
    may still be on their way to the disk until `finish`."""
    path = directory / STATS_NAME
    if stats_path is not None:
        if unused := options.changed("tokens", "sampled_tokens", "hessians", "hessian_memory"):
            session.note(f"{stats_path} is used as it is, so {' and '.join(unused)} did nothing")
        stats = StatsFile(stats_path).of(model).stats
        directory.mkdir(parents=True, exist_ok=True)
        if stats_path.resolve() != path.resolve():
            stats.save(path)
            source, target = path_beside(stats_path), path_beside(path)
            target.unlink(missing_ok=True)
            if source.is_file():
                try:
                    target.hardlink_to(source)  # gigabytes that nobody changes
                except OSError:
                    shutil.copyfile(source, target)
        return StatsFile(path, stats)
    kept = with_kept_moments(path, model, options, session.seed)
    return statistics_at(path, model, kept, session, in_background=options.ray is None)


def statistics_at(
    path: Path, model: Model, options: CalibrationOptions, session: Session, *, in_background: bool = False
) -> StatsFile:
    """Return the statistics of a file if they were measured with these options, or new ones in their place."""
    if path.is_file():
        file = StatsFile(path)
        if not (others := other_options(file.stats.provenance, kind_beside(path), model, options, session.seed)):
            session.note(f"reusing {path}")
            return file
        session.note(f"{path} was made with other {', '.join(others)}: calibrating anew")
    file = run_calibration(model, options, path, session, in_background=in_background)
    with file.guarded():
        tell_coverage(file.stats, model, session)
    return file


def run_calibration(
    model: Model, options: CalibrationOptions, output: Path, session: Session = SILENT, *, in_background: bool = False
) -> StatsFile:
    """Write the statistics, and the second moments beside them when they are asked for; return both.

    With `in_background` second moments, which are gigabytes, are written while other work is done, until `finish`.

    Raises:
        PlanError: a memory limit together with a cluster.
        StatsError: an option that a vision-language model does not take.
        WriteError: statistics of another calibration at a name that is needed beside the output.
    """
    _check(model, options, output)
    device = chosen_device(session.device)
    limit = None if options.ray is not None else streaming_limit(model, options, device, session)
    if limit is not None and options.sampled_tokens:
        raise StatsError(_needs_memory(model, options, limit))
    load = cache(lambda: load_hf(model, device=device))
    inputs, sampled = _all_inputs(model, options, output, load, session)
    inputs = replace(inputs, batch_size=_batch_size(model, inputs.longest, options.hessians, device))
    provenance = provenance_of(model, inputs, tokens=options.tokens, seed=session.seed).model_copy(update=sampled)
    limits = moment_limits(options.hessian_memory, _all_memory(device))
    statistics = StatisticsOptions(options.hessians, limits)
    if limit is not None:
        streaming = StreamingOptions(limit, options.spill, device, computing_type(model, device))
        with session.stage("Finished layers are kept.") as progress:
            result = calibrate_streamed(model, inputs, provenance, output, statistics, streaming, progress)
        if result.first_stage:
            session.note(f"went on with an interrupted calibration, {result.first_stage} of its stages were there")
    else:
        with session.stage("Calibration is not kept: what it has measured so far is lost.") as progress:
            if options.ray is not None:
                load.cache_clear()  # workers have models of their own
                with open_ray(options.ray) as pool:
                    device = pool.device(session.device)
                    result = calibrate_in_shards(
                        model, replace(inputs, batch_size=_batch_size(model, inputs.longest, options.hessians, device)),
                        provenance, statistics, device=device, pool=pool, progress=progress,
                    )  # fmt: skip
            else:
                hf_model = load()
                add_layer_ahead(model, hf_model)
                result = collect_statistics(
                    hf_model, inputs, names=weight_inputs(model, hf_model), provenance=provenance, options=statistics,
                    progress=progress,
                )  # fmt: skip
                del hf_model, load
                gc.collect()  # hooks and model hold each other: weights would stay beside those of later stages
    file = _saved(result, output, in_background) if limit is None else StatsFile(output, result.stats)
    with file.guarded():
        _save_beside(result, output, options)
        _tell_result(result, inputs, path_beside(output), statistics, session)
    return file


def _all_inputs(
    model: Model, options: CalibrationOptions, output: Path, load: Callable[[], nn.Module], session: Session
) -> tuple[ModelInputs, dict[str, object]]:
    """Return what the model is run on, and what the provenance says of text that it wrote itself."""
    inputs, sampled = calibration_inputs(model, options, session), {}
    if options.sampled_tokens:
        inputs, sampled = _with_written(model, inputs, options, written_path(output), load, session)
    if model.has_vision and not inputs.has_pictures:
        session.note(TEXT_ONLY)
    if inputs.num_tokens < FEW_TOKENS:
        session.note(
            f"calibrating on only {inputs.num_tokens:,} tokens of {inputs.name}. Statistics of fewer than "
            f"{FEW_TOKENS:,} say little about other text; give a longer text, or more --tokens."
        )
    return inputs, sampled


def _saved(result: Calibration, output: Path, in_background: bool) -> StatsFile:
    """Write what was measured; return it with what is still being written, as much of it as fits in memory."""
    output.parent.mkdir(parents=True, exist_ok=True)
    moments, writing, stop = result.moments, None, Event()
    if moments is not None:
        moments.check_finite()
        in_background = in_background and moments.num_bytes < free_memory_of("cpu")
        path_beside(output).unlink(missing_ok=True)  # never those of another calibration beside these statistics
        remove_work(path_beside(output))
        thread = ThreadPoolExecutor(1)
        writing = thread.submit(moments.write, path_beside(output), stop)
        thread.shutdown(wait=not in_background)
        if not in_background:
            writing.result()
    file = StatsFile(output, result.stats, moments if in_background else None, writing, stop)
    with file.guarded():
        result.stats.save(output)
    return file


def _save_beside(result: Calibration, output: Path, options: CalibrationOptions) -> None:
    """Write statistics of kinds of tokens, and remove what earlier or interrupted calibrations left."""
    for kind, stats in result.by_kind.items():
        stats.save(kind_path(output, kind))
    old = [kind_path(output, kind) for kind in KINDS if kind not in result.by_kind]
    for path in [*old, *([path_beside(output)] if options.hessians == "none" else [])]:
        path.unlink(missing_ok=True)
    remove_work(output)  # what lies in --spill may be an interrupted run of another folder's output


def _check_kinds(output: Path) -> None:
    """Raise WriteError for statistics of their own at a name for those of one kind of token, which are replaced."""
    for path in (kind_path(output, kind) for kind in KINDS):
        if not path.is_file():
            continue
        mine, theirs = (_provenance_at(file) for file in (output, path))
        if mine != theirs:
            raise WriteError(
                f"{path} is of another calibration than {output}, and would be replaced by the statistics of its "
                f"{path.stem.rpartition('-')[2]} tokens. Give another name for the output, or move that file."
            )


def _provenance_at(file: Path) -> object:
    try:
        return read_tensors_header(file)["provenance"]
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None


def _tell_result(
    result: Calibration, inputs: ModelInputs, moments_path: Path, options: StatisticsOptions, session: Session
) -> None:
    if inputs.has_pictures:
        num_text = sum(int(batch.is_text.sum()) for batch in inputs)
        num_pictures = inputs.num_tokens - num_text
        session.note(f"{len(inputs)} samples: {num_pictures:,} image tokens, {num_text:,} text tokens")
    if options.hessians != "none":
        size = human_bytes(moments_path.stat().st_size if result.moments is None else result.moments.num_bytes)
        pooled = ", one for each layer's experts" if result.pools_experts else ""
        session.note(f"{moments_path}: {result.num_moments} second moments{pooled}, {size}")
    if result.left_out:
        session.note(
            f"no second moments for {len(result.left_out)} inputs or outputs, because --hessian-memory "
            f"({' and '.join(map(human_bytes, options.hessian_bytes))}) is used up; they are encoded without error "
            f"feedback: {', '.join(result.left_out)}"
        )


def calibration_inputs(model: Model, options: CalibrationOptions, session: Session) -> ModelInputs:
    """Return what the model is run on: samples with pictures (`data`), or windows of a text.

    Raises:
        DataError: the model sees no images, or nothing of the file can be used.
        StatsError: the text is missing or empty.
    """
    if options.data is None:
        length = {"tokens": given_tokens(options), "window": options.window}
        inputs = text_inputs(model, options.text, **length, seed=session.seed)
        if inputs.num_tokens + inputs.longest <= options.tokens != CalibrationOptions.tokens:
            session.note(
                f"{inputs.name} has {inputs.num_tokens:,} tokens, fewer than the {options.tokens:,} of --tokens: all "
                "are taken. A longer --calibration, or --sampled-tokens N, gives more"
            )
        if plain := Counter(inputs.skipped):
            reasons = "\n  ".join(f"{reason} ({number})" for reason, number in plain.items())
            session.note(
                f"{plain.total()} conversations are plain text, for the chat template refuses them:\n  {reasons}"
            )
        return inputs
    inputs = picture_inputs(model, Path(options.data), tokens=options.tokens, seed=session.seed, strict=options.strict)
    if inputs.skipped:
        reasons = "\n  ".join(inputs.skipped)
        session.note(f"skipped {len(inputs.skipped)} samples whose images cannot be decoded:\n  {reasons}")
    return inputs


def streaming_limit(
    model: Model,
    options: CalibrationOptions,
    device: str,
    session: Session = SILENT,
    *,
    weight_bytes: int | None = None,
) -> int | None:
    """Bytes within which the model is to be streamed, or None to load it whole.

    A weight takes `weight_bytes`, by default 4 on a CPU and 2 on a GPU.
    """
    if model.has_vision:
        return None
    if options.max_memory is not None:
        return parse_size(options.max_memory)
    free = free_memory_of(device)
    needed = model.num_weights * (weight_bytes or (4 if device == "cpu" else 2))
    if needed <= COMFORTABLE_SHARE * free or not isinstance(model.source, ConvertedSource):
        return None
    limit = int(_LIMIT_SHARE * free_memory_of("cpu"))
    session.note(
        f"{model.name} takes {human_bytes(needed)} as floats and {human_bytes(free)} are free: it is "
        f"streamed layer by layer within {human_bytes(limit)}. --max-memory sets another limit"
    )
    return limit


def _with_written(
    model: Model,
    inputs: ModelInputs,
    options: CalibrationOptions,
    file: Path,
    load: Callable[[], nn.Module],
    session: Session,
) -> tuple[ModelInputs, dict[str, object]]:
    """Return inputs with windows that the model writes, evenly among those of given text, and their part of the
    provenance."""
    given, count = inputs.windows, -(-options.sampled_tokens // inputs.longest)
    with session.stage("Windows of text are kept once all that are written side by side are finished.") as progress:
        written = Writer(model.fingerprint, load, load_tokenizer(model), file=file).windows(
            given, count, session.seed, progress
        )
    if len(written) < count:
        session.note(
            f"the original wrote {len(written)} windows of text instead of {count}: the others end in loops or repeat "
            "each other"
        )
    given = given if options.tokens else given[:0]
    places = torch.cat([(torch.arange(len(part)) + 0.5) / max(len(part), 1) for part in (given, written)])
    samples = torch.cat([given, written])[places.argsort(stable=True)]
    name = f"{inputs.name} and text that the original wrote" if len(given) else "text that the original wrote"
    sampled = {"sampled_tokens": options.sampled_tokens, "sampled_hash": hashlib.sha256(written.numpy()).hexdigest()}
    return replace(inputs, samples=samples, name=name), sampled


def _needs_memory(model: Model, options: CalibrationOptions, limit: int) -> str:
    return (
        f"--sampled-tokens {options.sampled_tokens}: {model.name} cannot write text here. It runs token by token, so "
        f"all its weights have to be in memory, and it is streamed layer by layer within {human_bytes(limit)}. Leave "
        "--sampled-tokens out, or calibrate without --max-memory on a machine that holds the model."
    )


def _check(model: Model, options: CalibrationOptions, output: Path) -> None:
    if options.ray is not None and (options.max_memory is not None or options.spill is not None):
        raise PlanError(
            "Every worker of a cluster holds the model whole, so --max-memory and --spill do not go with --ray; leave "
            "out one or the other."
        )
    _check_kinds(output)
    if not model.has_vision:
        return
    for option, value in (("--max-memory", options.max_memory), ("--ray", options.ray)):
        if value is not None:
            raise StatsError(f"{model.name} has a vision tower and is run whole, in one process; leave {option} out.")
    if options.data is not None and options.hessians in ("gradients", "two-sided"):
        raise StatsError(f"--hessians {options.hessians} runs on text; with --data give activations or none.")


def _batch_size(model: Model, window: int, hessians: str, device: str) -> int:
    """Return how many windows run side by side. A backward pass keeps what all layers made of them, and logits, within
    a share of the memory that the device has in all."""
    most = 4 if device == "cpu" else 16
    if hessians not in ("gradients", "two-sided"):
        return most
    sizes = model.hyper
    needed = window * (_LOGIT_BYTES * sizes.n_vocab + _LAYER_BYTES * sizes.n_layer * sizes.n_embd)
    return max(1, min(most, int(_BACKWARD_SHARE * _all_memory(device) / max(needed, 1))))


def _all_memory(device: str) -> int:
    """Return the bytes of memory of the machine or GPU; what is free just then must not change a sum."""
    return total_memory() if device == "cpu" else torch.cuda.get_device_properties(device).total_memory
