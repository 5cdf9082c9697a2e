"""From a specification to a grammar over the tokenizer's tokens, by llguidance, off the engine's loop.

    spec --grammar_text--> llguidance's grammar --a thread--> MatcherGrammar (cached) --copy--> a request's state

llguidance walks the tokenizer's trie with a lazily built automaton, so nothing is precomputed for the whole
vocabulary: a schema compiles in about a millisecond, and what a hostile one may spend is bounded by fuel.
"""

from __future__ import annotations

import os
import threading
import time
from collections import OrderedDict
from collections.abc import Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from functools import cache
from typing import Any

import numpy as np

from tunesmith.engine.grammar_guard import GrammarGuard
from tunesmith.engine.grammar_library import GrammarLimits, fuel, library, panics_are_errors, refused
from tunesmith.engine.grammar_text import grammar_text
from tunesmith.engine.interfaces import GrammarState
from tunesmith.engine.request import StructuredSpec
from tunesmith.engine.structured import check_spec, mask_words
from tunesmith.errors import RequestError
from tunesmith.text.tokenizer import Tokenizer

# From here on the library's threads are worth their waking.
PARALLEL_STATES = 4


class MatcherState:
    """One answer's place in its grammar (`interfaces.GrammarState`, and `rollback`). Used by one thread at a time.

    Stop tokens are the engine's: they are allowed where the grammar may end, and only there.
    """

    def __init__(self, matcher: Any, stop_ids: tuple[int, ...]) -> None:
        self.matcher = matcher
        self._stop_ids = stop_ids
        self.has_stopped = False

    @property
    def is_finished(self) -> bool:
        """Whether a stop token was taken, or nothing else may follow."""
        return self.has_stopped or (self.matcher.is_stopped() and not self.matcher.is_error())

    @property
    def may_end(self) -> bool:
        """Whether what was accepted so far is a whole answer."""
        return self.has_stopped or self.matcher.is_accepting()

    def mask_into(self, bitmask_row: np.ndarray) -> None:
        """Write which tokens may come next.

        Args: `bitmask_row`: int32, contiguous, ceil(V / 32) long.
        Raises: RequestError when the grammar became too complex to follow: the request can't go on.
        """
        if self.has_stopped:
            bitmask_row.fill(0)
        else:
            with panics_are_errors("grammar"):
                self.matcher.unsafe_compute_mask_ptr(bitmask_row.ctypes.data, bitmask_row.nbytes)
        self.finish_mask(bitmask_row)

    def finish_mask(self, bitmask_row: np.ndarray) -> None:
        """The part of `mask_into` that is left when the library has written the row already."""
        if self.matcher.is_error():
            raise _too_complex(self.matcher)
        self._set_stops(bitmask_row)

    def _set_stops(self, bitmask_row: np.ndarray) -> None:
        words = bitmask_row.view(np.uint32)
        allowed = self.may_end
        for token in self._stop_ids:
            word, bit = token >> 5, 1 << (token & 31)
            words[word] = int(words[word]) | bit if allowed else int(words[word]) & ~bit

    def accept(self, token: int) -> bool:
        """Go on by one token; False, and no change, when the grammar doesn't allow it."""
        if self.has_stopped:
            return False
        if token in self._stop_ids:
            self.has_stopped = self.matcher.is_accepting()
            return self.has_stopped
        return self.matcher.try_consume_tokens([token]) == 1

    def rollback(self, num_tokens: int) -> None:
        """Take the last accepted tokens back."""
        if num_tokens and self.has_stopped:
            self.has_stopped = False
            num_tokens -= 1
        if num_tokens:
            self.matcher.rollback(num_tokens)

    def forced(self) -> list[int]:
        """Tokens that must come next, if any: drafts that a speculative step need not guess."""
        return [] if self.has_stopped else list(self.matcher.compute_ff_tokens())


def fill_masks(states: Sequence[tuple[int, GrammarState]], masks: np.ndarray) -> list[tuple[int, Exception]]:
    """Write the rows of all states, several at a time; what went wrong, by row. A row that failed allows everything.

    Args: `masks`: int32 [rows, ceil(V / 32)], contiguous.
    """
    together = [(row, s) for row, s in states if isinstance(s, MatcherState) and not s.has_stopped]
    done: set[int] = set()
    if len(together) >= PARALLEL_STATES:
        pairs = [(state.matcher, row) for row, state in together]
        with suppress(RequestError), panics_are_errors("grammar"):
            _executor().unsafe_compute_mask_ptr(pairs, masks.ctypes.data, masks.strides[0], len(masks))
            done = {row for row, _ in together}
    failed: list[tuple[int, Exception]] = []
    for row, state in states:
        try:
            if row in done and isinstance(state, MatcherState):
                state.finish_mask(masks[row])
            else:
                state.mask_into(masks[row])
        except Exception as error:
            masks[row] = -1
            failed.append((row, error))
    return failed


@cache
def _executor() -> Any:
    """The library's threads, half of the cores and 8 at most: tokens are also drawn, sent and tokenised meanwhile."""
    return library().LLExecutor(max(1, min(8, (os.cpu_count() or 1) // 2)))


class MatcherGrammar:
    """A compiled grammar: a matcher at its start, copied for each request (about a microsecond)."""

    def __init__(self, matcher: Any, stop_ids: tuple[int, ...], warnings: tuple[str, ...] = ()) -> None:
        self.matcher = matcher
        self._stop_ids = stop_ids
        self.warnings = warnings

    def state(self) -> MatcherState:
        """A fresh start."""
        return MatcherState(self.matcher.deep_copy(), self._stop_ids)


class PendingGrammar:
    """A grammar that is being compiled. `is_ready` never blocks."""

    def __init__(self, future: Future[MatcherGrammar], limit_s: float) -> None:
        self._future = future
        self._limit_s = limit_s
        self._started_s = time.monotonic()

    @property
    def is_ready(self) -> bool:
        """Whether `grammar` would answer (or raise) at once."""
        return self._future.done() or time.monotonic() - self._started_s > self._limit_s

    def grammar(self) -> MatcherGrammar:
        """The grammar, waiting for it up to the limit. Raises: RequestError when it is wrong or took too long."""
        left_s = self._limit_s - (time.monotonic() - self._started_s)
        try:
            return self._future.result(max(0.0, left_s))
        except TimeoutError:
            raise RequestError(
                f"the structured output's grammar was not compiled within {self._limit_s:g} s: make it simpler"
            ) from None


class GrammarCompiler:
    """Compiles specifications for one tokenizer and vocabulary, and keeps what it compiled.

    Args:
        vocab_size: the width of the logits; ids beyond the tokenizer's are never allowed.
        stop_ids: what ends an answer; allowed only where the grammar may end.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        stop_ids: Collection[int] = (),
        *,
        limits: GrammarLimits | None = None,
        max_threads: int = 2,
    ) -> None:
        self.tokenizer = tokenizer
        self.vocab_size = vocab_size
        self.stop_ids = tuple(sorted(token for token in stop_ids if token < vocab_size))
        self.limits = limits or GrammarLimits()
        self._pool = ThreadPoolExecutor(max_threads, thread_name_prefix="grammar")
        self._cache: OrderedDict[StructuredSpec, Future[MatcherGrammar]] = OrderedDict()
        self._lock = threading.Lock()
        self._trie_lock = threading.Lock()
        self._trie: Any = None
        self._guard = GrammarGuard(self.limits)

    @property
    def num_mask_words(self) -> int:
        """int32 words of a mask row."""
        return mask_words(self.vocab_size)

    def compile(self, spec: StructuredSpec) -> MatcherGrammar:
        """The grammar, waiting for it. Raises: RequestError."""
        return self.submit(spec).grammar()

    def submit(self, spec: StructuredSpec) -> PendingGrammar:
        """Begin compiling in a thread, or find what is there. Raises: RequestError for what is malformed."""
        check_spec(spec, max_bytes=self.limits.max_spec_bytes)
        with self._lock:
            future = self._cache.get(spec)
            if future is None or (future.done() and future.exception() is not None):
                future = self._cache[spec] = self._pool.submit(self._compile, spec)
            self._cache.move_to_end(spec)
            while len(self._cache) > self.limits.cache_entries:
                self._cache.popitem(last=False)
        return PendingGrammar(future, self.limits.compile_s)

    def warm_up(self) -> None:
        """Begin reading the vocabulary (a second for 150,000 tokens), and start the guard, before a request comes."""
        self.submit(StructuredSpec("json_object"))

    def close(self) -> None:
        """End the threads; what waits is dropped."""
        self._guard.close()
        self._pool.shutdown(wait=False, cancel_futures=True)

    def _compile(self, spec: StructuredSpec) -> MatcherGrammar:
        with panics_are_errors(spec.kind):
            text = grammar_text(spec)
            if reason := self._guard.check(text):
                raise refused(spec.kind, reason)
            matcher = library().LLMatcher(self._tokens(), text, log_level=0, limits=fuel(self.limits))
            reason = matcher.get_error() if matcher.is_error() else _try_out(matcher.deep_copy(), self.num_mask_words)
            if reason:
                raise refused(spec.kind, reason)
            return MatcherGrammar(matcher, self.stop_ids, tuple(matcher.get_grammar_warnings()))

    def _tokens(self) -> Any:
        """The vocabulary as llguidance's trie."""
        with self._trie_lock:
            if self._trie is None:
                self._trie = _read_vocabulary(self.tokenizer, self.vocab_size, self.stop_ids)
            return self._trie


class RequestGrammars:
    """The grammars of an engine's requests (`interfaces.Grammars`)."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self._pending: dict[int, PendingGrammar] = {}

    def submit(self, request_id: int, spec: StructuredSpec) -> None:
        """Begin to compile. Raises: RequestError for what is malformed."""
        self._pending[request_id] = self.compiler.submit(spec)

    def ready(self, request_id: int) -> MatcherState | None:
        """A fresh state; None while it is being compiled. Raises: RequestError when it is wrong or took too long."""
        pending = self._pending[request_id]
        return pending.grammar().state() if pending.is_ready else None

    def forget(self, request_id: int) -> None:
        """The request has ended."""
        self._pending.pop(request_id, None)


def _read_vocabulary(tokenizer: Tokenizer, vocab_size: int, stop_ids: tuple[int, ...]) -> Any:
    width = max(vocab_size, tokenizer.vocab_size)
    if mask_words(width) != mask_words(vocab_size):
        raise RequestError(
            f"structured output needs logits for all of the tokenizer's {tokenizer.vocab_size} tokens; "
            f"this model has {vocab_size}"
        )
    eos = stop_ids[0] if stop_ids else None
    try:
        return library().LLTokenizer(tokenizer.to_json(), n_vocab=width, eos_token=eos)
    except (ValueError, RuntimeError) as error:
        raise RequestError(f"structured output isn't possible with this model's tokenizer: {error}") from None


def _try_out(matcher: Any, num_words: int) -> str:
    """What goes wrong in the first two steps. They build most of the automaton: here, not in the engine's loop."""
    row = np.zeros(num_words, dtype=np.int32)
    for _ in range(2):
        matcher.unsafe_compute_mask_ptr(row.ctypes.data, row.nbytes)
        if matcher.is_error():
            return str(matcher.get_error())
        if matcher.is_stopped():
            return ""
        if not row.any():
            return "no text fits it"
        word = int(np.flatnonzero(row)[0])
        bits = int(row[word]) & 0xFFFFFFFF
        matcher.try_consume_tokens([word * 32 + (bits & -bits).bit_length() - 1])
    return ""


def _too_complex(matcher: Any) -> RequestError:
    reason = (matcher.get_error() or "unknown").strip().splitlines()[0][:200]
    return RequestError(f"the structured output's grammar became too complex to follow ({reason}): make it simpler")
