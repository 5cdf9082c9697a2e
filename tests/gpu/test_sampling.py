"""Sampling on a CUDA device: kernels against references at real vocabularies, no waiting, and how long it takes."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.engine.batch import SampledRow
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.sampling import BROKEN, Sampling
from tunesmith.kernels.decode_inputs import DecodeInputs, load_inputs, load_inputs_reference
from tunesmith.kernels.sampling import (
    choose,
    choose_reference,
    find_thresholds,
    thresholds_reference,
)
from tunesmith.kernels.sampling_logits import Allowed, Seen, change_logits, change_logits_reference

pytestmark = pytest.mark.gpu
Guard = Callable[[], AbstractContextManager[None]]
VOCAB = 151_936
WANTED = [
    (0.7, 0, 1.0, 0.0),
    (1.0, 5, 1.0, 0.0),
    (0.7, 0, 0.9, 0.0),
    (1.5, 0, 1.0, 0.05),
    (0.6, 20, 0.8, 0.0),
    (1.0, 50, 0.9, 0.1),
    (0.3, 0, 0.6, 0.02),
    (2.0, 3000, 0.95, 0.0),
    (1.0, 60_000, 1.0, 0.0),
    (0.0, 3, 0.5, 0.0),
]


def make_logits(rows: int, dtype: torch.dtype, seed: int = 0, scale: float = 3.0) -> Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return (torch.randn(rows, VOCAB, device="cuda", generator=generator) * scale).to(dtype)


def wanted(num: int) -> list[Tensor]:
    columns = zip(*(WANTED[i % len(WANTED)] for i in range(num)), strict=True)
    return [torch.tensor(column, device="cuda") for column in columns]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scale", [3.0, 0.05])
@pytest.mark.parametrize("num", [1, 7, 200])
def test_tokens_equal_the_references(num: int, scale: float, dtype: torch.dtype, no_waiting: Guard) -> None:
    """But for a logarithm's last bit, which now and then decides between two tokens."""
    logits = make_logits(num, dtype, scale=scale)
    if num > 1:
        logits[1, 77] = float("nan")
    temperatures = torch.linspace(0, 2, num, device="cuda")
    seeds, slots = torch.arange(num, device="cuda") * (2**40 + 7), torch.arange(num, device="cuda").flip(0)
    positions, lasts = slots * 3 + 5, [torch.zeros(num, dtype=torch.int64, device="cuda") for _ in range(4)]
    thresholds = logits.float().nan_to_num().quantile(0.999, dim=-1) if num < 200 else None
    given = (logits, temperatures, seeds, slots, positions)
    with no_waiting():
        found = choose(*given, lasts[0], thresholds)
        greedy = choose(logits, temperatures * 0, *given[2:], lasts[1])
    expected = choose_reference(*given, lasts[2], thresholds)
    assert int((found != expected).sum()) <= num // 100
    assert torch.equal(lasts[0][slots], found.clamp(min=0))
    values, tokens = logits.max(-1)
    assert torch.equal(greedy, torch.where(values.isnan(), BROKEN, tokens))
    if num == 7:
        given_cpu = [t.cpu() for t in given]
        limit = None if thresholds is None else thresholds.cpu()
        on_cpu = choose_reference(*given_cpu, lasts[3].cpu(), limit)
        assert torch.equal(on_cpu, found.cpu())


@pytest.mark.parametrize("scale", [3.0, 0.05])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_thresholds_equal_the_references(dtype: torch.dtype, scale: float, no_waiting: Guard) -> None:
    """Where two tokens' masses round to either side of top-p, both are right."""
    logits, given = make_logits(30, dtype, scale=scale), wanted(30)
    with no_waiting():
        found = find_thresholds(logits, *given)
    expected = thresholds_reference(logits, *given)
    temperatures, _, top_p, _ = given
    shares = (logits.float() / temperatures.clamp(min=0.1)[:, None]).softmax(-1)
    masses = [torch.where(logits >= limit[:, None], shares, 0.0).sum(-1) for limit in (found, expected)]
    assert torch.equal(found[top_p >= 1], expected[top_p >= 1])
    torch.testing.assert_close(masses[0], masses[1], rtol=0, atol=3e-5)
    assert int((found != expected).sum()) <= (2 if scale > 1 else 9)


def test_a_threshold_does_not_depend_on_the_batch() -> None:
    logits, given = make_logits(64, torch.float32), wanted(64)
    whole = find_thresholds(logits, *given)
    for i in (0, 4, 37, 63):
        one = find_thresholds(logits[i : i + 1], *(column[i : i + 1] for column in given))
        assert torch.equal(one[0], whole[i])


def test_penalised_and_masked_logits_equal_the_references(no_waiting: Guard) -> None:
    generator = torch.Generator("cuda").manual_seed(0)
    rows = torch.arange(9, device="cuda")
    prompts = torch.rand(4, VOCAB, device="cuda", generator=generator) < 0.1
    answers = torch.randint(0, 4, (4, VOCAB), device="cuda", generator=generator, dtype=torch.int16)
    penalties = torch.rand(3, 9, device="cuda", generator=generator) + 0.5
    words = torch.randint(-(2**31), 2**31, (3, VOCAB // 32), device="cuda", generator=generator).to(torch.int32)
    seen = Seen(prompts, answers, rows % 5 - 1, penalties)
    for allowed in (None, Allowed(words, rows % 4 - 1)):
        logits = make_logits(9, torch.bfloat16)
        with no_waiting():
            found = change_logits(logits, rows.flip(0), seen, allowed)
        torch.testing.assert_close(found, change_logits_reference(logits, rows.flip(0), seen, allowed))


def test_inputs_of_a_step_are_loaded_as_the_reference_loads_them() -> None:
    generator = torch.Generator().manual_seed(0)

    def ints(high: int, *shape: int) -> Tensor:
        return torch.randint(0, high, shape, generator=generator)

    rows, columns = 37, 300
    source = DecodeInputs(
        *(ints(n, rows) for n in (99, 500, 5000, 20, 99)),
        contexts=(ints(16 * columns - 1, rows) + 1).int(),
        adapters=ints(3, rows).int(),
        tables=ints(99, rows, columns).int(),
    )
    source = DecodeInputs(source.tokens - 40, *source.tensors()[1:])
    last = ints(50, 65)
    expected = DecodeInputs.empty(64, 2048, 64, torch.device("cpu"))
    found = DecodeInputs.empty(64, 2048, 64, torch.device("cuda"))
    load_inputs_reference(source, expected, last, 16)
    load_inputs(DecodeInputs(*(t.cuda() for t in source.tensors())), found, last.cuda(), 16)
    for a, b in zip(found.tensors()[:-1], expected.tensors()[:-1], strict=True):
        assert torch.equal(a.cpu(), b)
    for row, context in enumerate(source.contexts.tolist()):
        pages = (context + 15) // 16
        assert torch.equal(found.tables[row, :pages].cpu(), expected.tables[row, :pages])


MIXED: list[dict[str, Any]] = [
    {},
    {"temperature": 0.8},
    {"temperature": 1.0, "top_k": 7, "logprobs": 2},
    {"temperature": 1.2, "top_p": 0.7, "min_p": 0.01},
    {"temperature": 0.9, "presence_penalty": 1.5, "frequency_penalty": 0.2, "repetition_penalty": 1.1},
    {"logit_bias": {4: 100.0}},
    {"temperature": 1.0, "min_tokens": 4},
    {"temperature": 1.0, "structured": None},
]


def _rows(slots: Sequence[int]) -> list[SampledRow]:
    return [
        SampledRow(i, SamplingParams(**MIXED[i]), i, 3, (1, 2, 3), frozenset({5, 6}), has_grammar=i == 7) for i in slots
    ]


def test_a_batch_of_every_kind_waits_for_nothing_and_says_what_a_cpu_says(no_waiting: Guard) -> None:
    rows, num = _rows(range(len(MIXED))), len(MIXED)
    masks = torch.zeros(1, VOCAB // 32, dtype=torch.int32)
    masks[0, 100] = -1
    said: dict[str, list[list[int]]] = {}
    for device in ("cuda", "cpu"):
        sampling, said[device] = Sampling(num, VOCAB, torch.device(device)), []
        slots, words = torch.arange(num, device=device), masks.to(device)
        for step in range(4):
            logits = make_logits(num, torch.bfloat16, seed=step).to(device)
            positions = torch.full((num,), 3 + step, device=device)
            if device == "cuda":
                with no_waiting():
                    sampled = sampling(logits, rows, slots, positions, words).to_host()
                torch.cuda.synchronize()
            else:
                sampled = sampling(logits, rows, slots, positions, words).to_host()
            said[device].append(sampled.lists()[0])
    assert said["cuda"] == said["cpu"]
    assert all(3200 <= tokens[7] < 3232 for tokens in said["cuda"])


def test_kernels_are_loaded_ahead_once_for_each_dtype() -> None:
    sampling = Sampling(4, VOCAB, torch.device("cuda"))
    assert [sampling.warm_up(torch.bfloat16) for _ in range(3)] == [True, True, False]
    assert not Sampling(4, VOCAB, torch.device("cpu")).warm_up(torch.float32)


def _ms(work: Callable[[], object]) -> float:
    """The device's median time, with the cache flushed before each run."""
    flushed, times = torch.empty(2**28, device="cuda"), []
    for _ in range(12):
        flushed.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        work()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times[2:])


@pytest.mark.parametrize(("num", "most_ms", "most_filtered_ms"), [(1, 0.1, 0.4), (256, 0.6, 2.0)])
def test_it_takes_little_of_a_step(num: int, most_ms: float, most_filtered_ms: float) -> None:
    logits, slots = make_logits(num, torch.bfloat16), torch.arange(num, device="cuda")
    temperatures, last = torch.full((num,), 0.6, device="cuda"), torch.zeros(num, dtype=torch.int64, device="cuda")
    one, twenty = torch.ones(num, device="cuda"), torch.full((num,), 20, device="cuda")
    drawn = _ms(lambda: choose(logits, temperatures, slots, slots, slots, last))
    ordered = _ms(lambda: find_thresholds(logits, temperatures, twenty, one * 0.8, one * 0))
    places, penalties = slots % 8, torch.ones(3, num, device="cuda") * 1.05
    tables = (
        torch.zeros(8, VOCAB, dtype=torch.bool, device="cuda"),
        torch.zeros(8, VOCAB, dtype=torch.int16, device="cuda"),
    )
    penalised = _ms(lambda: change_logits(logits, slots, Seen(*tables, places, penalties), None))
    nucleus = _ms(lambda: find_thresholds(logits, temperatures, twenty * 0, one * 0.9, one * 0))
    sort = _ms(lambda: thresholds_reference(logits, temperatures, twenty, one * 0.8, one * 0))
    print(f"{num} rows: draw {drawn:.3f} ms, top-k + top-p {ordered:.3f}, top-p {nucleus:.3f}, by sorting {sort:.3f}")
    print(f"penalties {penalised:.3f} ms")
    assert penalised < most_ms
    assert drawn < most_ms
    assert max(ordered, nucleus) < most_filtered_ms
