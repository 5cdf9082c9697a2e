"""What comes out of a run: an adapter in PEFT's format, or a Hugging Face model directory with its tokenizer."""

from __future__ import annotations

import shlex
from pathlib import Path

import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.save import save_decoder
from tunesmith.errors import ModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.rundir.io import atomic_directory
from tunesmith.train.resolve import DTYPES, trains_base
from tunesmith.train.session import Session


def export(session: Session, directory: Path) -> Path:
    """Write the outcome of `session` as `directory`, whole or not at all.

    Weights that were trained as float32 masters are stored in the compute dtype, as checkpoints of models are.
    """
    with atomic_directory(directory, replace=True) as temporary:
        if trains_base(session.recipe.method):
            _save_model(session, temporary)
        else:
            base = session.recipe.model
            seed = session.recipe.train.seed if base.weights == "random" else None
            save_adapter(session.model, temporary, base.path, session.model_directory, base.revision, seed)
        if session.tokenizer is not None:
            session.tokenizer.save(temporary)
    return directory


def _save_model(session: Session, directory: Path) -> None:
    dtype = DTYPES[session.recipe.train.precision]
    if dtype is torch.float16:
        dtype = torch.float32  # masters may lie outside float16's range
    if isinstance(session.model, Decoder):
        save_decoder(session.model, directory, dtype=dtype)
    elif isinstance(session.model, TransformersModel):
        session.model.save(directory)
    else:
        raise ModelError(f"a {type(session.model).__name__} can't be saved as a model directory")


def next_commands(session: Session, run: Path) -> list[str]:
    """What to type next, with this run's own paths."""
    path, merged = shlex.quote(str(run)), shlex.quote(str(run / "merged"))
    merge = [] if trains_base(session.recipe.method) else [f"tunesmith merge {path} --output {merged}"]
    return [f"tunesmith chat {path}", f"tunesmith eval {path} --questions FILE", *merge, f"tunesmith report {path}"]
