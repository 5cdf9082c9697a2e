"""What a report reads: the JSON of run directories, taken with care (any value may be missing or foreign)."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from tunesmith.bench.infer.table import VERSION as INFER_VERSION
from tunesmith.bench.schema import CELL_MIGRATIONS, CELL_VERSION, SCALING_VERSION, scaling_file
from tunesmith.errors import RunDirError
from tunesmith.rundir.io import read_json, read_jsonl
from tunesmith.rundir.layout import RunDir, migrate, open_run

EVALUATED = ("accuracy", "perplexity", "before", "after")
"""Keys of which an evaluation has at least one."""


@dataclass(frozen=True)
class Node:
    """A JSON value with tolerant access: what is missing or of another type reads as None."""

    data: Any

    def get(self, *path: str) -> Any:
        """The value at a path of keys, or None."""
        value = self.data
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return value

    def number(self, *path: str) -> float | None:
        """A finite number, or None."""
        return as_number(self.get(*path))

    def text(self, *path: str) -> str | None:
        """A string, or None."""
        value = self.get(*path)
        return value if isinstance(value, str) else None

    def numbers(self, *path: str) -> list[float]:
        """The finite numbers of a list; empty where there is none."""
        value = self.get(*path)
        found = (as_number(item) for item in value) if isinstance(value, list) else iter(())
        return [item for item in found if item is not None]


def as_number(value: Any) -> float | None:
    """`value` as a float where it is a finite number and not a boolean."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    return float(value)


@dataclass(frozen=True)
class Run:
    """One run directory: what kind it is, and the JSON it holds."""

    path: Path
    kind: str
    name: str
    created_at: str | None = None
    status: str | None = None
    command: tuple[str, ...] = ()
    manifest: Node = field(default_factory=lambda: Node({}))
    cells: tuple[Node, ...] = ()
    metrics: tuple[Node, ...] = ()
    environment: Node = field(default_factory=lambda: Node({}))
    certificate: Node | None = None
    evaluations: tuple[tuple[str, Node], ...] = ()
    recipe: Node = field(default_factory=lambda: Node({}))
    scaling: Node = field(default_factory=lambda: Node({}))
    table: Node = field(default_factory=lambda: Node({}))
    profile: Node = field(default_factory=lambda: Node({}))


def read_runs(paths: Iterable[Path]) -> list[Run]:
    """The runs at these paths; those of one name are called by their directories.

    Raises: RunDirError for a path that holds none, or one of a newer version.
    """
    runs = [read_run(path) for path in paths]
    names = Counter(run.name for run in runs)
    folders = Counter(run.path.resolve().name for run in runs)
    return [run if names[run.name] == 1 else replace(run, name=_folder_name(run.path, folders)) for run in runs]


def _folder_name(path: Path, folders: Mapping[str, int]) -> str:
    """A directory's name, or all of its path where another run's directory has the same name."""
    whole = path.resolve()
    return whole.name if folders[whole.name] == 1 else str(path)


def read_run(path: Path) -> Run:
    """One run: a directory, or the JSON file of an evaluation.

    Raises: RunDirError for anything else.
    """
    if path.is_file():
        return Run(path, "eval", path.stem, evaluations=((path.stem, _read_evaluation(path)),))
    run = open_run(path)
    info = run.info()
    cells = tuple(_read_cells(run.cells))
    return Run(
        path=path,
        kind=info.kind,
        name=info.name,
        created_at=info.created_at,
        status=info.status,
        command=tuple(map(str, info.command)),
        manifest=Node(dict(info.facts)),
        cells=cells,
        metrics=tuple(Node(row) for row in read_jsonl(run.metrics)) if run.metrics.is_file() else (),
        environment=_read_optional(run.environment) or Node({}),
        certificate=_read_optional(run.certificate),
        evaluations=tuple((file.stem, Node(read_json(file))) for file in evaluation_files(path)),
        recipe=_read_recipe(run.recipe),
        scaling=_read_scaling(run),
        table=_read_table(run),
        profile=_read_profile(run),
    )


def _read_evaluation(path: Path) -> Node:
    """Raises: RunDirError for a file that is none: a page was made of it that said nothing."""
    node = Node(read_json(path))
    if not any(node.get(key) is not None for key in EVALUATED):
        raise RunDirError(
            f"{path} is no evaluation: a report is made of run directories, and of what tunesmith eval wrote "
            "(RUN/evaluations/NAME.json)"
        )
    return node


def evaluation_files(path: Path) -> list[Path]:
    """The evaluations of a run: comparisons of before and after, and what `tunesmith eval` wrote, the newest last."""
    return [*sorted(path.glob("eval*.json")), *sorted((path / "evaluations").glob("*.json"), key=_by_number)]


def _by_number(file: Path) -> tuple[str, int]:
    """So that quality-10 comes after quality-2, and quality before both."""
    name, _, number = file.stem.rpartition("-")
    return (name, int(number)) if name and number.isdecimal() else (file.stem, 0)


def _read_cells(directory: Path) -> Iterator[Node]:
    for file in sorted(directory.glob("*.json")):
        yield Node(migrate(read_json(file), CELL_VERSION, CELL_MIGRATIONS, file))


def _read_scaling(run: RunDir) -> Node:
    """The curves of a scaling run; empty of any other, and of one that did not finish."""
    file = scaling_file(run.path)
    return Node(migrate(read_json(file), SCALING_VERSION, {}, file)) if file.is_file() else Node({})


def _read_table(run: RunDir) -> Node:
    """The rows of an inference run; empty of any other."""
    file = run.path / "infer.json"
    return Node(migrate(read_json(file), INFER_VERSION, {}, file)) if file.is_file() else Node({})


def _read_profile(run: RunDir) -> Node:
    """A profile's operators and memory by these names; empty of any other run."""
    files = {name: run.profile / f"{name}.json" for name in ("operators", "memory")}
    return Node({name: read_json(file) for name, file in files.items() if file.is_file()})


def _read_recipe(file: Path) -> Node:
    if not file.is_file():
        return Node({})
    try:
        return Node(yaml.safe_load(file.read_text(encoding="utf-8")))
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise RunDirError(f"{file} is not valid YAML: {error}") from None


def _read_optional(file: Path) -> Node | None:
    return Node(read_json(file)) if file.is_file() else None
