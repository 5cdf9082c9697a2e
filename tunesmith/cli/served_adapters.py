"""The adapters that `tunesmith serve` loads at start: NAME=DIRECTORY, checked before anything else is loaded."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tunesmith.errors import RequestError
from tunesmith.rundir.layout import is_run

Modules = tuple[tuple[str, str], ...]
_HOW = {"--lora-modules": "NAME=DIRECTORY", "--follow-lora": "NAME=RUN"}


def check_modules(loaded: Sequence[str], followed: Sequence[str], names: Sequence[str]) -> tuple[Modules, Modules]:
    """Names and directories of `--lora-modules`, and of `--follow-lora`.

    Args: `names`: what the model itself is called.
    Raises: RequestError for what is no NAME=DIRECTORY, a name that is taken, a directory that isn't there, and one to
        follow that is no run.
    """
    taken = set(names)
    both = []
    for option, given in (("--lora-modules", loaded), ("--follow-lora", followed)):
        both.append(tuple(_module(option, text) for text in given))
        for name, path in both[-1]:
            if name in taken:
                raise RequestError(
                    f"{option} {name}={path}: there is a model called {name!r} already; take another name"
                )
            taken.add(name)
    for name, path in both[1]:
        if not is_run(Path(path).expanduser()):
            raise RequestError(
                f"--follow-lora {name}={path}: that is no run directory of tunesmith train, and only those can be "
                f"followed; an adapter that is finished is loaded by --lora-modules {name}={path}"
            )
    return both[0], both[1]


def _module(option: str, text: str) -> tuple[str, str]:
    name, equals, path = text.partition("=")
    if not (name and equals and path):
        raise RequestError(f"{option} wants {_HOW[option]}, got {text!r}")
    if not Path(path).expanduser().is_dir():
        raise RequestError(f"{option} {text}: there is no directory {path}")
    return name, path
