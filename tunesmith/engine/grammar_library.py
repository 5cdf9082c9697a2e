"""llguidance behind one door: found or said to be missing, held to limits, its failures made a request's errors."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tunesmith.errors import RequestError

MAX_SPEC_BYTES = 256 * 1024


@dataclass(frozen=True)
class GrammarLimits:
    """What one grammar may cost.

    max_spec_bytes: of a schema, expression, grammar or all choices together.
    compile_s: from the request's arrival until its grammar is ready; a request that waits longer fails.
    read_s: for reading a specification, in a process that is ended then.
    cache_entries: compiled grammars that are kept, the least recently used go first.
    start_fuel, step_fuel: automaton work for the start and for one token. What a nested repetition spends on the start
        grows with it: (((a{100}){100}){100} took 0.13 s and 50 MB with this limit, 1.7 s and 240 MB with four times it.
    max_states: automaton states of one grammar (1 to 2 kB each).
    max_symbols: symbols of a grammar after expansion.
    """

    max_spec_bytes: int = MAX_SPEC_BYTES
    compile_s: float = 10.0
    read_s: float = 3.0
    cache_entries: int = 64
    start_fuel: int = 250_000
    step_fuel: int = 200_000
    max_states: int = 50_000
    max_symbols: int = 500_000


def library() -> Any:
    """The library. Raises: RequestError where it is missing."""
    try:
        from llguidance import _lib
    except ImportError:
        raise RequestError(
            "structured output needs llguidance, which is not installed: pip install llguidance"
        ) from None
    return _lib


def fuel(limits: GrammarLimits) -> Any:
    """The limits as the library takes them."""
    return library().LLParserLimits(
        initial_lexer_fuel=limits.start_fuel,
        step_lexer_fuel=limits.step_fuel,
        max_lexer_states=limits.max_states,
        max_grammar_size=limits.max_symbols,
        verbose_errors=False,
    )


@contextmanager
def panics_are_errors(kind: str) -> Iterator[None]:
    """Whatever the library raises is an error of the request alone; a panic of it is no `Exception`."""
    try:
        yield
    except RequestError:
        raise
    except BaseException as error:
        raise refused(kind, f"{type(error).__name__}: {error}") from None


def refused(kind: str, reason: str) -> RequestError:
    """What is said of a specification that can't be used."""
    if "NoExtension" in reason:
        reason = "no text fits it"
    what = kind.replace("_", " ").replace("json", "JSON")
    return RequestError(f"the structured output's {what} can't be used: {' '.join(reason.split())[:300]}")
