"""The run directory of a run, and those of its further processes: made, gone on with, recorded, removed."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import RecipeError, TunesmithError
from tunesmith.parallel.mesh import Mesh
from tunesmith.recipe.load import dump_recipe, load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import write_text_atomic
from tunesmith.rundir.layout import RunDir, claim_run, create_run, is_run, open_run
from tunesmith.train.share import packs_of_a_step
from tunesmith.train.stopping import sigterm_exits

RANKS = "ranks"
"""The folder in a run directory where the processes other than the first have a run directory each."""
# What a resumed run may change: where and how often things are written, not what is computed.
FREE_KEYS = (
    "name",
    "output",
    "log.",
    "checkpoint.",
    "evaluation.",
    "bench.",
    "model.device",
    "parallel.",
    "train.graphs",
    "train.offload_optimizer",
    "train.device_memory_gb",
    "data.workers",
    "data.cache",
    "train.detect_anomaly",
)


def with_steps_of(recipe: Recipe, before: Recipe) -> Recipe:
    """`recipe` with as many micro-batches a step as the run that it goes on with had, whatever the processes.

    Raises: RecipeError when it asks for another number.
    """
    packs, asked = packs_of_a_step(before, 1), recipe.parallel.micro_batches
    if asked is not None and asked != packs:
        raise RecipeError(
            f"the run was started with {packs} micro-batches a step, and would go on with parallel.micro_batches "
            f"{asked}: leave it out, or start a new run without --resume"
        )
    return recipe.model_copy(update={"parallel": recipe.parallel.model_copy(update={"micro_batches": packs})})


def shared_run(make: Any, mesh: Mesh, recipe: Recipe) -> tuple[RunDir, RunDir]:
    """(the run's directory, this process's own): the first process makes the run's, which is its own.

    Args: make: makes or opens the run's directory. Raises: in all processes, what making it raised.
    """
    from tunesmith.parallel.agreement import raise_together

    found: list[Any] = [None]
    problem: Exception | None = None
    if mesh.is_first:
        try:
            found = [str(make().path)]
        except Exception as error:
            problem = error
    raise_together(problem)
    if mesh.world_size == 1:
        run = RunDir(Path(found[0]))
        return run, run
    import torch.distributed as dist

    dist.broadcast_object_list(found, src=0, device=torch.device("cpu"))
    run = RunDir(Path(found[0]))
    return run, run if mesh.is_first else _own_run(run, mesh, recipe)


def _own_run(run: RunDir, mesh: Mesh, recipe: Recipe) -> RunDir:
    path = run.path / RANKS / f"rank-{mesh.rank}"
    # Claimed first: what a start that was killed has left there without a run.json is no obstacle to the next.
    return open_run(path) if is_run(path) else create_run(recipe, path=claim_run("", "", path))


def opened_run(path: Path, recipe: Recipe) -> RunDir:
    """The run directory to go on with, its recipe being `recipe` from now on. Raises: RecipeError where it must not."""
    run = open_run(path)
    check_resumable(load_recipe(run.recipe), recipe)
    write_text_atomic(run.recipe, dump_recipe(recipe))
    return run


def check_resumable(before: Recipe, now: Recipe) -> None:
    """Raises: RecipeError naming the first key that changed and would make the rest of the run another one."""
    old, new = _flat(before.model_dump(mode="json")), _flat(now.model_dump(mode="json"))
    for key in (*new, *(key for key in old if key not in new)):
        value = new.get(key)
        if value is None and key == "train.epochs":
            continue  # decided from the data, and so the same again
        if value != old.get(key) and not key.startswith(FREE_KEYS):
            raise RecipeError(
                f"the run was started with {key}: {old.get(key)!r}, and would go on with {value!r}: "
                f"leave it as it was, or start a new run without --resume"
            )


def _flat(mapping: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in mapping.items():
        if isinstance(value, Mapping) and value:
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = value
    return flat


@contextmanager
def recorded(run: RunDir, made: set[Path] | None) -> Iterator[None]:
    """run.json says how the run stands, also when it fails; a mistake of use before the first step leaves nothing.

    Args: made: the folders above the run directory that were made for it; None: the run was there before.
    """
    run.set_status("running")
    try:
        with sigterm_exits():
            yield
    except (KeyboardInterrupt, SystemExit):
        run.set_status("interrupted")
        raise
    except BaseException as error:
        is_mistake = isinstance(error, TunesmithError) and isinstance(error, ValueError)
        if made is not None and is_mistake and not run.metrics.exists():
            _remove(run, made)
        elif run.run.exists():  # of a further process: the first one may have removed it
            run.set_status("failed", error=f"{type(error).__name__}: {error}")
        raise


def missing_folders(path: Path) -> set[Path]:
    """Which of `path` and the folders above it are not there."""
    return {folder for folder in (path, *path.parents) if not folder.exists()}


def _remove(run: RunDir, made: set[Path]) -> None:
    """The run directory, and of the folders above it those that were made for it and are empty."""
    shutil.rmtree(run.path, ignore_errors=True)
    with contextlib.suppress(OSError):
        for folder in run.path.parents:
            if folder not in made:
                return
            folder.rmdir()
