"""Markdown tables of what the benchmarks here wrote: `python -m dynquant.kernels.bench.tables FILE.json`.

A table for every matrix and kind of activations (of `gemv`), or matrix and product (of `experts`); a row for every
type and a column for every number of rows or tokens: microseconds, times bf16, and where memory decides, the share of
the read bandwidth. What was refused or failed says so.
"""

import json
from pathlib import Path

from dynquant.kernels.bench.harness import MarkdownTable, Row, options

_BOUND_BY_MEMORY = 16  # rows of activations, at most


def cell(row: Row | None) -> str:
    """Return what a table says of a measurement."""
    if row is None:
        return ""
    if "us" not in row:
        return next((name for name in ("refused", "failed") if name in row), "")
    share = f", {100 * row['fraction']:.0f} %" if size_of(row) <= _BOUND_BY_MEMORY else ""
    return f"{row['us']:.1f}, {row['speedup']:.2f}{share}"


def size_of(row: Row) -> int:
    """Return the rows of activations, or tokens."""
    return row["tokens"] if "tokens" in row else row["m"]


def title(row: Row) -> str:
    """Return the heading of the table that a measurement belongs to."""
    if "tokens" in row:
        return f"{row['experts']} experts, {row['part']} [{row['n']}, {row['k']}], {row['product']}, {row['way']}"
    return f"[{row['n']}, {row['k']}], {row['act']}"


def main() -> None:
    """Print the tables of a file."""
    report = json.loads(Path(options(__doc__, "file").file).read_text())
    rows = [row for row in report.pop("rows") if row["type"] != "BF16"]  # all others have its time beside theirs
    print(", ".join(f"{name} {value}" for name, value in report.items()))
    for heading in dict.fromkeys(title(row) for row in rows):
        matching = [row for row in rows if title(row) == heading]
        cells = {(row["type"], size_of(row)): row for row in matching}
        sizes = sorted({size for _, size in cells})
        print(f"\n{heading}\n")
        table = MarkdownTable("type", *map(str, sizes))
        table.add(
            "bf16", *(f"{next(row['bf16_us'] for row in matching if size_of(row) == size):.1f}" for size in sizes)
        )
        for name in dict.fromkeys(row["type"] for row in matching):
            table.add(name, *(cell(cells.get((name, size))) for size in sizes))


if __name__ == "__main__":
    main()
