"""`tunesmith chat` and `tunesmith eval` as a person or a script uses them."""

from __future__ import annotations

import contextlib
import io
import json
import os
import pty
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.cli import main
from tunesmith.kernels import cpu_compile, cpu_library

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("qwen2", initializer_range=0.3)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """The command line in this process (a fresh one imports torch for seconds)."""

    def call(*arguments: object, stdin: str = "") -> tuple[int, str, str]:
        from tunesmith.cli import console

        console._console.cache_clear()
        monkeypatch.setenv("COLUMNS", "200")
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        code = main.run([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        console._console.cache_clear()
        return code, captured.out, captured.err

    return call


def last_json(out: str) -> dict:
    return json.loads(out.rstrip("\n").split("\n")[-1])


def test_one_question_from_the_command_line(run: Run, model_dir: Path) -> None:
    options = ("--prompt", "你好", "--max-tokens", 8, "--temperature", 0)
    code, out, err = run("chat", model_dir, *options, "--json")
    assert code == 0, err
    result = last_json(out)
    assert [m["role"] for m in result["messages"]] == ["user", "assistant"]
    assert result["messages"][0]["content"] == "你好"
    assert result["answers"][0]["completion_tokens"] <= 8
    assert out.startswith(result["messages"][1]["content"])
    again = run("chat", model_dir, "--prompt", "-", *options[2:], stdin="你好\n")
    assert again[1] == out.split("\n{")[0] + "\n"


@pytest.mark.parametrize("has_compiler", [True, False])
def test_the_compiled_step_answers_by_default(
    has_compiler: bool,
    run: Run,
    model_dir: Path,
    kernel_cache: Path,
    compiled_library: object,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And says what torch says in float32. Without a compiler there is one line, and torch."""
    arguments = ("chat", model_dir, "--prompt", "你好", "--max-tokens", 12, "--temperature", 0)
    monkeypatch.setenv(cpu_library.SWITCH, "0")
    cpu_library.load.cache_clear()
    plain = run(*arguments)
    assert cpu_library.load() is None
    monkeypatch.delenv(cpu_library.SWITCH)
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache if has_compiler else tmp_path))
    if not has_compiler:
        monkeypatch.setattr(cpu_compile, "find_compiler", lambda: None)
    cpu_library.load.cache_clear()
    try:
        code, out, err = run(*arguments)
        assert (cpu_library.load() is not None) == has_compiler
    finally:
        cpu_library.load.cache_clear()
    assert (code, out) == plain[:2]
    assert " ".join(err.split()).count("go through torch") == (not has_compiler)


def test_a_piped_conversation_with_commands(run: Run, model_dir: Path, tmp_path: Path) -> None:
    saved = tmp_path / "对话.jsonl"
    turns = ["first\\", "line two", '"""', "a block", "", "of lines", '"""']
    commands = ["/stats", f"/save {saved}", "/help", "/quit", "never asked"]
    script = "\n".join(["/system 回答要短", *turns, *commands, ""])
    code, out, err = run("chat", model_dir, "--max-tokens", 5, "--seed", 1, "--json", stdin=script)
    assert code == 0, err
    messages = last_json(out)["messages"]
    assert [m["role"] for m in messages] == ["system", "user", "assistant", "user", "assistant"]
    assert messages[0]["content"] == "回答要短"
    assert messages[1]["content"] == "first\nline two"
    assert messages[3]["content"] == "a block\n\nof lines"
    assert json.loads(saved.read_text(encoding="utf-8"))["messages"] == messages
    assert "last answer: " in err and "KV cache: " in err
    assert all(command in err for command in ("/system", "/reset", "/stats", "/save", "/exit", "/quit"))


def test_resetting_forgets(run: Run, model_dir: Path) -> None:
    code, out, _ = run("chat", model_dir, "--max-tokens", 3, "--json", stdin="one\n/reset\ntwo\n")
    assert code == 0
    assert [m["content"] for m in last_json(out)["messages"] if m["role"] == "user"] == ["two"]


def test_mistakes_are_one_line_and_exit_2(run: Run, model_dir: Path) -> None:
    code, out, err = run("chat", model_dir, "--max-tokens", 2, "--json", stdin="/rest\none\n")
    assert code == 1 and len(last_json(out)["answers"]) == 1, "a mistyped command ended the session"
    assert "no command /rest, did you mean '/reset'?" in err
    assert run("chat", model_dir, "--mode", "chatt", "--prompt", "x")[0] == 2
    assert run("chat", model_dir, "--temperature", -1, "--prompt", "x")[0] == 2
    assert run("chat", model_dir / "absent", "--prompt", "x")[0] == 2
    code, _, err = run("chat", model_dir, "--prompt", "x" * 600)
    assert code == 2 and "shorten it" in err


def test_dropped_turns_are_said(run: Run, model_dir: Path) -> None:
    turns = "".join(f"message {i}\n" for i in range(4))
    code, _, err = run("chat", model_dir, "--max-tokens", 20, "--max-model-len", 120, "--temperature", 0, stdin=turns)
    assert code == 0
    assert "oldest messages were dropped" in err


def test_a_base_model_completes_and_says_so(run: Run, data_dir: Path) -> None:
    model = data_dir / "weights_stories260K" / "hf"
    code, out, err = run("chat", model, "--prompt", "Once upon a time", "--max-tokens", 10, "--temperature", 0)
    assert code == 0
    assert out.startswith(", there was a little girl named Lily")
    assert "no chat template of its own" in err


def test_eval_prints_for_people_and_programs(run: Run, model_dir: Path, tmp_path: Path) -> None:
    text, questions = tmp_path / "文本.jsonl", tmp_path / "questions.jsonl"
    text.write_text(json.dumps({"text": "some words to measure"}) + "\n", encoding="utf-8")
    questions.write_text(json.dumps({"question": "6 x 7?", "answer": "so it is\n#### 42"}) + "\n", encoding="utf-8")
    options = ("--data", text, "--questions", questions, "--max-new-tokens", 4, "--device", "cpu")
    code, out, err = run("eval", model_dir, *options, "--json")
    assert code == 0, err
    result = last_json(out)
    assert result["perplexity"]["perplexity"] > 1
    assert result["accuracy"]["comparison"] == "number"
    assert result["accuracy"]["num_questions"] == 1
    assert "perplexity" in err and "95 % interval" in err
    assert run("eval", model_dir)[0] == 2


class Terminal:
    """The command line in a pseudo-terminal."""

    def __init__(self, *arguments: object, cwd: Path) -> None:
        self.master, slave = pty.openpty()
        command = [str(Path(sys.executable).with_name("tunesmith")), *map(str, arguments)]
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40", "PYTHONUTF8": "1"}
        # Tests that a shell started in the background ignore Ctrl-C, and so would what they start.
        before = signal.signal(signal.SIGINT, signal.default_int_handler)
        self.process = subprocess.Popen(
            command, stdin=slave, stdout=slave, stderr=slave, cwd=cwd, env=environment, start_new_session=True
        )
        signal.signal(signal.SIGINT, before)
        os.close(slave)
        self.screen = ""

    def wait_for(self, pattern: str, timeout_s: float = 40) -> str:
        """Everything shown up to `pattern`, which is taken off."""
        deadline = time.monotonic() + timeout_s
        while not (found := re.search(pattern, self.screen)):
            if time.monotonic() > deadline or not self._read(1.0):
                raise AssertionError(f"{pattern!r} did not come; the screen shows:\n{self.screen[-2000:]}")
        before, self.screen = self.screen[: found.end()], self.screen[found.end() :]
        return before

    def _read(self, timeout_s: float) -> bool:
        if not select.select([self.master], [], [], timeout_s)[0]:
            return self.process.poll() is None
        try:
            self.screen += os.read(self.master, 65536).decode("utf-8", errors="replace")
        except OSError:
            return False
        return True

    def interrupt_until(self, pattern: str) -> None:
        """Press Ctrl-C, again and again as a person does: one between readline's waits is noticed at the next key."""
        for _ in range(20):
            os.kill(self.process.pid, signal.SIGINT)
            with contextlib.suppress(AssertionError):
                self.wait_for(pattern, timeout_s=2)
                return
            if (code := self.process.poll()) is not None:
                raise AssertionError(f"the chat ended with {code} at Ctrl-C; the screen shows:\n{self.screen[-2000:]}")
            self.type("\x01")  # to the line's beginning: a key that changes nothing
        raise AssertionError(f"{pattern!r} did not come after twenty times Ctrl-C:\n{self.screen[-2000:]}")

    def end_of_input(self) -> int:
        """Press Ctrl-D until the program ends: it means the end of input only once readline listens. Its exit code."""
        for _ in range(20):
            self.type("\x04")
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(3)
        raise AssertionError(f"it did not end; the screen shows:\n{self.screen[-2000:]}")

    def type(self, text: str) -> None:
        os.write(self.master, text.encode())

    def close(self) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.master)


def test_a_person_chats_and_stops_an_answer(tiny_model_dir: Callable[..., Path], tmp_path: Path) -> None:
    """Ctrl-C stops the answer, not the chat; Ctrl-C at the prompt is no exit either; Ctrl-D leaves.

    The model's greedy answer goes round in circles for ever, so there is an answer to stop.
    """
    slow = tiny_model_dir("qwen2", initializer_range=0.3, max_position_embeddings=200_000, eos_token_id=None)
    terminal = Terminal("chat", slow, "--max-tokens", 100_000, "--temperature", 0, cwd=tmp_path)
    try:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("> ")
        terminal.type("你好\n")
        terminal.wait_for(r"你好\s+(\x1b\[[0-9;?]*[a-zA-Z]|\s)*[^\s\x1b]")  # the answer has begun
        os.kill(terminal.process.pid, signal.SIGINT)
        terminal.wait_for(r"\(stopped\)")
        terminal.wait_for("> ")
        terminal.type("/stats\n")
        terminal.wait_for("KV cache|nothing said yet")
        terminal.wait_for("> ")
        terminal.interrupt_until("Ctrl-D or /quit leaves")
        terminal.wait_for("> ")
        terminal.type("/nothing\n")
        terminal.wait_for("there is no command /nothing")
        terminal.wait_for("> ")
        assert terminal.end_of_input() == 0
    finally:
        terminal.close()
