"""The same token ids for every engine."""

from __future__ import annotations

import random

from tunesmith.bench.infer.workload import InferWorkload, make_job_measures


def test_the_256_requests_are_those_that_others_draw() -> None:
    """The order of draws is fixed: 16 ids, twice 128, all prompt lengths, all output lengths, then the prompts."""
    rng = random.Random(0)
    first = [rng.randint(10, 9000) for _ in range(16)]
    for _ in range(256):
        rng.randint(10, 9000)
    lengths = [rng.randint(100, 1024) for _ in range(256)]
    outputs = [rng.randint(100, 1024) for _ in range(256)]
    prompt = [rng.randint(10, 9000) for _ in range(lengths[0])]
    job = make_job_measures(InferWorkload(kinds=("throughput",)), 151936)
    (measure,) = job["measures"]
    (sample,) = measure["samples"]
    assert job["first_prompt"] == first
    assert sample["outputs"] == outputs and [len(p) for p in sample["prompts"]] == lengths
    assert sample["prompts"][0] == prompt


def test_a_kind_has_the_same_ids_beside_any_other() -> None:
    alone = make_job_measures(InferWorkload(kinds=("prefill",), requests=3, prefill=(2, 8)), 5000)["measures"]
    beside = make_job_measures(InferWorkload(kinds=("throughput", "prefill"), requests=3, prefill=(2, 8)), 5000)[
        "measures"
    ]
    assert alone[0] == beside[1]
    assert beside[1]["samples"][0]["outputs"] == [1, 1]


def test_ids_are_folded_into_a_small_vocabulary() -> None:
    workload = InferWorkload(kinds=("batches",), batches=(1, 3), batch_tokens=(6, 4), samples=2)
    job = make_job_measures(workload, 272)
    assert [measure["name"] for measure in job["measures"]] == ["batch-1", "batch-3"]
    sample = job["measures"][1]["samples"][0]
    assert len(sample["first"]) == len(sample["prompts"]) == 3 and sample["outputs"] == [4, 4, 4]
    assert sample["first"] != sample["prompts"]  # or a cache of prefixes would know the second
    assert all(10 <= token < 272 for measure in job["measures"] for p in measure["warm_up"] for token in p)
    assert workload.longest == 10


def test_questions_keep_their_ids() -> None:
    workload = InferWorkload(kinds=("latency",), questions=((5, 6, 7), (8, 9)), samples=1, latency_tokens=(4, 20))
    (measure,) = make_job_measures(workload, 100)["measures"]
    (sample,) = measure["samples"]
    assert sample["prompts"][0][1:] == [5, 6, 7] and sample["first"][0][1:] == [5, 6, 7]
    assert sample["prompts"] != sample["first"]
    assert workload.longest == 24
