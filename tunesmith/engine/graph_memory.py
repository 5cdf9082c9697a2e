"""What recorded steps take of a device's memory, known before the cache is given the rest."""

from __future__ import annotations

from collections.abc import Sequence

from tunesmith.engine.graphs import DecodeGraphs
from tunesmith.engine.prompt_graphs import PromptGraphs


def measured_bytes(graphs: DecodeGraphs, prompts: PromptGraphs | None = None) -> int:
    """The device's memory that all graphs of start-up take: two of each kind are recorded for it, and dropped again.

    The largest brings the memory that all share; every other takes what the second one took more. Kinds that are
    recorded later, once they are used, take what is free then, or are done without. 0 where nothing can be recorded.
    prompts: recorded into the same memory, where decoding can be.
    """
    found = _foreseen(_taken(graphs), len(graphs.sizes))
    if prompts is not None and not graphs.refused:
        found += _foreseen(_taken(prompts), len(prompts.sizes))
        prompts.drop()
    graphs.drop()
    return found


def _taken(graphs: DecodeGraphs | PromptGraphs) -> list[int]:
    """Bytes of the first two that can be recorded."""
    taken: list[int] = []
    for _ in range(2):
        before = graphs.stats.num_bytes
        if not graphs.record_next():
            break
        taken.append(graphs.stats.num_bytes - before)
    return taken


def _foreseen(taken: Sequence[int], num_sizes: int) -> int:
    return sum(taken[:1]) + sum(taken[1:]) * (num_sizes - 1)
