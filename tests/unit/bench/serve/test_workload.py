"""What is sent: seeded, of real data, within the model's vocabulary and length."""

from __future__ import annotations

import itertools
import json
import lzma
import math
from pathlib import Path

import pytest

from tunesmith.bench.serve.arrivals import Point, intended_times, poisson
from tunesmith.bench.serve.workload import Item, Workload, fresh, make_requests
from tunesmith.errors import DataError, RecipeError


def test_synthetic_requests_are_seeded() -> None:
    one = make_requests(Workload(count=20, prompt_tokens=(5, 9), output_tokens=(2, 3), num_ids=100)).items
    assert one == make_requests(Workload(count=20, prompt_tokens=(5, 9), output_tokens=(2, 3), num_ids=100)).items
    assert (
        one != make_requests(Workload(count=20, prompt_tokens=(5, 9), output_tokens=(2, 3), num_ids=100, seed=1)).items
    )
    assert {item.prompt_tokens for item in one} == set(range(5, 10))
    assert {item.max_tokens for item in one} == {2, 3}
    assert max(token for item in one for token in item.prompt if isinstance(token, int)) < 100


def test_no_cache_knows_the_prompts_of_another_point() -> None:
    items = make_requests(Workload(count=50, prompt_tokens=(20, 30))).items
    prompts = {item.prompt for salt in range(300) for item in fresh(items, salt)}
    assert len({prompt[:16] for prompt in prompts}) == 50 * 300
    assert [item.prompt_tokens for item in fresh(items, 7)] == [item.prompt_tokens for item in items]
    assert fresh([Item("why?", 4)], 3)[0].prompt == "(3) why?"
    assert len(fresh([Item((5,), 4)], 3)[0].prompt) == 1


def test_real_prompts_with_their_times(data_dir: Path) -> None:
    items = make_requests(Workload("sharegpt", data_dir / "sharegpt_serving", count=None)).items
    assert len(items) == 300
    times = [item.arrival_s or 0.0 for item in items]
    assert times == sorted(times) and times[-1] > 1
    small = make_requests(
        Workload("sharegpt", data_dir / "sharegpt_serving", count=5, num_ids=4096, max_model_len=2048)
    )
    assert max(token for item in small.items for token in item.prompt if isinstance(token, int)) < 4096
    assert len(small.notes) == 2 and "left out" in small.notes[0] and "folded" in small.notes[1]


def test_a_production_trace(data_dir: Path) -> None:
    requests = make_requests(Workload("azure", data_dir / "traces_azure2023", count=4))
    assert [(item.prompt_tokens, item.max_tokens) for item in requests.items] == [
        (374, 44),
        (396, 109),
        (879, 55),
        (91, 16),
    ]
    times = intended_times(Point("trace", 2.0), requests.items, 0)
    assert times is not None and times[0] == 0 and times[1] == pytest.approx(4.314579 / 2)


def test_questions(data_dir: Path) -> None:
    (item,) = make_requests(Workload("gsm8k", data_dir / "gsm8k", count=1)).items
    assert isinstance(item.prompt, str) and "Janet" in item.prompt
    assert (item.max_tokens, item.prompt_tokens) == (512, None)


def test_what_can_not_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--data"):
        make_requests(Workload("azure"))
    with pytest.raises(RecipeError, match=r"sharegpt\*"):
        make_requests(Workload("sharegpt", tmp_path))
    rows = tmp_path / "test.jsonl.xz"
    rows.write_bytes(lzma.compress(json.dumps({"answer": "4"}).encode()))
    with pytest.raises(DataError, match="no question"):
        make_requests(Workload("gsm8k", rows))
    with pytest.raises(DataError, match="no request that fits"):
        make_requests(Workload(count=3, max_model_len=10))


def test_poisson_arrivals() -> None:
    times = poisson(4000, 8.0, seed=1)
    assert times == sorted(times) and times[0] == 0 and times == poisson(4000, 8.0, seed=1)
    gaps = [b - a for a, b in itertools.pairwise(times)]
    mean = sum(gaps) / len(gaps)
    assert mean == pytest.approx(1 / 8, rel=0.05)
    deviation = math.sqrt(sum((gap - mean) ** 2 for gap in gaps) / len(gaps))
    assert deviation == pytest.approx(mean, rel=0.08)  # an exponential's deviation is its mean
    assert poisson(3, math.inf, seed=1) == [0.0, 0.0, 0.0]


def test_loads_have_names() -> None:
    points = (Point("open", 2.5), Point("open", math.inf), Point("closed", 16), Point("trace", 2))
    assert [point.name for point in points] == ["rate-2.5", "rate-inf", "concurrency-16", "replay-2"]
    assert intended_times(Point("closed", 4), [Item((1,), 1)], 0) is None
    with pytest.raises(RecipeError, match="no arrival times"):
        intended_times(Point("trace", 1), [Item((1,), 1)], 0)
