"""How a runner talks: one JSON job on stdin, JSON lines on stdout, everything else on stderr.

    {"event": "step", "seconds": s, "loss": l, "grad_norm": n}      after every step, warm-up included
    {"event": "done", ...}                                          what else was measured
    {"event": "failed", "status": "missing" | "failed" | "out_of_memory" | "not_applicable", "reason": one line}

Libraries print what they like: file descriptor 1 is given to stderr before any of them is imported.
"""

from __future__ import annotations

import importlib.util
import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib import metadata
from typing import Any, TextIO

from tunesmith.errors import is_out_of_memory
from tunesmith.rundir.io import jsonable

Say = Callable[[Mapping[str, Any]], None]
PACKAGES = (
    "torch", "triton", "transformers", "peft", "accelerate", "bitsandbytes", "liger-kernel", "unsloth", "unsloth_zoo",
    "trl", "flash-attn",
)  # fmt: skip


class MissingPeerError(Exception):
    """A package that the peer needs is not there."""


class NotApplicableError(Exception):
    """The peer has no such row."""


def require(module: str, package: str) -> None:
    """Raise MissingPeerError unless `module` can be found."""
    if importlib.util.find_spec(module) is None:
        raise MissingPeerError(
            f"{package} is not installed: pip install {package}, or name its folder with --peer-path"
        )


def serve(run: Callable[[Mapping[str, Any], Say], Mapping[str, Any]]) -> None:
    """Read the job, run it, say what came out. Exits with 0 whenever it could say so."""
    with _protocol() as lines:

        def say(message: Mapping[str, Any]) -> None:
            lines.write(json.dumps(jsonable(message)) + "\n")
            lines.flush()

        job = json.loads(sys.stdin.read())
        try:
            result = run(job, say)
        except BaseException as error:
            traceback.print_exc()
            status, reason = explain(error)
            say({"event": "failed", "status": status, "reason": reason})
        else:
            say({"event": "done", **result, "versions": versions()})


def _protocol() -> TextIO:
    """The real stdout; whatever prints from now on prints to stderr."""
    kept = os.dup(1)
    os.dup2(2, 1)
    return os.fdopen(kept, "w", encoding="utf-8")


def explain(error: BaseException) -> tuple[str, str]:
    """The status of a runner that ended with `error`, and the reason in one line."""
    text = " ".join(str(error).split())[:300] or "no message"
    if isinstance(error, MissingPeerError):
        return "missing", text
    if isinstance(error, NotApplicableError):
        return "not_applicable", text
    if is_out_of_memory(error):
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
