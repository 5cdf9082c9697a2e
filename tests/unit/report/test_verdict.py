"""The verdict in words, from numbers whose answer is known."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tunesmith.report.load import read_run
from tunesmith.report.rows import rows_of
from tunesmith.report.strings import Words
from tunesmith.report.verdict import Verdict, bench_verdict

BenchRun = Callable[..., Path]
Make = Callable[..., dict[str, Any]]


def verdict_of(path: Path, language: Any = "en") -> Verdict:
    return bench_verdict(rows_of(read_run(path)), Words(language))


def test_the_sentences_say_what_the_numbers_say(methods_run: Path) -> None:
    verdict = verdict_of(methods_run)
    assert verdict.headline == "LoRA is the fastest and needs the least memory (80 MB)."
    assert [sentence.text for sentence in verdict.sentences] == [
        "LoRA: 60 % less memory, 30 % less time, loss +1.0 %.",
        "QLoRA: 56 % less memory, 4 % slower, loss +0.3 %.",
        "Checkpointing on top of QLoRA saved nothing (as much memory, 35 % slower, same loss): skip it.",
    ]
    assert [sentence.kind for sentence in verdict.sentences] == ["fact", "fact", "warning"]


def test_the_same_in_chinese(methods_run: Path) -> None:
    texts = [sentence.text for sentence in verdict_of(methods_run, "zh").sentences]
    assert texts[1] == "QLoRA：内存减少 56 %，慢 4 %，损失 +0.3 %。"
    assert texts[2].startswith("在 QLoRA 上再加梯度检查点没有节省")


def test_two_winners_are_both_named(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    run = bench_run(cell("fast", step_s=0.05), cell("small", owners_bytes=(1e6, 0, 0, 0, 0)))
    assert verdict_of(run).headline == ("fast is the fastest (50.2 ms per step); small needs the least memory (1 MB).")


def test_a_difference_within_the_noise_is_not_called_one(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    slow = cell("b", parent="a")
    slow["times"]["steps_s"] = [0.09, 0.12, 0.1, 0.13, 0.08]
    first = cell("a")
    first["times"]["steps_s"] = [0.1, 0.09, 0.11, 0.12, 0.08]
    verdict = verdict_of(bench_run(first, slow))
    assert "no difference in time that can be told from noise (0." in verdict.sentences[1].text
    assert verdict.sentences[0].kind == "warning"
    assert verdict.sentences[0].text.startswith("The times are noisy: a step of b took 100 ms at the median, with a 95")


def test_equal_times_are_as_fast_and_not_noisy(bench_run: BenchRun, cell: Make) -> None:
    sentences = verdict_of(bench_run(cell("a"), cell("b", parent="a"))).sentences
    assert [sentence.text for sentence in sentences] == ["b: as much memory, as fast within the noise, same loss."]


def test_a_tie_of_unlike_times_shows_both(bench_run: BenchRun, cell: Make) -> None:
    """The bug: 149 and 340 ms were "equally fast, within noise (149 ms per step)", and the gain was to be skipped."""
    first, other = cell("full"), cell("lora", parent="full", gain="checkpointing", owners_bytes=(99e6, 0, 0, 0, 0))
    first["times"]["steps_s"] = [0.149, 0.14, 0.5, 0.149, 0.6]
    other["times"]["steps_s"] = [0.34, 0.13, 0.34, 0.12, 0.4]
    run = bench_run(first, other)
    verdict = verdict_of(run)
    assert verdict.headline == (
        "Which of full, lora is the fastest can't be told from the noise (149 ms to 340 ms per step); "
        "lora needs the least memory (99 MB)."
    )
    assert not any("skip it" in sentence.text for sentence in verdict.sentences)
    chinese = verdict_of(run, "zh")
    assert "149 ms 至 340 ms" in chinese.headline
    assert chinese.sentences[0].text.startswith("计时噪声很大")


def test_a_tie_is_named_before_the_least_memory(bench_run: BenchRun, cell: Make) -> None:
    """The bug: a row within the noise of another was "the fastest" where it also needed the least memory."""
    headline = verdict_of(bench_run(cell("full"), cell("lora", owners_bytes=(9e6, 0, 0, 0, 0)))).headline
    assert (
        headline == "full, lora are equally fast, within noise (100 ms per step); lora needs the least memory (9 MB)."
    )


def test_throughput_is_that_of_the_median_step(bench_run: BenchRun, cell: Make) -> None:
    """The bug: bars of tokens/s came from the mean of all steps, the times beside them from the median."""
    noisy = cell("a", throughput={"tokens_per_s": 374.0})
    noisy["times"]["steps_s"] = [0.1, 0.1, 0.1, 0.1, 0.1, 0.1, 0.9, 2.0]
    (row,) = rows_of(read_run(bench_run(noisy)))
    assert row.tokens_per_s == pytest.approx(100 / 0.1)
    assert row.trained_tokens_per_s == pytest.approx(37.5 / 0.1)


def test_failed_cells_are_named_with_their_reason(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    run = bench_run(cell("a"), failed("b", "out_of_memory", "tried to allocate 9 GiB\nmore"), order=["a", "b", "c"])
    texts = [sentence.text for sentence in verdict_of(run).sentences]
    assert texts == ["b: out of memory (tried to allocate 9 GiB).", "c: not run."]


def test_unequal_work_is_not_compared(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    """The rest is then compared with the first cell that did the usual work."""
    other = {"steps": 8, "tokens": 400, "trained_tokens": 150}
    run = bench_run(
        cell("full", work=other),
        cell("lora", parent="full"),
        cell("qlora", parent="full", owners_bytes=(20e6, 0, 10e6, 10e6, 10e6)),
    )
    texts = [sentence.text for sentence in verdict_of(run).sentences]
    assert texts[0] == "Full did other work than the rest: it is not compared."
    assert texts[1] == "qlora against lora: 50 % less memory, as fast within the noise, same loss."


def test_random_weights_say_nothing_about_loss(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    random = {"model": {"weights": "random"}}
    run = bench_run(cell("a", recipe=random), cell("b", parent="a", recipe=random, loss=9.0, step_s=0.3))
    assert verdict_of(run).sentences[0].text == "b: as much memory, 3.0× the time."


@pytest.mark.parametrize("language", ["en", "zh"])
def test_nothing_measured_says_so(bench_run: BenchRun, failed: Make, language: str) -> None:
    run = bench_run(failed("a", "failed", "x"))
    assert verdict_of(run, language).headline in ("No cell was measured.", "没有测到任何单元。")


def test_what_was_not_measured_is_left_out_of_the_sentence(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    bare = cell("b", parent="a", step_s=0.3, losses={"training": [], "validation": None})
    bare["memory"]["allocated_peak_bytes"] = None
    assert verdict_of(bench_run(cell("a"), bare)).sentences[0].text == "b: 3.0× the time."
