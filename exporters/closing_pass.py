"""The closing pass: what has no codes in a quantized model is tuned on the KL to the original.

Codes are fixed. Every scale of a group or row, and every super-block's d (and dmin), gets a factor; norms and biases,
which are stored in floats, get values of their own, as routers do if asked for. All are trained together by Adam on
KL(original || quantized) over calibration text, and text that the original writes itself, with gradients that flow
through the whole model under its own routing, so that each layer also makes up for what the layers before it lost. Step
sizes follow the damage: a scale moves in proportion to the relative error of its tensor, the others to the mean one.
File size and types stay as they are, and what is measured is rounded as it is stored.

This module says when it can run, and runs it over a written file. GGUF files and compressed-tensors checkpoints are two
kinds of `tuning.interface.QuantizedFile`. How long it trains, which share of the trained change is taken and whether it
is kept is decided in `tuning.training`.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.run import count_windows
from dynquant.checkpoints.gguf_source import GGUFSource
from dynquant.checkpoints.model import Model
from dynquant.encoding.interface import Encoder
from dynquant.errors import ExportError
from dynquant.evaluation.reference_cache import model_files
from dynquant.evaluation.statistics import shown_kl
from dynquant.exporters.options import ClosingPassOptions
from dynquant.exporters.output import Encoding
from dynquant.exporters.tuning.compressed_file import QuantizedCheckpoint
from dynquant.exporters.tuning.gguf_file import QuantizedGGUF
from dynquant.exporters.tuning.interface import QuantizedFile
from dynquant.exporters.tuning.training import FEWEST_WINDOWS, Tuned, TuneOptions, tune
from dynquant.families.common.conversion import ConvertedSource
from dynquant.families.linear_layers import linear_checkpoint
from dynquant.inputs.text import MIX
from dynquant.resources import chosen_device, total_memory
from dynquant.running.load import load_hf
from dynquant.session import Session
from dynquant.storage.atomic import check_space
from dynquant.storage.work_files import WRITTEN, work_path

_FEW_HELD_TOKENS = 2048
_SAMPLED_ON_GPU = 3
"""Tokens that the original writes for every given one where that is cheap: with 504 thousand tokens instead of 111
thousand the KL of textbook-moe-89m at 21.4 MB falls by 19 % instead of 13 %, and thrice the same ones are no better
(reports/damage.md)."""
_MORE_TEXT = "calibrate on more text"
BYTES_PER_WEIGHT = 20  # peak memory: the model, its gradients, the decoded codes of one or two parts, and activations


class TunedFiles(NamedTuple):
    """Files of a tuned model, and what came of the closing pass, in words."""

    files: list[Path]
    outcome: str


def tune_file(
    model: Model,
    path: Path,
    windows: Tensor,
    options: TuneOptions,
    output: Path,
    session: Session,
    *,
    encoder: str,
    shared: Path | None = None,
) -> TunedFiles:
    """Tune the scales and norms of a GGUF file or compressed-tensors directory of `model` on token ids [n, window], and
    write the result.

    What the original writes is kept in a folder `shared` for other files of the model, or only until the end.
    """
    file = _quantized_file(path, model, session)
    check_space(output.parent, sum(part.stat().st_size for part in model_files(path)))  # it is copied in the end
    where = {"dtype": torch.float32, "device": chosen_device(session.device)}
    hf_model, original = load_hf(model, **where), model.original and load_hf(model.original, **where)
    written = shared / WRITTEN if shared else work_path(output, WRITTEN)
    with session.stage("Encoded tensors are kept; the closing pass starts again.") as progress:
        more = {"original": original, "written_file": written, "progress": progress}
        tuned = tune(model, hf_model, file, windows, options, **more)
    outcome = _outcome(tuned)
    session.note(outcome)
    files = file.write(output, tuned.replacements, encoder=encoder, outcome=outcome)
    if shared is None:
        written.unlink(missing_ok=True)
    return TunedFiles(files, outcome)


def _quantized_file(path: Path, model: Model, session: Session) -> QuantizedFile:
    """Open what is tuned, and say what of it stays. Raises ExportError: it is not of this model."""
    if not path.is_dir():
        file = QuantizedGGUF(GGUFSource(path), model)
        file.check_original()
        return file
    checkpoint = QuantizedCheckpoint(path, model, linear_checkpoint(model))
    checkpoint.check_original()
    if checkpoint.untrained:
        names = " and ".join(checkpoint.untrained)
        session.note(f"the closing pass leaves scales of {names} as they are: their few values are too far apart")
    return checkpoint


def _outcome(tuned: Tuned) -> str:
    """Return what the closing pass changed, on windows held out."""
    before, after = tuned.before, tuned.after
    change = f"KL {shown_kl(before.kl)} -> {shown_kl(after.kl)} nats on {tuned.held_tokens:,} tokens held out"
    if len(before.kls) > 1:
        of_kinds = ((kind, shown_kl(before.kls[kind]), shown_kl(after.kls[kind])) for kind in before.kls)
        change += "".join(f", {first} -> {then} on {kind}" for kind, first, then in of_kinds)
    change += f"; most likely token kept {before.agreement:.1%} -> {after.agreement:.1%}"
    if before.rerouted:
        change += f"; tokens that go to other experts, mean over layers, {before.rerouted:.1%} -> {after.rerouted:.1%}"
    run = f"{tuned.tokens:,} tokens (ended because {tuned.ended}; {tuned.fraction:.0%} of the trained change is taken)"
    if tuned.held_tokens < _FEW_HELD_TOKENS:
        change += "; so few tokens decide little: calibrate on more text"
    if tuned.replacements:
        return f"closing pass on {run}: {change}"
    return f"the closing pass on {run} did not clearly help, and all stays as encoded: {change}"


def sampled_tokens(options: ClosingPassOptions, given: int, device: str) -> int:
    """Return the tokens that the original writes beside `given` ones."""
    if options.tune_sampled is not None:
        return options.tune_sampled
    return 0 if device == "cpu" else _SAMPLED_ON_GPU * min(given, options.most_tokens)


def tune_options(options: ClosingPassOptions, windows: Tensor, device: str, **others: int | None) -> TuneOptions:
    """Return the settings that options stand for, with windows of given text [n, window] and on a device."""
    sampled = sampled_tokens(options, windows.numel(), device)
    asked = {"minutes": options.tune_minutes, "sampled_tokens": sampled, "parts": options.tune_parts}
    return TuneOptions(**asked, patience=options.patience, **others)  # type: ignore[arg-type]


def obstacle(model: Model, encoder: Encoder | None, *, has_moments: bool) -> str | None:
    """Return why the original cannot be run beside what is encoded, on the text of calibration; None when it can.

    No encoder stands for one that may be any.
    """
    if model.has_vision:
        return "it goes by text alone, and the model sees pictures"
    if encoder is not None and not encoder.uses_hessians:
        return "it goes with --encoder dynquant"
    if not has_moments:
        return "there are no second moments, whose text it goes by (`dynquant calibrate --hessians activations`)"
    if model.hf_directory is not None and not isinstance(model.source, ConvertedSource):
        return "the model is not of a family that dynquant converts itself"
    return None


def cannot_run(reason: str, tokens: int | None, asymmetric: int = 0, *, instead: str = "") -> ExportError:
    """Return the refusal of what runs the original and cannot: the closing pass over `tokens` (0 or None: not it) and
    asymmetric calibration. `instead` is a way out before that to go without."""
    passes = {
        f"the closing pass (--tune {tokens})": "give --tune 0" if tokens else "",
        f"asymmetric calibration (--asymmetric {asymmetric})": "leave out --asymmetric" if asymmetric else "",
    }
    what = " and ".join(words for words, way_out in passes.items() if way_out)
    ways = f"{instead}, or " * bool(instead) + " and ".join(filter(None, passes.values()))
    whole = f"{what} cannot run: {reason}. {ways[0].upper()}{ways[1:]} to go without."
    return ExportError(f"{whole[0].upper()}{whole[1:]}")


def check_can_tune(
    model: Model, tokens: int, calibration: CalibrationOptions, seed: int, encoder: Encoder | None = None
) -> None:
    """Refuse, before calibration, a closing pass over `tokens` that cannot run after it.

    Raises:
        ExportError: the original cannot run, or the text is too short.
        StatsError: the text is missing or empty.
    """
    reason, instead = obstacle(model, encoder, has_moments=calibration.hessians != "none"), ""
    if reason is None and (count := count_windows(model, calibration, seed, FEWEST_WINDOWS)) < FEWEST_WINDOWS:
        reason = (
            f"it takes {FEWEST_WINDOWS} windows of {calibration.window} tokens beside those that calibration holds "
            f"back, and {calibration.text or MIX} with --tokens {calibration.tokens} gives {count}"
        )
        instead = _MORE_TEXT
    if reason is not None:
        raise cannot_run(reason, tokens, instead=instead)


def check_windows(windows: Tensor, text: str, window: int) -> None:
    """Raise ExportError for windows of a text that are too few to tune a finished file on."""
    if len(windows) < FEWEST_WINDOWS:
        raise ExportError(
            f"The closing pass takes {FEWEST_WINDOWS} windows of {window} tokens, and {text} gives {len(windows)}. "
            "Give a longer --calibration, a smaller --window, or more --tokens."
        )


def closing_pass_of(encoding: Encoding, tokens: int | None, options: ClosingPassOptions) -> TuneOptions | None:
    """Return what the closing pass should do, or None; by default it runs with the encoder that uses second moments.
    Raises ExportError: `tokens` ask for one that cannot run."""
    model, moments = encoding.model, encoding.moments
    if tokens == 0 or (tokens is None and moments is None):
        return None
    reason, instead = obstacle(model, encoding.encoder, has_moments=moments is not None), ""
    device = chosen_device(encoding.session.device)
    if reason is not None:
        pass
    elif tokens is None and model.hf_directory is None:
        reason = "the original is a GGUF file, which transformers may load in another form (`--tune N` tries)"
    elif tokens is None and (too_large := too_large_to_tune(model, device, encoding.limits.memory)):
        reason = too_large
    elif len(moments.tokens) < FEWEST_WINDOWS:
        reason = f"it takes {FEWEST_WINDOWS} windows of text, and calibration had {len(moments.tokens)}"
        instead = _MORE_TEXT
    if reason is None:
        return tune_options(options, moments.tokens, device, tokens=options.most_tokens if tokens is None else tokens)
    if tokens is not None:
        raise cannot_run(reason, tokens, instead=instead)
    encoding.session.note(f"no closing pass: {reason}")
    return None


def too_large_to_tune(model: Model, device: str, allowed: int | None = None) -> str | None:
    """Why the closing pass should not run unasked on `device`, or None: it would take more than half of its memory, or
    more host memory than `allowed` bytes."""
    needed = BYTES_PER_WEIGHT * model.num_weights + (4 * model.original.num_weights if model.original else 0)
    if allowed is not None and needed > allowed:
        return f"it needs about {needed / 1e9:.1f} GB, more than --max-memory leaves (`--tune N` insists)"
    if device != "cpu":
        where, memory = "GPU", torch.cuda.mem_get_info(device)[1]
    else:
        where, memory = "machine", total_memory()
    if needed <= memory / 2:
        return None
    return f"it needs about {needed / 1e9:.0f} GB, and this {where} has {memory / 1e9:.0f} GB (`--tune N` insists)"
