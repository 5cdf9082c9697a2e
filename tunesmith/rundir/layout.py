"""Where things lie in a run directory, and its version.

    runs/shop-20260102-030405/
      run.json            what this is: kind, status, versions, times (the schema's version is here)
      recipe.yaml         the resolved recipe, every key
      environment.json    chip, driver, torch, packages, commit
      metrics.jsonl       a row per logged step and per validation
      certificate.json    the checks of `tunesmith verify`
      preview.json        one example with its mask
      checkpoints/        complete training states
      final/              the adapter or the model that came out
      outcome-step-N/     the same from a checkpoint, when it was asked for before the end
      cells/              a bench's measurements, one JSON per cell
      scaling.json        a scaling run's curves, and what limits them
      profile/            operator table, trace, memory timeline

Readers refuse a directory of a newer version, and bring an older one up to date in memory.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Protocol, get_args

from tunesmith import __version__
from tunesmith.errors import RunDirError
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import read_json, write_json_atomic, write_text_atomic

SCHEMA_VERSION = 1
Kind = Literal["train", "bench", "scale", "serve", "infer", "eval", "profile"]
Status = Literal["running", "finished", "failed", "interrupted"]
Migration = Callable[[dict[str, Any]], dict[str, Any]]
_CLAIMED = ".claimed"
"""In a folder that a launcher holds for a run: the command that was typed, as JSON. What lies beside it without a
run.json is of a start that was killed."""
MIGRATIONS: Mapping[int, Migration] = {}
"""From each older version of run.json, the function that makes it one version newer."""


class SavedRecipe(Protocol):
    """What a run directory needs of a recipe: this folder and `recipe` do not see each other."""

    @property
    def name(self) -> str: ...
    @property
    def output(self) -> str: ...
    def to_yaml(self) -> str:
        """The recipe as YAML, every key."""


@dataclass(frozen=True)
class RunDir:
    """The paths of one run directory. Knows where things lie, not what is in them."""

    path: Path

    @property
    def run(self) -> Path:
        """What this is: kind, status, versions, times."""
        return self.path / "run.json"

    @property
    def recipe(self) -> Path:
        """The resolved recipe."""
        return self.path / "recipe.yaml"

    @property
    def environment(self) -> Path:
        """The environment's fingerprint."""
        return self.path / "environment.json"

    @property
    def metrics(self) -> Path:
        """A row per logged step and per validation."""
        return self.path / "metrics.jsonl"

    @property
    def certificate(self) -> Path:
        """The checks of `tunesmith verify`."""
        return self.path / "certificate.json"

    @property
    def preview(self) -> Path:
        """One example with its mask, as plain data."""
        return self.path / "preview.json"

    @property
    def checkpoints(self) -> Path:
        """The folder of complete training states."""
        return self.path / "checkpoints"

    @property
    def final(self) -> Path:
        """The adapter or the model that came out."""
        return self.path / "final"

    def outcome_of(self, checkpoint: Path) -> Path:
        """Where the adapter or model of a checkpoint goes when it is asked for before the run has finished."""
        return self.path / f"outcome-{checkpoint.name}"

    @property
    def cells(self) -> Path:
        """The folder of a bench's measurements."""
        return self.path / "cells"

    @property
    def profile(self) -> Path:
        """The folder of operator table, trace and memory timeline."""
        return self.path / "profile"

    def info(self) -> RunInfo:
        """What run.json says now. Raises: RunDirError."""
        return _read_info(self)

    def set_status(self, status: Status, *, error: str | None = None, **facts: Any) -> None:
        """Record how the run stands, and any facts about it (merged into run.json's `facts`)."""
        if status not in get_args(Status):
            raise ValueError(f"status must be one of {', '.join(get_args(Status))}, got {status!r}")
        raw = _migrated(read_json(self.run), self.run)
        ended = None if status == "running" else _now()
        merged = {**raw.get("facts", {}), **facts}
        write_json_atomic(self.run, {**raw, "status": status, "ended_at": ended, "error": error, "facts": merged})


@dataclass(frozen=True)
class RunInfo:
    """The content of run.json."""

    kind: Kind
    status: Status
    name: str
    tunesmith_version: str
    created_at: str
    ended_at: str | None
    error: str | None
    command: tuple[str, ...]
    facts: Mapping[str, Any]


def create_run(recipe: SavedRecipe, *, kind: Kind = "train", path: Path | None = None) -> RunDir:
    """A new run directory with run.json, the recipe and the environment in it.

    Args: path: the directory; None: `<recipe.output>/<recipe.name>-<time>`, unique even when several start at once.
    Raises: RunDirError when `path` exists and is not empty, unless `claim_run` has claimed it.
    """
    if kind not in get_args(Kind):
        raise ValueError(f"kind must be one of {', '.join(get_args(Kind))}, got {kind!r}")
    run = RunDir(_claim(path) if path is not None else _claim_unique(Path(recipe.output), recipe.name))
    write_text_atomic(run.recipe, recipe.to_yaml())
    write_json_atomic(run.environment, environment_fingerprint())
    claimed = run.path / _CLAIMED
    write_json_atomic(run.run, _new_info(recipe.name, kind, read_json(claimed) if _has_text(claimed) else _typed()))
    claimed.unlink(missing_ok=True)
    return run


create = create_run


def new_run_path(output: str, name: str) -> Path:
    """Where a run that starts now would lie; nothing is made."""
    return _stem(Path(output), name)


def claim_run(output: str, name: str, path: Path | None = None) -> Path:
    """A folder for a run that other processes will make: they share it, and may begin again after being killed.

    The run that they make records the command of the process that claimed it, which is what a person typed.

    Args: path: the folder, which may hold a run already, or have been claimed; None: as `create_run` names it.
    Raises: RunDirError when `path` holds anything else.
    """
    if path is None:
        path = _claim_unique(Path(output), name)
    elif not is_run(path):
        _claim(path)
    if not is_run(path):
        (path / _CLAIMED).touch()  # before anything else lies there: others may claim it at the same moment
        write_json_atomic(path / _CLAIMED, _typed())
    return path


def open_run(path: Path | str) -> RunDir:
    """An existing run directory. Raises: RunDirError when it is missing, not a run directory, or of a newer version."""
    run = RunDir(Path(path))
    if run.path.is_file():
        raise RunDirError(f"{run.path} is a file, a run is a directory{_list_runs(run.path.parent)}")
    if not run.path.is_dir():
        raise RunDirError(f"there is no run directory {run.path}{_list_runs(run.path.parent)}")
    _read_info(run)
    return run


def is_run(path: Path) -> bool:
    """Whether `path` looks like a run directory (of any version)."""
    return (path / "run.json").is_file()


def runs_inside(folder: Path) -> list[str]:
    """The last three runs that lie in a folder, as they are named on a command line."""
    return [str(path) for path in sorted(folder.iterdir()) if is_run(path)][-3:] if folder.is_dir() else []


def _list_runs(folder: Path) -> str:
    """A hint at the runs there are: in the usual place below the folder, else in the folder itself."""
    names = runs_inside(folder / "runs") or runs_inside(folder)
    return f"; there are: {', '.join(names)}" if names else ""


def _typed() -> list[str]:
    """The command line of this process, by the program's name."""
    program = Path(sys.argv[0]).name
    return ["tunesmith" if program == "__main__.py" else program, *sys.argv[1:]]


def _has_text(path: Path) -> bool:
    return path.is_file() and path.stat().st_size > 0


def _new_info(name: str, kind: Kind, command: list[str]) -> dict[str, Any]:
    return {
        "schema": "tunesmith.run",
        "schema_version": SCHEMA_VERSION,
        "kind": kind,
        "status": "running",
        "name": name,
        "tunesmith_version": __version__,
        "created_at": _now(),
        "ended_at": None,
        "error": None,
        "command": command,
        "facts": {},
    }


def _read_info(run: RunDir) -> RunInfo:
    if not run.run.is_file():
        if names := runs_inside(run.path):
            raise RunDirError(f"{run.path} holds runs and is none itself: name one of them: {', '.join(names)}")
        raise RunDirError(f"{run.path} is not a run directory: it has no run.json")
    raw = _migrated(read_json(run.run), run.run)
    try:
        return RunInfo(
            **{key: raw[key] for key in ("kind", "status", "name", "tunesmith_version", "created_at")},
            ended_at=raw.get("ended_at"),
            error=raw.get("error"),
            command=tuple(raw.get("command", ())),
            facts=raw.get("facts", {}),
        )
    except KeyError as error:
        raise RunDirError(f"{run.run} lacks the key {error}") from None


def _migrated(raw: Any, path: Path) -> dict[str, Any]:
    return migrate(raw, SCHEMA_VERSION, MIGRATIONS, path)


def migrate(raw: Any, newest: int, migrations: Mapping[int, Migration], path: Path) -> dict[str, Any]:
    """`raw` brought up to version `newest`, one version at a time.

    Raises: RunDirError when it has no version, a newer one, or an older one from which no migration starts.
    """
    version = raw.get("schema_version") if isinstance(raw, dict) else None
    if not isinstance(version, int) or isinstance(version, bool):
        raise RunDirError(f"{path} has no schema_version: tunesmith did not write it")
    if version > newest:
        raise RunDirError(
            f"{path} is of version {version}, this tunesmith reads up to {newest}: pip install --upgrade tunesmith"
        )
    while version < newest:
        if version not in migrations:
            raise RunDirError(f"{path} is of version {version}, which this tunesmith can't bring up to {newest}")
        version += 1
        raw = {**migrations[version - 1](raw), "schema_version": version}
    return dict(raw)


def _make_folder(path: Path) -> None:
    """Raises: RunDirError where it can't be made, with what it was for: the system's words alone name a path."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise RunDirError(
            f"the run directory {path} can't be made ({error.strerror}): name another with --run-dir or --output, or "
            "another folder for runs with --set output=FOLDER"
        ) from None


def _claim(path: Path) -> Path:
    _make_folder(path)
    if any(path.iterdir()) and not ((path / _CLAIMED).exists() and not is_run(path)):
        raise RunDirError(f"{path} exists and is not empty: name another folder, or resume it")
    return path


def _claim_unique(folder: Path, name: str) -> Path:
    """A directory that no other process has: mkdir is what decides."""
    _make_folder(folder)
    first, attempt = _stem(folder, name), 1
    while True:
        path = first if attempt == 1 else first.with_name(f"{first.name}-{attempt}")
        try:
            path.mkdir()
        except FileExistsError:
            attempt += 1
        else:
            return path


def _stem(folder: Path, name: str) -> Path:
    return folder / f"{name.strip().replace(' ', '-')}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
