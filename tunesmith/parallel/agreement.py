"""What all processes of a run must agree on: what they run, and whether to go on.

Everything here goes through the hosts' group (gloo), never through a GPU's stream, and is a few bytes a call.
"""

from __future__ import annotations

import hashlib
import json
import platform
import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from tunesmith import __version__
from tunesmith.errors import ParallelError

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

_NAMED = 8
_VALUE = 120


def versions(device_type: str) -> dict[str, str]:
    """What this process is made of: versions that must be the same everywhere."""
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "tunesmith": __version__,
        "byte order": sys.byteorder,
    }
    if device_type == "cuda":
        found["CUDA"] = str(torch.version.cuda)
        found["NCCL"] = ".".join(map(str, torch.cuda.nccl.version()))
    return found


def digest(value: Any) -> str:
    """A short fingerprint of plain data, equal for equal data whatever the order of its keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def check_agreement(facts: Mapping[str, Any], group: ProcessGroup | None = None) -> None:
    """Every rank's `facts` must be equal: all ranks call this, in the same order, and all raise or none does.

    Nested mappings are compared key by key, so that the message names "recipe.train.seed". Nothing happens where
    torch.distributed is not started.

    Raises: ParallelError naming the first key that differs, and which ranks have which value.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return
    flat = _flat(facts)
    everyone: list[Any] = [None] * dist.get_world_size(group)
    # Fingerprints first: the values travel only where something differs.
    dist.all_gather_object(everyone, digest(flat), group=group)
    if len(set(everyone)) == 1:
        return
    dist.all_gather_object(everyone, flat, group=group)
    raise ParallelError(_difference(everyone))


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in facts.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, sort_keys=True, ensure_ascii=False, default=str)
    return flat


def _difference(everyone: Sequence[Mapping[str, str]]) -> str:
    keys = dict.fromkeys(key for facts in everyone for key in facts)
    for key in keys:
        values: dict[str, list[int]] = {}
        for rank, facts in enumerate(everyone):
            values.setdefault(facts.get(key, "(absent)"), []).append(rank)
        if len(values) > 1:
            said = "; ".join(f"{_short(value)} on {_ranks(ranks)}" for value, ranks in values.items())
            return f"the processes do not agree on {key}: {said}. Start all with the same recipe, versions and files"
    return "the processes do not agree, in a way that their facts do not show"


def _short(value: str) -> str:
    return value if len(value) <= _VALUE else value[:_VALUE] + " ..."


def _ranks(ranks: Sequence[int]) -> str:
    names = ", ".join(map(str, ranks[:_NAMED])) + (f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else "")
    return f"rank {names}" if len(ranks) == 1 else f"ranks {names}"


def any_rank(flag: bool, group: ProcessGroup | None = None) -> bool:
    """Whether `flag` is true on any rank: all ranks call this and get the same answer, so that all act after it.

    For a stop that was asked of one of them (SIGTERM), a NaN that one has seen, a disk that is full on one.
    """
    return most(int(flag), group) > 0


def most(value: int, group: ProcessGroup | None = None) -> int:
    """The greatest of all ranks' values (int64), on every rank: for a signal's number, or how grave a failure is."""
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        return value
    shared = torch.tensor(value, dtype=torch.int64)
    dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=group)
    return int(shared.item())


def raise_together(error: BaseException | None, group: ProcessGroup | None = None) -> None:
    """Raise on every rank where any rank has an `error`: its own there, and on the others one that names it.

    All ranks call this at the same place, those without an error with None: a failure on one leaves nobody waiting.

    Raises: `error`; ParallelError with the first failing rank's message where this rank has none.
    """
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size(group) == 1:
        if error is not None:
            raise error
        return
    if not any_rank(error is not None, group):
        return
    everyone: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(everyone, None if error is None else f"{type(error).__name__}: {error}", group=group)
    if error is not None:
        raise error
    rank, message = next((rank, message) for rank, message in enumerate(everyone) if message is not None)
    raise ParallelError(f"rank {rank} stopped all: {message}")


class StopVote:
    """A stop that one process was asked for becomes everybody's, after the same step, without a wait in any step.

    `ask(number)` is called once a step by every rank with the signal it has received (0: none), and returns what any
    rank said in the step before: the exchange runs while the step does. A stop is so one step late, and the same step
    on all ranks.
    """

    def __init__(self, group: ProcessGroup | None = None) -> None:
        self._group = group
        self._under_way: tuple[Any, torch.Tensor] | None = None

    def ask(self, number: int) -> int:
        """The signal that all ranks stop for now; 0 to go on."""
        import torch.distributed as dist

        if not dist.is_initialized() or dist.get_world_size(self._group) == 1:
            return number
        heard = self.finish()
        shared = torch.tensor(number, dtype=torch.int64)
        work = dist.all_reduce(shared, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        self._under_way = (work, shared)
        return heard

    def finish(self) -> int:
        """Wait for the exchange that is under way, as before other exchanges. Returns what it says; 0 where none is."""
        if self._under_way is None:
            return 0
        work, shared = self._under_way
        self._under_way = None
        work.wait()
        return int(shared.item())
