"""Which rank hangs, judged from what all ranks report: arithmetic on reports and a clock, without torch.

A rank hangs when others wait for it and it does not move. It does not when it is merely slow. What tells them apart:

- *Somebody waits for it.* Every rank counts the collectives it has entered, by group. While no rank has entered one
  that this rank has not, nobody is held up, however long a step takes.
- *It does not move.* Every collective it enters, every micro-batch and every step is a move, and starts its time anew.
- *It was given no patience.* Before the end of the first step (compilation, allocation), and inside what the run
  declares to be long (a save, an export, tokenising), the limit is PATIENCE times as long; SILENT_PATIENCE times, where
  not even its watchdog reports: it is stopped, or in a call that lets no other thread of its process run.
- *It is later than a whole step.* With the default limit, a rank is not hung while it is late by less than the shortest
  step so far: where steps take a minute, half a minute is no sign of anything.
- *It does not wait itself.* A rank that is held up has entered a collective that the one it waits for has not; of a
  chain of waiting ranks the last is named. Ranks that wait for each other in a ring are all named, after twice as long.

A pipeline's sends can't be compared by counting. There, a rank that stands still in code of its own while another
stands still inside torch.distributed is named, after three steps' time at least.

A rank is named at NAMED_AT of the limit, so that all have ended when the limit is reached.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from tunesmith.parallel.progress import Report

PATIENCE, SILENT_PATIENCE = 30.0, 3.0
NAMED_AT = 0.8
_PIPELINE_STEPS = 3.0


@dataclass(frozen=True)
class Verdict:
    """Who hangs, in what, for how long, and who waits. silent: of those, the ones that report nothing any more."""

    ranks: tuple[int, ...]
    silent: tuple[int, ...]
    waiting: tuple[int, ...]
    at: str
    still_s: float

    @classmethod
    def from_data(cls, data: Mapping[str, Any]) -> Verdict:
        """Read back what JSON made of `vars(verdict)`."""
        lists = {key: tuple(data[key]) for key in ("ranks", "silent", "waiting")}
        return cls(**lists, at=data["at"], still_s=data["still_s"])

    def line(self, stacks: Mapping[int, str]) -> str:
        """The verdict as people read it. Args: stacks: where each of `ranks` is, as far as it could say."""
        who = f"rank {self.ranks[0]} hangs" if len(self.ranks) == 1 else f"ranks {_names(self.ranks)} hang"
        line = f"{who} in {self.at}: no progress for {self.still_s:.1f} s"
        if self.waiting:
            line += f", while {_names(self.waiting)} {'waits' if len(self.waiting) == 1 else 'wait'}"
        for rank in self.ranks:
            if rank in stacks:
                line += f"; rank {rank} is at {stacks[rank]}"
            elif rank in self.silent:
                line += f"; rank {rank} does not answer: its process is stopped, or its machine is gone"
        return line


def _names(ranks: tuple[int, ...]) -> str:
    shown = ", ".join(map(str, ranks[:8]))
    return shown if len(ranks) <= 8 else f"{shown} and {len(ranks) - 8} more"


@dataclass
class _Track:
    """One rank over time. The times are the judge's own clock."""

    report: Report
    heard_at: float
    moved_at: float
    behind_since: float | None = None


@dataclass
class Judge:
    """Looks at all ranks' newest reports every so often.

    limit_s: how long a rank may hold others up; is_exact: it was asked for, and is not stretched by slow steps.
    """

    limit_s: float
    is_exact: bool = False
    _tracks: dict[int, _Track] = field(default_factory=dict)
    _step: tuple[int, float] | None = None
    _shortest_step_s: float = 0.0

    def look(self, reports: Mapping[int, Report], now: float) -> Verdict | None:
        """The ranks that hang, if any do. Args: reports: by rank; now: seconds, of a clock that never goes back."""
        live = {rank: report for rank, report in reports.items() if not report.finished}
        for rank, report in live.items():
            self._follow(rank, report, now)
        self._tracks = {rank: track for rank, track in self._tracks.items() if rank in live}
        self._time_steps(now)
        behind, ahead = _behind_and_ahead(live)
        for rank, track in self._tracks.items():
            track.behind_since = (track.behind_since or now) if rank in behind else None
        return self._held_up(behind, ahead, now) or self._standing_still(now)

    def _follow(self, rank: int, report: Report, now: float) -> None:
        track = self._tracks.get(rank)
        if track is None:
            self._tracks[rank] = _Track(report, now, now)
            return
        if report.beat != track.report.beat:
            track.heard_at = now
        if not report.is_as_far_as(track.report):
            track.moved_at = now
        track.report = report

    def _time_steps(self, now: float) -> None:
        """Keep the shortest step so far, by the rank that is last."""
        slowest = min((track.report.step for track in self._tracks.values()), default=0)
        if self._step is None or slowest > self._step[0]:
            if self._step is not None and slowest > 0:
                took = (now - self._step[1]) / (slowest - self._step[0])
                self._shortest_step_s = min(self._shortest_step_s or took, took)
            self._step = (slowest, now)

    def _allowed_s(self, track: _Track, steps: float, now: float) -> float:
        limit = self.limit_s if self.is_exact else max(self.limit_s, steps * self._shortest_step_s)
        patience = SILENT_PATIENCE if self._is_silent(track, now) else PATIENCE
        return NAMED_AT * limit * (patience if track.report.patient else 1.0)

    def _held_up(self, behind: set[int], ahead: set[int], now: float) -> Verdict | None:
        late = dict(self._late(behind, now))
        guilty = [rank for rank in late if rank not in ahead]
        if not guilty:  # they wait for each other
            still = {rank: self._still_s(self._tracks[rank], now) for rank in late}
            guilty = [rank for rank, allowed in late.items() if still[rank] >= 2 * allowed]
            waiting: set[int] = set()
        else:
            waiting = ahead - set(guilty)
        return self._verdict(guilty, waiting, now) if guilty else None

    def _late(self, behind: set[int], now: float) -> Iterator[tuple[int, float]]:
        for rank in sorted(behind):
            track = self._tracks[rank]
            allowed = self._allowed_s(track, 1.0, now)
            if self._still_s(track, now) >= allowed:
                yield rank, allowed

    @staticmethod
    def _still_s(track: _Track, now: float) -> float:
        """For how long the rank has both not moved and been behind."""
        return now - max(track.moved_at, now if track.behind_since is None else track.behind_since)

    def _standing_still(self, now: float) -> Verdict | None:
        """Where counting tells nothing: who stands still in its own code while others stand in torch.distributed."""
        still = {
            rank: track
            for rank, track in self._tracks.items()
            if now - track.moved_at >= self._allowed_s(track, _PIPELINE_STEPS, now)
        }
        if len(still) < len(self._tracks):
            return None
        waiting = {rank for rank, track in still.items() if track.report.waits and not self._is_silent(track, now)}
        guilty = [rank for rank in still if rank not in waiting]
        return self._verdict(guilty, waiting, now) if waiting and guilty else None

    def _is_silent(self, track: _Track, now: float) -> bool:
        return now - track.heard_at >= NAMED_AT * self.limit_s / 2

    def _verdict(self, guilty: list[int], waiting: set[int], now: float) -> Verdict:
        tracks = {rank: self._tracks[rank] for rank in sorted(guilty)}
        silent = tuple(rank for rank, track in tracks.items() if self._is_silent(track, now))
        first = next(iter(tracks.values()))
        return Verdict(tuple(tracks), silent, tuple(sorted(waiting)), first.report.at, now - first.moved_at)


def _behind_and_ahead(reports: Mapping[int, Report]) -> tuple[set[int], set[int]]:
    """Who has not entered a collective that another of its group has; and who has entered one that another has not."""
    most: dict[str, int] = {}
    least: dict[str, int] = {}
    for report in reports.values():
        for key, count in report.collectives.items():
            most[key], least[key] = max(count, most.get(key, count)), min(count, least.get(key, count))
    behind = {r for r, report in reports.items() if any(n < most[key] for key, n in report.collectives.items())}
    ahead = {r for r, report in reports.items() if any(n > least[key] for key, n in report.collectives.items())}
    return behind, ahead
