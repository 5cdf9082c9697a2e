"""A plan carried out on this machine by torch's elastic agent, which starts, watches and restarts the processes.

What is added to it: a group is only tried again when that can help (`causes`); the processes that are left over after a
failure have a moment to say what they saw, and are then ended; a stop (SIGTERM, Ctrl-C) is passed on, and whoever is
saving its state is let finish.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerGroup, WorkerSpec, WorkerState
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous import registry as rendezvous_registry
from torch.distributed.elastic.rendezvous.api import RendezvousClosedError, RendezvousError

from tunesmith.errors import ParallelError
from tunesmith.launch.causes import STOPPED, Ending, Verdict, ending_path, judge, read_ending
from tunesmith.launch.plan import Plan

LEFT_OVER_S = 8.0
"""How long the other processes may go on after one has failed: to find out, and to say so in their logs."""
STOPPING_S = 600.0
"""How long a state may take to be saved after a stop was asked for. A scheduler that asks may well be less patient."""
_MEETING_S = 600
_FORWARDED = (signal.SIGTERM, signal.SIGINT)
Say = Callable[[str], None]


def run_here(plan: Plan, say: Say) -> int:
    """Start the plan's processes on this machine and see them to their end. Returns the exit code of the group.

    Raises: ParallelError naming the rank that failed and how, when it is not to be tried again.
    """
    plan.logs.mkdir(parents=True, exist_ok=True)
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)  # what it says, the verdict says shorter
    folder = tempfile.mkdtemp(prefix="tunesmith-launch-")
    handler = rendezvous_registry.get_rendezvous_handler(_meeting(plan))
    try:
        agent = _Agent(_worker_spec(plan, handler), DefaultLogsSpecs(log_dir=folder), plan.logs, say)
        with _environment(plan), _stops_passed_on(agent, say):
            return _outcome(agent, plan)
    finally:
        handler.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


def _outcome(agent: _Agent, plan: Plan) -> int:
    try:
        result = agent.run()
    except RendezvousClosedError:
        raise ParallelError("the other machines have given up: see what they print") from None
    except RendezvousError as error:
        raise ParallelError(f"the machines could not meet at {plan.rendezvous}: {error}") from None
    if not result.is_failed():
        return 0
    verdict = agent.verdict
    if verdict is None or verdict.exit_code not in STOPPED:
        line = "the processes ended" if verdict is None else verdict.line
        is_tried_out = verdict is not None and verdict.restart and plan.max_restarts > 0
        last = "the only restart" if plan.max_restarts == 1 else f"the last of {plan.max_restarts} restarts"
        tries = f" ({last})" if is_tried_out else ""
        raise GroupError(f"{line}{tries}; the logs of all ranks: {plan.logs}", verdict)
    return verdict.exit_code


class GroupError(ParallelError):
    """The group of processes failed; exit_code is the first failure's."""

    def __init__(self, message: str, verdict: Verdict | None) -> None:
        super().__init__(message)
        self.exit_code = 1 if verdict is None else verdict.exit_code


class _Agent(LocalElasticAgent):
    def __init__(self, spec: WorkerSpec, logs_specs: DefaultLogsSpecs, logs: Path, say: Say) -> None:
        super().__init__(spec, logs_specs)
        self.verdict: Verdict | None = None
        self.is_stopping = False
        self._logs, self._say = logs, say
        self._failed_at: float | None = None

    def pass_on(self, number: int) -> None:
        """Send a signal to every process that is left."""
        self.is_stopping = True
        for process in self._running():
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(number)

    def _start_workers(self, worker_group: WorkerGroup) -> dict[int, Any]:
        self._failed_at = None
        for worker in worker_group.workers:
            ending_path(self._logs, worker.global_rank).unlink(missing_ok=True)
        return super()._start_workers(worker_group)

    def _monitor_workers(self, worker_group: WorkerGroup) -> RunResult:
        """As the agent's, but the failure of one does not at once end the others, who may be saving or reporting."""
        codes = self._exit_codes(worker_group)
        failed = {rank: code for rank, code in codes.items() if code}
        if not failed:
            return super()._monitor_workers(worker_group)
        now = time.monotonic()
        self._failed_at = self._failed_at or now
        if None in codes.values() and now - self._failed_at < self._patience_s(failed):
            return RunResult(state=WorkerState.HEALTHY)
        self._decide([read_ending(ending_path(self._logs, rank), rank, code) for rank, code in failed.items()])
        for process in self._running():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        return super()._monitor_workers(worker_group)

    @staticmethod
    def _patience_s(failed: dict[int, int]) -> float:
        return STOPPING_S if all(code in STOPPED for code in failed.values()) else LEFT_OVER_S

    def _decide(self, endings: list[Ending]) -> None:
        """Whether there is another try, and what is said of this one."""
        self.verdict = verdict = judge(endings)
        if self.is_stopping or not verdict.restart:
            self._remaining_restarts = 0
        if self._remaining_restarts > 0:
            left = self._remaining_restarts - 1
            self._say(f"{verdict.line}; starting all again from the last checkpoint ({left} more restarts allowed)")

    def _processes(self) -> dict[int, Any]:
        """The processes by local rank; none before they were started."""
        return getattr(self._pcontext, "subprocess_handlers", {})

    def _running(self) -> list[Any]:
        return [handler.proc for handler in self._processes().values() if handler.proc.poll() is None]

    def _exit_codes(self, worker_group: WorkerGroup) -> dict[int, int | None]:
        handlers = self._processes()
        return {
            worker.global_rank: handlers[worker.local_rank].proc.poll()
            for worker in worker_group.workers
            if worker.local_rank in handlers
        }


def _worker_spec(plan: Plan, handler: Any) -> WorkerSpec:
    return WorkerSpec(
        role="tunesmith",
        local_world_size=plan.nproc,
        rdzv_handler=handler,
        entrypoint=plan.command[0],
        args=plan.command[1:],
        max_restarts=plan.max_restarts,
        monitor_interval=0.1,
        local_addr="127.0.0.1" if plan.rendezvous is None else None,
    )


def _meeting(plan: Plan) -> RendezvousParameters:
    low, high = plan.nodes
    return RendezvousParameters(
        backend="c10d",
        endpoint=plan.rendezvous or "127.0.0.1:0",
        run_id=plan.rendezvous_id,
        min_nodes=low,
        max_nodes=high,
        local_addr="127.0.0.1" if plan.rendezvous is None else None,
        is_host="true" if plan.rendezvous is None else None,
        timeout=_MEETING_S,
        join_timeout=_MEETING_S,
    )


@contextlib.contextmanager
def _environment(plan: Plan) -> Iterator[None]:
    """The plan's variables while the processes run: they inherit this process's environment.

    Rank 0 of each try has a store of its own: in the agent's, which torch would have them share, a restarted group
    finds the addresses of the one before, and waits for dead processes (torch 2.13).
    """
    own = {"TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGHUP,SIGQUIT", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    wanted = {**plan.environment, **own}
    before = {key: os.environ.get(key) for key in wanted}
    os.environ.update(wanted)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                os.environ.pop(key, None)
            else:
                os.environ[key] = value


@contextlib.contextmanager
def _stops_passed_on(agent: _Agent, say: Say) -> Iterator[None]:
    """SIGTERM and Ctrl-C go to the processes, which finish their step and save; a second Ctrl-C ends them."""

    def forward(number: int, frame: FrameType | None) -> None:
        if agent.is_stopping and number == signal.SIGINT:
            agent.pass_on(signal.SIGKILL)
            return
        say(f"{signal.Signals(number).name}: passed on to all ranks, which finish their step and save")
        agent.pass_on(number)

    before = {number: signal.signal(number, forward) for number in _FORWARDED}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
