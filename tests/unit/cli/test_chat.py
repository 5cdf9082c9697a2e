"""`tunesmith chat` on runs: what one talks with, and what it remembers."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from tunesmith.cli import chat_server, console, main
from tunesmith.cli.chat import describe_model, samples
from tunesmith.compress.merge import merge_to_directory
from tunesmith.compress.quantize import compress_to_directory
from tunesmith.engine.source import ModelSource
from tunesmith.rundir.layout import open_run
from tunesmith.train.run import train

Chat = Callable[..., tuple[dict[str, Any], str]]
TURN = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "me."}]
SAID = "learnt from single questions"


@pytest.fixture(scope="module")
def runs(tiny_model_dir: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two runs of one step: on conversations of one question, and with one that goes on."""
    folder = tmp_path_factory.mktemp("runs")
    made = {}
    for name, longest in (("single", 1), ("several", 2)):
        rows = [{"messages": TURN}] * 6 + [{"messages": TURN * longest}]
        data = folder / f"{name}.jsonl"
        data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        result = train(
            {
                "model": {"path": str(tiny_model_dir("qwen2", initializer_range=0.3)), "device": "cpu"},
                "method": {"kind": "lora", "rank": 2},
                "data": {"train": [str(data)], "max_length": 128, "validation_fraction": 0, "cache": False},
                "train": {"max_steps": 1, "micro_batch_tokens": 128},
                "log": {"trackers": []},
            },
            run_dir=folder / name,
            quiet=True,
        )
        made[name] = result.run_dir
    return made


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """The verb with lines on stdin: its JSON, and what it said on stderr."""

    def call(*arguments: object, stdin: str) -> tuple[dict[str, Any], str]:
        console._console.cache_clear()
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        options = ("--max-tokens", "4", "--temperature", "0", "--device", "cpu", "--json")
        code = main.run(["chat", *map(str, arguments), *options])
        out, err = capsys.readouterr()
        console._console.cache_clear()
        assert code == 0, err
        return json.loads(out.rstrip("\n").split("\n")[-1]), err

    return call


def test_the_run_knows_how_many_of_its_rows_went_on(runs: dict[str, Path]) -> None:
    assert open_run(runs["single"]).info().facts["data"] == {"conversations": 7, "multi_turn": 0}
    assert open_run(runs["several"]).info().facts["data"] == {"conversations": 7, "multi_turn": 1}


def test_a_run_of_single_questions_is_asked_each_alone_and_says_so(runs: dict[str, Path], chat: Chat) -> None:
    """The bug: a small model answered the second question with words of the first, and nothing said why."""
    found, err = chat(runs["single"], stdin="one\ntwo\none\n")
    first, second, third = found["answers"]
    assert first["prompt_tokens"] == second["prompt_tokens"] == third["prompt_tokens"]
    assert third["text"] == first["text"]
    assert found["history"] is False and len(found["messages"]) == 6
    assert err.count(SAID) == 1 and "/history on" in err


def test_what_is_made_of_such_a_run_is_asked_each_question_alone_too(
    runs: dict[str, Path], chat: Chat, tmp_path: Path
) -> None:
    """The bug: merged or compressed, the model saw all that was said before, and its second answers went wrong."""
    merge_to_directory(None, runs["single"] / "final", tmp_path / "merged", device="cpu")
    compress_to_directory(tmp_path / "merged", tmp_path / "small", "int8", device="cpu")
    for made in ("merged", "small"):
        found, err = chat(tmp_path / made, "--mode", "chat", stdin="one\ntwo\n")
        assert found["history"] is False and err.count(SAID) == 1, made
    merge_to_directory(None, runs["several"] / "final", tmp_path / "long", device="cpu")
    assert not (tmp_path / "long" / "tunesmith.json").exists()


@pytest.mark.parametrize(
    ("card", "options", "keeps"),
    [
        ({"single_turns": True}, [], False),
        ({"single_turns": True}, ["--history"], True),
        ({"single_turns": False}, [], True),
        ({}, [], True),  # another program's server
    ],
)
def test_a_server_says_that_its_model_learnt_from_single_questions(
    monkeypatch: pytest.MonkeyPatch, chat: Chat, card: dict[str, Any], options: list[str], keeps: bool
) -> None:
    """The bug: `chat --server` sent such a model all that was said before."""
    asked: list[list[Any]] = []

    def answer(request: httpx.Request) -> httpx.Response:
        if request.url.path == "/v1/models":
            return httpx.Response(200, json={"data": [{"id": "m", **card}]})
        if request.url.path == "/tokenize":
            return httpx.Response(404, json={})
        asked.append(json.loads(request.content)["messages"])
        delta = json.dumps({"choices": [{"delta": {"content": "yes"}, "finish_reason": "stop"}]})
        return httpx.Response(200, text=f"data: {delta}\n\ndata: [DONE]\n\n")

    client = partial(httpx.Client, transport=httpx.MockTransport(answer))
    monkeypatch.setattr(chat_server, "httpx", SimpleNamespace(**{**vars(httpx), "Client": client}))
    found, err = chat("--server", "http://there", *options, stdin="one\ntwo\n")
    assert [len(messages) for messages in asked] == [1, 3 if keeps else 1]
    assert found["history"] is keeps and err.count(SAID) == (0 if keeps else 1)


@pytest.mark.parametrize(
    ("name", "options", "stdin"),
    [
        ("single", ["--history"], "one\ntwo\n"),
        ("single", [], "one\n/history on\ntwo\n"),
        ("several", [], "one\ntwo\n"),
    ],
)
def test_history_is_kept_where_it_was_asked_for_or_learnt(
    runs: dict[str, Path], chat: Chat, name: str, options: list[str], stdin: str
) -> None:
    found, err = chat(runs[name], *options, stdin=stdin)
    first, second = found["answers"]
    assert second["prompt_tokens"] > first["prompt_tokens"] + 4
    assert found["history"] is True and SAID not in err


def test_history_can_be_off_for_any_model(runs: dict[str, Path], chat: Chat) -> None:
    found, err = chat(runs["several"], "--no-history", stdin="one\ntwo\n/history\n")
    assert found["answers"][0]["prompt_tokens"] == found["answers"][1]["prompt_tokens"]
    assert SAID not in err and "history off: every question stands alone" in err


def test_one_question_needs_no_word_about_history(runs: dict[str, Path], chat: Chat) -> None:
    assert SAID not in chat(runs["single"], stdin="one\n")[1]


def test_questions_that_stood_alone_are_saved_as_rows_of_their_own(
    runs: dict[str, Path], chat: Chat, tmp_path: Path
) -> None:
    saved = tmp_path / "talk.jsonl"
    found, _ = chat(runs["single"], "--system", "be kind", stdin=f"one\ntwo\n/save {saved}\n")
    head, *turns = found["messages"]
    rows = [json.loads(line)["messages"] for line in saved.read_text(encoding="utf-8").splitlines()]
    assert rows == [[head, *turns[:2]], [head, *turns[2:]]]


def test_what_one_talks_with_is_named(tmp_path: Path) -> None:
    """The bug: a run was greeted with "Chat with builtin:tiny."."""
    adapted = ModelSource("builtin:tiny", tmp_path / "final")
    assert describe_model("builtin:tiny", ModelSource("builtin:tiny")) == "builtin:tiny"
    assert describe_model("runs/a", adapted) == (
        f"runs/a (builtin:tiny with the adapter that the run trained, {tmp_path / 'final'})"
    )
    assert describe_model("builtin:tiny", adapted) == f"builtin:tiny with the adapter {tmp_path / 'final'}"
    assert describe_model("runs/a", ModelSource("runs/a/final")) == "runs/a (the whole model, runs/a/final)"


def test_a_model_whose_configuration_samples_nothing_answers_greedily(tiny_model_dir: Callable[..., Path]) -> None:
    """`builtin:tiny` writes characters that it never saw before fine-tuning wrongly where they are drawn by chance."""
    assert not samples(SimpleNamespace(source=ModelSource("builtin:tiny")))
    assert samples(SimpleNamespace(source=ModelSource(str(tiny_model_dir("qwen2")))))
    assert samples(SimpleNamespace(source=None))
