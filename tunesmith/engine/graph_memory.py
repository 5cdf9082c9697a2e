"""What recorded steps take of a device's memory, known before the cache is given the rest."""

from __future__ import annotations

from tunesmith.engine.graphs import DecodeGraphs


def measured_bytes(graphs: DecodeGraphs) -> int:
    """The device's memory that all graphs of start-up take: two of them are recorded for it, and dropped again.

    The largest brings the memory that all share; every other takes what the second one took more. Kinds that are
    recorded later, once they are used, take what is free then, or are done without. 0 where nothing can be recorded.
    """
    taken = []
    for _ in range(2):
        before = graphs.stats.num_bytes
        if not graphs.record_next():
            break
        taken.append(graphs.stats.num_bytes - before)
    graphs.drop()
    return sum(taken[:1]) + sum(taken[1:]) * (len(graphs.sizes) - 1)
