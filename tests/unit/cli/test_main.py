"""The frame of the command line: verbs, exit codes, one line for an error, JSON as the last line."""

from __future__ import annotations

import json
import logging
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Annotated, Any

import pytest
import typer

from tunesmith import __version__
from tunesmith.cli import console, main
from tunesmith.errors import DeviceError, RecipeError

Verb = Callable[[Callable[..., Any]], None]


@pytest.fixture(autouse=True)
def _clean_mode() -> Iterator[None]:
    handlers, level = logging.getLogger().handlers[:], logging.getLogger().level
    console._console.cache_clear()
    yield
    console.mode.debug = console.mode.json = False
    console._console.cache_clear()
    logging.getLogger().handlers[:] = handlers
    logging.getLogger().setLevel(level)


@pytest.fixture
def verb(monkeypatch: pytest.MonkeyPatch) -> Verb:
    """A function that makes `tunesmith try` run the function it is given."""

    def install(function: Callable[..., Any]) -> None:
        module = ModuleType("try_verb")
        module.app = typer.Typer(add_completion=False)  # type: ignore[attr-defined]
        module.app.command()(function)
        monkeypatch.setitem(sys.modules, "try_verb", module)
        monkeypatch.setitem(main.VERBS, "try", ("try_verb", "a verb for tests"))

    return install


def _raise(error: BaseException) -> Callable[[], None]:
    def function() -> None:
        raise error

    return function


@pytest.mark.parametrize("arguments", [[], ["--help"], ["-h"], ["help"]])
def test_help_lists_every_verb(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(arguments) == 0
    text = capsys.readouterr().out
    assert all(f"  {verb} " in text for verb in main.VERBS)


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    assert capsys.readouterr().out == f"tunesmith {__version__}\n"
    assert main.run(["--version", "--json"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"version": __version__}


@pytest.mark.parametrize(("typed", "near"), [("trian", "train"), ("reciep", "recipe"), ("--hlep", "--help")])
def test_a_misspelt_verb_names_the_nearest(typed: str, near: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run([typed]) == 2
    assert f"did you mean '{near}'?" in capsys.readouterr().err


def test_what_a_verb_returns_is_the_exit_code(verb: Verb) -> None:
    verb(lambda: None)
    assert main.run(["try"]) == 0
    verb(lambda: 3)
    assert main.run(["try"]) == 3
    verb(lambda: True)
    assert main.run(["try"]) == 0
    verb(_raise(typer.Exit(4)))
    assert main.run(["try"]) == 4


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (RecipeError("train.x is not a key"), 2, "tunesmith: error: train.x is not a key\n"),
        (DeviceError("no such device"), 1, "tunesmith: error: no such device\n"),
        (
            RuntimeError(
                "[enforce fail at x.cpp:1] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8"
            ),
            1,
            "tunesmith: error: out of memory: can't allocate memory: you tried to allocate 8; lower "
            "train.micro_batch_tokens, or set train.checkpointing=block or method.kind=qlora\n",
        ),
        (
            type("OutOfMemoryError", (RuntimeError,), {})("CUDA's"),  # torch's, by its name
            1,
            "method.kind=qlora; where all weights are trained, train.offload_optimizer=true\n",
        ),
        (KeyboardInterrupt(), 130, "tunesmith: interrupted\n"),
        (typer.Abort(), 130, "tunesmith: interrupted\n"),
        (ZeroDivisionError("a\nb"), 1, "tunesmith: error: unexpected ZeroDivisionError: a b; run again with --debug"),
        (OSError(28, "No space left on device", "/x"), 1, "tunesmith: error: No space left on device: '/x'\n"),
        (typer.BadParameter("must be even"), 2, "must be even"),
    ],
)
def test_an_error_is_one_line_and_a_code(
    verb: Verb, capsys: pytest.CaptureFixture[str], error: BaseException, code: int, line: str
) -> None:
    verb(_raise(error))
    assert main.run(["try"]) == code
    captured = capsys.readouterr()
    assert line in captured.err
    assert captured.err.count("\n") == 1
    assert captured.out == ""


def test_debug_shows_the_traceback(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(_raise(RecipeError("wrong")))
    assert main.run(["try", "--debug"]) == 2
    error = capsys.readouterr().err
    assert "Traceback (most recent call last)" in error
    assert error.endswith("tunesmith: error: wrong\n")


def test_json_is_the_last_line_also_of_an_error(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda: console.emit({"loss": float("nan"), "名": "商店"}))
    assert main.run(["--json", "try"]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"loss": None, "名": "商店"}
    verb(_raise(RecipeError("wrong")))
    assert main.run(["try", "--json"]) == 2
    assert json.loads(capsys.readouterr().out.splitlines()[-1]) == {"error": "wrong", "exit_code": 2}


def test_without_json_stdout_stays_silent(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    verb(lambda: console.emit({"a": 1}))
    assert main.run(["try"]) == 0
    assert capsys.readouterr().out == ""


def test_global_flags_after_two_dashes_belong_to_the_verb(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    seen: list[str] = []

    def collect(words: Annotated[list[str], typer.Argument()]) -> None:
        seen.extend(words)

    verb(collect)
    assert main.run(["try", "a", "--", "--debug"]) == 0
    assert seen == ["a", "--debug"]
    assert not console.is_debug()


@pytest.mark.parametrize("arguments", [["--no-such-option"], ["surplus"]])
def test_a_mistake_of_use_is_one_line_with_the_help_to_type(
    verb: Verb, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    verb(lambda: None)
    assert main.run(["try", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "see: tunesmith try --help" in error


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (["train", "m", "--dta", "f"], "there is no option --dta, did you mean '--data'?; see: tunesmith train --help"),
        (["train", "m", "-d", "f"], "did you mean '--data'?"),
        (["train", "m", "--methd", "lora"], "did you mean '--method'?"),
        (["train", "m", "--no-verfy"], "did you mean '--no-verify'?"),
        (["train", "m", "--jsno"], "did you mean '--json'?"),
        (["train", "m", "--epochs", "3"], "it is a key of the recipe: --set train.epochs=VALUE"),
        (["train", "m", "--lr", "3"], "--set train.learning_rate=VALUE"),
        (["train", "m", "--output", "d"], "there is no option --output; --run-dir DIRECTORY names"),
        (["train", "m", "-o", "d"], "--run-dir DIRECTORY"),
        (["chat", "m", "--promt", "hi"], "did you mean '--prompt'?"),
        (["demo", "--outptu", "x"], "did you mean '--output'?"),
        (["chat", "m", "--zzz"], "there is no option --zzz; see: tunesmith chat --help"),
    ],
)
def test_a_misspelt_option_names_the_nearest(
    arguments: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """--dta offered --data and --set, -d nothing at all, and --epochs nothing though --set train.epochs exists."""
    assert main.run(arguments) == 2
    error = capsys.readouterr().err
    assert hint in error
    assert error.count("\n") == 1


@pytest.mark.parametrize("arguments", [["try", "--help"], ["help", "try"]])
def test_a_verbs_help_tells_of_the_global_flags(
    verb: Verb, capsys: pytest.CaptureFixture[str], arguments: list[str]
) -> None:
    verb(lambda: None)
    assert main.run(arguments) == 0
    assert "--json" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "whole"),
    [
        (["serve"], ["--max-num-batched-tokens", "--gpu-memory-utilization", "--speculative-config", "8000"]),
        (["bench"], ["say who was faster on equal work.", "end to end, throughput, goodput, errors."]),
    ],
)
def test_help_cuts_nothing_in_a_narrow_terminal(
    arguments: list[str], whole: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """At 80 columns `tunesmith serve --help` said --max-num-batche… and --tensor-paralle…"""
    monkeypatch.setenv("COLUMNS", "80")
    assert main.run([*arguments, "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    assert [part for part in whole if part not in text] == []
    assert "…" not in text


def test_logs_go_to_stderr_and_debug_shows_more(verb: Verb, capsys: pytest.CaptureFixture[str]) -> None:
    def speak() -> None:
        logging.getLogger("tunesmith.somewhere").info("news [1/2]")
        logging.getLogger("another").warning("careful: %s", "long " * 40)
        logging.getLogger("tunesmith.somewhere").debug("detail")
        logging.getLogger("another").info("noise")

    verb(speak)
    assert main.run(["try"]) == 0
    captured = capsys.readouterr()
    # They were padded and broken at 80 characters, in the middle of paths, with "INFO" before each.
    assert captured.err == f"news [1/2]\nwarning: careful: {'long ' * 40}\n"
    assert "detail" not in captured.err
    assert "noise" not in captured.err
    assert captured.out == ""
    console._console.cache_clear()
    assert main.run(["try", "--debug"]) == 0
    assert "detail" in capsys.readouterr().err


def test_no_verb_imports_torch_before_it_is_called() -> None:
    """`tunesmith VERB --help` answers at once: what a verb needs it imports when it runs."""
    program = (
        "import importlib, sys; from tunesmith.cli.main import VERBS;"
        "heavy = {m: v for v, (name, _) in VERBS.items() if importlib.import_module(name)"
        " for m in ('torch', 'transformers', 'matplotlib', 'datasets') if m in sys.modules};"
        "print(heavy)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout.strip(), done.stderr) == ("{}", "")


@pytest.mark.parametrize(
    ("typed", "hint"),
    [
        (["bench", "run", "x.yaml"], "did you mean: tunesmith bench train; see"),
        (["bench", "peeers"], "did you mean: tunesmith bench peers; see"),
        (["recipe", "new"], "did you mean: tunesmith recipe init; see"),
        (
            ["bench", "zzz"],
            "there are: tunesmith bench train, tunesmith bench peers, tunesmith bench scale, tunesmith bench serve, "
            "tunesmith bench infer; see",
        ),
    ],
)
def test_a_wrong_subcommand_names_the_right_one(
    typed: list[str], hint: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """It was "No such command 'run'", and nothing else."""
    assert main.run(typed) == 2
    assert hint in capsys.readouterr().err
