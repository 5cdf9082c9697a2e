"""`tunesmith chat`: talk to a model in the terminal, from a pipe, or with one question."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown
from rich.text import Text

from tunesmith.cli.console import emit, err
from tunesmith.cli.turns import BLOCK, Interrupts, lines_of_stdin, read_turns, tail, typed_lines
from tunesmith.cli.unfinished import use_checkpoint
from tunesmith.errors import RequestError, TunesmithError, nearest
from tunesmith.rundir.io import read_json
from tunesmith.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from tunesmith.engine.conversation import Answer, Conversation, Mode
    from tunesmith.engine.llm import LLM
    from tunesmith.engine.request import Completion
    from tunesmith.engine.source import ModelSource

app = typer.Typer(add_completion=False)
MODES = ("auto", "chat", "complete")
TEMPERATURE = 0.7
ALIASES = {"/quit": "/exit", "/q": "/exit", "/?": "/help"}
ALONE = (
    "This model learnt from single questions, so each one is asked without what was said before "
    "(to keep it: --history, or type /history on)."
)


@app.command()
def chat(
    model: Annotated[str, typer.Argument(help="a model directory, builtin:tiny, a Hub id, or a run directory")] = "",
    server: Annotated[str | None, typer.Option(help="the URL of a server to talk to instead of loading MODEL")] = None,
    adapter: Annotated[Path | None, typer.Option(help="an adapter directory, put on top of the model")] = None,
    prompt: Annotated[str | None, typer.Option(help="ask this and leave; - reads all of stdin as one message")] = None,
    system: Annotated[str | None, typer.Option(help="the system message")] = None,
    history: Annotated[
        bool | None,
        typer.Option(
            help="answers see what was said before; by default, unless the model learnt single questions only"
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="auto, chat (use the chat template), complete (continue the text)")
    ] = "auto",
    temperature: Annotated[
        float | None,
        typer.Option(
            help="0 is greedy; by default 0.7, and 0 where the model's generation_config.json samples nothing"
        ),
    ] = None,
    top_p: Annotated[float, typer.Option(help="keep the likeliest tokens up to this share")] = 0.9,
    top_k: Annotated[int, typer.Option(help="keep the k likeliest tokens; 0: all")] = 0,
    repetition_penalty: Annotated[float, typer.Option(help="above 1: say less again")] = 1.0,
    max_tokens: Annotated[int | None, typer.Option(help="longest answer in tokens; by default 512")] = None,
    seed: Annotated[
        int | None, typer.Option(help="makes sampled answers reproducible; each question adds 1 to it")
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            "--quantization",
            help="hold the weights in int8, w8a8, int4 (-g128, -g64, -g32; -sym), nf4, nf4-double, fp8; else as stored",
        ),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="context in tokens; by default the model's")] = None,
) -> None:
    """Talk to a model. Ctrl-C stops an answer, Ctrl-D or /quit leaves; from a pipe every line is a turn.

    Exit codes: 0 all was answered, 1 a command from a pipe went wrong, 2 a mistake of use.
    """
    if mode not in MODES:
        raise RequestError(f"--mode must be auto, chat or complete, got {mode!r}{nearest(mode, MODES)}")
    if server is not None:
        from tunesmith.cli.chat_server import converse

        conversation, name, alone = converse(server, model or None, locals())
        talk = Talk(conversation, name, ALONE if alone else None)
    elif model:
        talk = _load(locals())
    else:
        raise RequestError("name a model (for instance builtin:tiny, or a run directory), or a server: --server URL")
    if prompt is not None:
        talk.answer(sys.stdin.read().strip() if prompt == "-" else prompt)
    elif sys.stdin.isatty():
        talk.interactive()
    else:
        talk.follow(read_turns(lines_of_stdin()))
    said = talk.conversation
    emit({"messages": said.messages(), "mode": said.mode, "history": said.history, "answers": talk.answers})
    if talk.num_mistakes and not sys.stdin.isatty():
        raise typer.Exit(1)


def _load(asked: dict[str, Any]) -> Talk:
    """A talk with a model that is loaded here. `asked`: the options of `chat`."""
    from tunesmith.engine.asked import Asked
    from tunesmith.engine.compiling import start_ahead

    model, temperature, history = asked["model"], asked["temperature"], asked["history"]
    loaded = {name: asked[name] for name in ("adapter", "quantize", "dtype", "device", "max_model_len")}
    use_checkpoint(model, asked["adapter"])
    start_ahead(Asked.of({"model": model, "max_num_seqs": 1, **loaded}))  # while torch is imported
    from tunesmith.engine.conversation import Conversation
    from tunesmith.engine.llm import LLM
    from tunesmith.engine.request import SamplingParams

    names = ("max_tokens", "top_p", "top_k", "repetition_penalty", "seed")
    params = SamplingParams(
        temperature=TEMPERATURE if temperature is None else temperature, **{name: asked[name] for name in names}
    )
    with err.status("loading the model") if err.is_terminal else contextlib.nullcontext():
        llm = LLM(model, max_num_seqs=1, **loaded)
    if temperature is None and not samples(llm):
        params = replace(params, temperature=0.0)
    chosen = choose_mode(llm, asked["mode"])
    alone = learnt_single_turns(llm) and chosen == "chat" and history is None
    keeps = not alone and history is not False
    conversation = Conversation(llm, params, asked["system"] or llm.system, chosen, history=keeps)
    return Talk(conversation, describe_model(model, llm.source), ALONE if alone else None)


def samples(llm: LLM) -> bool:
    """Whether answers are drawn by chance unless one says else: the model's own generation_config.json may say no."""
    if llm.source is None:
        return True
    from tunesmith.checkpoint.source import resolve_model

    file = resolve_model(llm.source.path, llm.source.revision) / "generation_config.json"
    config = read_json(file) if file.is_file() else {}
    return not isinstance(config, dict) or config.get("do_sample") is not False


def learnt_single_turns(llm: LLM) -> bool:
    """Whether the model was trained here, on conversations of one question each."""
    return llm.source is not None and llm.source.single_turns


def describe_model(asked: str, source: ModelSource | None) -> str:
    """What one talks with, in words: what was asked for, and what is loaded for it."""
    if source is None:
        return asked
    if source.adapter is None:
        return asked if asked == source.path else f"{asked} (the whole model, {source.path})"
    if asked == source.path:
        return f"{asked} with the adapter {source.adapter}"
    return f"{asked} ({source.path} with the adapter that the run trained, {source.adapter})"


def choose_mode(llm: LLM, wanted: str) -> Mode:
    """Chat where the model has a template of its own or was trained with one, else plain completion; says so."""
    if wanted == "complete" or (wanted == "auto" and not llm.has_chat_template):
        if wanted == "auto":
            err.print(
                "This model has no chat template of its own: it continues your text, without history "
                "(--mode chat uses its family's usual template).",
                style="yellow",
            )
        return "complete"
    return "chat"


class Talk:
    """The loop between a person (or a pipe) and a conversation. Answers go to stdout, all else to stderr."""

    def __init__(self, conversation: Conversation, name: str, note: str | None = None) -> None:
        self.conversation = conversation
        self.name = name
        self.note = note  # what a person has to know before the second question
        self.answers: list[dict[str, Any]] = []
        self.out = Console(highlight=False, soft_wrap=not sys.stdout.isatty())
        self.commands: dict[str, tuple[str, Callable[[str], None]]] = {
            "/help": ("this list", self._help),
            "/system": ("TEXT: set the system message and start anew; alone: show it", self._system),
            "/reset": ("forget what was said", self._reset),
            "/history": ("on or off: whether answers see what was said before; alone: show it", self._history),
            "/stats": ("speed of the last answer, and how full the context is", self._stats),
            "/save": ("FILE: the conversation as lines of JSON that `tunesmith train --data` reads", self._save),
            "/exit": ("leave (so do /quit and Ctrl-D)", self._exit),
        }
        self.left = False
        self.num_mistakes = 0
        self.interrupts = Interrupts()

    def interactive(self) -> None:
        """Read turns from the terminal until the person leaves."""
        err.print(
            f"Chat with {self.name}. /help lists the commands; \\ at a line's end, or {BLOCK} lines, for more lines.",
            markup=False,
        )
        self._say_note()
        with self.interrupts.noted():
            while not self.left:
                try:
                    for turn in read_turns(typed_lines(self.interrupts)):
                        self._take_safely(turn)
                        if self.left:
                            return
                    return
                except KeyboardInterrupt:
                    err.print("\n(Ctrl-D or /quit leaves)", style="dim")

    def follow(self, turns: Iterator[str]) -> None:
        """Take turns from a pipe. A command that goes wrong is told and counted, a question that does ends it."""
        for turn in turns:
            if turn.startswith("/"):
                self._take_safely(turn)
            else:
                self._take(turn)
            if self.left:
                return

    def _say_note(self) -> None:
        if self.note is not None:
            err.print(self.note, style="yellow", markup=False)
        self.note = None

    def _take_safely(self, turn: str) -> None:
        try:
            self._take(turn)
        except TunesmithError as error:
            err.print(f"error: {error}", style="red", markup=False)
            self.num_mistakes += 1

    def _take(self, turn: str) -> None:
        if not turn.startswith("/"):
            self.answer(turn)
            return
        name, _, rest = turn.partition(" ")
        name = ALIASES.get(name, name)
        if name not in self.commands:
            raise RequestError(f"there is no command {name}{nearest(name, self.commands)}; /help lists them")
        self.commands[name][1](rest.strip())

    def answer(self, text: str) -> None:
        """Say `text` and show the answer as it comes; Ctrl-C keeps what was said."""
        if self.answers:
            self._say_note()
        answer = self.conversation.say(text)
        if self.conversation.num_dropped:
            err.print(
                f"(the context of {self.conversation.llm.max_model_len} tokens is full: "
                f"the {self.conversation.num_dropped} oldest messages were dropped)",
                style="yellow",
            )
        interrupts = self.interrupts
        try:
            with interrupts.noted(patience=2):
                self._show(answer, lambda: bool(interrupts.num_seen))
        finally:
            answer.close()
        if interrupts.num_seen:
            if not sys.stdin.isatty():
                raise KeyboardInterrupt
            err.print("(stopped)", style="dim")
        self.answers.append(_facts(answer.text, self.conversation.last))

    def _show(self, answer: Answer, interrupted: Callable[[], bool]) -> None:
        pieces = takewhile(lambda _: not interrupted(), answer)
        if not self.out.is_terminal:
            for piece in pieces:
                sys.stdout.write(piece)
                sys.stdout.flush()
            sys.stdout.write("\n")
            sys.stdout.flush()
            return
        try:
            with Live(console=self.out, transient=True, refresh_per_second=12) as live:
                for _ in pieces:
                    live.update(Text(tail(answer.text, self.out.width, self.out.height - 2)))
        finally:
            self.out.print(Markdown(answer.text))

    def _help(self, rest: str) -> None:
        for name, (what, _) in self.commands.items():
            err.print(f"  {name:<9} {what}", markup=False)

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = rest
            self.conversation.reset()
        err.print(f"system: {self.conversation.system or '(none)'}", style="dim", markup=False)

    def _reset(self, rest: str) -> None:
        self.conversation.reset()
        err.print("(forgotten)", style="dim")

    def _history(self, rest: str) -> None:
        if rest not in ("", "on", "off"):
            raise RequestError(f"/history takes on or off, got {rest!r}{nearest(rest, ('on', 'off'))}")
        if rest:
            self.conversation.history, self.note = rest == "on", None
        seen = "the answers see what was said before" if self.conversation.history else "every question stands alone"
        err.print(f"(history {'on' if self.conversation.history else 'off'}: {seen})", style="dim")

    def _stats(self, rest: str) -> None:
        err.print(describe(self.conversation), style="dim", markup=False)

    def _save(self, rest: str) -> None:
        if not rest:
            raise RequestError("/save needs a file name, for instance: /save talk.jsonl")
        rows = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in self.conversation.rows())
        try:
            Path(rest).expanduser().write_text("".join(rows), encoding="utf-8")
        except OSError as error:
            raise RequestError(f"{rest} can't be written: {error.strerror}") from None
        err.print(f"(saved {len(self.conversation.turns)} messages to {rest})", style="dim", markup=False)

    def _exit(self, rest: str) -> None:
        self.left = True


def _facts(text: str, completion: Completion | None) -> dict[str, Any]:
    if completion is None:
        return {"text": text, "finish_reason": "abort"}
    return {
        "text": text,
        "finish_reason": completion.finish_reason,
        "prompt_tokens": completion.prompt_tokens,
        "completion_tokens": len(completion.token_ids),
        "timings": asdict(completion.timings),
    }


def describe(conversation: Conversation) -> str:
    """Speed of the last answer and the state of context and cache, for people."""
    llm, last = conversation.llm, conversation.last
    if last is None:
        return f"nothing said yet; the context holds {llm.max_model_len} tokens"
    timings, num_tokens = last.timings, len(last.token_ids)
    rate = "" if not timings.tpot_s else f", then {1 / timings.tpot_s:,.0f} tokens/s"
    lines = [
        f"last answer: {num_tokens} tokens in {format_seconds(timings.total_s)} "
        f"(first after {format_seconds(timings.ttft_s)}{rate}); finished: {last.finish_reason}",
        f"context: {last.prompt_tokens + num_tokens} of {llm.max_model_len} tokens",
    ]
    if (cache := getattr(llm.runner, "cache", None)) is not None:
        lines.append(
            f"KV cache: {format_bytes(cache.token_bytes)} a token, {format_bytes(cache.capacity_bytes)} allocated"
        )
    return "\n".join(lines)
