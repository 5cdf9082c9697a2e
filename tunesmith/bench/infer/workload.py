"""The token ids that all engines get: the same for every engine, format and round.

The 256 requests of `run`, the warm-up and the prompts of batch 1 are drawn in one order from `random.Random(seed)`,
with ids from 10 to 9000, so that seed 0 gives prompt and output lengths that others can draw again.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

FIRST_ID, LAST_ID = 10, 9000
KINDS = ("latency", "throughput", "prefill", "batches")


@dataclass(frozen=True)
class InferWorkload:
    """What is measured. kinds: some of KINDS.

    latency      one request, `latency_tokens` in and out, several times
    throughput   `requests` at once, prompt and output lengths uniform in `lengths`, both ends included
    prefill      prompts x tokens of `prefill`, one token out
    batches      for each of `batches`: so many requests at once, `batch_tokens` in and out, several times
    """

    kinds: tuple[str, ...] = ("latency", "throughput", "prefill")
    requests: int = 256
    lengths: tuple[int, int] = (100, 1024)
    prefill: tuple[int, int] = (32, 2048)
    latency_tokens: tuple[int, int] = (128, 512)
    batches: tuple[int, ...] = (1, 4, 16)
    batch_tokens: tuple[int, int] = (128, 128)
    samples: int = 3
    seed: int = 0
    questions: tuple[tuple[int, ...], ...] = ()

    @property
    def longest(self) -> int:
        """Tokens of the longest request, prompt and answer together."""
        sizes = {
            "latency": max(self.latency_tokens[0], *map(len, self.questions), 0) + self.latency_tokens[1],
            "throughput": 2 * self.lengths[1],
            "prefill": self.prefill[1] + 1,
            "batches": sum(self.batch_tokens),
        }
        return max(sizes[kind] for kind in self.kinds)


def make_job_measures(workload: InferWorkload, vocab_size: int) -> dict[str, Any]:
    """The measurements as the protocol wants them: first_prompt and measures, all ids within the vocabulary."""
    rng = random.Random(workload.seed)

    def draw(count: int) -> list[int]:
        return [rng.randint(FIRST_ID, LAST_ID) for _ in range(count)]

    first, _, _ = draw(16), draw(128), draw(128)
    makers: dict[str, Callable[[], list[dict[str, Any]]]] = {
        "throughput": lambda: [_throughput(workload, rng, draw)],
        "prefill": lambda: [_prefill(workload, draw)],
        "latency": lambda: [_latency(workload, draw)],
        "batches": lambda: [
            _batch(f"batch-{n}", n, *workload.batch_tokens, workload.samples, draw) for n in workload.batches
        ],
    }
    # Drawn in this order whatever is asked for, so that a kind has the same ids beside any other.
    made = {
        kind: make() for kind, make in makers.items() if kind in ("throughput", "prefill") or kind in workload.kinds
    }
    measures = [measure for kind in KINDS if kind in workload.kinds for measure in made[kind]]
    return {
        "first_prompt": _fold(first, vocab_size),
        "measures": [_folded(measure, vocab_size) for measure in measures],
    }


def _throughput(workload: InferWorkload, rng: random.Random, draw: Callable[[int], list[int]]) -> dict[str, Any]:
    lengths = [rng.randint(*workload.lengths) for _ in range(workload.requests)]
    outputs = [rng.randint(*workload.lengths) for _ in range(workload.requests)]
    sample = {"prompts": [draw(length) for length in lengths], "outputs": outputs}
    return {"name": "throughput", "kind": "run", "warm_up": [draw(16)], "samples": [sample]}


def _prefill(workload: InferWorkload, draw: Callable[[int], list[int]]) -> dict[str, Any]:
    count, length = workload.prefill
    sample = {"prompts": [draw(length) for _ in range(count)], "outputs": [1] * count}
    return {"name": "prefill", "kind": "run", "warm_up": [draw(16)], "samples": [sample]}


def _latency(workload: InferWorkload, draw: Callable[[int], list[int]]) -> dict[str, Any]:
    length, outputs = workload.latency_tokens
    if not workload.questions:
        return _batch("latency", 1, length, outputs, workload.samples, draw)
    # Each question is asked twice, for one token and for all: a token before it keeps a cache from knowing it.
    samples = [
        {"first": [[*draw(1), *ids]], "prompts": [[*draw(1), *ids]], "outputs": [outputs]} for ids in workload.questions
    ]
    return {"name": "latency", "kind": "batch", "warm_up": [draw(length)], "samples": samples[: workload.samples]}


def _batch(
    name: str, count: int, length: int, outputs: int, samples: int, draw: Callable[[int], list[int]]
) -> dict[str, Any]:
    def prompts() -> list[list[int]]:
        return [draw(length) for _ in range(count)]

    taken = [{"first": prompts(), "prompts": prompts(), "outputs": [outputs] * count} for _ in range(samples)]
    return {"name": name, "kind": "batch", "warm_up": prompts(), "samples": taken}


def _fold(ids: Sequence[int], vocab_size: int) -> list[int]:
    """Ids within the vocabulary; those that are, as they were."""
    low = min(FIRST_ID, vocab_size - 1)
    return [token if token < vocab_size else low + token % (vocab_size - low) for token in ids]


def _folded(measure: dict[str, Any], vocab_size: int) -> dict[str, Any]:
    def fold(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
        return [_fold(prompt, vocab_size) for prompt in prompts]

    samples = [
        {key: fold(value) if key in ("first", "prompts") else value for key, value in sample.items()}
        for sample in measure["samples"]
    ]
    return {**measure, "warm_up": fold(measure["warm_up"]), "samples": samples}
