"""A model that processes share, as the first one sees it: the others are started, and everything is loaded."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.tensor_parallel import TensorParallelRunner
from tunesmith.engine.tensor_serving import SharedSource, join, load_share
from tunesmith.engine.tensor_team import TensorTeam
from tunesmith.errors import ParallelError, RequestError
from tunesmith.model.decoder import Decoder

SHARED_FORMATS = ("nf4", "nf4-double", "fp8", "fp8-inner")
GRAPHS_S = 5.0
"""Seconds at start-up for recording graphs beyond the coarse sizes."""


@dataclass(frozen=True)
class SharedModel:
    """The first process's part of a model, and the others."""

    decoder: Decoder
    team: TensorTeam

    def runner(self, config: EngineConfig) -> TensorParallelRunner:
        """The runner of all processes together. Raises: ParallelError, DeviceError."""
        self.team.tell({"kind": "runner", "config": dict(vars(config)), "num_pages": None})
        team = self.team
        runner = TensorParallelRunner(self.decoder, config, team.tell, team.check, give_up=team.give_up)
        self.team.hear("ready")
        runner.warm_up(GRAPHS_S)
        return runner

    def close(self) -> None:
        """End the other processes, and leave their group."""
        self.team.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def load_shared(source: SharedSource, size: int) -> SharedModel:
    """A model that `size` processes share, this one and others that are started.

    Raises: ParallelError naming what can't be divided or which process failed; RequestError for what is not there.
    """
    _check(source, size)
    threads = max(1, torch.get_num_threads() // size) if source.device_type == "cpu" else None
    team = TensorTeam(size, threads=threads)
    try:
        team.hear("hello")
        resolve_model(source.path, source.revision)  # once, where it has to be fetched
        team.tell({"kind": "start", "size": size, "meeting": team.meeting, "source": vars(source)})
        decoder = load_share(source, join(size, 0, team.meeting, source.device_type))
        team.when_failed(_abort_group)
        team.hear("loaded")
    except BaseException:
        team.close()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        raise
    if threads is not None:
        torch.set_num_threads(threads)
    return SharedModel(decoder, team)


def _check(source: SharedSource, size: int) -> None:
    if source.quantize is not None and source.quantize not in SHARED_FORMATS:
        raise RequestError(
            f"weights in {source.quantize} can't be shared by processes: choose one of {', '.join(SHARED_FORMATS)}, or "
            f"tensor_parallel_size=1"
        )
    if source.device_type == "cuda" and torch.cuda.device_count() < size:
        raise ParallelError(
            f"tensor_parallel_size {size} asks for {size} GPUs, and this machine shows {torch.cuda.device_count()}"
        )
    if torch.distributed.is_initialized():
        raise ParallelError(
            "this process belongs to a group of torch.distributed already: serve a shared model from a process of its "
            "own"
        )


def _abort_group() -> None:
    """Let nothing wait for a process that is gone. Between CPUs a collective notices by itself."""
    abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)
    if abort is not None and torch.cuda.is_available():
        abort()
