"""Text that plans are chosen on: pieces from all over what calibration left of its own text, or another text.

Documents are read and shuffled as calibration read them, so that what it used is known; one window is left out between
the two. Where it took nearly all, the pieces are of what it held back, of which no price has seen anything.
"""

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.run import HELD_BACK
from dynquant.checkpoints.model import Model
from dynquant.errors import StatsError
from dynquant.inputs.model_inputs import ModelInputs
from dynquant.inputs.text import pack_windows, read_text, window_domains
from dynquant.planning.options import SearchOptions
from dynquant.running.load import load_tokenizer
from dynquant.session import Session


class Extent(NamedTuple):
    """The first tokens of its text that calibration used, the seed that shuffled it, and without any the tokens that it
    read to write others behind their beginnings."""

    num_tokens: int
    window: int
    seed: int
    sampled_tokens: int = 0


def check_selection_text(
    model: Model, options: SearchOptions, calibration: CalibrationOptions, session: Session
) -> None:
    """Raise StatsError, before anything is measured, when calibration will leave too little text to select on."""
    extent = Extent(calibration.tokens, calibration.window, session.seed, calibration.sampled_tokens)
    selection_windows(model, options, calibration, extent)


def selection_windows(
    model: Model, options: SearchOptions, calibration: CalibrationOptions, used: Extent
) -> tuple[ModelInputs, torch.Tensor]:
    """Return windows to select on, and token ids [n, window] of those that calibration used; where it used none, of all
    others.

    A source may be read in part, and its documents are shuffled then: as many are read as calibration did.
    """
    window, most, tokenizer = used.window, options.selection_tokens, load_tokenizer(model)
    behind = max(most, options.selection_span)
    read = used.num_tokens or used.sampled_tokens or behind
    documents = read_text(calibration.text, seed=used.seed, max_tokens=read)
    lengths = {"window": window, "max_tokens": used.num_tokens + window + behind}
    windows, first = pack_windows(documents, tokenizer, **lengths), used.num_tokens // window
    calibrated, min_tokens = windows[:first] if first else windows, min(most, 4 * window)
    if options.text is not None:
        name = options.text.name
        other = read_text(options.text, seed=used.seed, max_tokens=most)
        selection = pack_windows(other, tokenizer, window=window, max_tokens=most)
    else:
        name = f"{documents.name}, all over what is behind the calibrated tokens"
        left = range(first + 1, len(windows))  # one window is left out between the two
        summed, held = ModelInputs(calibrated).hold_back(HELD_BACK)
        if len(left) < len(held) - 1 and len(left) * windows.shape[1] < min_tokens:
            # Calibration took nearly all, but no price has seen what it held back.
            name = f"{documents.name}, all over what calibration held back"
            left, calibrated = range(len(summed) + 1, len(calibrated)), summed.windows
        domains = window_domains(documents, tokenizer, **lengths, place=min(window, options.selection_window) // 2)
        length = min(windows.shape[1], max(options.selection_window, most // max(1, len(left))))
        chosen = _evenly_of_all_domains(left, max(1, most // length), domains)
        selection = windows[chosen, :length]
        if not first:
            calibrated = windows[[number for number in range(len(windows)) if number not in chosen]]
    if options.select and selection.numel() < min_tokens:
        raise StatsError(
            f"{name}: {selection.numel():,} tokens. Selection wants {most:,}, and at least {min_tokens:,}. Give "
            "--selection-text FILE, or calibrate in a new folder (-o) on a longer text or on fewer --tokens of it."
        )
    return ModelInputs(selection if len(selection) else calibrated[:1], name=name), calibrated


def _evenly_of_all_domains(left: range, most: int, domains: Sequence[str]) -> list[int]:
    """Return numbers of windows, evenly from `left`; a domain that would be missing takes the place of a near window of
    a domain that has several."""
    count = min(most, len(left))
    chosen = [left[index * len(left) // count] for index in range(count)]
    for domain in dict.fromkeys(domains[left.start : left.stop]):
        counts = Counter(domains[number] for number in chosen)
        spare = [number for number in chosen if counts[domains[number]] > 1]
        if domain in counts or not spare:
            continue
        of_domain = [number for number in left if domains[number] == domain]
        middle = of_domain[len(of_domain) // 2]
        chosen[chosen.index(min(spare, key=lambda number: abs(number - middle)))] = middle
    return sorted(chosen)
