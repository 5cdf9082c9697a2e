"""What `LLM` is pointed at: a model directory or id, or a run directory, whose outcome and recipe say the rest."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, cast

from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import AdapterError, RunDirError
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import MethodSection
from tunesmith.rundir.layout import RunDir, is_run, open_run

Quantize = Literal["nf4", "nf4-double"]


@dataclass(frozen=True)
class ModelSource:
    """A base model, what goes on top of it, where its tokenizer is, and how its template is called."""

    path: str
    adapter: Path | None = None
    quantize: Quantize | None = None
    revision: str | None = None
    tokenizer: Path | None = None
    template_arguments: dict[str, object] | None = None


def find_source(path: str, adapter: str | Path | None, quantize: str | None, revision: str | None) -> ModelSource:
    """The model that `path` names; a run gives its adapter on its base (4-bit after QLoRA), or its whole model.

    Raises: RunDirError for a run that has no outcome yet; AdapterError for a second adapter.
    """
    wanted = cast("Quantize | None", quantize)
    if path.startswith("builtin:") or not is_run(Path(path).expanduser()):
        return ModelSource(path, None if adapter is None else _adapter_directory(Path(adapter)), wanted, revision)
    run = open_run(Path(path).expanduser())
    if adapter is not None:
        raise AdapterError(
            f"{path} is a run directory and brings its own outcome: leave the adapter out, or name its base"
        )
    return _run_source(run, wanted, revision)


def _adapter_directory(path: Path) -> Path:
    """An adapter's directory; a run directory stands for the adapter that came out of it."""
    if not is_run(path):
        return path
    outcome = _outcome(open_run(path))
    if not _is_adapter(outcome):
        raise AdapterError(f"the outcome of the run {path} is a whole model, not an adapter: name the run as the model")
    return outcome


def _run_source(run: RunDir, quantize: Quantize | None, revision: str | None) -> ModelSource:
    recipe = load_recipe(run.recipe)
    outcome = _outcome(run)
    arguments = dict(recipe.data.template_arguments)
    tokenizer = _tokenizer_directory(outcome)
    if not _is_adapter(outcome):
        return ModelSource(str(outcome), None, quantize, None, tokenizer, arguments)
    base, base_revision = recipe.model.path, revision or recipe.model.revision
    if quantize is None:
        quantize = _trained_on(recipe.method)
    tokenizer = tokenizer or resolve_model(base, base_revision)
    return ModelSource(base, outcome, quantize, base_revision, tokenizer, arguments)


def _trained_on(method: MethodSection) -> Quantize | None:
    if method.kind != "qlora":
        return None
    return "nf4-double" if method.double_quantisation else "nf4"


def _outcome(run: RunDir) -> Path:
    for directory in (run.final, run.path / "adapter", run.path / "model"):
        if (directory / "config.json").is_file() or _is_adapter(directory):
            return directory
    raise RunDirError(
        f"the run {run.path} has no trained model yet (no {run.final.name}/): let it finish, "
        f"or go on with: tunesmith train --resume {run.path}"
    )


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def _tokenizer_directory(directory: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return directory if any((directory / name).is_file() for name in names) else None
