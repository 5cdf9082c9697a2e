"""The house's lines, held by reading the imports: who may import whom, no cycles, no relative imports, calm files."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "tunesmith"
LINE_LIMIT = 400
LAYERS = (
    ("errors", "units", "callable_package"),
    ("hardware", "arch", "formats"),
    ("recipe", "rundir", "cost", "kernels", "watch"),
    ("model", "text"),
    ("parallel",),
    ("checkpoint",),
    ("train", "engine", "compress"),
    ("plan", "verify", "backends", "launch"),
    ("serve",),
    ("rag", "images", "bench"),
    ("report",),
    ("page",),
    ("cli",),
    ("__main__",),
)
LEVEL = {folder: level for level, folders in enumerate(LAYERS, start=1) for folder in folders}
_MODULE_NAME = re.compile(r"^tunesmith(\.[a-z_0-9]+)+$")


@cache
def modules() -> dict[str, Path]:
    """Every module of the package by its dotted name."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def folder_of(module: str) -> str:
    """The folder (or the file beside them) that a module belongs to; the package itself is ''."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports_of(source: str, known: frozenset[str]) -> Iterator[str]:
    """The project's modules that `source` imports: at the top, lazily, for types only, or by name as text."""
    tree = ast.parse(source)
    labels = _schema_labels(tree)
    for node in ast.walk(tree):
        if node in labels:
            continue
        if isinstance(node, ast.Import):
            yield from (_module(alias.name, known) for alias in node.names if alias.name.startswith("tunesmith"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tunesmith"):
            yield from (_module(f"{node.module}.{alias.name}", known) for alias in node.names)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and _MODULE_NAME.match(node.value):
            yield from (name for name in [node.value] if name in known)


def _schema_labels(tree: ast.Module) -> set[ast.AST]:
    """The values of "schema" keys: they look like modules (tunesmith.bench.cell) and label JSON."""
    pairs = [pair for d in ast.walk(tree) if isinstance(d, ast.Dict) for pair in zip(d.keys, d.values, strict=True)]
    return {value for key, value in pairs if isinstance(key, ast.Constant) and key.value == "schema"}


def _module(name: str, known: frozenset[str]) -> str:
    """The module that `name` is, or is an attribute of."""
    return name if name in known else name.rpartition(".")[0]


@cache
def graph() -> dict[str, frozenset[str]]:
    """Who imports whom, but for the package's own lazy table of exports."""
    known = frozenset(modules())
    edges = {name: frozenset(imports_of(path.read_text(encoding="utf-8"), known)) for name, path in modules().items()}
    return {name: targets - {name} for name, targets in edges.items() if name != "tunesmith"}


def violations(edges: dict[str, frozenset[str]]) -> list[str]:
    """Imports that go up or sideways."""
    found = []
    for importer, targets in edges.items():
        here = folder_of(importer)
        for target in sorted(targets):
            there = folder_of(target)
            if there not in ("", here) and LEVEL[there] >= LEVEL[here]:
                found.append(f"{importer} imports {target}: {here} is on line {LEVEL[here]}, {there} on {LEVEL[there]}")
    return found


def test_every_folder_has_its_line() -> None:
    assert {folder_of(name) for name in modules()} - {""} <= LEVEL.keys()


def test_imports_go_down() -> None:
    assert violations(graph()) == []


def test_no_cycles() -> None:
    try:
        list(TopologicalSorter(graph()).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_relative_imports() -> None:
    relative = [
        f"{name}:{node.lineno}"
        for name, path in modules().items()
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_files_stay_short() -> None:
    lengths = {name: len(path.read_text(encoding="utf-8").splitlines()) for name, path in modules().items()}
    assert {name: length for name, length in lengths.items() if length > LINE_LIMIT} == {}


def test_every_module_says_what_it_is_for() -> None:
    assert [n for n, p in modules().items() if not ast.get_docstring(ast.parse(p.read_text(encoding="utf-8")))] == []


def test_cost_is_arithmetic_without_torch() -> None:
    heavy = re.compile(r"^\s*(?:import|from) (?:torch|transformers|numpy)\b", flags=re.MULTILINE)
    assert [n for n, p in modules().items() if folder_of(n) == "cost" and heavy.search(p.read_text("utf-8"))] == []


def test_the_reader_sees_every_kind_of_import() -> None:
    source = (
        "from tunesmith.train import loop\n"
        "def f():\n    import tunesmith.engine.llm\n    return importlib.import_module('tunesmith.cli.main')\n"
        "if TYPE_CHECKING:\n    from tunesmith.model.decoder import Decoder\n"
        "from tunesmith import __version__\n"
        "label = {'schema': 'tunesmith.bench.cell'}\n"
    )
    known = frozenset({"tunesmith", "tunesmith.train.loop", "tunesmith.engine.llm", "tunesmith.cli.main"})
    known |= {"tunesmith.model.decoder"}
    assert set(imports_of(source, known | {"tunesmith.bench.cell"})) == known


def test_the_reader_finds_imports_up_and_sideways() -> None:
    up = {"tunesmith.model.decoder": frozenset({"tunesmith.train.loop"})}
    sideways = {"tunesmith.rundir.layout": frozenset({"tunesmith.recipe.load"})}
    fine = {"tunesmith.train.loop": frozenset({"tunesmith.train.losses", "tunesmith.model.decoder", "tunesmith"})}
    assert len(violations(up)) == len(violations(sideways)) == 1
    assert violations(fine) == []


def test_the_map_names_every_folder() -> None:
    text = (ROOT / "docs" / "map.md").read_text(encoding="utf-8")
    rows = "\n".join(line for line in text.splitlines() if line.startswith("|"))
    folders = {path.name + "/" for path in PACKAGE.iterdir() if (path / "__init__.py").is_file()}
    files = {path.name for path in PACKAGE.glob("*.py")} - {"__init__.py"}
    assert {name for name in folders | files if f"`{name}`" not in rows} == set()
