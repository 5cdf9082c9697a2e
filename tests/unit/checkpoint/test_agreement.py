"""What processes tell each other while they save."""

from __future__ import annotations

import threading
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from tunesmith.checkpoint.agreement import Alone, FileAgreement, checkpoint_group
from tunesmith.errors import ParallelError


def gather_twice() -> list[Any]:
    agreement = checkpoint_group()
    first = agreement.gather({"rank": agreement.rank, "text": "é" * (1 + 100 * agreement.rank)})
    return [len(entry["text"]) for entry in first] + agreement.gather(None if agreement.rank else [1.5])


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_through_a_group(ranks: Callable[..., list[Any]], world_size: int) -> None:
    lengths = [1 + 100 * rank for rank in range(world_size)]
    assert ranks(gather_twice, world_size) == [[*lengths, [1.5], *([None] * (world_size - 1))]] * world_size


def test_alone() -> None:
    assert isinstance(checkpoint_group(), Alone)
    assert Alone().gather("x") == ["x"]


def test_through_files_for_many_rounds(tmp_path: Path) -> None:
    """A process that hurries must not overtake one that still reads; old rounds go."""
    heard: list[list[list[int]]] = [[], [], []]

    def talk(rank: int) -> None:
        agreement = FileAgreement(tmp_path, rank, 3, "now")
        for number in range(30):
            heard[rank].append(agreement.gather(100 * number + rank))

    threads = [threading.Thread(target=talk, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert heard == [[[100 * number + rank for rank in range(3)] for number in range(30)]] * 3
    assert len(list((tmp_path / ".agreement-now").iterdir())) <= 6


def test_files_of_an_earlier_start_are_not_believed(tmp_path: Path) -> None:
    def agreement(rank: int, session: str) -> FileAgreement:
        return FileAgreement(tmp_path, rank, 2, session, patience=timedelta(seconds=0.05))

    with pytest.raises(ParallelError, match=r"process 0 wrote no part of the checkpoint within 0 s"):
        agreement(1, "first").gather("stale")
    with pytest.raises(ParallelError, match="process 1 wrote no part"):
        agreement(0, "second").gather("fresh")
    assert [path.name for path in tmp_path.iterdir()] == [".agreement-second"]
