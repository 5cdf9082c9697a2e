"""A whole run: recipe in, run directory with metrics, checkpoints and the outcome out."""

from __future__ import annotations

import logging
import os
import shlex
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import TrainingError
from tunesmith.hardware import pick_device
from tunesmith.parallel.accelerate_env import with_accelerate
from tunesmith.parallel.agreement import check_agreement, versions
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.parallel.progress import Progress
from tunesmith.parallel.watchdog import watched
from tunesmith.recipe.load import dump_recipe, load_recipe, recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import read_jsonl, write_json_atomic, write_text_atomic
from tunesmith.rundir.layout import RunDir, create_run, open_run
from tunesmith.text.preview import check_trainable, mask_preview
from tunesmith.train.allocator import prepare_allocator
from tunesmith.train.cpu_operations import prepare_cpu_operations
from tunesmith.train.determinism import configure_cublas
from tunesmith.train.directories import check_resumable as check_resumable
from tunesmith.train.directories import missing_folders, opened_run, recorded, shared_run, with_steps_of
from tunesmith.train.display import Display, best_line, closing_lines, method_line, pace_line, plan_line
from tunesmith.train.execution import execution_facts, execution_line, ran_as_asked
from tunesmith.train.export import export, next_commands, remove_interim
from tunesmith.train.loop import DISK_FULL, Hooks, LoopResult, run_loop
from tunesmith.train.loop import resume as resume_from
from tunesmith.train.metrics import EvalMetrics, StepMetrics
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session import Session, build_session
from tunesmith.train.start import loads_first
from tunesmith.train.stopping import exit_code
from tunesmith.train.together import Together, together
from tunesmith.watch.start_up import StartUp
from tunesmith.watch.start_up import describe as describe_start_up
from tunesmith.watch.trackers import Trackers

Preflight = Callable[[Recipe, Path], str]
_MEASURED = ("duration_s", "skipped_steps")
SLOW_IMPORTS = ("torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor", "transformers", "pyarrow")
"""What takes a second or so to import and is not needed for a first step; run.json says which of it came in."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """What a run came to. Losses are None where none was measured; exit_code is 143 or 130 when it was stopped."""

    run_dir: Path
    steps: int
    loss: float | None
    validation_loss: float | None
    perplexity: float | None
    final: Path | None
    tokens_seen: int
    duration_s: float
    bottleneck: str | None
    skipped_steps: int
    exit_code: int
    next_commands: tuple[str, ...] = ()
    data_wait_ratio: float | None = None
    data_verdict: str | None = None

    def facts(self) -> dict[str, Any]:
        """The result as plain data."""
        return {**vars(self), "next_commands": list(self.next_commands)}


def train(
    recipe: Recipe | Mapping[str, Any],
    *,
    resume: Path | str | None = None,
    on_step: Callable[[StepMetrics], None] | None = None,
    run_dir: Path | str | None = None,
    preflight: Preflight | None = None,
    start_up: StartUp | None = None,
    quiet: bool = False,
) -> TrainResult:
    """Train as `recipe` says.

    Args:
        recipe: a Recipe, or plain nested data.
        resume: a run directory to go on with, from its newest whole checkpoint.
        on_step: called with the metrics of every step.
        run_dir: the directory to make; None: <recipe.output>/<recipe.name>-<time>.
        preflight: called with the resolved recipe and the run directory before a checkpoint is touched and a step made,
            and before the weights are loaded unless a GPU has ample room for them; it raises to stop, and returns a
            line to show.
        start_up: what the seconds before the first step are added to; they are recorded in run.json.
        quiet: print nothing.

    Raises: RecipeError for a resume with a changed recipe; NonFiniteError before the update of a bad batch;
    TrainingError when the disk is full; whatever loading raises. A mistake in recipe, data or model that is found
    before the first step leaves no run directory behind.
    """
    asked = recipe if isinstance(recipe, Recipe) else recipe_from_mapping(recipe)
    watch = StartUp() if start_up is None else start_up
    prepare_allocator(asked.model.device)
    if resume is not None:
        asked = with_steps_of(asked, load_recipe(open_run(resume).recipe))
    asked = asked.model_copy(update={"parallel": with_accelerate(asked.parallel, os.environ)})
    with joined(asked.parallel, torch.device(pick_device(asked.model.device)).type) as mesh:
        if mesh.world_size > 1:
            asked = _for_this_process(asked, mesh)
        with watch.part("recipe and device"):
            resolved = resolve_recipe(asked, mesh.world_size)
            prepare_cpu_operations(resolved)
        folders = None if resume is not None else missing_folders(Path(resolved.output if run_dir is None else run_dir))
        with watch.part("run directory"):
            make = partial(_run_directory, resolved, resume, run_dir)
            run, own = shared_run(make, mesh, resolved)
        with (
            recorded(own, folders if mesh.is_first else None),
            watched(mesh, resolved.parallel, run.path / "logs") as progress,
            Display(quiet=quiet or not mesh.is_first) as display,
        ):
            if mesh.size("pp") > 1:
                progress.leave_out(mesh.group("pp"))
            place = _Place(mesh, together(mesh, progress), progress, run, own)
            return _train(resolved, place, display, resume is not None, on_step, preflight, watch)


@dataclass(frozen=True)
class _Place:
    """Where in a run this process stands. run: the run's directory; own: this process's, the same for the first."""

    mesh: Mesh
    others: Together
    progress: Progress
    run: RunDir
    own: RunDir


def _run_directory(recipe: Recipe, resume: Path | str | None, run_dir: Path | str | None) -> RunDir:
    if resume is not None:
        return opened_run(Path(resume), recipe)
    return create_run(recipe, path=None if run_dir is None else Path(run_dir))


def _for_this_process(recipe: Recipe, mesh: Mesh) -> Recipe:
    """On its own device; trackers are the first process's."""
    model = recipe.model.model_copy(update={"device": str(mesh.device)})
    log = recipe.log if mesh.is_first else recipe.log.model_copy(update={"trackers": []})
    return recipe.model_copy(update={"model": model, "log": log})


def _train(
    recipe: Recipe,
    place: _Place,
    display: Display,
    resuming: bool,
    on_step: Callable[[StepMetrics], None] | None,
    preflight: Preflight | None,
    watch: StartUp,
) -> TrainResult:
    configure_cublas(recipe.train)
    run, mesh = place.own, place.mesh
    session = _checked_session(recipe, run, display, preflight, watch, mesh)
    session.updater.before_update = place.others.fence
    _check_agreement(session, recipe)
    display.say(f"run directory: {run.path}")
    if session.recipe != recipe:
        recipe = session.recipe
        write_text_atomic(run.recipe, dump_recipe(recipe))
    display.say(method_line(recipe, session.method_summary))
    display.say(plan_line(recipe, session.total_steps))
    with watch.part("example"):
        _show_example(session, run, display)
    if resuming:
        state = resume_from(session, place.run.checkpoints, place.others.agreement)
        where = state or "the start: there is no checkpoint yet"
        display.say(f"going on from {where} (step {session.step_number} of {session.total_steps})")
    with watch.part("trackers"):
        trackers = Trackers(recipe.log, run.path, name=run.path.name, config=recipe.model_dump(mode="json"))
    try:
        watch.begin_last("first step")
        display.start(session.step_number, session.total_steps)
        loop = run_loop(
            session,
            run,
            evaluation=recipe.evaluation,
            checkpoint=recipe.checkpoint,
            log=recipe.log,
            hooks=_hooks(display, trackers, on_step, partial(_record_start_up, run, watch), place.progress),
            others=place.others,
            checkpoints=place.run.checkpoints,
        )
    finally:
        trackers.close()
    with place.progress.long("export"):
        return _finish(session, place, display, loop)


def _checked_session(
    recipe: Recipe, run: RunDir, display: Display, preflight: Preflight | None, watch: StartUp, mesh: Mesh
) -> Session:
    """The session of a recipe that has passed its preflight."""

    def check() -> None:
        said = "" if preflight is None else preflight(recipe, run.path)
        if said:
            display.say(said)

    load = partial(build_session, recipe, progress=display.loading, start_up=watch, mesh=mesh)
    with watch.part("recipe and device"):
        checks_last = preflight is not None and loads_first(recipe)
    if not checks_last:
        check()
        return load()
    session = load()
    check()
    return session


def _check_agreement(session: Session, recipe: Recipe) -> None:
    """All processes must run the same recipe, versions and data. Raises: ParallelError naming what differs."""
    if session.mesh.world_size == 1:
        return
    own: Any = {"model": {"device"}, "log": True}
    facts = {
        "versions": versions(session.device.type),
        "recipe": recipe.model_dump(mode="json", exclude=own),
        "data": session.data_fingerprint(),
    }
    check_agreement(facts)


def _record_start_up(run: RunDir, watch: StartUp) -> None:
    """After the first step: where the seconds before went, in run.json and in the debug log."""
    if watch.is_over:
        return
    seconds = watch.finish()
    imported = [name for name in SLOW_IMPORTS if name in sys.modules]
    run.set_status("running", start_up={"seconds": seconds, "imported": imported})
    _log.debug("%s", describe_start_up(seconds))


def _hooks(
    display: Display,
    trackers: Trackers,
    on_step: Callable[[StepMetrics], None] | None,
    started: Callable[[], None],
    progress: Progress,
) -> Hooks:
    def stepped(metrics: StepMetrics) -> None:
        started()
        progress.step_done(metrics.step)
        trackers.log(metrics.step, metrics.row())
        display.step(metrics)
        if on_step is not None:
            on_step(metrics)

    def evaluated(metrics: EvalMetrics) -> None:
        trackers.log(metrics.step, metrics.row())
        display.evaluation(metrics)

    return Hooks(stepped, evaluated, lambda path: display.say(f"saved {path}"), display.warn)


def _show_example(session: Session, run: RunDir, display: Display) -> None:
    """One example with its mask, on the screen and in the run directory; nothing to learn is refused here."""
    data = session.data.loaded
    if data is None:
        return
    for line in data.summary.lines():
        display.say(line)
    summary = data.summary
    run.set_status("running", data={"conversations": summary.conversations, "multi_turn": summary.multi_turn})
    check_trainable(data.train, data.tokenizer, session.recipe.data)
    preview = mask_preview(data.train[0], data.tokenizer)
    display.say(preview.text)
    write_json_atomic(run.preview, preview.data)


def _finish(session: Session, place: _Place, display: Display, loop: LoopResult) -> TrainResult:
    run = place.own
    final, commands = None, [_go_on_command(place.mesh, run)]
    if loop.stopped_by is None:
        final = _export(session, place)
        commands = next_commands(session, run.path)
        display.say(f"written: {final}")
    if (pace := pace_line(loop)) is not None:
        display.say(pace)
    if (best := best_line(_validations(run))) is not None:
        display.say(best)
    validation = loop.validation
    result = TrainResult(
        run_dir=run.path,
        steps=loop.steps,
        loss=loop.loss,
        validation_loss=None if validation is None else validation.loss,
        perplexity=None if validation is None else validation.perplexity,
        final=final,
        tokens_seen=session.tokens_seen,
        duration_s=loop.duration_s,
        bottleneck=loop.bottleneck,
        data_wait_ratio=loop.data_wait_ratio,
        data_verdict=loop.data_verdict,
        skipped_steps=loop.skipped_steps,
        exit_code=exit_code(loop.stopped_by),
        next_commands=tuple(commands),
    )
    execution = execution_facts(session.model)
    facts = {**result.facts(), **_method_facts(session), "execution": execution}
    if loop.duration_s == 0:  # nothing was left to do: what the process that did it has recorded stays
        facts = {key: value for key, value in facts.items() if value is not None and key not in _MEASURED}
    run.set_status("finished" if loop.stopped_by is None else "interrupted", **facts)
    if (how := execution_line(execution)) is not None:
        (_log.debug if ran_as_asked(execution) else display.say)(how)
    for line in closing_lines(commands):
        display.say(line)
    return result


def _go_on_command(mesh: Mesh, run: RunDir) -> str:
    """What goes on with a run that was stopped, in as many processes."""
    command = f"train --resume {shlex.quote(str(run.path))}"
    if mesh.world_size == 1:
        return f"tunesmith {command}"
    device = "--cpu " if mesh.device.type == "cpu" else ""
    return f"tunesmith launch {device}--nproc {mesh.world_size} {command}"


def _validations(run: RunDir) -> list[tuple[int, float]]:
    """Step and loss of every validation of the run, also before it was resumed."""
    rows = read_jsonl(run.metrics) if run.metrics.exists() else []
    return [(row["step"], row["validation_loss"]) for row in rows if row["event"] == "validation"]


def _method_facts(session: Session) -> dict[str, Any]:
    summary = session.method_summary
    return {
        "backend": session.model.backend,
        "trainable_parameters": summary.trainable_parameters,
        "total_parameters": summary.total_parameters,
    }


def _export(session: Session, place: _Place) -> Path:
    run = place.run
    if not place.mesh.is_first:
        return run.final
    try:
        final = export(session, run)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise TrainingError(
            f"the disk is full ({error.strerror}): {run.final} was not written. The trained state is safe in "
            f"{run.checkpoints}: free space, then: tunesmith train --resume {run.path}"
        ) from error
    remove_interim(run)
    return final
