"""Time of `plan`, `export` and `release` with more effort, estimated from a few seconds of work on this machine.

The bundled model runs a window forward and back on the device, and the encoder takes some rows; operations and weights
of the model at hand scale both. It is a bound for models that keep a GPU busier than the bundled one, and leaves out
reading a checkpoint that does not fit into memory.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from importlib import resources

import torch

from dynquant.analysis.costs.measure_machine import random_layer
from dynquant.analysis.costs.model import calibration_work
from dynquant.calibration.stage import StatsFile
from dynquant.checkpoints.model import Model
from dynquant.encoding.stream import load_encoder
from dynquant.exporters.closing_pass import sampled_tokens, too_large_to_tune
from dynquant.exporters.options import ExportOptions
from dynquant.families.open import open_model
from dynquant.formats.quant_types import QUANT_TYPES
from dynquant.inputs.text import pack_windows, read_text
from dynquant.planning.options import PlanOptions
from dynquant.publishing.options import ReleaseOptions
from dynquant.recipes.build_plan import plan_from_types
from dynquant.recipes.plan import plan_file
from dynquant.recipes.presets import preset_types
from dynquant.resources import chosen_device
from dynquant.running.load import load_hf, load_tokenizer
from dynquant.session import Progress, Session
from dynquant.storage.file_names import STATS_NAME

_WINDOW = 512
_PASSES = {"none": 1, "activations": 2, "gradients": 4, "two-sided": 6}  # forward passes that a calibrated token takes
_BACK = 3  # forward and backward pass, in forward passes
_TUNED = 1 + _BACK + 1  # what the original says, a step, and the looks at text that is held out
_NEXT_SIZE = 0.5  # the search of another size of a release
_WRITTEN, _WRITTEN_ON_CPU = 3, 15  # a token that the model writes
_ENCODED = 3 + 1  # times that the search encodes all weights: types of the Fisher probe, plans; and half a time a round


def with_estimate(options: PlanOptions | ExportOptions | ReleaseOptions, session: Session) -> Session:
    """Return a session that says, when the first long work begins and so after all refusals, how long the command
    takes; the same one where no more effort than usual is asked for."""
    if options.effort == "normal":
        return session
    first = iter([None])

    def stage(kept: str) -> AbstractContextManager[Progress]:
        for _ in first:
            session.note(_effort_time(options, session))
        return session.stage(kept)

    return replace(session, stage=stage)


def _effort_time(options: PlanOptions | ExportOptions | ReleaseOptions, session: Session) -> str:
    """Say how long a command takes that finds nothing done yet."""
    export, sizes = options if isinstance(options, ExportOptions) else None, 1
    if isinstance(options, ReleaseOptions):
        first, export, sizes = options.of_plans, options.of_export(options.output, options.output), len(options.targets)
    else:
        first = options
    model = open_model(str(first.model), base_gguf=first.base_gguf, mtp=first.mtp)
    token, encoding = _speeds(model, session)
    tokens, calibrated = _tokens(model, first, session)
    seconds = calibrated * token
    if isinstance(first, PlanOptions):
        priced, encodings = _work_of_search(first)
        seconds += (priced * token + encodings * encoding) * (1 + (sizes - 1) * _NEXT_SIZE)
    if export is not None:
        seconds += sizes * (encoding + _closing_seconds(model, export, tokens, session, token))
    spent = f"{seconds / 60:,.0f} minutes" if seconds < 7200 else f"{seconds / 3600:,.1f} hours"
    return f"--effort {options.effort}: about {spent} on this machine when it does nothing else, from nothing"


def _work_of_search(options: PlanOptions) -> tuple[float, float]:
    """Return tokens in forward passes, and encodings of all weights."""
    search = options.search.with_methods(on_text=options.calibration.data is None)
    if not search.runs_model:
        return 0, 0
    prices = _BACK * (search.probes * search.probe_window + search.rounds * search.unit_tokens)
    return prices + (4 + search.rounds) * search.selection_tokens, _ENCODED + search.rounds / 2


def _closing_seconds(model: Model, options: ExportOptions, there: int, session: Session, token: float) -> float:
    """Return the time of the closing pass at most, for a text of `there` tokens; `token` is that of a token's forward
    pass."""
    tokens = min(there, options.closing.most_tokens if options.tune is None else options.tune)
    device = chosen_device(session.device)
    written = sampled_tokens(options.closing, tokens, device)
    too_large = options.tune is None and too_large_to_tune(model, device)
    if options.encoder != "dynquant" or too_large or not tokens:
        return 0.0
    tuned = min(_TUNED * (tokens + written) * token, 60 * options.closing.tune_minutes)
    return _written(device) * written * token + tuned


def _tokens(model: Model, options: PlanOptions | ExportOptions, session: Session) -> tuple[int, int]:
    """Return the tokens of the calibration text, and forward passes of a token that statistics of it are worth: none
    where they are there."""
    plan, calibration = getattr(options, "plan", None), options.calibration
    stats = options.stats or (plan and plan_file(plan).with_name(STATS_NAME))
    if stats is not None:
        return (StatsFile(stats).stats.provenance.num_tokens if stats.is_file() else 0), 0
    tokens, written = calibration.tokens, calibration.sampled_tokens
    if calibration.data is None and tokens:
        documents = read_text(calibration.text, seed=session.seed, max_tokens=tokens)
        limits = {"window": calibration.window, "max_tokens": tokens}
        tokens = pack_windows(documents, load_tokenizer(model), **limits).numel()
    passes = _PASSES[calibration.hessians] * (tokens + written)
    return tokens + written, passes + _written(chosen_device(session.device)) * written


def _written(device: str) -> int:
    return _WRITTEN_ON_CPU if device == "cpu" else _WRITTEN


def _speeds(model: Model, session: Session) -> tuple[float, float]:
    """Return the seconds of a token's forward pass, and of encoding all weights."""
    device, threads = chosen_device(session.device), session.threads or torch.get_num_threads()
    small = open_model(str(resources.files("dynquant") / "data" / "textbook-moe-16m"))
    hf_model = load_hf(small, dtype=torch.float32, device=device)
    window = torch.arange(_WINDOW, device=device)[None]

    def seconds(work: Callable[[], object]) -> float:
        """Return the least of three times, on the CPU as if nobody else worked there."""
        clock, at_once = (time.process_time, threads) if device == "cpu" else (time.perf_counter, 1)
        starts = [(clock(), work(), clock()) for _ in range(3)]
        return min(end - start for start, _, end in starts) / at_once

    @torch.inference_mode()
    def run() -> float:
        return hf_model(input_ids=window, use_cache=False).logits.sum().item()  # waits for a GPU

    encoder, (weights, importance, hessian) = load_encoder("dynquant", device), random_layer(4, 64, 512)
    encode = partial(encoder.encode, QUANT_TYPES["IQ2_XXS"], weights, importance, threads, hessian=hessian)
    token = seconds(run) / _WINDOW * _operations(model) / _operations(small)
    return token, seconds(encode) * model.num_weights / weights.numel()


def _operations(model: Model) -> float:
    """Return operations of a token's forward pass."""
    plan = plan_from_types(model, preset_types("f16", model), recipe="f16")
    return calibration_work(model, plan, {1: 1.0}, _WINDOW, _WINDOW)[0] / _WINDOW
