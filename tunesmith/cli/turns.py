"""What a person types in `tunesmith chat`: lines as turns, Ctrl-C as a wish; and the end of an answer on a screen."""

from __future__ import annotations

import contextlib
import signal
import sys
from collections.abc import Iterator
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


class Interrupts:
    """Ctrl-C in a conversation: noted whenever it comes, an exception only where something waits for it.

    An exception in the middle of anything (a finaliser, the display's thread, the line that tells of the last Ctrl-C)
    is swallowed there or ends the program; a note is neither.
    """

    def __init__(self) -> None:
        self.num_seen = 0
        self._patience: int | None = None

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.num_seen += 1
        if self.num_seen == self._patience:
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def noted(self, patience: int | None = None) -> Iterator[None]:
        """Inside, Ctrl-C is counted; the `patience`-th one is a KeyboardInterrupt too."""
        before = signal.signal(signal.SIGINT, self._note), self._patience
        self.num_seen, self._patience = 0, patience
        try:
            yield
        finally:
            self._patience = before[1]
            signal.signal(signal.SIGINT, before[0])

    @contextlib.contextmanager
    def raised(self) -> Iterator[None]:
        """Inside, Ctrl-C is a KeyboardInterrupt. By Python's own handler: `input` asks for signals once more while the
        first one's exception is on its way, and a handler that returns then is a SystemError."""
        before = signal.getsignal(signal.SIGINT)
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            yield
        finally:
            signal.signal(signal.SIGINT, before)


def typed_lines(interrupts: Interrupts) -> Iterator[str]:
    """Lines from the terminal, with editing and history where readline exists. Raises: KeyboardInterrupt."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() its line editing
    while True:
        try:
            with interrupts.raised():
                line = input("> ")
        except EOFError:
            sys.stderr.write("\n")
            return
        yield line


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
