"""How the processes that write one state tell each other of it: through a group, through files, or not at all."""

from __future__ import annotations

import json
import shutil
import time
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from tunesmith.errors import ParallelError
from tunesmith.rundir.io import write_text_atomic

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

PATIENCE = timedelta(hours=1)
"""How long one process waits for another to write its part."""
POLL_S = 0.01


class Agreement(Protocol):
    """All processes call `gather` as often as each other; only one thread of a process does at a time."""

    @property
    def rank(self) -> int:
        """This process, of `world_size`."""

    @property
    def world_size(self) -> int:
        """All processes."""

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank. `value` is plain JSON. Raises: ParallelError when one is gone."""


class Alone:
    """One process."""

    rank, world_size = 0, 1

    def gather(self, value: Any) -> list[Any]:
        """What was given."""
        return [value]


class GroupAgreement:
    """Through a group of torch.distributed that works on the host (gloo) and is used for nothing else."""

    def __init__(self, group: ProcessGroup) -> None:
        import torch.distributed as dist

        self._group = group
        self.rank, self.world_size = dist.get_rank(group), dist.get_world_size(group)

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank."""
        import torch.distributed as dist

        content = json.dumps(value, ensure_ascii=False).encode("utf-8")
        try:
            sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
            dist.all_gather(sizes, torch.tensor([len(content)]), group=self._group)
            longest = max(int(size) for size in sizes)
            padded = torch.frombuffer(bytearray(content.ljust(longest, b" ")), dtype=torch.uint8)
            texts = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.world_size)]
            dist.all_gather(texts, padded, group=self._group)
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ParallelError(f"process {self.rank} lost the others while saving a checkpoint: {reason}") from None
        return [json.loads(text.numpy().tobytes()) for text in texts]


class FileAgreement:
    """Through files in a folder that all processes see: where there is no group, or none any more.

    Args: session: a name that all processes of this start of the run share, and no other start has.
    """

    def __init__(self, folder: Path, rank: int, world_size: int, session: str, patience: timedelta = PATIENCE) -> None:
        self.rank, self.world_size = rank, world_size
        self._folder = folder / f".agreement-{session}"
        self._patience_s = patience.total_seconds()
        self._round = 0
        if rank == 0:
            for old in folder.glob(".agreement-*"):
                if old != self._folder:
                    shutil.rmtree(old, ignore_errors=True)

    def gather(self, value: Any) -> list[Any]:
        """What every process gave, by rank. Raises: ParallelError naming those that gave nothing for too long."""
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text_atomic(self._path(self._round, self.rank), json.dumps(value, ensure_ascii=False))
        ends = time.monotonic() + self._patience_s
        values = [json.loads(self._wait(rank, ends)) for rank in range(self.world_size)]
        # Who has begun this round has read all of the one before.
        self._path(self._round - 1, self.rank).unlink(missing_ok=True)
        self._round += 1
        return values

    def _wait(self, rank: int, ends: float) -> str:
        path = self._path(self._round, rank)
        while True:
            try:
                return path.read_text(encoding="utf-8")
            except FileNotFoundError:
                if time.monotonic() > ends:
                    raise ParallelError(
                        f"process {rank} wrote no part of the checkpoint within {self._patience_s:.0f} s: see its log"
                    ) from None
            time.sleep(POLL_S)

    def _path(self, number: int, rank: int) -> Path:
        return self._folder / f"{number}-{rank}.json"


def checkpoint_group() -> Agreement:
    """The agreement of all processes, with a gloo group of its own; `Alone` where there is one process.

    Every process calls it, once.
    """
    import torch.distributed as dist

    if not dist.is_available() or not dist.is_initialized() or dist.get_world_size() == 1:
        return Alone()
    return GroupAgreement(dist.new_group(backend="gloo", timeout=PATIENCE))
