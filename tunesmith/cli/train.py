"""`tunesmith train RECIPE.yaml`, or `tunesmith train MODEL --data FILE` with no YAML at all."""

from __future__ import annotations

import json
import logging
import os
import shlex
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from tunesmith.cli import console
from tunesmith.errors import DataError, RecipeError, VerificationError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from tunesmith.kernels.compiling import Compiling
    from tunesmith.recipe.schema import Recipe
    from tunesmith.train.metrics import StepMetrics
    from tunesmith.train.run import TrainResult
    from tunesmith.watch.start_up import StartUp

app = typer.Typer(add_completion=False)
_log = logging.getLogger(__name__)
_NO_DATA = ("config.json", "adapter_config.json", "tokenizer.json", "run.json")
"""What the folder of a model, an adapter or a run holds, and one of data does not."""


@app.command()
def train(
    target: Annotated[
        str | None, typer.Argument(metavar="[RECIPE.yaml | MODEL]", help="a recipe, or a model to train on --data")
    ] = None,
    data: Annotated[
        list[str] | None, typer.Option("--data", help="training data: a file, a folder, a Hub id (repeatable)")
    ] = None,
    method: Annotated[str | None, typer.Option(help="full, lora or qlora")] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe, such as train.learning_rate=1e-4")
    ] = None,
    resume: Annotated[Path | None, typer.Option(help="a run directory to go on with")] = None,
    run_dir: Annotated[
        Path | None, typer.Option(help="the run directory to make, or to go on with where it is there already")
    ] = None,
    verify: Annotated[bool, typer.Option(help="run the cheap part of the certificate first")] = True,
) -> int:
    """Fine-tune or pre-train a model as a recipe says.

    All other settings (epochs, learning rate, ...) are keys of the recipe, for --set: tunesmith recipe schema.

    Exit codes: 0 done, 130 and 143 stopped by Ctrl-C or SIGTERM after saving.
    """
    from tunesmith.rundir.layout import is_run

    recipe = _recipe(target, data or [], method, overrides or [], _named_run(target, resume, run_dir))
    if run_dir is not None and is_run(run_dir):
        resume, run_dir = run_dir, None
    if resume is not None and (facts := finished_facts(resume, recipe)) is not None:
        console.err.print(nothing_left(resume, recipe, facts), markup=False)
        console.emit(facts)
        return 0
    if recipe.data.train and recipe.data.format != "tokens":
        from tunesmith.text.tokenise import refuse_at_once

        refuse_at_once(recipe.data)  # before a line, a run directory or the certificate's "mask shown" is made of it
    if console.launched_rank() == 0:  # the first line comes before torch does
        first = "first a check that training is correct here" if verify else "loading"
        console.err.print(f"{recipe.method.kind} on {recipe.model.path}: {first} ...", style="dim", markup=False)
    from tunesmith.checkpoint.read_ahead import read_ahead
    from tunesmith.kernels.cuda_start import start_cuda
    from tunesmith.verify.warm_up import start_compiling
    from tunesmith.watch.start_up import StartUp, process_age_s

    start_up = StartUp(process_age_s(), "command")
    with start_up.part("threads begun"):
        compiling = start_compiling(recipe)  # while torch is imported
        cuda = start_cuda(recipe.model.device)
        read_ahead(recipe.model)
    if cuda is None:
        # Before torch reads it: threads that spin while they wait take a busy machine's cores from those that compute.
        os.environ.setdefault("GOMP_SPINCOUNT", "0")
    run_training = _import_all(start_up, verify, has_cuda=cuda is not None)
    if cuda is not None:
        with start_up.part("CUDA waited for"):
            cuda.wait()
    preflight = partial(_prepare, compiling, verify, start_up)
    result = run_training(
        recipe, resume=resume, run_dir=run_dir, preflight=preflight, start_up=start_up, on_step=idle_watch(recipe)
    )
    console.emit(result.facts())
    return result.exit_code


def _import_all(start_up: StartUp, verify: bool, *, has_cuda: bool) -> Callable[..., TrainResult]:
    """All that a first step imports, while CUDA starts and kernels are compiled. Returns: `train.run.train`.

    Modules are never garbage: looking for some among them would take a tenth of the time.
    """
    import gc

    gc.disable()
    try:
        with start_up.part("torch imported"):
            import torch  # noqa: F401
        with start_up.part("imports"):
            from tunesmith.train.run import train as run_training

            if verify:
                from tunesmith.verify import certificate as _  # noqa: F401
        if has_cuda:
            from tunesmith.model.uncompiled import import_kernels

            with start_up.part("kernels imported"):
                import_kernels()
    finally:
        gc.enable()
    return run_training


def read_target(arguments: list[str]) -> tuple[Recipe, Path | None]:
    """The recipe that a command line of this verb describes, and the run directory that it names.

    Raises: RecipeError, RunDirError, and typer's mistakes of use.
    """
    context = typer.main.get_command(app).make_context("tunesmith train", list(arguments))
    asked = context.params
    named = _named_run(asked["target"], asked["resume"], asked["run_dir"])
    recipe = _recipe(asked["target"], asked["data"] or [], asked["method"], asked["overrides"] or [], named)
    return recipe, asked["resume"] or asked["run_dir"]


def _named_run(target: str | None, resume: Path | None, run_dir: Path | None) -> Path | None:
    """The run whose recipe is gone on with: --resume's, or --run-dir's where no recipe is named beside it."""
    from tunesmith.rundir.layout import is_run

    if resume is not None and run_dir is not None:
        raise RecipeError("--resume and --run-dir both name a run directory: leave one out")
    if target is None and run_dir is not None and is_run(run_dir):
        return run_dir
    return resume


def _recipe(
    target: str | None, data: list[str], method: str | None, overrides: list[str], resume: Path | None
) -> Recipe:
    """The recipe that the command line describes. Raises: RecipeError."""
    from tunesmith.recipe.load import load_recipe, recipe_from_mapping
    from tunesmith.rundir.layout import open_run

    if resume is not None:
        if target is not None or data or method is not None:
            raise RecipeError(
                "--resume takes its recipe from the run directory: leave the model, --data and --method out"
            )
        return load_recipe(open_run(resume).recipe, overrides)
    if target is None:
        raise RecipeError("name a recipe or a model: tunesmith train RECIPE.yaml, or tunesmith train MODEL --data FILE")
    if target.endswith((".yaml", ".yml")):
        more = ([f"data.train={json.dumps(data, ensure_ascii=False)}"] if data else []) + (
            [f"method.kind={method}"] if method else []
        )
        return load_recipe(target, [*more, *overrides])
    _refuse_data(target)
    mapping: dict[str, Any] = {"model": {"path": target}, "data": {"train": data}}
    if method is not None:
        mapping["method"] = {"kind": method}
    recipe = recipe_from_mapping(mapping, overrides)
    if not recipe.data.train and recipe.data.format != "tokens":
        raise RecipeError(f"say what to train {target} on: tunesmith train {target} --data FILE")
    return recipe


def finished_facts(run_dir: Path, recipe: Recipe) -> dict[str, Any] | None:
    """What a run has recorded that ended as its recipe says, and whose outcome is there; None: it can be gone on with.

    A recipe that differs from the run's is left to be compared with it.
    """
    from tunesmith.recipe.load import load_recipe
    from tunesmith.rundir.layout import open_run

    run = open_run(run_dir)
    info = run.info()
    if info.kind != "train" or info.status != "finished" or not run.final.is_dir() or load_recipe(run.recipe) != recipe:
        return None
    return dict(info.facts)


def nothing_left(run_dir: Path, recipe: Recipe, facts: Mapping[str, Any]) -> str:
    """That a run has ended, and the command that trains its outcome further."""
    data = "".join(f" --data {shlex.quote(entry)}" for entry in recipe.data.train)
    outcome = run_dir / "final"
    final = shlex.quote(str(outcome))
    if recipe.method.kind in ("lora", "qlora"):
        method = "" if recipe.method.kind == "lora" else f" --method {recipe.method.kind}"
        more = f"tunesmith train {shlex.quote(recipe.model.path)}{data}{method} --set method.adapter={final}"
    else:
        more = f"tunesmith train {final}{data} --method full"
    return (
        f"nothing left to do: this run ended at step {facts.get('steps')}, and what it learnt is in {outcome}\n"
        "A run's length is part of its recipe. To train on from there, begin a new run (how long: "
        f"--set train.epochs=N):\n  {more}"
    )


def idle_watch(recipe: Recipe) -> Callable[[StepMetrics], None] | None:
    """What looks at the first step for processes that the data leaves without work; None alone, and on all but one."""
    from tunesmith.parallel.mesh import mesh_shape, place_from

    place = place_from(os.environ)
    if place.rank != 0 or place.world_size == 1:
        return None
    sharing = mesh_shape(recipe.parallel, place.world_size)[1]

    def look(metrics: StepMetrics) -> None:
        if metrics.step == 1 and (line := idle_line(metrics.micro_batches, sharing)) is not None:
            _log.warning(line)

    return look


def idle_line(micro_batches: int, sharing: int) -> str | None:
    """What to say where a step has fewer micro-batches than processes share it; None where all have work."""
    if micro_batches >= sharing:
        return None
    amount = "one micro-batch" if micro_batches == 1 else f"{micro_batches} micro-batches"
    return (
        f"idle in every step: {sharing - micro_batches} of the {sharing} processes that share the data; a step has "
        f"only {amount} (train.micro_batch_tokens each). --nproc {micro_batches} is as fast"
    )


def _prepare(compiling: Compiling | None, verify: bool, start_up: StartUp, recipe: Recipe, run_dir: Path) -> str:
    """Kernels and certificate, before any step. Returns lines to show. Raises: VerificationError."""
    with start_up.part("kernels waited for"):
        compiled = None if compiling is None else compiling.wait()
    with start_up.part("certificate"):
        certified = _certify(recipe, run_dir) if verify else None
    return "\n".join(line for line in (compiled, certified) if line is not None)


def _refuse_data(target: str) -> None:
    """Raises: RecipeError where data is named in the model's place."""
    from tunesmith.text.files import ROW_SUFFIXES, split_suffixes
    from tunesmith.text.sources import SOURCES

    path = Path(target).expanduser()
    files = list(path.iterdir()) if path.is_dir() else [path]
    is_model = any(file.name in _NO_DATA or file.suffix == ".safetensors" for file in files)
    is_builtin = target.startswith("builtin:") and target[8:].partition("?")[0] in SOURCES
    if is_builtin or (not is_model and any(split_suffixes(file)[0] in ROW_SUFFIXES for file in files)):
        raise RecipeError(f"{target} looks like data: tunesmith train builtin:tiny --data {shlex.quote(target)}")


def _certify(recipe: Recipe, run_dir: Path) -> str:
    """The cheap part of the certificate, written into the run directory. Raises: VerificationError, DataError."""
    from tunesmith.units import format_seconds
    from tunesmith.verify.certificate import LEFT_TO_VERIFY, MASK_SHOWN, certify

    certificate = certify(recipe, full=False, run_dir=run_dir)
    failed = [check for check in certificate.checks if not check.passed]
    if [check.name for check in failed] == [MASK_SHOWN]:
        raise DataError(failed[0].detail)  # nothing is wrong with the machine: it is the data that teaches nothing
    if failed:
        raise VerificationError(
            f"the certificate failed ({', '.join(check.name for check in failed)}), so the run would be silently "
            f"wrong: {failed[0].detail}; see {run_dir}/certificate.json"
        )
    longest = max(certificate.checks, key=lambda check: check.duration_s)
    took = f"in {format_seconds(certificate.duration_s)}, {longest.name} {format_seconds(longest.duration_s)} of it"
    how = "kept from an earlier run" if certificate.cached else took
    quick, left = len(certificate.checks), list(certificate.skipped.values()).count(LEFT_TO_VERIFY)
    more = f"; tunesmith verify {shlex.quote(str(run_dir))} runs all {quick + left}" if left else ""
    return f"certificate: {quick} quick checks passed that training is correct here ({how}{more})"
