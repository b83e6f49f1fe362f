"""Kills `dynquant export` with SIGKILL at random moments until it has died N times, and compares what comes out.

    python tests/examples/kill_export.py --kills 30 --work DIR -- MODEL --plan plan.json -f gguf --tune 0

Everything after `--` is for `dynquant export`, without -o. Moments are drawn half by time and half by the number of
parts that are on the disk, so that kills also fall between parts that take no time. An export that ends before its kill
is compared with the undisturbed one, byte by byte, and begun anew. With `--each-ends`, every kill is followed by a run
that ends and is compared.
"""

import argparse
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path


def contents(output: Path) -> dict[str, bytes]:
    """File name -> bytes, of everything beside and under an output."""
    return {str(path.relative_to(output)): path.read_bytes() for path in output.rglob("*") if path.is_file()}


def start(arguments: list[str], output: Path) -> subprocess.Popen:
    name = output if "safetensors" in arguments else output / "model.gguf"
    command = [sys.executable, "-m", "dynquant", "export", *arguments, "-o", str(name)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def parts_on_disk(output: Path) -> int:
    journal = next(output.glob("*.journal"), None)
    try:
        return journal.read_bytes().count(b"sha256") if journal else 0
    except FileNotFoundError:  # the export ended in between
        return 0


def wait_for_moment(child: subprocess.Popen, output: Path, seconds: float | None, parts: int) -> None:
    """Until `seconds` have passed or, without, `parts` are on the disk; or the child has ended."""
    begin = time.monotonic()
    while child.poll() is None:
        if time.monotonic() - begin >= seconds if seconds is not None else parts_on_disk(output) >= parts:
            return
        time.sleep(0.002)


def run(arguments: list[str], work: Path, *, kills: int, seed: int, each_ends: bool) -> dict[str, int]:
    """Counts of kills, of kills after which parts were kept, and of finished exports, all with the expected bytes."""
    dice, straight, output = random.Random(seed), work / "straight", work / "killed"
    for folder in (straight, output):
        folder.mkdir(parents=True)
    begin, most_parts = time.monotonic(), 0
    child = start(arguments, straight)
    while child.poll() is None:
        most_parts = max(most_parts, parts_on_disk(straight))
        time.sleep(0.01)
    if child.returncode:
        raise SystemExit(child.stderr.read())
    duration, wanted = time.monotonic() - begin, contents(straight)
    print(f"undisturbed: {duration:.1f} s, {most_parts} parts, {sum(map(len, wanted.values())):,} bytes", flush=True)
    counts = {"kills": 0, "kills with parts kept": 0, "finished": 0}
    killed = False
    while counts["kills"] < kills or killed:
        child = start(arguments, output)
        if counts["kills"] < kills and not (each_ends and killed):
            by_time = dice.random() < 0.5
            kept = parts_on_disk(output)
            parts = dice.randint(min(kept + 1, most_parts), most_parts)
            wait_for_moment(child, output, dice.uniform(0, duration) if by_time else None, parts)
            child.kill()
        error = child.communicate()[1]
        killed = child.returncode == -9
        if killed:
            counts["kills"] += 1
            counts["kills with parts kept"] += parts_on_disk(output) > 0
            continue
        if child.returncode:
            raise SystemExit(f"the export failed on its own after {counts['kills']} kills: {error}")
        if contents(output) != wanted:
            raise SystemExit(f"after {counts['kills']} kills the export has other bytes than the undisturbed one")
        counts["finished"] += 1
        shutil.rmtree(output)
        output.mkdir()
    return counts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--each-ends", action="store_true", help="After each kill, let the export end and compare.")
    parser.add_argument("--work", type=Path, required=True, help="An empty or new directory.")
    parser.add_argument("arguments", nargs="+", help="Of `dynquant export`, after `--`.")
    given = parser.parse_args()
    counts = run(given.arguments, given.work, kills=given.kills, seed=given.seed, each_ends=given.each_ends)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()) + "; all finished exports have equal bytes")


if __name__ == "__main__":
    main()
