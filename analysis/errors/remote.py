"""Measures the error table on a Ray cluster: every part is one task, and its sums come back.

Workers open checkpoint and statistics by path, which every node must see. The table is that of a local run, to the bit
where PyTorch runs there on as many threads as a task has; a node that reads another checkpoint, or runs another version
of dynquant or ggml, is refused.
"""

from functools import partial

from dynquant.analysis.errors.measure import ErrorMeter, Measure
from dynquant.analysis.errors.sampling import Sampling
from dynquant.analysis.errors.sums import ErrorPart, Sums
from dynquant.encoding.remote import EncoderChoice, StoredFiles, open_stored, worker_encoder
from dynquant.running.cluster import RayPool, TaskNeeds


def measure_on(pool: RayPool, choice: EncoderChoice, files: StoredFiles, sampling: Sampling | None = None) -> Measure:
    """Return what measures parts on `pool`, for `build_error_table`."""
    return lambda parts: pool.run(partial(_sums, choice, files, sampling), parts, TaskNeeds(choice.threads))


def _sums(choice: EncoderChoice, files: StoredFiles, sampling: Sampling | None, part: ErrorPart) -> Sums:
    model, stats, moments = open_stored(files)
    assert stats is not None
    meter = ErrorMeter(model, stats, worker_encoder(choice), moments, sampling, threads=choice.threads)
    return meter.sums(part)
