"""Drawing tokens: the noise's distribution, thresholds against plain sums, the kernels against their references."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.kernels import sampling
from tunesmith.kernels.philox import philox
from tunesmith.kernels.sampling import choose_reference, find_thresholds, thresholds_reference
from tunesmith.kernels.sampling_cpu import MOST_NOISE, words_of
from tunesmith.kernels.sampling_noise import BROKEN, SERIES_BELOW, SITE, exponential, gumbel, quarter


def choose(
    logits: Tensor, temperature: float = 1.0, seed: int = 1, first: int = 0, threshold: float | None = None
) -> Tensor:
    """Tokens of rows that are drawn at the positions first, first + 1, ... of one sequence."""
    num = len(logits)
    return choose_reference(
        logits,
        torch.tensor([temperature]),
        torch.tensor([seed]),
        torch.zeros(num, dtype=torch.int64),
        torch.arange(first, first + num),
        torch.zeros(1, dtype=torch.int64),
        None if threshold is None else torch.full((num,), threshold),
    )


def chi_square(counts: Tensor, probabilities: Tensor) -> float:
    """How far counts are from what is expected, in standard deviations of the statistic."""
    expected = probabilities * counts.sum()
    statistic = float(((counts - expected) ** 2 / expected).sum())
    freedom = len(counts) - 1
    return (statistic - freedom) / math.sqrt(2 * freedom)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
def test_tokens_are_drawn_from_the_softmax(temperature: float) -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3)) * 1.5
    counts = torch.bincount(choose(logits.expand(10_000, 40), temperature), minlength=40)
    assert chi_square(counts, (logits / temperature).softmax(-1)) < 4


def test_tokens_at_and_above_the_threshold_are_drawn_as_often_as_they_should() -> None:
    logits = torch.randn(40, generator=torch.Generator().manual_seed(3))
    threshold = float(logits.sort().values[-10])
    tokens = choose(logits.expand(10_000, 40), threshold=threshold)
    allowed = logits >= threshold
    assert bool(allowed[tokens].all())
    counts = torch.bincount(tokens, minlength=40)[allowed]
    assert chi_square(counts, logits[allowed].softmax(-1)) < 4


def test_seeds_and_positions_draw_independently() -> None:
    """Pairs of draws at neighbouring positions, and of neighbouring seeds, fill the square of outcomes evenly."""
    logits = torch.zeros(8_000, 6)
    tokens = choose(logits, seed=5)
    for other in (choose(logits, seed=5, first=1), choose(logits, seed=6), choose(logits, seed=5 + 2**33)):
        counts = torch.bincount(tokens * 6 + other, minlength=36)
        assert chi_square(counts, torch.full((36,), 1 / 36)) < 4


def test_noise_is_gumbel_in_its_rare_values_too() -> None:
    """P(noise > x) = 1 - exp(-exp(-x)); large values decide which rare tokens are drawn."""
    noise = gumbel(torch.arange(40), torch.arange(40), 50_000).flatten().double()
    assert float(noise.mean()) == pytest.approx(0.5772, abs=0.005)
    assert float(noise.var()) == pytest.approx(math.pi**2 / 6, abs=0.01)
    for x in (2.0, 6.0, 9.0):
        expected = noise.numel() * -math.expm1(-math.exp(-x))
        assert abs(int((noise > x).sum()) - expected) < 5 * math.sqrt(expected)


def test_exponential_values_of_small_words_are_exact() -> None:
    words = torch.tensor([0, 1, 1000, 2**20, round(2**32 * SERIES_BELOW) - 1, round(2**32 * SERIES_BELOW) + 1, 2**31])
    expected = -torch.log1p(-(words.double() + 0.5) * 2.0**-32)
    torch.testing.assert_close(exponential(words).double(), expected, rtol=1e-5, atol=0)
    assert float(exponential(torch.tensor([2**32 - 1]))) == pytest.approx(24 * math.log(2))


def test_noise_of_a_token_is_its_word_of_the_generator() -> None:
    assert (quarter(256), quarter(257), quarter(151_936)) == (64, 128, 38_016)
    whole = gumbel(torch.tensor([9]), torch.tensor([4]), 300)
    torch.testing.assert_close(whole[:, :130], gumbel(torch.tensor([9]), torch.tensor([4]), 500)[:, :130][:, :130])


def test_a_row_without_a_finite_maximum_is_broken_alone() -> None:
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(0))
    expected = choose(logits, seed=2)
    logits[1, 3], logits[2], logits[3, 0] = math.nan, -math.inf, math.inf
    found = choose(logits, seed=2)
    assert found[[1, 2, 3]].tolist() == [BROKEN] * 3
    assert torch.equal(found[[0, 4]], expected[[0, 4]])


def test_zero_temperature_takes_the_first_largest() -> None:
    assert choose(torch.tensor([[1.0, 3.0, 3.0, 2.0]]), temperature=0).tolist() == [1]


def _kept_by_hand(row: Tensor, temperature: float, top_k: int, top_p: float, min_p: float) -> set[int]:
    """Tokens that are left, by the definitions, one token after the other."""
    probabilities = (row.double() / temperature).softmax(-1)
    order = sorted(range(len(row)), key=lambda i: -float(row[i]))
    kept = [i for i in order if probabilities[i] >= min_p * probabilities.max()]
    kept = kept[: top_k or None]
    total, mass, found = float(probabilities[kept].sum()), 0.0, []
    for i in kept:
        if mass >= top_p * total and top_p < 1:
            break
        found.append(i)
        mass += float(probabilities[i])
    return set(found)


CASES = [(1.0, 5, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.3, 0, 1.0, 0.05), (0.6, 20, 0.8, 0.0), (1.0, 30, 0.95, 0.02)]


@pytest.mark.parametrize(("temperature", "top_k", "top_p", "min_p"), CASES)
@pytest.mark.parametrize("vocab_size", [60, 3000])
def test_thresholds_keep_what_the_definitions_keep(
    vocab_size: int, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    """A vocabulary larger than what is sorted on a CPU, too."""
    logits = torch.randn(3, vocab_size, generator=torch.Generator().manual_seed(1)) * 2
    rows = (torch.full((3,), temperature), torch.full((3,), top_k), torch.full((3,), top_p), torch.full((3,), min_p))
    found = find_thresholds(logits, *rows)
    assert torch.equal(found, thresholds_reference(logits, *rows))
    for row, threshold in zip(logits, found, strict=True):
        kept = set(torch.nonzero(row >= threshold)[:, 0].tolist())
        assert kept == _kept_by_hand(row, temperature, top_k, top_p, min_p)


@pytest.mark.parametrize("scale", [0.1, 3.0, 12.0])
def test_wide_vocabularies_on_a_cpu_draw_what_the_reference_draws(scale: float) -> None:
    """Where only some tokens can win, and where nearly all can; of few rows, which all get noise, too."""
    num, generator = 40, torch.Generator().manual_seed(0)
    logits = torch.randn(num, 5000, generator=generator) * scale
    logits[3, 7], logits[4, 9], logits[5] = math.nan, -math.inf, -math.inf
    slots, temperatures = torch.arange(num), torch.linspace(0, 2, num)
    for thresholds in (None, torch.where(slots % 2 == 0, scale, -math.inf)):
        lasts = torch.zeros(2, num, dtype=torch.int64)
        found = sampling.choose(logits, temperatures, slots * 3, slots, slots + 7, lasts[0], thresholds)
        expected = choose_reference(logits, temperatures, slots * 3, slots, slots + 7, lasts[1], thresholds)
        assert torch.equal(found, expected)
        assert torch.equal(*lasts)
        assert found[[3, 5]].tolist() == [BROKEN] * 2
        few, limits = slots[2:9], None if thresholds is None else thresholds[2:9]
        alone = sampling.choose(logits[2:9], temperatures, slots * 3, few, few + 7, lasts[0], limits)
        assert torch.equal(alone, expected[2:9])


def test_words_of_a_cpu_are_the_generators() -> None:
    """Each lane, with seeds of 64 bits whose highest is set too."""
    seeds = torch.tensor([5, -3, 2**62 + 2**33 + 9])
    columns, positions = torch.tensor([0, 7, 37_983]), torch.tensor([1, 2**31 - 1, 12])
    arrays = (columns.numpy().astype(np.uint64), positions.numpy().astype(np.uint64), seeds.numpy().view(np.uint64))
    expected = torch.stack(philox(columns, positions, SITE, seeds))
    assert np.array_equal(words_of(*arrays), expected.numpy().astype(np.uint64))


def test_noise_is_never_above_its_bound() -> None:
    least = exponential(torch.tensor([0]))
    assert MOST_NOISE - 0.2 < -float(least.log()) < MOST_NOISE - 0.1


def test_noise_is_never_above_what_the_upper_bits_of_its_word_allow() -> None:
    """What a GPU leaves tokens out by: -log(u) of the word's 23 upper bits."""
    words = torch.randint(0, 2**32, (100_000,), generator=torch.Generator().manual_seed(0)) >> (
        torch.arange(100_000) % 20
    )
    words = torch.cat([words, torch.tensor([0, 1, 511, 512, 2**26 - 1, 2**26, 2**32 - 513, 2**32 - 1])])
    least = ((words >> 9).double() * 2.0**-23).log()
    assert bool((-exponential(words).log().double() <= 1e-5 - least).all())


def test_tokens_that_equal_the_threshold_stay_together() -> None:
    logits = torch.tensor([[3.0, 1.0, 1.0, 1.0, 0.0, -math.inf]])
    one = torch.ones(1)
    assert float(find_thresholds(logits, one, torch.tensor([2]), one, one * 0)) == 1
    assert float(find_thresholds(logits, one, torch.tensor([6]), one, one * 0)) == 0
    assert float(find_thresholds(logits, one, torch.tensor([0]), one * 1e-9, one * 0)) == 3


def test_flat_rows_keep_a_large_set() -> None:
    """Far more tokens than what is sorted first on a CPU."""
    logits = torch.randn(1, 5000, generator=torch.Generator().manual_seed(1)) * 0.01
    one = torch.ones(1)
    threshold = find_thresholds(logits, one, torch.zeros(1, dtype=torch.int64), one * 0.9, one * 0)
    share = logits.softmax(-1)[logits >= threshold].sum()
    assert float(share) == pytest.approx(0.9, abs=3e-4)


INTERPRETED = """
import torch
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels import sampling
from tunesmith.kernels.philox import philox
from tunesmith.kernels.sampling import choose, choose_greedily, choose_reference, find_thresholds, thresholds_reference

torch.manual_seed(0)
inf = float("inf")
for rows, vocab, dtype in ((6, 50, torch.float32), (1, 4500, torch.bfloat16)):
    logits = (torch.randn(rows, vocab) * 3).to(dtype)
    if rows == 6:
        logits[3, 7], logits[4], logits[5, 1] = float("nan"), -inf, inf
    temperatures, seeds = torch.tensor([0.0, 0.7, 1.0, 2.0, 0.3, 1.0, 0.0]), torch.arange(7) * (2**40 + 7)
    slots, positions = torch.tensor([4, 1, 0, 3, 2, 5])[:rows], torch.arange(rows) * 3 + 5
    for thresholds in (None, torch.tensor([-1.0, 1.0, 0.0, 1.0, 1.0, 1.0])[:rows]):
        lasts = [torch.zeros(7, dtype=torch.int64) for _ in range(4)]
        given = (logits, temperatures, seeds, slots, positions)
        with kernels_on("cpu"):
            found = choose(*given, lasts[0], thresholds)
            greedy = choose(logits, temperatures * 0, *given[2:], lasts[1])
        assert torch.equal(found, choose_reference(*given, lasts[2], thresholds)), (found, dtype)
        assert torch.equal(greedy, choose_greedily(logits, slots, lasts[3]))
        assert torch.equal(lasts[0], lasts[2]) and torch.equal(lasts[1], lasts[3])

# A program goes over six blocks, and leaves out those in which no token can reach the best so far.
from tunesmith.kernels import sampling_triton

sampling_triton._COLUMNS, sampling_triton.num_splits = 128, lambda *_: 1
logits = torch.randn(4, 2600) * torch.tensor([0.01, 1.0, 8.0, 0.5])[:, None]
logits[1, :2000], logits[3, 2500] = -inf, float("nan")
temperatures, slots = torch.tensor([1.0, 0.6, 0.05, 1.0]), torch.arange(4)
for rows, thresholds in ((4, None), (1, logits[:1].quantile(0.9, dim=-1))):
    given = (logits[:rows], temperatures, slots * 7, slots[:rows], slots[:rows] + 3)
    with kernels_on("cpu"):
        found = choose(*given, torch.zeros(4, dtype=torch.int64), thresholds)
    assert torch.equal(found, choose_reference(*given, torch.zeros(4, dtype=torch.int64), thresholds)), found

wanted = ((0.7, 0, 1.0, 0.0), (1.0, 5, 1.0, 0.0), (0.7, 0, 0.9, 0.0), (1.5, 0, 1.0, 0.05), (0.6, 20, 0.8, 0.0),
          (1.0, 7, 0.9, 0.1), (0.3, 0, 0.6, 0.02), (2.0, 50000, 0.5, 0.0), (0.0, 3, 0.5, 0.0))
# The last case has more candidates than are gathered.
for vocab, dtype, scale, rows in ((50, torch.float32, 3, (0, 3, 5, 8)), (5000, torch.bfloat16, 2, (4,)),
                                  (4700, torch.float32, 0.01, (2,))):
    temperatures, top_k, top_p, min_p = (torch.tensor(column) for column in zip(*(wanted[row] for row in rows)))
    logits = (torch.randn(len(rows), vocab) * scale).to(dtype)
    logits[0, 3] = -inf
    given = (logits, temperatures, top_k, top_p, min_p)
    with kernels_on("cpu"):
        found = find_thresholds(*given)
    assert torch.equal(found, thresholds_reference(*given)), (found, thresholds_reference(*given))

from tunesmith.kernels.sampling_logits import Allowed, Seen, change_logits, change_logits_reference

answers = torch.randint(0, 3, (3, 2100), dtype=torch.int16)
penalties = torch.tensor([[0.5, 0, 1], [0.1, 1, 0], [1.3, 1, 2]])
seen = Seen(torch.rand(3, 2100) < 0.3, answers, torch.tensor([2, -1, 0]), penalties)
allowed = Allowed(torch.randint(-(2**31), 2**31, (2, 66)).to(torch.int32), torch.tensor([1, 0, -1]))
logits, slots = torch.randn(3, 2100).bfloat16(), torch.tensor([2, 0, 1])
for masks in (None, allowed):
    with kernels_on("cpu"):
        found = change_logits(logits, slots, seen, masks)
    assert torch.equal(found, change_logits_reference(logits, slots, seen, masks))

from tunesmith.kernels import log_normaliser_triton
from tunesmith.kernels.log_normaliser import log_normaliser, log_normaliser_reference

log_normaliser_triton._COLUMNS = 64
logits = torch.randn(5, 150) * 9
logits[1, 3:], logits[2], logits[3, 5], logits[4, 70] = -inf, -inf, float("nan"), inf
for given in (logits, logits[:1, 1:], logits[:3].bfloat16()):
    with kernels_on("cpu"):
        found = log_normaliser(given)
    torch.testing.assert_close(found, log_normaliser_reference(given), rtol=1e-6, atol=1e-6, equal_nan=True)
"""


def test_kernels_equal_their_references_interpreted(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(INTERPRETED)
