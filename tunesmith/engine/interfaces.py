"""What the engine asks of its parts: the runner, and what may be added to it (drafts, grammars, adapters)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:  # whoever only reads grammars imports no torch
    import numpy as np
    import torch

    from tunesmith.engine.batch import SampledRow, StepBatch, StepResult
    from tunesmith.engine.pages import PageAllocator
    from tunesmith.engine.request import StructuredSpec


class Pending(Protocol):
    """A step that was launched. Its tokens may not be computed yet."""

    def wait(self) -> StepResult:
        """The step's tokens on the host. Called once, and in the order of the launches."""


class Runner(Protocol):
    """A model with its cache. A step has two halves, so that masks may be made while the first one runs.

        runner.forward(batch)                      the model's pass is launched; hidden states stay on the device
        pending = runner.sample(batch, rows, masks)  choosing tokens is launched; they also stay as last tokens
        result = pending.wait()

    Steps are launched in order and run in that order on the device. `step n + 1` may be launched before `step n` was
    waited for; its batch then names tokens of step n by slot (see batch.py).
    """

    max_model_len: int
    vocab_size: int
    pages: PageAllocator
    shares_prefixes: bool
    device: torch.device
    fixed_rows: int | None

    def refresh(self) -> bool:
        """Called while nothing runs: make ready for a model that may have changed. True where the cache is lost."""

    def forward(self, batch: StepBatch) -> None:
        """Launch the pass over the model. The tokens' keys and values are in the cache afterwards."""

    def sample(self, batch: StepBatch, rows: Sequence[SampledRow], masks: np.ndarray | None) -> Pending:
        """Launch the choice of the sampled rows' tokens.

        rows: one for each of `sample_rows_B` (a sequence with drafts comes several times, one after the other).
        masks: int32 [number of rows that have a grammar, ceil(V / 32)] in the order of `rows`; bit `t % 32` of word
            `t // 32` is set where token t is allowed. None where no row has a grammar.
        """

    def release(self, slot: int) -> None:
        """A sequence has left this slot: what is kept for it may go."""

    def warm_up(self, limit_s: float | None = None) -> None:
        """Get ready before the first request, for about `limit_s` seconds at most (CUDA graphs)."""

    def idle(self) -> bool:
        """Something that makes later steps faster, in a moment without work; False where nothing is left to do."""


class GrammarState(Protocol):
    """How far one answer is in its grammar."""

    @property
    def is_finished(self) -> bool:
        """Whether the answer is complete: nothing but its end may follow."""

    def mask_into(self, bitmask_row: np.ndarray) -> None:
        """Set the bits of the tokens that may come next, end tokens too where the answer may end (int32 [V / 32])."""

    def accept(self, token: int) -> bool:
        """Go on by a token; False where the grammar doesn't allow it."""


@runtime_checkable
class RollingState(GrammarState, Protocol):
    """A state that can go back, as speculation needs."""

    def rollback(self, num_tokens: int) -> None:
        """Take the last accepted tokens back."""


class Grammars(Protocol):
    """Grammars of requests, compiled elsewhere than in the engine's loop."""

    def submit(self, request_id: int, spec: StructuredSpec) -> None:
        """Begin to compile. Raises RequestError for what is refused at once."""

    def ready(self, request_id: int) -> GrammarState | None:
        """A fresh state, or None while it is being compiled: the request waits. Raises RequestError if it failed."""

    def forget(self, request_id: int) -> None:
        """The request has ended."""


class Adapters(Protocol):
    """Named adapters on the base model, held in numbered places on the device (`adapters.AdapterPool`).

    `choose` goes into the runner's `before_pass`, with the batch's `token_adapters`.
    """

    def check(self, name: str) -> None:
        """Raises RequestError for a name that is not known."""

    def acquire(self, name: str) -> int | None:
        """The place of an adapter, held until `release`; None while it is being loaded: the request waits."""

    def release(self, slot: int) -> None:
        """One user of a place fewer."""

    def cache_key(self, slot: int) -> str:
        """What cached prefixes are kept under: another one for other weights."""

    def poll(self) -> None:
        """Called between two steps: what was loaded meanwhile takes its place."""


class Drafter(Protocol):
    """Guesses the next tokens of sequences, to be verified in one step. Called where all tokens so far are known."""

    max_drafts: int

    def propose(self, sequences: Sequence[Drafted]) -> list[list[int]]:
        """For each sequence at most `max_drafts` tokens that may follow its `all_ids`; [] for no guess."""

    def forget(self, request_id: int) -> None:
        """The sequence has ended."""


class Drafted(Protocol):
    """What a drafter sees of a sequence (`sequence.Sequence`)."""

    @property
    def request_id(self) -> int: ...

    @property
    def all_ids(self) -> list[int]:
        """Prompt and answer so far."""
