"""CPU time of a release of several sizes beside one plan and the encoding of all that its files are made of.

    python -m dynquant.analysis.bench.plans.release_time MODEL -o DIR --sizes 1.8:5.0

Both run in new folders and select by KL; the plan is of the middle size. Encoding is of the distinct pairs of tensor
and type of all files, each once. CPU time of all threads is counted, which others on the machine hardly change.
"""

import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dynquant.calibration.options import CalibrationOptions
from dynquant.calibration.stage import StatsFile
from dynquant.encoding.store import ENCODED_NAME, open_store
from dynquant.encoding.stream import load_encoder
from dynquant.families.open import open_model
from dynquant.kernels.bench.harness import MarkdownTable, options
from dynquant.planning.stage import make_plans
from dynquant.publishing.options import WORK_NAME, ReleaseOptions
from dynquant.publishing.stage import release
from dynquant.recipes.plan import Plan
from dynquant.resources import chosen_device
from dynquant.session import Progress, Session
from dynquant.storage.file_names import STATS_NAME


class _Clock:
    """CPU seconds by stage; what is between stages counts as others."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._stage, self._last = "others", time.process_time()

    def __call__(self, stage: str, done: int, total: int, /, **_where: object) -> None:
        self.turn(stage if done < total else "others")

    def turn(self, stage: str) -> None:
        now = time.process_time()
        self.seconds[self._stage] += now - self._last
        self._stage, self._last = stage, now

    @contextmanager
    def stages(self, _kept: str) -> Iterator[Progress]:
        yield self


def main() -> None:
    """Parse, measure, print a Markdown table and the ratio."""
    asked = options(
        __doc__, "model", output=(Path("release_time"), "New directory of both."), sizes=("1.8:5.0", "As of release."),
        tokens=(131072, "Tokens of calibration."), device=(str, "cpu or cuda."),
    )  # fmt: skip
    calibration = CalibrationOptions(tokens=asked.tokens)
    common = {"model": asked.model, "sizes": asked.sizes, "select": True, "calibration": calibration}
    whole = ReleaseOptions(output=asked.output / "release", **common)
    clocks = {name: _Clock() for name in ("release", "plan", "encoding")}
    release(whole, Session(device=asked.device, stage=clocks["release"].stages))
    clocks["release"].turn("others")
    clocks["plan"] = _Clock()
    alone = ReleaseOptions(output=asked.output / "plan", **common).of_plans
    targets = whole.targets
    make_plans(alone, [targets[len(targets) // 2]], Session(device=asked.device, stage=clocks["plan"].stages))
    clocks["plan"].turn("others")
    plans = [Plan.load(path) for path in sorted((whole.output / WORK_NAME).glob("*.plan.json"))]
    pairs = {(entry.name, entry.type): entry.quant_type for plan in plans for entry in plan.entries}
    model, encoder = open_model(asked.model), load_encoder(whole.encoder, chosen_device(asked.device))
    store = open_store(model, StatsFile(whole.output / WORK_NAME / STATS_NAME), encoder, asked.output / ENCODED_NAME)
    clocks["encoding"] = _Clock()
    for (name, type_name), stored in pairs.items():
        if not stored.is_float:
            store.packed(name, type_name)
    clocks["encoding"].turn("others")
    print_times(clocks, len(plans))


def print_times(clocks: dict[str, _Clock], count: int) -> None:
    """Print CPU seconds by stage, and how they compare."""
    total = Counter({name: sum(clock.seconds.values()) for name, clock in clocks.items()})
    table = MarkdownTable("stage", *clocks)
    for stage in dict.fromkeys(stage for clock in clocks.values() for stage in clock.seconds):
        table.add(stage, *(f"{clock.seconds.get(stage, 0):.1f}" for clock in clocks.values()))
    table.add("all", *(f"{total[name]:.1f}" for name in clocks))
    ratio = total["release"] / (total["plan"] + total["encoding"])
    print(f"\n{count} sizes take {ratio:.2f} times one plan and the encoding of the distinct pairs (CPU time).")


if __name__ == "__main__":
    main()
