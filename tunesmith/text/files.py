"""What `data.train` names, as a list of sources: files, folders, built-in generators, Hub data sets."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tunesmith.errors import DataError
from tunesmith.text.near_paths import near_path_hint

ROW_SUFFIXES = (".json", ".jsonl", ".ndjson", ".txt", ".csv", ".tsv", ".parquet")
COMPRESSIONS = (".gz", ".xz", ".bz2")
_SKIPPED_NAMES = ("dataset_info.json",)
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(:[\w.-]+)?")


@dataclass(frozen=True)
class Source:
    """One file, generator or Hub data set. `name` is what messages call it."""

    kind: Literal["file", "builtin", "hub"]
    name: str
    path: Path | None = None

    @property
    def suffix(self) -> str:
        """The row format's suffix, without the compression's."""
        return split_suffixes(self.path or Path(self.name))[0]

    def fingerprint(self) -> str | None:
        """SHA-256 of the content; None where the content can't be told from outside (a Hub id)."""
        if self.kind == "hub":
            return None
        digest = hashlib.sha256(self.name.encode())
        files = [self.path] if self.path else sorted((Path(__file__).parent / "builtin").rglob("*.py"))
        for file in files:
            try:
                with file.open("rb") as stream:
                    digest.update(hashlib.file_digest(stream, "sha256").digest())
            except OSError as error:
                raise DataError(f"{file} can't be read: {error.strerror}") from None
        return digest.hexdigest()


def split_suffixes(path: Path) -> tuple[str, str]:
    """('.jsonl', '.gz') of x.jsonl.gz; ('.utf8', '') of x.utf8."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    if suffixes and suffixes[-1] in COMPRESSIONS:
        return (suffixes[-2] if len(suffixes) > 1 else ""), suffixes[-1]
    return (suffixes[-1] if suffixes else ""), ""


def find_sources(entries: Sequence[str]) -> list[Source]:
    """The sources of a recipe's entries, folders opened, each file once.

    Raises: DataError naming the entry that is none.
    """
    sources: list[Source] = []
    for entry in entries:
        sources += _sources_of(entry)
    seen: set[str] = set()
    return [s for s in sources if not (s.name in seen or seen.add(s.name))]  # type: ignore[func-returns-value]


def _sources_of(entry: str) -> list[Source]:
    if entry.startswith("builtin:"):
        return [Source("builtin", entry)]
    if not entry.strip():
        raise DataError("an entry of the data is empty: name a file, a folder, builtin:NAME, or a Hub id")
    path = Path(entry).expanduser()
    if path.is_dir():
        files = [p for p in sorted(path.rglob("*")) if _is_rows(p, path)]
        if not files:
            raise DataError(f"the folder {entry} holds no data files; looked for {', '.join(ROW_SUFFIXES)}")
        return [Source("file", str(file), file) for file in files]
    if path.exists() and not path.is_file():
        raise DataError(f"{entry} is a pipe or a device, not a file: data is read more than once; write it to a file")
    if path.exists():
        if split_suffixes(path)[0] not in ROW_SUFFIXES:
            raise DataError(
                f"{entry} has an unknown suffix; allowed: {', '.join(ROW_SUFFIXES)}, each also with "
                f"{', '.join(COMPRESSIONS)} after it (zip, zst and tar must be unpacked first)"
            )
        return [Source("file", entry, path)]
    if _HUB_ID.fullmatch(entry) and split_suffixes(path)[0] not in ROW_SUFFIXES:
        return [Source("hub", entry)]
    raise DataError(
        f"there is no file or folder {entry}{path_hint(entry)}; data may be files, folders, builtin:NAME, or Hub "
        f"ids (owner/name)"
    )


def path_hint(entry: str) -> str:
    """A hint ", did you mean ./data/shop.json?" for an entry that is no path of data, or the empty string."""
    return near_path_hint(entry, lambda file: split_suffixes(file)[0] in ROW_SUFFIXES)


def _is_rows(path: Path, folder: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.relative_to(folder).parts)
    return not hidden and path.is_file() and split_suffixes(path)[0] in ROW_SUFFIXES and path.name not in _SKIPPED_NAMES
