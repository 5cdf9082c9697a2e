"""The server that is measured: one that is there already, or one that is started for the run and ended after it."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from tunesmith.errors import RecipeError, TunesmithError

LOG_LINES = 15
STOP_S = 20.0
PORT, MODEL = "{port}", "{model}"


@dataclass(frozen=True)
class Target:
    """A server that answers. url: without /v1. start_s: from its command to its first good answer; None: it was there.

    max_model_len, num_ids (of its vocabulary): by its /v1/models, where that says so. version: by its /version.
    """

    url: str
    model: str
    max_model_len: int | None
    version: str | None = None
    start_s: float | None = None
    command: str | None = None
    num_ids: int | None = None


def normal_url(url: str) -> str:
    """The server's root, whether or not /v1 was typed. Raises: RecipeError for what is no URL."""
    if not url.startswith(("http://", "https://")):
        raise RecipeError(f"--url must begin with http:// or https://, got {url!r}")
    return url.rstrip("/").removesuffix("/v1")


def serve_command(model: str, arguments: Sequence[str] = ()) -> list[str]:
    """The command line of tunesmith's own server for a model, {port} left open."""
    return [sys.executable, "-m", "tunesmith", "serve", model, "--port", PORT, *arguments]


def find_target(url: str, model: str | None = None, api_key: str | None = None) -> Target:
    """The server at `url`, and its model: the first of /v1/models unless named. Raises: TunesmithError."""
    try:
        listed = _get(f"{url}/v1/models", api_key)
    except (OSError, ValueError) as error:
        raise TunesmithError(
            f"{url} gives no list of models: {error}; is the server up, and the --api-key right?"
        ) from None
    models = [entry for entry in listed.get("data") or [] if isinstance(entry, dict)]
    entry = next((one for one in models if model in (None, one.get("id"))), None)
    if entry is None:
        names = ", ".join(str(one.get("id")) for one in models)
        raise TunesmithError(f"{url} has no model {model!r}; it has: {names or 'none'}")
    limit, ids = (
        value if isinstance(value, int) else None for value in map(entry.get, ("max_model_len", "vocab_size"))
    )
    return Target(url, str(entry["id"]), limit, _version(url, api_key), num_ids=ids)


def _version(url: str, api_key: str | None) -> str | None:
    with contextlib.suppress(OSError, ValueError):
        said = _get(f"{url}/version", api_key)
        return None if said.get("version") is None else str(said["version"])
    return None


def _get(url: str, api_key: str | None, body: bytes | None = None) -> dict[str, Any]:
    """The JSON that a GET answers, or a POST where there is a body."""
    headers = {"Content-Type": "application/json"} | ({} if api_key is None else {"Authorization": f"Bearer {api_key}"})
    with urllib.request.urlopen(urllib.request.Request(url, body, headers), timeout=60) as answer:
        return dict(json.load(answer))


@contextlib.contextmanager
def started(
    command: Sequence[str], *, log: Path, timeout_s: float, api_key: str | None = None, model: str | None = None
) -> Iterator[Target]:
    """Start a server, wait until it lists its models, and end it and all it started when done.

    Args: command: with {port} where the port goes. Raises: TunesmithError when it ends early, or is not up in time.
    """
    port = free_port()
    words = [word.replace(PORT, str(port)) for word in command]
    url, began = f"http://127.0.0.1:{port}", time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, start_new_session=True)
    try:
        _wait_until_up(process, url, api_key, log, timeout_s)
        found = find_target(url, model, api_key)
        _wait_until_it_answers(process, found, api_key, log, began + timeout_s)
        start_s = time.monotonic() - began
        yield replace(found, start_s=start_s, command=shlex.join(command))
    finally:
        stop(process)


def free_port() -> int:
    """A port of this machine that no one listens at."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _wait_until_up(
    process: subprocess.Popen[bytes], url: str, api_key: str | None, log: Path, timeout_s: float
) -> None:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if process.poll() is not None:
            raise TunesmithError(f"the server ended with code {process.returncode}; its last lines:\n{_tail(log)}")
        try:
            _get(f"{url}/v1/models", api_key)
            return
        except urllib.error.HTTPError as error:
            if error.code in (401, 403):
                raise TunesmithError(f"the server refuses the key ({error.code}): give its --api-key") from None
        except (OSError, ValueError):
            pass
        time.sleep(0.05)
    raise TunesmithError(f"the server was not up after {timeout_s:g} s; its last lines:\n{_tail(log)}")


def _wait_until_it_answers(
    process: subprocess.Popen[bytes], target: Target, api_key: str | None, log: Path, until: float
) -> None:
    """Ask for one token until there is one: a server may list its models while it still loads them."""
    body = json.dumps({"model": target.model, "prompt": "a", "max_tokens": 1}).encode()
    while time.monotonic() < until:
        if process.poll() is not None:
            raise TunesmithError(f"the server ended with code {process.returncode}; its last lines:\n{_tail(log)}")
        with contextlib.suppress(urllib.error.URLError, OSError):
            _get(f"{target.url}/v1/completions", api_key, body)
            return
        time.sleep(0.1)
    raise TunesmithError(f"the server did not answer in time; its last lines:\n{_tail(log)}")


def _tail(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES:])


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end, and end its whole group if it does not within a while."""
    with contextlib.suppress(ProcessLookupError):
        process.send_signal(signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
