"""A stage in words: amounts, speed, time left, place, bytes and memory."""

from dynquant.cli.terminal.record import StageRecord
from dynquant.resources import human_bytes, peak_cuda_bytes, peak_memory_bytes


def describe(stage: StageRecord) -> str:
    """A stage in a line: `quantize 45 %, 7.2 M of 16.0 M weights, 1.2 M weights/s, 0:12 left, blk.3.attn_q.weight`."""
    share = 100 * stage.done / stage.total if stage.total else 0
    unit = f" {stage.unit}" if stage.unit else ""
    parts = [f"{stage.name} {share:.0f} %", f"{short(stage.done)} of {short(stage.total)}{unit}", speed(stage)]
    return ", ".join(part for part in (*parts, time_left(stage), place(stage), usage(stage)) if part)


def usage(stage: StageRecord) -> str:
    """Bytes read and written by the stage, and the process's peak memory."""
    moved = zip(("read", "written"), stage.traffic, strict=True)
    return ", ".join([f"{name} {human_bytes(count)}" for name, count in moved if count is not None] + [memory_peaks()])


def memory_peaks() -> str:
    """The most memory that the process has used, and the most on a GPU."""
    found = (("peak memory", peak_memory_bytes()), ("peak GPU memory", peak_cuda_bytes()))
    return ", ".join(f"{name} {human_bytes(count)}" for name, count in found if count is not None)


def short(number: float) -> str:
    """`12.3 M`; small whole numbers as they are."""
    for limit, suffix in ((1e9, " G"), (1e6, " M"), (1e3, " k")):
        if number >= limit:
            return f"{number / limit:.1f}{suffix}"
    return str(number) if isinstance(number, int) else f"{number:.1f}"


def clock_time(seconds: float) -> str:
    """`1:02:03` or `2:03`."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def duration(seconds: float) -> str:
    """`4.2 s`, and from a minute on as on a clock."""
    return f"{seconds:.1f} s" if seconds < 60 else clock_time(seconds)


def place(stage: StageRecord) -> str:
    """The tensor that is being worked on, or else the layer."""
    if stage.tensor is not None:
        return stage.tensor
    return "" if stage.layer is None else f"layer {stage.layer}"


def speed(stage: StageRecord) -> str:
    """`12.3 M weights/s`."""
    return f"{short(float(stage.rate))} {stage.unit}/s" if stage.rate and stage.unit else ""


def time_left(stage: StageRecord) -> str:
    """`2:03 left`, while the stage runs."""
    is_running = stage.seconds_left is not None and stage.done < stage.total
    return f"{clock_time(stage.seconds_left or 0)} left" if is_running else ""
