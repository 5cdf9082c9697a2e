"""Thousands of random schedules through the engine: every request says what it says alone, and nothing is left behind.

A schedule is an engine with random limits (slots, budget, pages, steps ahead, prefixes, guesses, recorded steps, batch
invariance, our own C++ for CPUs or torch) and random traffic (greedy, sampled, penalised, constrained, scored, with
salts, stop texts and tokens, priorities, aborts, a step that fails now and then). The truth is the same model through
torch with one slot, plenty of pages and nothing of all that, one request after the other. Float32 weights whose choices
are clear of rounding.

TUNESMITH_SCHEDULES says how many (1,000), TUNESMITH_SCHEDULES_FROM the first seed.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine import runner as runner_module
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.draft import DraftModel
from tunesmith.engine.engine import Engine
from tunesmith.engine.graphs import DecodeGraphs
from tunesmith.engine.interfaces import Drafter
from tunesmith.engine.pages import PAGE_SLOTS, pages_of
from tunesmith.engine.request import Completion, Request, SamplingParams, StepOutput, StructuredSpec
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter
from tunesmith.engine.text import TextDecoder
from tunesmith.model.decoder import Decoder

pytestmark = [pytest.mark.long, pytest.mark.timeout(7200)]
FAMILIES = ("llama", "mistral", "qwen3", "mixtral")
CONTEXT = 160
LOGPROB_TOLERANCE = 2e-4
"""Log-probabilities of float32: the same sums in another order."""


class Letters:
    """Every token is two letters, so that stop texts lie over borders of tokens."""

    def put(self, token: int) -> str:
        return chr(97 + token % 16) + chr(97 + token // 16 % 26)

    def finish(self) -> str:
        return ""


class Residue:
    """A grammar: tokens whose remainder by 3 is the next of 0, 1, 2, 0, ...; complete after `length` of them."""

    def __init__(self, length: int) -> None:
        self.left, self.next = length, 0

    @property
    def is_finished(self) -> bool:
        return self.left == 0

    def mask_into(self, bitmask_row: np.ndarray) -> None:
        bits = np.arange(bitmask_row.size * 32) % 3 == self.next
        bitmask_row[:] = np.packbits(bits, bitorder="little").view(np.int32)

    def accept(self, token: int) -> bool:
        if token % 3 != self.next:
            return False
        self.next, self.left = (self.next + 1) % 3, self.left - 1
        return True

    def rollback(self, num_tokens: int) -> None:
        self.next, self.left = (self.next - num_tokens) % 3, self.left + num_tokens


class Residues:
    """Grammars by their length; ready at the second look."""

    def __init__(self) -> None:
        self.waiting: dict[int, list[int]] = {}

    def submit(self, request_id: int, spec: StructuredSpec) -> None:
        self.waiting[request_id] = [0, int(str(spec.value))]

    def ready(self, request_id: int) -> Residue | None:
        known = self.waiting[request_id]
        known[0] += 1
        return Residue(known[1]) if known[0] > 1 else None

    def forget(self, request_id: int) -> None:
        del self.waiting[request_id]


class Wild:
    """Guesses: right ones, wrong ones, none, too many."""

    def __init__(self, choice: random.Random, most: int) -> None:
        self.choice, self.max_drafts = choice, most
        self.lookup = NgramDrafter(most)

    def propose(self, sequences: Sequence[Any]) -> list[list[int]]:
        found = self.lookup.propose(sequences)
        return [
            guess
            if self.choice.random() < 0.5
            else [self.choice.randrange(250) for _ in range(self.choice.randint(0, 6))]
            for guess in found
        ]

    def forget(self, request_id: int) -> None:
        self.lookup.forget(request_id)


class Repeating:
    """Recorded steps on a CPU: every replay does the work again, into the tensors of the recording."""

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        made = work()

        def replay() -> None:
            for into, tensor in zip(made, work(), strict=True):
                into.copy_(tensor)

        return replay, made

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def free_bytes(self) -> int | None:
        return None

    def renew(self) -> None:
        return


@dataclass(frozen=True)
class Asked:
    """A request, and what it is given with."""

    ids: tuple[int, ...]
    params: SamplingParams
    salt: str
    priority: int


def make_decoder(request: Request) -> TextDecoder:
    return Letters()


def make_engine(
    model: Decoder, config: EngineConfig, num_pages: int, recorded: bool, drafter: Drafter | None
) -> Engine:
    runner = NativeRunner(model, config, num_pages)
    if recorded:
        runner._fused = None
        runner.graphs = DecodeGraphs(
            runner._decode,
            runner.sampling,
            max_num_seqs=config.max_num_seqs,
            max_context=config.max_model_len,
            slots_of_page=PAGE_SLOTS,
            device=runner.device,
            recorder=Repeating(),
        )
        runner.prompt_graphs = runner._make_prompt_graphs(runner.graphs)
        runner.warm_up(0.0)
    return Engine(
        runner, config=config, stop_ids=[258, 7], make_decoder=make_decoder, grammars=Residues(), drafter=drafter
    )


def random_config(choice: random.Random) -> tuple[EngineConfig, int]:
    slots = choice.choice([1, 2, 3, 5, 8])
    config = EngineConfig(
        max_model_len=CONTEXT,
        max_num_seqs=slots,
        max_num_batched_tokens=max(slots, choice.choice([3, 8, 16, 17, 33, 64, 300])),
        enable_prefix_cache=choice.random() < 0.7,
        step_ahead=choice.random() < 0.7,
        batch_invariant=choice.random() < 0.08,
        debug_pages=True,
    )
    least = pages_of(CONTEXT)
    return config, choice.choice([least, least + 1, least + 3, 2 * least, slots * least])


def random_drafter(choice: random.Random, model: Decoder, config: EngineConfig) -> Drafter | None:
    """None, wild guesses, or the model itself with few pages of its own."""
    kind = choice.random()
    if kind < 0.2:
        return Wild(choice, choice.choice([1, 4]))
    if kind < 0.3:
        own = replace(config, max_model_len=CONTEXT - choice.choice([0, 60]), batch_invariant=False)
        runner = NativeRunner(model, own, choice.choice([2, 6, 40]))
        return DraftModel(runner, choice.choice([1, 3]), 272, max_tokens=choice.choice([20, 500]))
    return None


def random_request(choice: random.Random, shared: Sequence[Sequence[int]]) -> Asked:
    begin = list(choice.choice(shared))
    tail = [choice.randrange(250) for _ in range(choice.choice([0, 1, 1, 3, 15, 16, 17, 30]))]
    ids = (begin + tail) or [choice.randrange(250)]
    if choice.random() < 0.2:
        ids = ids[: max(1, len(ids) // PAGE_SLOTS * PAGE_SLOTS)]
    room = CONTEXT - len(ids)
    num = choice.choice([1, 2, 5, 16, 30, room])
    num = min(num, room)
    kind = choice.random()
    sampled = choice.random() < 0.5
    options: dict[str, Any] = {"max_tokens": num, "ignore_eos": choice.random() < 0.7}
    if sampled:
        options |= {"temperature": choice.choice([0.3, 1.0]), "seed": choice.randrange(2**40)}
        options |= choice.choice([{}, {}, {"top_k": 5}, {"top_p": 0.7}, {"min_p": 0.1}])
    if kind < 0.15:
        options |= choice.choice([{"presence_penalty": 0.7}, {"repetition_penalty": 1.3}, {"frequency_penalty": -0.4}])
    elif kind < 0.3:
        options |= {"structured": StructuredSpec("regex", str(choice.randint(1, 12))), "ignore_eos": True}
    elif kind < 0.4:
        options |= {"logit_bias": {choice.randrange(250): choice.choice([-5.0, 3.0])}}
    if choice.random() < 0.3:
        options |= {"stop_token_ids": tuple(choice.randrange(250) for _ in range(8))}
    if choice.random() < 0.2 and "structured" not in options:
        options |= {"min_tokens": choice.randint(0, num)}
    if choice.random() < 0.3:
        options |= {"stop": ("".join(choice.choice("abcdefgh") for _ in range(choice.choice([2, 2, 3]))),)}
    if choice.random() < 0.25:
        options |= {"logprobs": choice.randrange(4)}
    if choice.random() < 0.15:
        options |= {"prompt_logprobs": choice.randrange(3)}
    return Asked(tuple(ids), SamplingParams(**options), choice.choice(["", "", "salt"]), choice.choice([0, 0, 0, 1, 2]))


def submit(engine: Engine, asked: Asked) -> int:
    return engine.submit(asked.ids, asked.params, priority=asked.priority, cache_salt=asked.salt)


class Alone:
    """What each request says alone. Kept, since a schedule may ask for the same again."""

    def __init__(self, model: Decoder) -> None:
        config = EngineConfig(
            max_model_len=CONTEXT, max_num_seqs=1, max_num_batched_tokens=CONTEXT, enable_prefix_cache=False
        )
        self.engine = make_engine(model, config, pages_of(CONTEXT), False, None)

    def __call__(self, asked: Asked) -> Completion:
        submit(self.engine, asked)
        while True:
            for output in self.engine.step():
                if output.completion is not None:
                    return output.completion


def check_stream(pieces: list[StepOutput], done: Completion) -> None:
    assert "".join(output.piece for output in pieces) == done.text
    assert [token for output in pieces for token in output.token_ids] == done.token_ids
    if done.logprobs is not None:
        assert [one for output in pieces for one in output.logprobs or []] == done.logprobs


def check_same(mine: Completion, alone: Completion, is_whole: bool) -> None:
    num = len(mine.token_ids)
    assert mine.token_ids == alone.token_ids[:num]
    if not is_whole:
        assert alone.text.startswith(mine.text) or mine.text.startswith(alone.text)
        return
    assert (mine.token_ids, mine.text, mine.finish_reason) == (alone.token_ids, alone.text, alone.finish_reason)
    assert mine.stop_reason == alone.stop_reason
    for ours, theirs in ((mine.logprobs, alone.logprobs), (mine.prompt_logprobs, alone.prompt_logprobs)):
        assert (ours is None) == (theirs is None)
        for one, other in zip(ours or [], theirs or [], strict=True):
            assert (one is None) == (other is None)
            if one is not None and other is not None:
                assert one.token_id == other.token_id
                assert one.logprob == pytest.approx(other.logprob, abs=LOGPROB_TOLERANCE, rel=LOGPROB_TOLERANCE)
                assert len(one.top) == len(other.top)


def run_schedule(model: Decoder, alone: Alone, seed: int) -> dict[str, int]:
    """One schedule. Returns what happened in it."""
    choice = random.Random(seed)
    config, num_pages = random_config(choice)
    drafter = random_drafter(choice, model, config)
    recorded = choice.random() < 0.3 and not config.batch_invariant
    engine = make_engine(model, config, num_pages, recorded, drafter)
    forward = engine.runner.forward
    fails = choice.random() < 0.1

    def failing(batch: Any) -> None:
        forward(batch)
        if fails and choice.random() < 0.02:
            raise RuntimeError("a step that fails")

    engine.runner.forward = failing  # type: ignore[method-assign]
    shared = [[], [], *([choice.randrange(250) for _ in range(n)] for n in (16, 32, 40, 47, 64))]
    asked: dict[int, Asked] = {}
    heard: dict[int, list[StepOutput]] = {}
    done: dict[int, Completion] = {}
    aborted: dict[int, Completion] = {}
    total, rate = choice.randint(3, 14), choice.choice([0.1, 0.4, 0.9])
    while len(asked) < total or engine.has_work:
        kind = choice.random()
        if kind < rate and len(asked) < total:
            request = random_request(choice, shared)
            asked[submit(engine, request)] = request
        elif kind > 0.97 and asked:
            request_id = choice.choice(sorted(asked))
            said = engine.abort(request_id)
            if said is not None:
                aborted[request_id] = said
        else:
            try:
                outputs = engine.step()
            except RuntimeError as error:
                assert "a step that fails" in str(error)
                outputs = []
            for output in outputs:
                assert output.request_id not in done and output.request_id not in aborted
                heard.setdefault(output.request_id, []).append(output)
                if output.completion is not None:
                    done[output.request_id] = output.completion
        engine.scheduler.check()
    for request_id, completion in done.items():
        check_stream(heard[request_id], completion)
        check_same(completion, alone(asked[request_id]), is_whole=True)
    for request_id, completion in aborted.items():
        check_same(completion, alone(asked[request_id]), is_whole=False)
    check_nothing_is_left(engine)
    stats = engine.stats()
    return {
        "done": len(done),
        "aborted": len(aborted),
        "preempted": stats.num_preempted,
        "hits": stats.prefix_hits_tokens,
    }


def check_nothing_is_left(engine: Engine) -> None:
    scheduler, state = engine.scheduler, engine.runner.sampling.state  # type: ignore[attr-defined]
    assert engine.runner.pages.num_used == 0
    assert sorted(scheduler.free_slots) == list(range(engine.config.max_num_seqs))
    assert not (scheduler.sequences or scheduler.waiting or scheduler.running or scheduler.left_slots)
    assert not (engine.unready or engine.mail or engine.launched or engine.grammars.waiting)  # type: ignore[union-attr]
    assert not (state._entered or state.counts.places)
    if isinstance(engine.drafter, Wild):
        assert not engine.drafter.lookup._known
    if isinstance(engine.drafter, DraftModel):
        assert not engine.drafter._held and engine.drafter.runner.pages.num_used == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_every_request_says_what_it_says_alone(
    family: str, tiny_model_dir: Callable[..., Path], compiled_library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    number = int(os.environ.get("TUNESMITH_SCHEDULES", "1000")) // len(FAMILIES)
    first = int(os.environ.get("TUNESMITH_SCHEDULES_FROM", "0"))
    model = load_decoder(tiny_model_dir(family, initializer_range=0.2), device="cpu", dtype=torch.float32).eval()
    alone = Alone(model)
    counts: dict[str, int] = {}
    for seed in range(first, first + number):
        library = compiled_library if seed % 3 else None
        monkeypatch.setattr(runner_module, "load", lambda library=library: library)
        try:
            found = run_schedule(model, alone, seed)
        except BaseException as error:
            error.add_note(f"schedule {seed} of {family}")
            raise
        counts = {name: counts.get(name, 0) + count for name, count in found.items()}
    print(family, number, "schedules", counts)
    assert counts["preempted"] and counts["hits"] and counts["done"]
