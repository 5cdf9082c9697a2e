"""What comes out of a run: an adapter in PEFT's format, or a Hugging Face model directory with its tokenizer."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.consolidate import can_stream, consolidate
from tunesmith.checkpoint.save import save_decoder
from tunesmith.checkpoint.state import load_latest
from tunesmith.errors import ModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import atomic_directory
from tunesmith.rundir.layout import RunDir
from tunesmith.text.tokenizer import Tokenizer
from tunesmith.train.resolve import DTYPES, trains_base
from tunesmith.train.session import Session


def export(session: Session, run: RunDir) -> Path:
    """Write the outcome of `session` as the run's `final/`; see `write_outcome`.

    Where no process holds all of it, it is put together from the last checkpoint, a tensor at a time.
    """
    is_sharded = session.mesh.world_size > 1 or session.recipe.parallel.engine == "deepspeed"
    if is_sharded and can_stream(session.recipe):
        _, state = load_latest(run.checkpoints)
        consolidate(session.recipe, state, run.final, replace=True)
        return run.final
    return write_outcome(session.recipe, session.model, session.model_directory, session.tokenizer, run.final)


def write_outcome(
    recipe: Recipe, model: LanguageModel, base_directory: Path, tokenizer: Tokenizer | None, directory: Path
) -> Path:
    """Write what was trained as `directory`, whole or not at all: the model, or the adapter on its base.

    Weights that were trained as float32 masters are stored in the compute dtype, as checkpoints of models are.
    """
    with atomic_directory(directory, replace=True) as temporary:
        if trains_base(recipe.method):
            _save_model(recipe, model, temporary)
        else:
            base = recipe.model
            seed = recipe.train.seed if base.weights == "random" else None
            save_adapter(model, temporary, base.path, base_directory, base.revision, seed)
        if tokenizer is not None:
            tokenizer.save(temporary)
    return directory


def _save_model(recipe: Recipe, model: LanguageModel, directory: Path) -> None:
    dtype = DTYPES[recipe.train.precision]
    if dtype is torch.float16:
        dtype = torch.float32  # masters may lie outside float16's range
    if isinstance(model, Decoder):
        save_decoder(model, directory, dtype=dtype)
    elif isinstance(model, TransformersModel):
        model.save(directory, dtype=dtype)
    else:
        raise ModelError(f"a {type(model).__name__} can't be saved as a model directory")


def remove_interim(run: RunDir) -> None:
    """Drop what was written from checkpoints of `run` while it had not finished."""
    for directory in run.path.glob(run.outcome_of(Path("step-*")).name):
        shutil.rmtree(directory, ignore_errors=True)


def next_commands(session: Session, run: Path) -> list[str]:
    """What to type next, with this run's own paths."""
    path, merged = shlex.quote(str(run)), shlex.quote(str(run / "merged"))
    merge = [] if trains_base(session.recipe.method) else [f"tunesmith merge {path} --output {merged}"]
    first = [f"tunesmith chat {path}", f"tunesmith serve {path}", f"tunesmith eval {path} --questions FILE"]
    return [*first, *merge, f"tunesmith report {path}"]
