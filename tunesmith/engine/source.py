"""What `LLM` is pointed at: a model directory or id, or a run directory, whose outcome and recipe say the rest."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from tunesmith.checkpoint.adapter import read_adapter_tensors
from tunesmith.checkpoint.source import resolve_model
from tunesmith.checkpoint.state import list_states
from tunesmith.errors import AdapterError, RunDirError
from tunesmith.recipe.load import load_recipe
from tunesmith.rundir.layout import RunDir, RunInfo, is_run, open_run
from tunesmith.rundir.model_notes import ModelNotes, notes_of_facts, read_notes

Quantize = Literal["nf4", "nf4-double", "fp8", "fp8-inner"]
_OUTCOMES = ("final", "adapter", "model")


@dataclass(frozen=True)
class ModelSource:
    """A base model, what goes on top of it, where its tokenizer is, and how its template is called.

    single_turns: it was trained on conversations of which none had a second question.
    """

    path: str
    adapter: Path | None = None
    quantize: Quantize | None = None
    revision: str | None = None
    tokenizer: Path | None = None
    template_arguments: dict[str, object] | None = None
    chat_template: Path | None = None
    system: str | None = None
    single_turns: bool = False

    @property
    def is_tuned(self) -> bool:
        """Whether something was trained on top: then its chat template is one it was trained with."""
        return self.adapter is not None or self.template_arguments is not None


def find_source(path: str, adapter: str | Path | None, quantize: str | None, revision: str | None) -> ModelSource:
    """The model that `path` names; a run gives its adapter on its base, or its whole model.

    A base that an adapter was trained on in NF4 or fp8 is held so unless asked otherwise.
    Raises: RunDirError for a run that has no outcome yet; AdapterError for a second adapter.
    """
    wanted = cast("Quantize | None", quantize)
    run = None if path.startswith("builtin:") else _run_of(Path(path).expanduser())
    if run is None and (inside := _runs_inside(Path(path).expanduser())):
        raise RunDirError(f"{path} holds runs and is none itself: name one of them: {', '.join(inside)}")
    if run is not None:
        if adapter is not None:
            raise AdapterError(
                f"{path} comes from a run and brings its own outcome: leave the adapter out, or name its base"
            )
        return _run_source(run, wanted, revision)
    if adapter is None:
        return _plain_source(path, wanted, revision)
    return _adapted_source(path, Path(adapter).expanduser(), wanted, revision)


def _run_of(path: Path) -> RunDir | None:
    """The run that a directory is, or is the outcome of."""
    if is_run(path):
        return open_run(path)
    parent = path.resolve().parent
    return open_run(parent) if path.name in _OUTCOMES and is_run(parent) else None


def _runs_inside(path: Path) -> list[str]:
    """The newest training runs in a folder that is no model's."""
    if not path.is_dir() or (path / "config.json").exists():
        return []
    found = [RunDir(child) for child in path.iterdir() if is_run(child)]
    training = [run.path for run in found if run.info().kind == "train"]
    return [shlex.quote(str(child)) for child in sorted(training, key=lambda p: -p.stat().st_mtime)[:3]]


def _adapted_source(path: str, adapter: Path, quantize: Quantize | None, revision: str | None) -> ModelSource:
    """A base and an adapter; where the adapter is a run's, the run says how it was trained."""
    run = _run_of(adapter)
    if run is None:
        return ModelSource(path, adapter, quantize or _recorded(adapter), revision)
    if not _is_adapter(_outcome(run)):
        raise AdapterError(
            f"the outcome of the run {adapter} is a whole model, not an adapter: name the run as the model"
        )
    source = _run_source(run, quantize, None)
    # The base is what was asked for; its tokenizer is the run's where the run has one of its own.
    return replace(source, path=path, revision=revision)


def _run_source(run: RunDir, quantize: Quantize | None, revision: str | None) -> ModelSource:
    info = check_training(run)
    recipe = load_recipe(run.recipe)
    outcome = _outcome(run)
    is_adapter = _is_adapter(outcome)
    base_revision = revision or recipe.model.revision
    tokenizer = _tokenizer_directory(outcome)
    template = recipe.data.chat_template
    return ModelSource(
        path=recipe.model.path if is_adapter else str(outcome),
        adapter=outcome if is_adapter else None,
        quantize=quantize or (recipe.method.quantisation if is_adapter else None),
        revision=base_revision if is_adapter else None,
        tokenizer=tokenizer or resolve_model(recipe.model.path, base_revision),
        template_arguments=dict(recipe.data.template_arguments),
        # A tokenizer that was saved with the outcome has the template already.
        chat_template=Path(template) if template is not None and tokenizer is None else None,
        system=recipe.data.system,
        single_turns=notes_of_facts(info.facts).single_turns,
    )


def check_training(run: RunDir) -> RunInfo:
    """What run.json says. Raises: RunDirError for a run of a kind that trains no model to keep."""
    info = run.info()
    if info.kind != "train":
        raise RunDirError(
            f"{run.path} is a {info.kind} run: chat, eval and merge take a training run (what it measured: "
            f"tunesmith report {shlex.quote(str(run.path))})"
        )
    return info


def _plain_source(path: str, quantize: Quantize | None, revision: str | None) -> ModelSource:
    """A model by itself, and what the file beside its weights says, where merge or compress wrote one."""
    directory = Path(path).expanduser()
    notes = read_notes(directory) if directory.is_dir() else ModelNotes()
    return ModelSource(
        path,
        quantize=quantize,
        revision=revision,
        template_arguments=notes.template_arguments or None,
        system=notes.system,
        single_turns=notes.single_turns,
    )


def _recorded(adapter: Path) -> Quantize | None:
    """How the base was held while the adapter was trained, where its file says so."""
    if not _is_adapter(adapter):
        return None
    _, record = read_adapter_tensors(adapter)
    return cast("Quantize | None", record.quantisation) if record.quantisation in get_args(Quantize) else None


def _outcome(run: RunDir) -> Path:
    states = list_states(run.checkpoints)
    interim = [run.outcome_of(state) for state in reversed(states)]
    for directory in [*(run.path / name for name in _OUTCOMES), *interim]:
        if (directory / "config.json").is_file() or _is_adapter(directory):
            return directory
    raise RunDirError(why_no_outcome(run, has_checkpoint=bool(states)))


def why_no_outcome(run: RunDir, *, has_checkpoint: bool) -> str:
    """Why a run without an outcome can't be used, and what to type."""
    again = f"tunesmith train --resume {shlex.quote(str(run.path))}"
    if has_checkpoint:
        return (
            f"the run {run.path} has no trained model yet (no {run.final.name}/): let it finish, or go on with: {again}"
        )
    if run.info().status == "running":
        return (
            f"the run {run.path} has no checkpoint yet: let it go on. If it is running no more, there is nothing to go "
            f"on from, and this trains it anew, from the first step: {again}"
        )
    return (
        f"the run {run.path} ended before its first checkpoint: nothing it learnt was kept, and there is nothing to go "
        f"on from. Train it anew, from the first step: {again}"
    )


def _is_adapter(directory: Path) -> bool:
    return (directory / "adapter_config.json").is_file()


def _tokenizer_directory(directory: Path) -> Path | None:
    names = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    return directory if any((directory / name).is_file() for name in names) else None
