"""The search for the longest sequence: its arithmetic, and the whole of it on a tiny model with a cap of its own."""

from __future__ import annotations

import gc
import importlib.util
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import Mock

import pytest
import torch

from tunesmith.bench import long_step
from tunesmith.bench.long_attention import AttentionCheck
from tunesmith.bench.long_step import Step
from tunesmith.errors import DeviceError, NonFiniteError
from tunesmith.model import cpu_attention
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.resolve import resolve_recipe

ROOT = Path(__file__).parents[3]


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("long_context", ROOT / "benchmarks" / "long_context.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(autouse=True)
def _little_to_collect() -> Iterator[None]:
    """Every step collects garbage, and would look at all that the tests before have imported."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Six blocks, as builtin:tiny, but narrow ones."""
    folder = tmp_path_factory.mktemp("narrow")
    config = json.loads((ROOT / "tunesmith" / "models" / "tiny" / "config.json").read_text(encoding="utf-8"))
    config |= {"hidden_size": 64, "intermediate_size": 128, "vocab_size": 256}
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    raw = {
        "model": {"path": str(folder), "weights": "random", "device": "cpu"},
        "method": {"kind": "qlora", "rank": 4},
        "data": {"format": "tokens", "max_length": 64, "validation_fraction": 0},
        "train": {"micro_batch_tokens": 64, "checkpointing": "block", "loss_chunk_tokens": 64},
    }
    return resolve_recipe(recipe_from_mapping(raw))


def test_a_surface_through_four_peaks(bench: ModuleType) -> None:
    truth = bench.Peaks(1000.0, 50.0, 7.0, 2.0)
    peaks = {(n, t): int(truth.bytes_for(n, t)) for n in bench.BLOCKS for t in (10, 30)}
    found = bench.Peaks.through((10, 30), peaks)
    assert found == truth
    most = found.most_tokens(32, 20_000)
    assert found.bytes_for(32, most) <= 20_000 < found.bytes_for(32, most + 1)
    assert found.most_tokens(32, 2000) == 0


def test_the_longest_step_is_found_and_taken(
    bench: ModuleType, recipe: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Under a cap in bytes of live storages; a sixteenth longer would not have fitted.

    Without the CPU's attention that holds probabilities for some lengths: peaks would not grow with the length.
    """
    monkeypatch.setattr(cpu_attention, "LONGEST", 0)
    cap = 2_800_000
    answer = bench.Answer(tmp_path / "answer.json")
    found = bench.find(recipe, bench.Limits(cap, 100_000), (64, 128), 3, 1, answer)
    assert found["stopped_by"] == "device memory"
    assert found["tokens"] >= 256
    assert found["steps"][-1]["peak_bytes"] <= cap
    assert found["predicted_peak_bytes"] == pytest.approx(found["steps"][-1]["peak_bytes"], rel=0.1)
    assert found["check"]["tokens"] == found["attention_checks"][0]["tokens"] >= found["tokens"]
    assert found["check_predicted_bytes"] == pytest.approx(found["check"]["peak_bytes"], rel=0.1)
    longer = bench.take_step(bench.of_length(recipe, found["tokens"] * 17 // 16))
    assert longer.peak_bytes > cap * 0.95
    assert json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))["tokens"] == found["tokens"]


def test_other_bounds_stop_it_too(bench: ModuleType, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(given: Any) -> Step:
        tokens, blocks = int(given.data.max_length), bench.config_of(given).num_hidden_layers
        return Step(tokens, 100 * tokens * blocks, build_s=0.0, seconds=0.1 * blocks, loss=5.0)

    monkeypatch.setattr(bench, "take_step", taken)
    monkeypatch.setattr(long_step, "take_step", taken)
    answer = bench.find(recipe, bench.Limits(10**9, 300), (64, 128), 1)
    assert (answer["stopped_by"], answer["tokens"]) == ("--most", 256)
    assert answer["bounds_tokens"] == {"--most": 300, "device memory": 970_000_000 // 601}  # a byte a token at least
    monkeypatch.setattr(bench, "available_memory_bytes", lambda: 10**9)
    offloaded = recipe_from_mapping({"model": {"path": "recipes/configs/llama-3.1-8b"}, "method": {"kind": "qlora"}})
    train = offloaded.train.model_copy(update={"checkpointing": "offload-block", "precision": "bfloat16"})
    monkeypatch.chdir(ROOT)
    tokens = bench.host_tokens(offloaded.model_copy(update={"train": train}))
    assert tokens == pytest.approx(0.8 * 10**9 / (31 * 4096 * 2), abs=2)
    assert bench.host_tokens(recipe) is None


def test_a_step_that_does_not_fit_is_an_answer(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for error, said in (
        (torch.OutOfMemoryError("no room"), "device memory"),
        (DeviceError("too little"), "host memory: too little"),
        (NonFiniteError("the loss is nan"), "not finite: the loss is nan"),
    ):
        monkeypatch.setattr(long_step, "take_step", Mock(side_effect=error))
        assert long_step.tried(recipe, 1).error == said


@pytest.fixture
def check(bench: ModuleType, recipe: Any, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """What `_checked` answers for 1,280 tokens where the checks went like this."""

    def run(steps: list[Any], attention: Sequence[float] = (1e-3,), seconds: float | None = None) -> Any:
        errors, taken = iter(attention), iter(steps)
        kernels, was_in = iter(["dense-cudnn", "varlen", "varlen", "varlen"]), iter([True, True, False, False])
        monkeypatch.setattr(bench, "leave_out", lambda name: next(was_in))
        monkeypatch.setattr(bench, "_attention", lambda r, t: _attention_check(t, next(kernels), next(errors)))
        monkeypatch.setattr(bench, "tried", lambda r, cap: next(taken)(int(r.data.max_length)))
        peaks = bench.Peaks(1000.0, 0.0, 10.0, 5.0)  # six blocks: 40 a token
        limits = bench.Limits(10**6, 10**6, seconds=seconds)
        return bench._checked(recipe, limits, peaks, 0.001, (1280, "host memory"), 2, bench.Answer())

    return run


def _attention_check(tokens: int, kernel: str, error: float) -> AttentionCheck:
    return AttentionCheck(tokens, kernel, 0.0, 0.0, error, 0.0, 1.0)


def _step(peak_bytes: int, seconds: float = 2.28) -> Callable[[int], Step]:
    return lambda tokens: Step(tokens, peak_bytes, build_s=1.0, seconds=seconds, loss=1.0)


def test_a_check_that_went_well_changes_nothing(check: Callable[..., Any]) -> None:
    assert check([_step(20_000)]) == (1280, "host memory")


def test_more_memory_than_predicted_is_less_tokens(check: Callable[..., Any]) -> None:
    """960 bytes a token of one block instead of 15: of what 0.97 MB leave, 1,000 bytes a token go to fewer tokens."""
    assert check([_step(1_230_000 + 1000)]) == (969_000 // 986 // 128 * 128, "device memory")


def test_a_check_that_fails_is_made_again_on_fewer(check: Callable[..., Any]) -> None:
    assert check([lambda t: Step(t, error="device memory"), _step(9)], (0.0, 0.0)) == (1152, "device memory")
    assert check([_step(9)], (0.5, 0.0)) == (1280, "host memory")  # by another kernel
    assert check([_step(9)], (0.5, 0.5, 0.5, 0.0)) == (1152, "attention is wrong")
    assert check([], (float("nan"), 0.5, 0.5, 0.5)) == (0, "attention is wrong")


def test_the_time_that_is_left_is_enough_for_fewer(check: Callable[..., Any]) -> None:
    """A block takes a second and the head 1.28; six of them, 5 % more and the head are 7.58 s."""
    assert check([_step(9)], seconds=4 + 7.7) == (1280, "host memory")
    assert check([_step(9)], seconds=4 + 7.58 / 4) == (512, "--seconds")  # a little less than half
    assert check([_step(9)], seconds=0.0) == (0, "--seconds")


def test_all_that_is_known_is_written_at_once(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    answer = bench.Answer(tmp_path / "answer.json")
    answer.note("one", first=1)
    answer.note("two", second=float("nan"))
    known = json.loads((tmp_path / "answer.json").read_text(encoding="utf-8"))
    assert (known["first"], known["second"], known["reached"]) == (1, None, "two")
    assert [line.split("] ")[1] for line in capsys.readouterr().err.splitlines()] == ["one", "two"]
