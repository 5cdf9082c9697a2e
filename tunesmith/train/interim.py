"""What a run that has not finished has learnt so far: its newest whole checkpoint, written as a model or an adapter.

    runs/shop-20260102-030405/
      checkpoints/step-00000120/    the training state; it holds the trained weights alone
      outcome-step-00000120/        what `final/` would be had the run ended here

The outcome is made once for a checkpoint; that of an older one goes when a newer one, or `final/`, is written.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from tunesmith.checkpoint.source import resolve_model, resolve_tokenizer
from tunesmith.checkpoint.state import TrainingState, list_states, load_latest
from tunesmith.hardware import pick_device
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import RunDir
from tunesmith.text.tokenise import with_template
from tunesmith.text.tokenizer import load_tokenizer
from tunesmith.train.export import remove_interim, write_outcome
from tunesmith.train.session import trained_weights
from tunesmith.train.states import restore_weights
from tunesmith.train.trainable import load_trainable


@dataclass(frozen=True)
class Interim:
    """The outcome of a run as of `step` (of `total_steps`)."""

    path: Path
    step: int
    total_steps: int


def write_interim(run: RunDir) -> Interim | None:
    """The outcome of the newest whole checkpoint of `run`; None when the run is finished, or has no checkpoint yet.

    Raises: CheckpointError when there are checkpoints and none is whole; whatever loading the model raises.
    """
    if run.final.is_dir() or run.info().kind != "train" or not list_states(run.checkpoints):
        return None
    checkpoint, state = load_latest(run.checkpoints)
    interim = Interim(run.outcome_of(checkpoint), state.step, int(state.facts.get("total_steps", state.step)))
    if not interim.path.is_dir():
        remove_interim(run)
        write_state_outcome(load_recipe(run.recipe), state, interim.path)
    return interim


def _here(recipe: Recipe) -> Recipe:
    """The recipe on this machine: a checkpoint is often looked at where there is no GPU."""
    kind = torch.device(recipe.model.device).type
    device = recipe.model.device if kind == pick_device("auto").type else "cpu"
    return recipe.model_copy(update={"model": recipe.model.model_copy(update={"device": device})})


def write_state_outcome(recipe: Recipe, state: TrainingState, directory: Path) -> None:
    """Write what a state has learnt as `directory`: the model is built in memory, on this machine's device."""
    recipe = _here(recipe)
    base = resolve_model(recipe.model.path, recipe.model.revision)
    model, _ = load_trainable(recipe)
    restore_weights(state, trained_weights(model))
    tokenizer = None
    if recipe.data.format != "tokens":
        tokenizer = with_template(recipe.data, load_tokenizer(resolve_tokenizer(recipe)))
    write_outcome(recipe, model, base, tokenizer, directory)
