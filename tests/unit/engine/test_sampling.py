"""Sampling of a batch: what may be drawn equals transformers', rows don't see each other, nothing reads the device."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from tunesmith.engine import logprobs as logprobs_module
from tunesmith.engine.batch import SampledRow
from tunesmith.engine.logprobs import chosen_and_top, score_prompt
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.sampling import BROKEN, Sampled, Sampling, draw_seed
from tunesmith.errors import RequestError
from tunesmith.kernels.sampling import find_thresholds
from tunesmith.kernels.sampling_logits import penalise, unpack_masks

VOCAB = 50
CPU = torch.device("cpu")


def make_logits(seed: int = 0, rows: int = 1) -> Tensor:
    return torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed)) * 3


def row(slot: int = 0, seen: Sequence[int] = (1, 2, 3), num_prompt: int = 3, **options: Any) -> SampledRow:
    """A sampled row; `grammar` and `stops` are the row's own, all else are sampling parameters."""
    grammar, stops = options.pop("grammar", False), frozenset(options.pop("stops", ()))
    params = SamplingParams(**options)
    return SampledRow(slot, params, 17 if params.seed is None else params.seed, num_prompt, tuple(seen), stops, grammar)


def sample(
    sampling: Sampling, logits: Tensor, rows: Sequence[SampledRow], positions: Sequence[int], **more: Any
) -> Sampled:
    slots = torch.tensor([one.slot for one in rows])
    return sampling(logits, rows, slots, torch.tensor(positions), **more)


def draws(one: SampledRow, num: int, first: int = 3, logits: Tensor | None = None) -> list[int]:
    """Tokens drawn one after the other."""
    sampling = Sampling(8, VOCAB, CPU)
    given = [make_logits(i) if logits is None else logits for i in range(first, first + num)]
    return [sample(sampling, x, [one], [i]).tokens_B.item() for i, x in enumerate(given, first)]  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 1.0, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.8},
        {"temperature": 1.0, "min_p": 0.1},
        {"temperature": 0.9, "top_k": 20, "top_p": 0.7},
        {"temperature": 1.0, "top_p": 1e-6},
    ],
)
def test_what_may_be_drawn_equals_transformers(options: dict[str, Any], seed: int) -> None:
    params = SamplingParams(**options)
    warpers = LogitsProcessorList([TemperatureLogitsWarper(params.temperature)])
    if params.top_k:
        warpers.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        warpers.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        warpers.append(MinPLogitsWarper(params.min_p))
    logits = make_logits(seed)
    expected = warpers(torch.zeros(1, 1, dtype=torch.int64), logits.clone()) > -math.inf
    names = ("temperature", "top_k", "top_p", "min_p")
    threshold = find_thresholds(logits, *(torch.tensor([getattr(params, name)]) for name in names))
    assert torch.equal(logits >= threshold[:, None], expected)


def test_draws_stay_within_what_may_be_drawn_and_follow_its_distribution() -> None:
    logits = make_logits()
    rows = [row(temperature=1.0, top_k=4)] * 3000
    found = sample(Sampling(1, VOCAB, CPU), logits.expand(3000, VOCAB), rows, range(3, 3003))
    counts = torch.bincount(found.tokens_B, minlength=VOCAB)
    kept = logits[0].topk(4).indices
    expected = torch.zeros(VOCAB).index_copy(0, kept, logits[0, kept].softmax(-1))
    assert (counts[expected == 0] == 0).all()
    assert (counts / 3000 - expected).abs().max() < 0.03


def test_repetition_penalty_equals_transformers() -> None:
    logits, seen = make_logits(), [3, 7, 11, 40]
    expected = RepetitionPenaltyLogitsProcessor(1.5)(torch.tensor([seen]), logits.clone())
    in_prompt, in_answer = torch.zeros(1, VOCAB, dtype=torch.bool), torch.zeros(1, VOCAB, dtype=torch.int16)
    in_prompt[0, seen[:2]], in_answer[0, seen[2:]] = True, 2
    zero = torch.zeros(1)
    torch.testing.assert_close(penalise(logits, in_prompt, in_answer, zero, zero, zero + 1.5), expected)


def test_presence_and_frequency_are_of_the_answer_only() -> None:
    logits = torch.zeros(1, 4)
    in_prompt, in_answer = torch.tensor([[True, True, False, False]]), torch.tensor([[0, 1, 3, 0]])
    found = penalise(logits, in_prompt, in_answer, torch.tensor([0.5]), torch.tensor([0.25]), torch.ones(1))
    assert found[0].tolist() == [0, -0.75, -1.25, 0]


def test_a_penalised_greedy_row_moves_on() -> None:
    logits = torch.zeros(1, VOCAB)
    logits[0, :3] = torch.tensor([1.0, 0.9, 0.8])
    assert draws(row(seen=(9,), num_prompt=1, repetition_penalty=2.0), 3, logits=logits) == [0, 1, 2]
    assert draws(row(seen=(0,), num_prompt=1, presence_penalty=1.0), 3, logits=logits) == [0, 1, 2]
    assert draws(row(seen=(0,), num_prompt=1, frequency_penalty=0.06), 4, logits=logits) == [0, 0, 1, 0]
    assert draws(row(seen=(0,), num_prompt=1, repetition_penalty=2.0), 2, logits=logits) == [1, 2]


def test_counts_are_made_anew_where_a_sequence_comes_back() -> None:
    """After a preemption it is another row, perhaps in another slot, that has seen its answer already."""
    options = {"temperature": 1.5, "frequency_penalty": 0.7, "presence_penalty": 0.3, "repetition_penalty": 1.2}
    whole = draws(row(**options), 12)
    for num in (1, 5):
        back = row(slot=4, seen=(1, 2, 3, *whole[:num]), **options)
        assert draws(back, 12 - num, first=3 + num) == whole[num:]


def test_places_of_counts_are_used_again() -> None:
    sampling = Sampling(40, VOCAB, CPU)
    for slot in range(30):
        sample(sampling, make_logits(slot), [row(slot=slot % 3, presence_penalty=1.0)], [3])
        if slot % 3 == 2:
            for left in range(3):
                sampling.release(left)
    assert sampling.state.counts.answers_NV.shape[0] == 8
    rows = [row(slot=slot, presence_penalty=1.0) for slot in range(12)]
    sample(sampling, make_logits(0, 12), rows, [3] * 12)
    assert sampling.state.counts.answers_NV.shape[0] == 16
    assert sampling.state.counts.answers_NV[list(sampling.state.counts.places.values())].sum() == 12


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8, "seed": 5},
    {"temperature": 1.0, "top_k": 7, "seed": 6, "logprobs": 2},
    {"temperature": 1.2, "top_p": 0.7, "min_p": 0.01, "seed": 7},
    {"temperature": 0.9, "presence_penalty": 1.5, "seed": 8},
    {"logit_bias": {4: 100.0, 9999: 5.0}},
    {"temperature": 1.0, "seed": 9, "min_tokens": 4, "stops": range(25, 50)},
    {"temperature": 1.0, "seed": 10, "grammar": True},
]


def _words(allowed: Sequence[int]) -> Tensor:
    words = torch.zeros(1, 2, dtype=torch.int64)
    for token in allowed:
        words[0, token // 32] |= 1 << (token % 32)
    return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


def _run(rows: Sequence[SampledRow], order: Sequence[int], steps: int = 6) -> dict[int, list[int]]:
    """Tokens by slot. Row i always has logits of its own."""
    sampling, found = Sampling(len(MIXED), VOCAB, CPU), {i: [] for i in order}  # type: ignore[var-annotated]
    for step in range(steps):
        logits = torch.cat([make_logits(100 * i + step) for i in order])
        masks = _words([3, 31, 32, 49]) if 7 in order else None
        ordered = [rows[i] for i in order]
        sampled = sample(sampling, logits, ordered, [3 + step] * len(order), masks_MW=masks)
        for i, token in zip(order, sampled.to_host().lists()[0], strict=True):
            found[i].append(token)
    return found


def test_a_row_is_chosen_as_if_it_were_alone() -> None:
    rows = [row(slot=i, **options) for i, options in enumerate(MIXED)]
    together = _run(rows, range(len(rows)))
    assert _run(rows, [5, 2, 7, 0, 6, 4, 1, 3]) == together
    for i in range(len(rows)):
        assert _run(rows, [i])[i] == together[i]
    assert together[0] == [int(make_logits(step).argmax()) for step in range(6)]
    assert together[5] == [4] * 6
    assert max(together[6][:4]) < 25, "stop tokens are too early"
    assert set(together[7]) <= {3, 31, 32, 49}


def test_seeds_reproduce_and_differ() -> None:
    logits = torch.zeros(1, VOCAB)
    assert draws(row(temperature=1.0, seed=5), 40, logits=logits) == draws(
        row(temperature=1.0, seed=5), 40, logits=logits
    )
    assert draws(row(temperature=1.0, seed=5), 40, logits=logits) != draws(
        row(temperature=1.0, seed=6), 40, logits=logits
    )
    assert draw_seed() != draw_seed()
    assert 0 <= draw_seed() < 2**63


@pytest.mark.parametrize(
    "options", [{}, {"temperature": 1.0}, {"repetition_penalty": 1.2}, {"temperature": 1.0, "top_p": 0.5}]
)
def test_a_row_that_is_not_numbers_is_broken_alone(options: dict[str, Any]) -> None:
    logits, rows = make_logits(rows=3), [row(slot=i, **options) for i in range(3)]
    expected = sample(Sampling(3, VOCAB, CPU), logits, rows, [3, 3, 3]).tokens_B
    logits[1, 4] = math.nan
    sampling = Sampling(3, VOCAB, CPU)
    found = sample(sampling, logits, rows, [3, 3, 3]).tokens_B
    assert found.tolist() == [expected[0], BROKEN, expected[2]]
    assert sampling.state.last_tokens_N.tolist() == [expected[0], 0, expected[2], 0], "it must be a token"


def test_a_mask_that_allows_nothing_breaks_its_row() -> None:
    found = sample(Sampling(1, VOCAB, CPU), make_logits(), [row(grammar=True)], [3], masks_MW=_words([]))
    assert found.tokens_B.tolist() == [BROKEN]


def test_masks_are_bits_of_words() -> None:
    masks = torch.tensor([[-(2**31) + 5, 2], [-1, -1]], dtype=torch.int32)
    assert torch.nonzero(unpack_masks(masks, 40)[0])[:, 0].tolist() == [0, 2, 31, 33]
    assert unpack_masks(masks, 40)[1].all()


def test_plans_are_kept_while_rows_are_the_same_objects() -> None:
    sampling = Sampling(4, VOCAB, CPU)
    rows = [row(slot=0), row(slot=1, temperature=1.0)]
    plan = sampling.plan(rows)
    assert sampling.state.has_new_rows
    assert sampling.plan(list(rows)) is plan
    assert not sampling.state.has_new_rows
    assert sampling.plan(rows[::-1]) is not plan
    assert not sampling.state.has_new_rows
    sampling.plan([row(slot=0), rows[1]])
    assert sampling.state.has_new_rows


def test_what_a_graph_has_chosen_counts_only_where_it_could_know() -> None:
    sampling = Sampling(4, VOCAB, CPU)
    plain, ordered = row(slot=0, temperature=1.0), row(slot=0, temperature=1.0, top_k=2)
    logits, chosen = make_logits(), torch.tensor([33])
    own = sample(Sampling(4, VOCAB, CPU), logits, [plain], [3]).tokens_B
    assert torch.equal(sample(sampling, logits, [plain], [3], chosen_B=chosen).tokens_B, own), "the row is new"
    assert sample(sampling, logits, [plain], [3], chosen_B=chosen).tokens_B is chosen
    assert torch.equal(sampling.choose_plainly(logits, torch.tensor([0]), torch.tensor([3])), own)
    sample(sampling, logits, [ordered], [3])
    assert sample(sampling, logits, [ordered], [3], chosen_B=chosen).tokens_B is not chosen


class _NoReads(TorchDispatchMode):
    """Fails where an operator's result, or its shape, has to be read from the device."""

    READS = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "is_nonzero", "equal", "repeat_interleave")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        assert func.overloadpacket.__name__ not in self.READS, func
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_from_the_device() -> None:
    rows = [row(slot=i, **options) for i, options in enumerate(MIXED)]
    sampling, num = Sampling(len(rows), VOCAB, CPU), len(rows)
    with _NoReads():
        for step in range(2):
            sample(sampling, make_logits(step, num), rows, [3 + step] * num, masks_MW=_words([1, 2])).to_host()
    with pytest.raises(AssertionError, match="scalar"), _NoReads():
        make_logits().max().item()


def test_logprobs_are_of_the_models_own_logits() -> None:
    rows = [
        row(slot=0, temperature=0.5, top_k=2, logprobs=3),
        row(slot=1),
        row(slot=2, logit_bias={7: 100.0}, logprobs=0),
    ]
    logits = make_logits(rows=3)
    tokens, found = sample(Sampling(3, VOCAB, CPU), logits.bfloat16(), rows, [3] * 3).to_host().lists()
    expected = logits.bfloat16().float().log_softmax(-1)
    first, none, last = found
    assert none is None
    assert first is not None and last is not None
    assert (first.token_id, last.token_id) == (tokens[0], 7)
    assert first.logprob == pytest.approx(float(expected[0, tokens[0]]), abs=1e-5)
    assert last.logprob == pytest.approx(float(expected[2, 7]), abs=1e-5)
    assert last.top == ()
    values, ids = expected[0].topk(3)
    assert [token for token, _ in first.top] == ids.tolist()
    assert [value for _, value in first.top] == pytest.approx(values.tolist(), abs=1e-5)


def test_prompts_are_scored_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    # Whole numbers, whose sums are exact: a product of fewer rows may add in another order.
    hidden, head = (torch.randint(-2, 3, shape, generator=generator).float() for shape in ((10, 8), (8, VOCAB)))
    targets = torch.arange(10)
    rows: list[int] = []

    def project(part: Tensor) -> Tensor:
        rows.append(len(part))
        return part @ head

    monkeypatch.setattr(logprobs_module, "CHUNK_BYTES", 4 * VOCAB * 4)
    found = score_prompt(hidden, targets, project, VOCAB, 2).lists([2] * 10)
    assert rows == [4, 4, 2]
    assert found == chosen_and_top(hidden @ head, targets, 2).lists([2] * 10)
    assert [one.token_id for one in found] == targets.tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
        ({"temperature": -1.0}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"min_p": 1.5}, "min_p"),
        ({"top_k": -1}, "top_k"),
        ({"repetition_penalty": 0.0}, "repetition_penalty"),
        ({"stop": ("",)}, "stop"),
    ],
)
def test_impossible_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        SamplingParams(**options)


def test_one_stop_text_may_be_given_bare() -> None:
    assert SamplingParams(stop="end").stop == ("end",)  # type: ignore[arg-type]


def test_plans_of_usual_rows_are_what_a_look_at_every_row_finds() -> None:
    """Rows that ask for temperatures alone are known by their slots, also where a slot has a new row."""
    choice = random.Random(0)
    kinds: list[dict[str, Any]] = [
        {},
        {"temperature": 0.0},
        {"top_k": 1},
        {"top_k": VOCAB},
        {"top_k": VOCAB - 1},
        {"top_p": 0.9},
        {"min_p": 0.1},
        {"temperature": 0.0, "top_p": 0.5},
        {"logprobs": 0},
        {"logit_bias": {3: 1.0}},
        {"min_tokens": 2, "stops": [4]},
        {"grammar": True},
        {"presence_penalty": 0.5},
    ]
    state, num_plain = Sampling(8, VOCAB, CPU).state, 0
    for turn in range(300):
        usual = kinds[:4] if turn % 2 else kinds
        rows = [row(slot, **choice.choice(usual)) for slot in choice.sample(range(8), choice.randint(1, 5))]
        plan = state.plan(rows)
        looked = state._make_plan(tuple(rows))
        assert plan.rows == looked.rows
        num_plain += plan.is_plain
        for name in ("is_greedy", "is_plain", "has_order", "has_masks", "reported_rows", "num_top"):
            assert getattr(plan, name) == getattr(looked, name), name
        for name in ("filtered", "penalised", "biased", "not_yet", "places_B", "mask_rows_B", "reported"):
            assert (getattr(plan, name) is None) == (getattr(looked, name) is None), name
        assert state.plan(list(rows)) is plan
        if choice.random() < 0.5:
            state.release(rows[0].slot)
    assert 100 < num_plain < 290
