"""What ranks agree on, and what becomes everybody's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from tunesmith.errors import NonFiniteError, ParallelError
from tunesmith.parallel.agreement import (
    StopVote,
    any_rank,
    check_agreement,
    digest,
    most,
    raise_together,
    versions,
)

Ranks = Callable[..., list[Any]]


def _agree(key: str | None, rank: int) -> str:
    facts: dict[str, Any] = {
        "recipe": {"seed": 1, "epochs": None},
        "versions": versions("cpu"),
        "data": "abc",
    }
    if key is not None and dist.get_rank() == rank:
        section, _, name = key.partition(".")
        facts[section] = {**facts[section], name: "other"} if name else "other"
    try:
        check_agreement(facts)
    except ParallelError as error:
        return str(error)
    return "agreed"


def test_equal_facts_are_agreed_on(ranks: Ranks) -> None:
    assert ranks(_agree, 3, None, 0) == ["agreed"] * 3


@pytest.mark.parametrize(("key", "rank"), [("data", 2), ("versions.torch", 0), ("recipe.seed", 1)])
def test_the_first_key_that_differs_is_named_on_every_rank(key: str, rank: int, ranks: Ranks) -> None:
    said = ranks(_agree, 3, key, rank)
    assert len(set(said)) == 1
    assert f"do not agree on {key}" in said[0]
    assert f'"other" on rank {rank}' in said[0]
    assert f"on ranks {', '.join(str(r) for r in range(3) if r != rank)}" in said[0]


def test_alone_everything_is_agreed_on() -> None:
    check_agreement({"a": 1})
    assert any_rank(True) and not any_rank(False)
    assert most(7) == 7
    assert StopVote().ask(15) == 15
    raise_together(None)
    with pytest.raises(NonFiniteError):
        raise_together(NonFiniteError("x"))


def test_a_fingerprint_does_not_depend_on_order() -> None:
    assert digest({"a": 1, "b": [1, 2]}) == digest({"b": [1, 2], "a": 1}) != digest({"a": 1, "b": [2, 1]})


def _flags(rank: int) -> tuple[bool, bool, int]:
    mine = dist.get_rank() == rank
    return any_rank(mine), any_rank(False), most(10 * dist.get_rank() if mine else 1)


def test_what_one_rank_has_seen_all_know(ranks: Ranks) -> None:
    assert ranks(_flags, 3, 2) == [(True, False, 20)] * 3


def _together(rank: int | None) -> str:
    try:
        raise_together(NonFiniteError("NaN in batch 3") if dist.get_rank() == rank else None)
    except (NonFiniteError, ParallelError) as error:
        return f"{type(error).__name__}: {error}"
    return "on it goes"


def test_an_error_of_one_rank_is_raised_on_all(ranks: Ranks) -> None:
    assert ranks(_together, 2, None) == ["on it goes"] * 2
    assert ranks(_together, 2, 1) == [
        "ParallelError: rank 1 stopped all: NonFiniteError: NaN in batch 3",
        "NonFiniteError: NaN in batch 3",
    ]


def _votes(signalled_rank: int, at_step: int) -> list[int]:
    vote = StopVote()
    heard = [vote.ask(15 if step >= at_step and dist.get_rank() == signalled_rank else 0) for step in range(5)]
    return [*heard, vote.finish(), vote.finish()]


def test_a_stop_comes_one_step_later_and_on_all_at_once(ranks: Ranks) -> None:
    assert ranks(_votes, 3, 1, 2) == [[0, 0, 0, 15, 15, 15, 0]] * 3
