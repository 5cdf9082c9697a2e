"""How log records look to people: a line each, as long as it is."""

from __future__ import annotations

import logging

from tunesmith.cli import console


class LogLines(logging.Handler):
    """Prints a record as one line on stderr, never wrapped: news as they are, warnings and errors with their level."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print `record`."""
        try:
            is_news = record.levelno <= logging.INFO
            line = self.format(record)
            style = "dim" if is_news else "yellow" if record.levelno < logging.ERROR else "red"
            console.err.print(
                line if is_news else f"{record.levelname.lower()}: {line}", style=style, markup=False, soft_wrap=True
            )
        except Exception:  # as the standard handlers do: a log line must not end what it tells of
            self.handleError(record)
