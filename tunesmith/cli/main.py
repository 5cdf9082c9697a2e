"""`tunesmith VERB ...`: finds the verb, imports it, and turns what it raises into one line and an exit code.

The convention: every verb is `tunesmith/cli/<module>.py` with `app: typer.Typer` (one command, or a callback and
subcommands, never both). `--debug` and `--json` may stand anywhere before `--` and are taken out here. A verb
prints for people on stderr and ends with `console.emit(result)`.

Exit codes: 0 done; 1 a failure; 2 a mistake of use; 130 interrupted; whatever else a verb returns is documented
by the verb. `tunesmith --help` imports nothing heavy: no torch, no pydantic, no typer.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from tunesmith import __version__
from tunesmith.cli import console
from tunesmith.errors import TunesmithError, is_out_of_memory, nearest

VERBS = {
    "demo": ("tunesmith.cli.demo", "see it work: fine-tune a small model in five ways, compare them, ask it questions"),
    "doctor": ("tunesmith.cli.doctor", "is this machine ready? what is missing, and the command that mends it"),
    "recipe": ("tunesmith.cli.recipe", "write, show and explain recipes: files that say what to train, and how"),
    "data": ("tunesmith.cli.data", "look at your data as training will see it"),
    "train": ("tunesmith.cli.train", "fine-tune a model on your data, or train one from scratch"),
    "launch": ("tunesmith.cli.launch", "train on several GPUs or machines: here, under mpirun, or as a SLURM job"),
    "eval": ("tunesmith.cli.eval", "how good is a model: right answers to questions, surprise at a text"),
    "chat": ("tunesmith.cli.chat", "talk to a model, or to what came out of a training run"),
    "serve": ("tunesmith.cli.serve", "serve a model to programs, with OpenAI's interface"),
    "verify": ("tunesmith.cli.verify", "check that training by a recipe is correct on this machine"),
    "merge": ("tunesmith.cli.merge", "make one model of a base model and the adapter (add-on) trained for it"),
    "compress": ("tunesmith.cli.compress", "make a model smaller and faster to answer: int8 or int4 weights"),
    "consolidate": (
        "tunesmith.cli.consolidate",
        "make a model folder, or an adapter, of a checkpoint that any number of processes wrote",
    ),
    "bench": ("tunesmith.cli.bench", "measure time and memory of several methods in equal conditions"),
    "report": ("tunesmith.cli.report", "one page from training and bench runs: tables, plots, verdict"),
    "profile": ("tunesmith.cli.profile", "where the time and the memory of a training step go"),
}
GLOBAL_OPTIONS = {
    "--json": "the last line of stdout is the result as JSON",
    "--debug": "debug logs, and the traceback of an error",
    "--version": "print the version",
    "--help": "print this; tunesmith VERB --help explains a verb",
}
INTERRUPTED = 130
_TEMPORARY = re.compile(r"\.([^/]+)\.tmp-\d+-[0-9a-f]{8}\b")
"""What a file is called while it is written: its own name, which people know, is the group."""
_ELSEWHERE = {"run": "train", "methods": "train", "matrix": "train", "new": "init", "create": "init", "print": "show"}
"""What subcommands are called in other tools."""
_OUTPUTS = ("o", "out", "output", "output_dir", "out_dir", "save_dir")
"""What the option for the run directory is called in other tools."""


def main(argv: Sequence[str] | None = None) -> None:
    """The console script: runs the command line and exits the process with its code."""
    sys.exit(run(list(sys.argv[1:] if argv is None else argv)))


def run(argv: list[str], on_error: Callable[[BaseException], None] = lambda _: None) -> int:
    """Run one command line. Returns the exit code; nothing escapes but SystemExit of a verb.

    Args: on_error: is told what is turned into a line and an exit code.
    """
    arguments, flags = _split_global_flags(argv)
    console.mode.debug, console.mode.json = "--debug" in flags, "--json" in flags
    try:
        return _dispatch(arguments)
    except BrokenPipeError:
        return _quiet_stdout()
    except KeyboardInterrupt:
        _say("interrupted")
        return INTERRUPTED
    except console.StoppedError as stop:
        _say(f"interrupted: {stop}")
        return stop.exit_code
    except Exception as error:
        on_error(error)
        return _explain(error)


def _split_global_flags(argv: list[str]) -> tuple[list[str], set[str]]:
    """The arguments without --debug and --json, and which of the two there were; what follows "--" is left alone."""
    end = argv.index("--") if "--" in argv else len(argv)
    flags = {argument for argument in argv[:end] if argument in ("--debug", "--json")}
    return [a for a in argv[:end] if a not in flags] + argv[end:], flags


def _dispatch(arguments: list[str]) -> int:
    if arguments[:1] == ["help"] and len(arguments) > 1:
        arguments = [*arguments[1:], "--help"]
    if not arguments or arguments[0] in ("--help", "-h", "help"):
        sys.stdout.write(help_text())
        return 0
    if arguments[0] in ("--version", "-V"):
        sys.stdout.write(f"tunesmith {__version__}\n")
        console.emit({"version": __version__})
        return 0
    verb = arguments[0]
    if verb not in VERBS:
        what = "option" if verb.startswith("-") else "verb"
        known = [*VERBS, *GLOBAL_OPTIONS]
        return _fail(f"'{verb}' is not a {what} of tunesmith{nearest(verb, known)}; see: tunesmith --help", 2)
    return _run_verb(verb, arguments[1:])


def _run_verb(verb: str, arguments: list[str]) -> int:
    module = importlib.import_module(VERBS[verb][0])
    import typer.main

    configure_logging()
    command: Any = typer.main.get_command(module.app)
    command.epilog = "Everywhere: --json (the result as the last line of stdout), --debug (tracebacks, debug logs)"
    _make_help_plain(command)
    result = command.main(args=arguments, prog_name=f"tunesmith {verb}", standalone_mode=False, max_content_width=100)
    sys.stdout.flush()
    if result == INTERRUPTED:  # typer turns Ctrl-C into this code
        _say("interrupted")
    return result if isinstance(result, int) and not isinstance(result, bool) else 0


def _make_help_plain(command: Any) -> None:
    """Help as plain lines: in typer's boxes, names of options and their values are cut in a terminal of 80 columns."""
    command.rich_markup_mode = None
    for each in getattr(command, "commands", {}).values():
        each.short_help = (each.help or "").split("\n\n")[0]  # whole in the list of subcommands, not cut
        _make_help_plain(each)


def configure_logging() -> None:
    """The only place where logging is set up: warnings and tunesmith's own news, with --debug more, go to stderr."""
    import logging

    handler: logging.Handler
    if console.is_debug():
        from rich.logging import RichHandler

        handler = RichHandler(console=console.err, markup=False)
    else:
        from tunesmith.cli.log_lines import LogLines

        handler = LogLines()
    logging.basicConfig(level=logging.WARNING, format="%(message)s", handlers=[handler], force=True)
    logging.getLogger("tunesmith").setLevel(logging.DEBUG if console.is_debug() else logging.INFO)


def _explain(error: Exception) -> int:
    """One line on stderr for `error`; returns its exit code."""
    if console.is_debug():
        import traceback

        traceback.print_exception(error)
    if isinstance(error, TunesmithError):
        return _fail(str(error), getattr(error, "exit_code", 2 if isinstance(error, ValueError) else 1))
    if type(error).__name__ == "Abort":  # typer's, when a prompt is left with Ctrl-C or Ctrl-D
        _say("interrupted")
        return INTERRUPTED
    if hasattr(error, "format_message"):  # typer's mistakes of use
        return _fail(_usage_message(error), int(getattr(error, "exit_code", 2)))
    if isinstance(error, OSError) and error.strerror:
        name = _TEMPORARY.sub(r"\1", str(error.filename)) if error.filename else ""
        return _fail(f"{error.strerror}{f': {name!r}' if name else ''}", 1)
    if is_out_of_memory(error):
        reason = str(error).split("DefaultCPUAllocator: ")[-1].split("\n")[0]
        advice = "lower train.micro_batch_tokens, or set train.checkpointing=block or method.kind=qlora"
        if type(error).__name__ == "OutOfMemoryError":  # a GPU's
            advice += "; where all weights are trained, train.offload_optimizer=true"
        return _fail(f"out of memory: {reason or 'no more to be had'}; {advice}", 1)
    hint = "" if console.is_debug() else "; run again with --debug for the traceback"
    return _fail(f"unexpected {type(error).__name__}: {' '.join(str(error).split()) or 'no message'}{hint}", 1)


def _usage_message(error: Any) -> str:
    context = getattr(error, "ctx", None)
    help_hint = f"; see: {context.command_path} --help" if context is not None else ""
    wrong = getattr(error, "option_name", None)
    if type(error).__name__ == "NoSuchOption" and wrong is not None and context is not None:
        options = [name for option in context.command.params for name in (*option.opts, *option.secondary_opts)]
        options = [name for name in (*options, "--help", "--json", "--debug") if name.startswith("--")]
        return f"there is no option {wrong}{option_hint(wrong, options)}{help_hint}"
    message = error.format_message().rstrip(".")
    subcommands = getattr(getattr(context, "command", None), "commands", None)
    if context is not None and subcommands and message.startswith("No such command"):
        return f"{message}{subcommand_hint(message.split(chr(39))[1], context.command_path, subcommands)}{help_hint}"
    return f"{message}{help_hint}"


def subcommand_hint(wrong: str, verb: str, known: Iterable[str]) -> str:
    """What was meant by the subcommand `wrong` of `verb`: the nearest, or what people call it elsewhere, or all."""
    names = list(known)
    meant = _ELSEWHERE.get(wrong)
    if meant in names:
        return f", did you mean: {verb} {meant}"
    near = nearest(wrong, names)
    if near:
        return f", did you mean: {verb} {near.split(chr(39))[1]}"
    return f"; there are: {', '.join(f'{verb} {name}' for name in names)}"


def option_hint(wrong: str, options: Sequence[str]) -> str:
    """What was meant by the option `wrong`: one of `options`, or a recipe's key for --set; empty when unknown."""
    name = wrong.lstrip("-").replace("-", "_")
    if "--run-dir" in options and "--set" in options and name in _OUTPUTS:
        return "; --run-dir DIRECTORY names the run directory, --set output=FOLDER where new ones are made"
    if "--set" in options:
        from tunesmith.recipe.explain import all_keys

        keys = [key for key in all_keys() if key.rpartition(".")[2] == {"lr": "learning_rate"}.get(name, name)]
        if keys:
            return f"; it is a key of the recipe: --set {keys[0]}=VALUE"
    begins = [option for option in options if wrong.strip("-") and option.startswith(f"--{wrong.lstrip('-')}")]
    return f", did you mean '{begins[0]}'?" if begins else nearest(wrong, options)


def _fail(message: str, code: int) -> int:
    _say(f"error: {message}")
    console.emit({"error": message, "exit_code": code})
    return code


def _say(message: str) -> None:
    sys.stderr.write(f"tunesmith: {message}\n")


def _quiet_stdout() -> int:
    """The reader of our output went away (`tunesmith ... | head`): leave without a word."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1


def help_text() -> str:
    """What `tunesmith --help` prints."""
    verbs = "\n".join(f"  {verb:<11} {line}" for verb, (_, line) in VERBS.items())
    options = "\n".join(f"  {option:<11} {line}" for option, line in GLOBAL_OPTIONS.items())
    return (
        "tunesmith trains language models, measures what each way of doing it costs, and lets you talk to the result."
        "\n\n"
        f"Usage: tunesmith VERB ...\n\nVerbs\n{verbs}\n\nOptions\n{options}\n\n"
        "Start with: tunesmith demo\n"
        "Your own:   tunesmith train builtin:tiny --data mine.json    then: tunesmith chat RUN\n"
        "            (RUN is the directory under runs/ that train prints)\n"
    )
