"""Grammars tried out in a process that can be ended: the library has no limit of time where it reads a specification.

    engine's thread --{"grammar": ...}--> child: validate --{"error": ...}--> engine's thread
                                            '-- too long: killed, and another is started for the next grammar

As `python -m tunesmith.engine.grammar_guard SECONDS` it is the child. It imports the library and nothing heavy, and
ends by itself: with its standard input, or when one grammar takes it SECONDS of processor time.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import weakref
from collections.abc import Mapping
from contextlib import suppress
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from tunesmith.engine.grammar_library import GrammarLimits, fuel, library
from tunesmith.errors import RequestError

START_S = 30.0


class GrammarGuard:
    """One child, started with the first grammar. Used by several threads, one after the other."""

    def __init__(self, limits: GrammarLimits) -> None:
        self.limits = limits
        self._child: subprocess.Popen[bytes] | None = None
        # Ends the child also where nobody closes the guard, and when Python ends.
        self._finalizer: weakref.finalize[Any, Any] | None = None
        self._lock = threading.Lock()

    def check(self, grammar: str) -> str:
        """What is wrong with a grammar (llguidance's form), "" for nothing.

        Raises: RequestError when it can't be read within `limits.read_s`.
        """
        with self._lock:
            child = self._running()
            try:
                return str(_ask(child, {"grammar": grammar}, self.limits.read_s)["error"])
            except (OSError, ValueError, TimeoutError):
                self._end()
                raise RequestError(
                    f"the structured output's grammar can't be read within {self.limits.read_s:g} s: make it simpler"
                ) from None

    def _running(self) -> subprocess.Popen[bytes]:
        if self._child is None or self._child.poll() is not None:
            command = [sys.executable, "-m", __name__, str(self.limits.read_s), json.dumps(vars(self.limits))]
            self._end()
            self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
            self._finalizer = weakref.finalize(self, _end_child, self._child)
            try:
                _ask(self._child, {"grammar": ""}, START_S)
            except (OSError, ValueError, TimeoutError):
                self._end()
                raise RequestError("structured output: the process that reads grammars can't be started") from None
        return self._child

    def close(self) -> None:
        """End the child."""
        with self._lock:
            self._end()

    def _end(self) -> None:
        self._child = None
        if self._finalizer is not None:
            self._finalizer()


def _end_child(child: subprocess.Popen[bytes]) -> None:
    child.kill()
    child.wait()
    for stream in (child.stdin, child.stdout):
        if stream is not None:
            with suppress(OSError):
                stream.close()


def _ask(child: subprocess.Popen[bytes], question: Mapping[str, Any], limit_s: float) -> Mapping[str, Any]:
    """One line of JSON there, one back. Raises: TimeoutError; OSError or ValueError from a child that has ended."""
    assert child.stdin is not None and child.stdout is not None
    child.stdin.write(json.dumps(question).encode() + b"\n")
    child.stdin.flush()
    with DefaultSelector() as selector:
        selector.register(child.stdout, EVENT_READ)
        if not selector.select(limit_s):
            raise TimeoutError
    answer: Mapping[str, Any] = json.loads(child.stdout.readline())
    return answer


def main(argv: list[str]) -> None:
    """The child."""
    limit_s, limits = float(argv[0]), fuel(GrammarLimits(**json.loads(argv[1])))
    matcher = library().LLMatcher
    for line in sys.stdin.buffer:
        _limit_processor(limit_s)
        grammar = json.loads(line)["grammar"]
        wrong, messages = matcher.validate_grammar_with_warnings(grammar, limits=limits) if grammar else (False, [])
        try:
            os.write(sys.stdout.fileno(), json.dumps({"error": messages[0] if wrong else ""}).encode() + b"\n")
        except BrokenPipeError:  # whoever asked has ended, and said why
            return


def _limit_processor(more_s: float) -> None:
    """The system ends this process after so many more seconds of work, also when nobody waits for it any more."""
    try:
        import resource
    except ImportError:  # not on Windows; there the parent alone ends it
        return
    used = resource.getrusage(resource.RUSAGE_SELF)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    resource.setrlimit(resource.RLIMIT_CPU, (int(used.ru_utime + used.ru_stime + more_s) + 2, hard))


if __name__ == "__main__":
    main(sys.argv[1:])
