"""Hours of damaged files: `make fuzz`. Findings are kept as files, with the traceback beside each.

    python -m tests.fuzz.nightly --seconds 3600 [--kinds gguf,plan] -o FOLDER

Each case is random damage to a valid file, named by its number, so any case can be made again.
"""

import argparse
import json
import random
import sys
import time
import traceback
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp

from tests.helpers.hostile_files import Target, damage, make_targets, read_damaged
from tests.helpers.limits import at_most

SMALL_MOE = Path(__file__).resolve().parents[2] / "dynquant" / "data" / "textbook-moe-16m"
SECONDS, MEMORY = 5, 512 << 20


def main() -> None:
    options = _options()
    options.output.mkdir(parents=True, exist_ok=True)
    targets = make_targets(Path(mkdtemp(prefix="fuzz-")), SMALL_MOE)
    kinds = options.kinds.split(",") if options.kinds else list(targets)
    sys.exit(_random(kinds, targets, options))


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=3600)
    parser.add_argument("--kinds", help="Default: all in turn.")
    parser.add_argument("--first", type=int, default=0, help="Number of the first case of each kind.")
    parser.add_argument("-o", "--output", type=Path, default=Path("fuzz-out"))
    return parser.parse_args()


def _random(kinds: list[str], targets: dict[str, Target], options: argparse.Namespace) -> int:
    """Number of findings. summary.json is kept up to date."""
    whole = {kind: targets[kind].file.read_bytes() for kind in kinds}
    cases, refused, found = Counter(), Counter(), Counter()
    end, number, slowest = time.monotonic() + options.seconds, options.first, 0.0
    while time.monotonic() < end:
        for kind in kinds:
            content = damage(whole[kind], random.Random(f"{kind} {number}"), targets[kind].header_bytes)
            start = time.monotonic()
            try:
                with at_most(SECONDS, MEMORY):
                    refused[kind] += read_damaged(targets[kind], content) is not None
            except BaseException as error:
                if isinstance(error, KeyboardInterrupt):
                    raise
                found[kind] += 1
                _keep(options.output, f"{kind}-{number}", content)
            cases[kind] += 1
            slowest = max(slowest, time.monotonic() - start)
            targets[kind].file.write_bytes(whole[kind])
        number += 1
        if number % 200 == 0:
            _summarize(options.output, kinds, cases, refused, found, slowest)
    _summarize(options.output, kinds, cases, refused, found, slowest)
    return min(sum(found.values()), 1)


def _keep(folder: Path, name: str, content: bytes) -> None:
    if len(list(folder.glob("*.trace"))) < 200:
        (folder / name).write_bytes(content)
        (folder / f"{name}.trace").write_text(traceback.format_exc())


def _summarize(folder: Path, kinds: list[str], cases: Counter, refused: Counter, found: Counter, slow: float) -> None:
    rows = {kind: {"cases": cases[kind], "refused": refused[kind], "findings": found[kind]} for kind in kinds}
    summary = {"cases": sum(cases.values()), "findings": sum(found.values()), "slowest_s": round(slow, 3)}
    summary["kinds"] = rows
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
