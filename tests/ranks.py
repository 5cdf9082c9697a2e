"""A pool of processes that stay, so that tests of many ranks do not pay for starting them: see the fixture `ranks`."""

from __future__ import annotations

import contextlib
import importlib.util
import multiprocessing
import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

TIMEOUT_S = 120.0
PRELOADED = ["torch.distributed.fsdp", "torch.distributed.pipelining", "tunesmith.train.run", "tunesmith.model.fused"]


class RankError(AssertionError):
    """A rank failed; the message has every rank's traceback."""


class RankPool:
    """Processes that meet in a new gloo group for every call."""

    def __init__(self) -> None:
        self._workers: list[tuple[Any, Connection]] = []

    def __call__(
        self, function: Callable[..., Any], world_size: int, *arguments: Any, timeout_s: float = TIMEOUT_S, **named: Any
    ) -> list[Any]:
        """`function(*arguments, **named)` on every rank, torch.distributed being initialised; what each returned.

        `function` is defined at the top of a file; arguments and results are pickled. RANK, WORLD_SIZE and LOCAL_RANK
        are set as torchrun sets them. A rank that fails or hangs fails the call, and the next call has new processes.
        """
        while len(self._workers) < world_size:
            self._workers.append(_start())
        with tempfile.TemporaryDirectory() as folder:
            for rank, (_, pipe) in enumerate(self._workers[:world_size]):
                where = (function.__code__.co_filename, function.__qualname__)
                pipe.send((where, arguments, named, rank, world_size, f"{folder}/meeting"))
            outcomes = [_receive(rank, pipe, timeout_s) for rank, (_, pipe) in enumerate(self._workers[:world_size])]
        failed = [text for ok, text in outcomes if not ok]
        if failed:
            self.close()
            raise RankError("\n\n".join(failed))
        return [value for _, value in outcomes]

    def close(self) -> None:
        """End the processes."""
        for process, pipe in self._workers:
            process.kill()
            process.join()
            pipe.close()
        self._workers.clear()


def _receive(rank: int, pipe: Connection, timeout_s: float) -> tuple[bool, Any]:
    try:
        if not pipe.poll(timeout_s):
            return False, f"rank {rank} did not answer within {timeout_s} s"
        return pipe.recv()
    except EOFError:
        return False, f"rank {rank} died"


def _start() -> tuple[Any, Connection]:
    """A fork of a process that has imported what most tests of ranks import: seconds for every rank.

    With a GPU each starts afresh: CUDA can't be used in a fork of a process in which an import has asked for it.
    """
    import torch

    context = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
    context.set_forkserver_preload(PRELOADED)
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, list(sys.path)), daemon=True)
    process.start()
    there.close()
    return process, here


def _serve(pipe: Connection, path: list[str]) -> None:
    sys.path[:] = path
    import torch

    torch.set_num_threads(1)
    with contextlib.suppress(EOFError, KeyboardInterrupt):
        while True:
            where, arguments, named, rank, world_size, meeting = pipe.recv()
            try:
                pipe.send((True, _call(where, arguments, named, rank, world_size, meeting)))
            except BaseException:
                pipe.send((False, f"rank {rank} of {world_size}:\n{traceback.format_exc()}"))


def _call(
    where: tuple[str, str], arguments: tuple[Any, ...], named: dict[str, Any], rank: int, world_size: int, meeting: str
) -> Any:
    import torch.distributed as dist

    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world_size), LOCAL_RANK=str(rank))
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world_size)
    try:
        return getattr(_module(where[0]), where[1])(*arguments, **named)
    finally:
        dist.destroy_process_group()


@cache
def _module(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"ranks_{Path(path).stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
