"""`tunesmith consolidate RUN_OR_CHECKPOINT --output DIR`: a training state as a model directory or an adapter."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console
from tunesmith.errors import RunDirError
from tunesmith.rundir.layout import RunDir, is_run, open_run
from tunesmith.units import format_bytes

if TYPE_CHECKING:
    import torch

    from tunesmith.checkpoint.consolidate import Consolidated
    from tunesmith.checkpoint.state import TrainingState
    from tunesmith.recipe.schema import Recipe

app = typer.Typer(add_completion=False)


class DTypeName(StrEnum):
    """What weights can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def consolidate(
    source: Annotated[
        Path, typer.Argument(metavar="RUN_OR_CHECKPOINT", help="a run directory, or RUN/checkpoints/step-N")
    ],
    output: Annotated[Path, typer.Option(help="the folder to write the model or the adapter to")],
    dtype: Annotated[
        DTypeName | None, typer.Option(help="dtype of a model's weights; left out: what training computed in")
    ] = None,
    replace: Annotated[bool, typer.Option(help="write over an existing folder")] = False,
) -> None:
    """Write a checkpoint as Hugging Face safetensors, or as an adapter in PEFT's format.

    Whatever number of processes wrote it. It is streamed: the model need not fit into memory.
    Exit codes: 0 written, 1 the checkpoint is damaged, 2 there is none.
    """
    from tunesmith.recipe.load import load_recipe

    run, state = find_state(source)
    result = _write(load_recipe(run.recipe), state, output, dtype, replace)
    files = "an adapter" if result.kind == "adapter" else "a model"
    console.err.print(
        f"{files} as of step {result.step}: {result.tensors} tensors, {format_bytes(result.num_bytes)} -> {output}",
        markup=False,
    )
    console.err.print(f"talk to it: tunesmith chat {_how_to_load(run, result)}", markup=False)
    console.emit(asdict(result))


def find_state(source: Path) -> tuple[RunDir, TrainingState]:
    """The run, and its newest whole state or the one that was named.

    Raises: RunDirError for what is neither; CheckpointError.
    """
    from tunesmith.checkpoint.state import list_states, load_latest, load_state

    path = source.expanduser()
    if is_run(path):
        run = open_run(path)
        if not list_states(run.checkpoints):
            raise RunDirError(f"the run {path} has no checkpoint: name one that has checkpoints/step-N")
        return run, load_latest(run.checkpoints)[1]
    folder = path.resolve()
    if _is_deepspeeds(folder):
        whole = source.parent if folder.name.startswith("global_step") else source
        raise RunDirError(
            f"{source} is a checkpoint as DeepSpeed itself writes it: pickled, and tunesmith opens no pickles; where "
            f"you trust it: python zero_to_fp32.py {shlex.quote(str(whole))} DIR --safe_serialization (the script lies "
            f"beside it), then name DIR as model.path"
        )
    if not (folder / "manifest.json").is_file():
        raise RunDirError(f"{source} is neither a run directory nor a checkpoint of one (RUN/checkpoints/step-N)")
    if not is_run(folder.parents[1]):
        raise RunDirError(f"{source} lies in no run directory, whose recipe says what model it is: move it back there")
    return open_run(folder.parents[1]), load_state(folder)


def _is_deepspeeds(folder: Path) -> bool:
    """Whether DeepSpeed's own engine saved it: global_stepN, or the folder of several."""
    tags = [folder, *folder.glob("global_step*")] if folder.is_dir() else []
    return any(next(tag.glob("*mp_rank_*_states.pt"), None) is not None for tag in tags)


def _write(recipe: Recipe, state: TrainingState, output: Path, dtype: DTypeName | None, replace: bool) -> Consolidated:
    from tunesmith.checkpoint.consolidate import can_stream
    from tunesmith.checkpoint.consolidate import consolidate as write

    if can_stream(recipe):
        return write(recipe, state, output, dtype=_torch_dtype(dtype), replace=replace)
    return _write_in_memory(recipe, state, output, dtype, replace)


def _write_in_memory(
    recipe: Recipe, state: TrainingState, output: Path, dtype: DTypeName | None, replace: bool
) -> Consolidated:
    """A model that only transformers knows is built, and saved by it."""
    from tunesmith.checkpoint.consolidate import Consolidated
    from tunesmith.train.interim import write_state_outcome

    if dtype is not None:
        raise RunDirError(
            "--dtype is for models that tunesmith streams; this one is saved by transformers: leave it out"
        )
    if output.exists() and not replace:
        raise RunDirError(f"{output} exists already: name another folder, or add --replace")
    console.err.print("this model has to be built in memory: only transformers knows its tensors", style="yellow")
    write_state_outcome(recipe, state, output)
    kind = "model" if recipe.method.kind in ("full", "freeze") else "adapter"
    num_bytes = sum(path.stat().st_size for path in output.iterdir())
    trained = sum(name.startswith("model.") for name in state.tensors)
    return Consolidated(str(output), kind, state.step, trained, num_bytes)


def _how_to_load(run: RunDir, result: Consolidated) -> str:
    if result.kind == "model":
        return shlex.quote(result.output)
    from tunesmith.recipe.load import load_recipe

    return f"{shlex.quote(load_recipe(run.recipe).model.path)} --adapter {shlex.quote(result.output)}"


def _torch_dtype(dtype: DTypeName | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)
