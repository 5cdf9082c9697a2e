"""A whole run: recipe in, run directory with metrics, checkpoints and the outcome out."""

from __future__ import annotations

import contextlib
import logging
import shlex
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError, TrainingError, TunesmithError
from tunesmith.recipe.load import dump_recipe, load_recipe, recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import read_jsonl, write_json_atomic, write_text_atomic
from tunesmith.rundir.layout import RunDir, create_run, open_run
from tunesmith.text.preview import check_trainable, mask_preview
from tunesmith.train.allocator import prepare_allocator
from tunesmith.train.display import Display, best_line, closing_lines, method_line, pace_line, plan_line
from tunesmith.train.execution import execution_facts, execution_line, ran_as_asked
from tunesmith.train.export import export, next_commands, remove_interim
from tunesmith.train.loop import DISK_FULL, Hooks, LoopResult, run_loop
from tunesmith.train.loop import resume as resume_from
from tunesmith.train.metrics import EvalMetrics, StepMetrics
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session import Session, build_session, configure_cublas
from tunesmith.train.start import loads_first
from tunesmith.train.stopping import exit_code, sigterm_exits
from tunesmith.watch.start_up import StartUp
from tunesmith.watch.start_up import describe as describe_start_up
from tunesmith.watch.trackers import Trackers

Preflight = Callable[[Recipe, Path], str]
# What a resumed run may change: where and how often things are written, not what is computed.
FREE_KEYS = (
    "name",
    "output",
    "log.",
    "checkpoint.",
    "evaluation.",
    "bench.",
    "model.device",
    "data.workers",
    "data.cache",
    "train.detect_anomaly",
)
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
    with watch.part("recipe and device"):
        resolved = resolve_recipe(asked)
    if resume is not None:
        run = open_run(resume)
        check_resumable(load_recipe(run.recipe), resolved)
        write_text_atomic(run.recipe, dump_recipe(resolved))
        folders: set[Path] | None = None
    else:
        folders = _missing_folders(Path(resolved.output if run_dir is None else run_dir))
        with watch.part("run directory"):
            run = create_run(resolved, path=None if run_dir is None else Path(run_dir))
    with _recorded(run, folders), Display(quiet=quiet) as display:
        return _train(resolved, run, display, resume is not None, on_step, preflight, watch)


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
def _recorded(run: RunDir, made: set[Path] | None) -> Iterator[None]:
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
        else:
            run.set_status("failed", error=f"{type(error).__name__}: {error}")
        raise


def _missing_folders(path: Path) -> set[Path]:
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


def _train(
    recipe: Recipe,
    run: RunDir,
    display: Display,
    resuming: bool,
    on_step: Callable[[StepMetrics], None] | None,
    preflight: Preflight | None,
    watch: StartUp,
) -> TrainResult:
    configure_cublas(recipe.train)
    session = _checked_session(recipe, run, display, preflight, watch)
    display.say(f"run directory: {run.path}")
    if session.recipe != recipe:
        recipe = session.recipe
        write_text_atomic(run.recipe, dump_recipe(recipe))
    display.say(method_line(recipe, session.method_summary))
    display.say(plan_line(recipe, session.total_steps))
    with watch.part("example"):
        _show_example(session, run, display)
    if resuming:
        place = resume_from(session, run) or "the start: there is no checkpoint yet"
        display.say(f"going on from {place} (step {session.step_number} of {session.total_steps})")
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
            hooks=_hooks(display, trackers, on_step, partial(_record_start_up, run, watch)),
        )
    finally:
        trackers.close()
    return _finish(session, run, display, loop)


def _checked_session(
    recipe: Recipe, run: RunDir, display: Display, preflight: Preflight | None, watch: StartUp
) -> Session:
    """The session of a recipe that has passed its preflight."""

    def check() -> None:
        said = "" if preflight is None else preflight(recipe, run.path)
        if said:
            display.say(said)

    load = partial(build_session, recipe, progress=display.loading, start_up=watch)
    if preflight is None or not loads_first(recipe):
        check()
        return load()
    session = load()
    check()
    return session


def _record_start_up(run: RunDir, watch: StartUp) -> None:
    """After the first step: where the seconds before went, in run.json and in the debug log."""
    if watch.is_over:
        return
    seconds = watch.finish()
    imported = [name for name in SLOW_IMPORTS if name in sys.modules]
    run.set_status("running", start_up={"seconds": seconds, "imported": imported})
    _log.debug("%s", describe_start_up(seconds))


def _hooks(
    display: Display, trackers: Trackers, on_step: Callable[[StepMetrics], None] | None, started: Callable[[], None]
) -> Hooks:
    def stepped(metrics: StepMetrics) -> None:
        started()
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


def _finish(session: Session, run: RunDir, display: Display, loop: LoopResult) -> TrainResult:
    final, commands = None, [f"tunesmith train --resume {shlex.quote(str(run.path))}"]
    if loop.stopped_by is None:
        final = _export(session, run)
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


def _export(session: Session, run: RunDir) -> Path:
    try:
        final = export(session, run.final)
    except OSError as error:
        if error.errno not in DISK_FULL:
            raise
        raise TrainingError(
            f"the disk is full ({error.strerror}): {run.final} was not written. The trained state is safe in "
            f"{run.checkpoints}: free space, then: tunesmith train --resume {run.path}"
        ) from error
    remove_interim(run)
    return final
