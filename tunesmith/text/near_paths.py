"""What was meant by the path of data that is not there."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

_LOOKED_AT = 2000  # names of a folder, at most


def near_path_hint(entry: str, is_data: Callable[[Path], bool]) -> str:
    """A hint ", did you mean ./data/shop.json?", or the empty string where nothing is near.

    Args: is_data: whether a file may be meant; folders always may.
    """
    path = Path(entry).expanduser()
    found = _mended(path, is_data) or _elsewhere(path.name, is_data)
    if found is None:
        return ""
    return f", did you mean {'' if found.is_absolute() else './'}{found}?"


def _mended(path: Path, is_data: Callable[[Path], bool]) -> Path | None:
    """The path with each part that is not there replaced by the nearest name in its folder."""
    at = Path(path.anchor)
    parts = path.parts[1:] if path.anchor else path.parts
    for i, part in enumerate(parts):
        if (at / part).exists():
            at /= part
            continue
        last = i == len(parts) - 1
        near = _nearest(part, [p.name for p in _children(at) if (is_data(p) if last and p.is_file() else p.is_dir())])
        if near is None:
            return None
        at /= near
    return at if path.parts else None


def _elsewhere(name: str, is_data: Callable[[Path], bool]) -> Path | None:
    """A file of just this name in the current folder, or in a folder of it."""
    here = Path()
    folders = [here, *(p for p in _children(here) if p.is_dir() and not p.name.startswith("."))]
    found = [folder / name for folder in folders if (folder / name).is_file() and is_data(folder / name)]
    return found[0] if found else None


def _nearest(name: str, names: list[str]) -> str | None:
    """The nearest name, where case, and of a file what follows its first point, count little."""
    folded = {other.casefold(): other for other in names}
    close = difflib.get_close_matches(name.casefold(), folded, n=1, cutoff=0.7)
    if close:
        return folded[close[0]]
    stem = name.casefold().partition(".")[0]
    same = [other for key, other in folded.items() if stem and key.partition(".")[0] == stem]
    return same[0] if len(same) == 1 else None


def _children(folder: Path) -> Iterator[Path]:
    try:
        yield from sorted(islice(folder.iterdir(), _LOOKED_AT))
    except OSError:
        return
