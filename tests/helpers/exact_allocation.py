"""The exact answer to the allocation problem, by dynamic programming, to measure the allocator against."""

from dynquant.analysis.errors.table import Option


def lowest_cost(table: dict[str, list[Option]], budget: int) -> float | None:
    """Cost of the cheapest assignment of at most `budget` bytes, or None when nothing fits.

    Keeps, for the tensors seen so far, every (bytes, cost) that no other beats in both. Time and memory grow with the
    number of distinct byte totals, so this is for small tables.
    """
    states = [(0, 0.0)]
    for choices in table.values():
        sums = sorted((size + o.bytes, cost + o.cost) for size, cost in states for o in choices)
        states = []
        for size, cost in sums:
            if size <= budget and (not states or cost < states[-1][1]):
                states.append((size, cost))
    return states[-1][1] if states else None
