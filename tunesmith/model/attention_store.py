"""Attention choices kept from one process to the next, a file for each GPU and version of torch, CUDA and driver.

    ~/.cache/tunesmith/attention/KEY.json     or below $XDG_CACHE_HOME

A cache that can't be read or written is no reason to stop: then every process measures for itself.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import RunDirError
from tunesmith.hardware import driver_version
from tunesmith.rundir.cache import user_cache
from tunesmith.rundir.io import read_json, write_json_atomic

Stored = tuple[str, dict[str, float]]
"""A kernel's name, and the milliseconds of all that it was chosen from."""


def stored_choice(shape: Mapping[str, Any], candidates: tuple[str, ...]) -> Stored | None:
    """What an earlier process chose for a shape from the same candidates, whose times it knows."""
    known: Any = _read(store_path()).get(_name(shape))
    try:
        kernel, times = known["kernel"], {str(name): float(value) for name, value in known["milliseconds"].items()}
        fits = known["candidates"] == list(candidates) and kernel in candidates and kernel in times
    except (AttributeError, KeyError, TypeError, ValueError):
        return None
    return (kernel, times) if fits else None


def store_choice(
    shape: Mapping[str, Any], candidates: tuple[str, ...], kernel: str, times: Mapping[str, float]
) -> None:
    """Keep a choice for the processes after this one, beside what others have kept meanwhile."""
    path = store_path()
    entry = {"candidates": list(candidates), "kernel": kernel, "milliseconds": dict(times)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, {**_read(path), _name(shape): entry})
    except (OSError, RunDirError):
        return


@cache
def store_path() -> Path:
    """The file of this machine's GPU and versions."""
    versions = [torch.__version__, torch.version.cuda, driver_version()]
    key = hashlib.sha256(json.dumps(versions).encode()).hexdigest()[:16]
    return user_cache("attention") / f"{key}.json"


def _name(shape: Mapping[str, Any]) -> str:
    return json.dumps(dict(shape), sort_keys=True)


def _read(path: Path) -> dict[str, Any]:
    try:
        found = read_json(path)
    except (OSError, RunDirError):
        return {}
    return found if isinstance(found, dict) else {}
