"""Where a model lives: a directory, the embedded default, or the Hugging Face Hub."""

from __future__ import annotations

import re
from pathlib import Path

import tunesmith
from tunesmith.errors import ModelError, nearest
from tunesmith.recipe.schema import Recipe

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
# Never pickle: what may execute code is not even downloaded.
_HUB_FILES = [
    "*.safetensors",
    "*.safetensors.index.json",
    "*.json",
    "*.jinja",
    "tokenizer.model",
    "*.txt",
    "*.tiktoken",
]
BUILTIN = "builtin:"


def resolve_model(path: str, revision: str | None = None) -> Path:
    """The directory of a model: a path, `builtin:NAME`, or a Hub id such as `Qwen/Qwen2.5-0.5B` (downloaded once).

    A name that looks like a path (its folder is here, or it begins with runs/) is never looked up on the Hub, unless a
    revision says that it is one of the Hub's.

    Raises: ModelError when there is no such model, or it can't be downloaded.
    """
    if path.startswith(BUILTIN):
        return _builtin(path.removeprefix(BUILTIN))
    directory = Path(path).expanduser()
    if directory.exists():
        return _local(directory, revision)
    if _HUB_ID.fullmatch(path) and (revision is not None or not _is_path(directory)):
        return _download(path, revision)
    raise ModelError(
        f"there is no model or run directory {path!r}{_neighbours(directory)}: name a directory, {BUILTIN}tiny, or a "
        f"Hub id like org/name"
    )


def resolve_tokenizer(recipe: Recipe) -> Path:
    """The directory of a recipe's tokenizer: the model's, unless data.tokenizer names another. Raises: ModelError."""
    if recipe.data.tokenizer is not None:
        return resolve_model(recipe.data.tokenizer)
    return resolve_model(recipe.model.path, recipe.model.revision)


def _is_path(directory: Path) -> bool:
    return directory.parts[0] == "runs" or directory.parent.is_dir()


def _neighbours(directory: Path) -> str:
    """What is in the folder where `directory` was looked for: the nearest name, and the newest ones."""
    folder = directory.parent
    try:
        found = sorted(
            (p for p in folder.iterdir() if p.is_dir() and p.name[0] != "."), key=lambda p: -p.stat().st_mtime
        )
    except OSError:
        return ""
    names = [path.name for path in found]
    if not names or folder == Path():
        return nearest(directory.name, names)
    return f"{nearest(directory.name, names)} ({folder} holds {', '.join(names[:3])}{', ...' if names[3:] else ''})"


def _builtin(name: str) -> Path:
    root = Path(tunesmith.__file__).parent / "models"
    directory = root / name
    if (directory / "config.json").is_file() and directory.parent == root:
        return directory
    known = sorted(p.parent.name for p in root.glob("*/config.json"))
    raise ModelError(
        f"there is no embedded model {BUILTIN}{name}{nearest(BUILTIN + name, [BUILTIN + each for each in known])} "
        f"(embedded in this installation: {', '.join(known) or 'none'})"
    )


def _local(directory: Path, revision: str | None) -> Path:
    if not directory.is_dir():
        raise ModelError(f"{directory} is a file: name the directory that holds config.json and *.safetensors")
    if revision is not None:
        raise ModelError(f"model.revision {revision!r} goes with a Hub id; {directory} is a local directory")
    return directory


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_HUB_FILES))
    except LocalEntryNotFoundError as error:
        raise ModelError(
            f"{repo!r} is no local directory, it was not downloaded before, and it can't be had from the Hub: the Hub "
            f"can't be reached (or HF_HUB_OFFLINE is set). Check the connection, or download it elsewhere and name its "
            f"directory"
        ) from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"{repo!r} is no local directory, and it can't be had from the Hub: {reason}. "
            f"Check the name, or download it elsewhere and name its directory"
        ) from error
