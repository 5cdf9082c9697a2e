"""A model that processes share, as the first one sees it: the others are started, and everything is loaded."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from tunesmith.checkpoint.inference import TRAINED
from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.tensor_parallel import TensorParallelRunner
from tunesmith.engine.tensor_plain import plain_hidden
from tunesmith.engine.tensor_serving import SharedSource, join, load_share
from tunesmith.engine.tensor_team import TensorTeam
from tunesmith.errors import ParallelError, RequestError, nearest
from tunesmith.model.decoder import Decoder
from tunesmith.model.weight_formats import FORMAT_NAMES

SHARED_FORMATS = (*FORMAT_NAMES, *TRAINED)
_log = logging.getLogger(__name__)
_aborting = threading.Lock()
ABORT_S = 10.0
"""Seconds that an abort which is under way is waited for."""
GRAPHS_S = 5.0
"""Seconds at start-up for recording graphs beyond the coarse sizes."""


@dataclass(frozen=True)
class SharedModel:
    """The first process's part of a model, and the others."""

    decoder: Decoder
    team: TensorTeam
    runners: list[TensorParallelRunner] = field(default_factory=list)
    """Those that were made: a communicator of NCCL can't be ended, or aborted, while a graph with it is there."""

    def runner(self, config: EngineConfig, *, beside_page_bytes: int = 0) -> TensorParallelRunner:
        """The runner of all processes together. Raises: ParallelError, DeviceError.

        beside_page_bytes: what another cache of the first process takes for each page (a draft model's).
        """
        team = self.team
        team.tell({"kind": "runner", "config": dict(vars(config)), "num_pages": None})
        runner = TensorParallelRunner(
            self.decoder, config, team.tell, team.check, give_up=team.give_up, beside_page_bytes=beside_page_bytes
        )
        self.runners.append(runner)
        self.team.hear("ready")
        runner.warm_up(GRAPHS_S)
        return runner

    def hidden(self, documents: Sequence[Sequence[int]]) -> Tensor:
        """hidden_TD after the final norm of whole documents, without the engine: between its steps, in its thread.

        Raises: ParallelError.
        """
        team = self.team
        try:
            team.tell({"kind": "hidden", "lengths": [len(document) for document in documents]})
            return plain_hidden(self.decoder, documents)
        except BaseException as error:
            team.give_up(f"{type(error).__name__}: {error}")
            if isinstance(error, Exception):
                team.check()
            raise

    def logits(self, documents: Sequence[Sequence[int]]) -> list[Tensor]:
        """logits_TV of each document. Raises: ParallelError."""
        hidden_TD = self.hidden(documents)
        with torch.no_grad():
            return list(self.decoder.logits(hidden_TD).split([len(document) for document in documents]))

    def close(self) -> None:
        """End the other processes, and leave their group; no runner works afterwards. Closing twice does nothing."""
        self.team.close()
        for runner in self.runners:
            if runner.graphs is not None:
                runner.graphs.drop()
        self.runners.clear()
        _leave_group()


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
        team.hear("here")
        decoder = load_share(source, join(size, 0, team.meeting, source.device_type))
        team.when_failed(_abort_group)
        team.hear("loaded")
    except BaseException:
        team.close()
        _leave_group()
        raise
    if threads is not None:
        torch.set_num_threads(threads)
    return SharedModel(decoder, team)


def _check(source: SharedSource, size: int) -> None:
    if source.quantize is not None and source.quantize not in SHARED_FORMATS:
        raise RequestError(
            f"there is no weight format {source.quantize!r}{nearest(source.quantize, SHARED_FORMATS)}; there are: "
            f"{', '.join(SHARED_FORMATS)}"
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


def _leave_group() -> None:
    """Between GPUs the others are gone by now, and a communicator that is ended in good order would wait for them."""
    if not torch.distributed.is_initialized():
        return
    if torch.distributed.get_backend() == "nccl":
        _abort_group()
    else:
        torch.distributed.destroy_process_group()


def _abort_group() -> None:
    """Let nothing wait for a process that is gone. Between CPUs a collective notices by itself."""
    abort = getattr(torch.distributed.distributed_c10d, "_abort_process_group", None)
    if not _aborting.acquire(timeout=ABORT_S):
        _log.warning("NCCL does not let go of the processes that shared the model; a new process can share one")
        return
    try:
        if abort is not None and torch.distributed.is_initialized() and torch.distributed.get_backend() == "nccl":
            abort()
    finally:
        _aborting.release()
