"""What a person types in `tunesmith chat`: lines as turns, Ctrl-C as a wish; and the end of an answer on a screen."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

from rich.text import Text

BLOCK = '"""'


def lines_of_stdin() -> Iterator[str]:
    """Lines of a pipe, their ends cut off."""
    return (line.rstrip("\r\n") for line in sys.stdin)


def read_turns(lines: Iterator[str]) -> Iterator[str]:
    """Messages and commands. A line that ends with a backslash goes on; lines of three quotes stand around a block."""
    gathered: list[str] = []
    in_block = False
    for line in lines:
        if line.strip() == BLOCK:
            in_block = not in_block
        elif in_block:
            gathered.append(line)
        elif line.endswith("\\"):
            gathered.append(line[:-1])
            continue
        else:
            gathered.append(line)
        if not in_block and gathered:
            turn = "\n".join(gathered).strip()
            gathered = []
            if turn:
                yield turn
    if gathered and (turn := "\n".join(gathered).strip()):
        yield turn


@contextlib.contextmanager
def interruptible() -> Iterator[Callable[[], bool]]:
    """Inside, the first Ctrl-C is only noted, for the loop to ask about; the second one interrupts.

    An exception in the middle of anything (a finaliser, the display's thread) may be swallowed there; a note is not.
    """
    seen: list[int] = []
    before = signal.getsignal(signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        if len(seen) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, note)
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


def typed_lines() -> Iterator[str]:
    """Lines from the terminal, with editing and history where readline exists."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            yield input("> ")
        except EOFError:
            sys.stderr.write("\n")
            return


def tail(text: str, width: int, height: int) -> str:
    """The end of `text` that fits a screen, so that a growing answer always shows its newest words."""
    rows = 0
    kept: list[str] = []
    for line in reversed(text[-width * height :].split("\n")):
        rows += max(1, -(-Text(line).cell_len // max(width, 1)))
        if rows > max(height, 1) and kept:
            break
        kept.append(line)
    return "\n".join(reversed(kept))
