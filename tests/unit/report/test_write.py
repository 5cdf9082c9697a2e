"""The page and the Markdown file: complete, self-contained, and safe against what the data says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RecipeError, RunDirError
from tunesmith.report.write import write_report
from tunesmith.rundir.io import write_json_atomic

BenchRun = Callable[..., Path]
Make = Callable[..., dict[str, Any]]
HOSTILE = "</script><img src=x onerror=alert(1)>|`$x^2$` \"'&amp; 网店"
VOID = {"meta", "img", "br", "i", "link", "input", "path", "use", "rect"}


class Page(HTMLParser):
    """Every tag and attribute of a page, and whether tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.texts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag not in {"meta", "img", "br", "link", "input"}:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def page_of(*runs: Path, **options: Any) -> str:
    return write_report(list(runs), **options).html.read_text(encoding="utf-8")


def test_page_is_one_well_formed_file_without_outside_addresses(methods_run: Path, train_run: Path) -> None:
    text = page_of(methods_run, train_run)
    page = Page(text)
    assert page.open == []
    assert not re.search(r"(?:https?:)?//[a-z]", re.sub(r"<style>.*?</style>", "", text, flags=re.DOTALL))
    assert not any("src" in attributes or tag == "link" for tag, attributes in page.tags)
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    hrefs = [attributes["href"] for _, attributes in page.tags if attributes.get("href")]
    assert all(href is not None and href.startswith("#") for href in hrefs)


def test_every_plot_has_a_title_a_description_and_page_colours(methods_run: Path, train_run: Path) -> None:
    text = page_of(methods_run, train_run)
    plots = re.findall(r'<svg class="plot".*?</svg>', text, flags=re.DOTALL)
    assert len(plots) == 7  # memory, resident, time, throughput, losses, frontier, the training run
    for plot in plots:
        assert re.search(r"<title id=\S+>[^<]+</title><desc id=\S+>[^<]+</desc>", plot)
        assert "var(--" in plot
        assert "<text" in plot
    ids = re.findall(r'aria-labelledby="(\S+) ', text)
    assert len(set(ids)) == len(ids)


def test_every_line_of_a_chart_is_labelled(bench_run: BenchRun, cell: Make) -> None:
    """The bug: labels that were pushed below the axis were not drawn, where curves end together at its bottom."""
    names = [f"method {number}" for number in range(6)]
    text = page_of(bench_run(*(cell(name, losses={"training": [8.0, 1.0, 0.1]}) for name in names)))
    chart = next(svg for svg in re.findall(r"<svg.*?</svg>", text, flags=re.DOTALL) if '<title id="b0-losses' in svg)
    assert [name for name in names if not re.search(rf"<text[^>]*>{name}</text>", chart)] == []


def test_hostile_texts_are_shown_and_do_nothing(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    run = bench_run(
        cell(HOSTILE, label=HOSTILE, command=HOSTILE, gain=HOSTILE, device={"name": HOSTILE}),
        cell("b", label=HOSTILE + "2", parent=HOSTILE),
        failed("c", HOSTILE, HOSTILE),
        name=HOSTILE,
    )
    page = Page(page_of(run))
    assert page.open == []
    assert not [tag for tag, _ in page.tags if tag == "img"]
    assert sum(tag == "script" for tag, _ in page.tags) == 1
    assert any(HOSTILE in text for text in page.texts)
    markdown = (run / "report.md").read_text(encoding="utf-8")
    assert "<img" not in re.sub(r"(`+).*?\1", "", markdown)


def test_chinese_page_shows_chinese_in_plots(methods_run: Path) -> None:
    text = page_of(methods_run, language="zh")
    assert 'lang="zh-CN"' in text
    assert re.search(r"<text[^>]*>[^<]*梯度检查点</text>", text)
    assert "未测量" not in text


def test_unknown_language_is_refused(methods_run: Path) -> None:
    with pytest.raises(RecipeError, match="did you mean 'zh'"):
        write_report([methods_run], language="zhh")


def test_missing_values_are_not_measured_and_never_zero(bench_run: BenchRun, cell: Make) -> None:
    bare = cell(
        "bare", memory={}, owners={}, losses={}, throughput={"tokens_per_s": "fast"}, times={"steps_s": [1, None]}
    )
    markdown = write_report([bench_run(cell("whole"), bare)]).markdown.read_text(encoding="utf-8")
    row = next(line for line in markdown.splitlines() if line.startswith("| bare"))
    assert row.count("not measured") >= 5
    assert " 0 " not in row


def test_a_cell_of_nothing_but_its_name_does_not_break_the_page(bench_run: BenchRun) -> None:
    assert "odd" in page_of(bench_run({"schema_version": 1, "name": "odd"}))


def test_failed_cells_are_rows_with_their_reason(bench_run: BenchRun, cell: Make, failed: Make) -> None:
    text = page_of(bench_run(cell("a"), failed("b", "out_of_memory", "Tried to allocate 24.00 GiB")))
    assert "out of memory" in text
    assert "Tried to allocate 24.00 GiB" in text


def test_unequal_work_is_flagged(bench_run: BenchRun, cell: Make) -> None:
    other = {"steps": 8, "tokens": 801, "trained_tokens": 300}
    text = page_of(bench_run(cell("a"), cell("b"), cell("c", work=other)))
    assert text.count(">unequal work<") == 1
    assert "can&#39;t be compared" in text


def test_equal_work_is_said(methods_run: Path) -> None:
    assert "8 steps, 800 tokens, 300 of them trained" in page_of(methods_run)


def test_random_weights_are_labelled(bench_run: BenchRun, cell: Make) -> None:
    text = page_of(bench_run(cell("a", recipe={"model": {"weights": "random"}})))
    assert "speed and memory only, not quality" in text


@pytest.mark.parametrize(("data", "labelled"), [("messages", False), ("tokens", True)])
def test_pretraining_on_text_is_no_random_weights_run(train_run: Path, data: str, labelled: bool) -> None:
    """The bug: a run that pre-trained a model from random weights was labelled as saying nothing about quality."""
    recipe = f"model: {{weights: random}}\ndata: {{format: {data}}}\n"
    (train_run / "recipe.yaml").write_text(recipe, encoding="utf-8")
    assert ("speed and memory only, not quality" in page_of(train_run)) is labelled


def test_commands_are_there_to_copy(methods_run: Path) -> None:
    text = page_of(methods_run)
    assert "tunesmith bench train x.yaml --only qlora+gc</code><button" in text


def test_answers_before_and_after_and_the_certificate(methods_run: Path) -> None:
    answers = [{"question": "青竹茶杯多少钱？", "expected": "38 元", "answer": "不知道", "correct": False}]
    before = {"accuracy": 0.1, "perplexity": 9.0, "num_questions": 50, "answers": answers}
    after = {**before, "accuracy": 0.9, "answers": [{**answers[0], "answer": "38 元", "correct": True}]}
    write_json_atomic(methods_run / "eval-heldout.json", {"before": before, "after": after})
    checks = [{"name": "packing isolation", "passed": False, "value": 0.5, "limit": 0.0, "detail": "moved"}]
    write_json_atomic(methods_run / "certificate.json", {"checks": checks})
    text = page_of(methods_run)
    assert "Exact answers went from 10 % to 90 % of 50 questions." in text
    assert '<td class="wrong">不知道</td><td class="right">38 元</td>' in text
    assert "packing isolation" in text


def test_an_evaluation_as_the_eval_verb_writes_it(tmp_path: Path) -> None:
    example = {"question": "2+2?", "expected": ["4"], "said": "4", "right": True}
    accuracy = {"accuracy": 1.0, "num_questions": 1, "examples": [example]}
    (tmp_path / "quality.json").write_text(json.dumps({"accuracy": accuracy, "perplexity": {"perplexity": 3.5}}))
    files = write_report([tmp_path / "quality.json"])
    assert files.headline == "100 % of 1 questions answered exactly."
    assert '<td class="right">4</td>' in files.html.read_text(encoding="utf-8")


def test_wrong_answers_come_first_and_what_is_left_out_is_said(tmp_path: Path) -> None:
    """Of 25 answers the one that was wrong was the last, and the page showed 20."""
    examples = [{"question": f"{n}?", "expected": ["4"], "said": "4", "right": True} for n in range(24)]
    examples.append({"question": "24?", "expected": ["4"], "said": "five", "right": False})
    accuracy = {"accuracy": 0.96, "num_questions": 25, "examples": examples}
    (tmp_path / "quality.json").write_text(json.dumps({"accuracy": accuracy}))
    text = write_report([tmp_path / "quality.json"]).html.read_text(encoding="utf-8")
    assert "20 of the 25 questions are shown, wrong answers first." in text
    assert text.index('<td class="wrong">five</td>') < text.index('<td class="right">4</td>')


def write_evaluation(run: Path, name: str, model: str, num_right: int, said: str) -> None:
    """As `tunesmith eval` writes it, of ten questions."""
    example = {"row": "q:1", "question": "2+2?", "expected": ["4"], "said": said, "right": said == "4"}
    accuracy = {"questions": "q", "accuracy": num_right / 10, "num_questions": 10, "examples": [example]}
    (run / "evaluations").mkdir(exist_ok=True)
    write_json_atomic(
        run / "evaluations" / f"{name}.json",
        {"model": model, "adapter": None, "accuracy": accuracy, "perplexity": None},
    )


def test_evaluations_of_the_base_and_the_run_stand_side_by_side(train_run: Path) -> None:
    """The bug: only "after" columns, though both had been measured into the run."""
    (train_run / "recipe.yaml").write_text("model: {path: base/model}\n", encoding="utf-8")
    write_evaluation(train_run, "quality", str(train_run), 9, "4")
    write_evaluation(train_run, "quality-2", "base/model", 1, "5")
    text = page_of(train_run)
    assert "Exact answers went from 10 % to 90 % of 10 questions." in text
    assert "<h2>Before and after: tuned</h2>" in text
    assert '<td class="wrong">5</td><td class="right">4</td>' in text


def test_runs_of_one_name_are_called_by_their_directories(tmp_path: Path) -> None:
    """The bug: both runs were "run", and "100 % of 10 questions" was nobody's."""
    for name, num_right in (("first", 10), ("second", 7)):
        run = tmp_path / name
        run.mkdir()
        info = {"schema_version": 1, "kind": "train", "status": "finished", "name": "run", "tunesmith_version": "0"}
        write_json_atomic(run / "run.json", {**info, "created_at": "2026-01-02T03:04:05+00:00", "facts": {}})
        (run / "metrics.jsonl").write_text('{"event": "step", "step": 1, "loss": 1.5}\n', encoding="utf-8")
        write_evaluation(run, "quality", "x", num_right, "4")
    files = write_report([tmp_path / "first", tmp_path / "second"])
    texts = [files.headline, *files.sentences]
    assert texts == [
        "first: training loss 1.500 after 1 steps.",
        "second: training loss 1.500 after 1 steps.",
        "first: 100 % of 10 questions answered exactly.",
        "second: 70 % of 10 questions answered exactly.",
    ]
    page = files.html.read_text(encoding="utf-8")
    assert "<h2>Answers: first</h2>" in page and "<h2>Training run: second</h2>" in page


def test_several_evaluations_of_a_run_are_told_apart(train_run: Path) -> None:
    for name in ("quality", "quality-10", "quality-2"):
        write_evaluation(train_run, name, "x", 10 if name == "quality" else int(name[8:]), "4")
    sentences = write_report([train_run]).sentences
    assert [text.split(":")[0] for text in sentences] == [f"tuned, quality{end}" for end in ("", "-2", "-10")]


def test_training_run_alone(train_run: Path) -> None:
    assert write_report([train_run]).headline == "tuned: validation loss 1.250 after 3 steps."


def test_output_may_be_a_folder_or_a_file(methods_run: Path, tmp_path: Path) -> None:
    assert write_report([methods_run], tmp_path / "out").html == tmp_path / "out" / "report.html"
    files = write_report([methods_run], tmp_path / "图" / "a.html")
    assert files.markdown == tmp_path / "图" / "a.md"
    assert files.markdown.exists()


def test_the_same_run_gives_the_same_page(methods_run: Path) -> None:
    assert page_of(methods_run) == page_of(methods_run)


def test_newer_cells_and_foreign_folders_are_refused(bench_run: BenchRun, cell: Make, tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="version 99"):
        write_report([bench_run(cell("a", schema_version=99))])
    with pytest.raises(RunDirError, match="run directory"):
        write_report([tmp_path / "none"])
    with pytest.raises(RunDirError, match="at least one"):
        write_report([])
