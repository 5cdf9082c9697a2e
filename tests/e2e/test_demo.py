"""`tunesmith demo` as a newcomer types it, and what it promises about the model it trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

HELDOUT, SHUFFLED = "builtin:shop-heldout?rows=30", "builtin:shop-shuffled?rows=15"


def tunesmith(*arguments: str, cwd: Path, timeout_s: float = 280) -> subprocess.CompletedProcess[str]:
    code = "from tunesmith.cli.main import main; main()"
    environment = {**os.environ, "COLUMNS": "160"}
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=cwd,
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout_s,
    )


@pytest.fixture(scope="module")
def quick(tmp_path_factory: pytest.TempPathFactory) -> tuple[subprocess.CompletedProcess[str], Path]:
    folder = tmp_path_factory.mktemp("demo")
    return tunesmith("demo", "--quick", "--output", "out", "--json", cwd=folder), folder


def test_quick_demo_goes_through_every_stage(quick):
    done, folder = quick
    assert done.returncode == 0, done.stderr
    for title in ("Is this machine ready?", "Five methods", "LoRA", "The report", "before and after", "Try next"):
        assert title in done.stderr
    facts = json.loads(done.stdout.splitlines()[-1])
    assert facts["before"]["accuracy"] == 0.0
    assert (folder / facts["report"]).is_file()


def test_quick_demo_measured_five_cells_and_reports_them(quick):
    done, folder = quick
    assert done.returncode == 0, done.stderr
    cells = [json.loads(file.read_text(encoding="utf-8")) for file in (folder / "out/matrix/cells").glob("*.json")]
    assert sorted(cell["name"] for cell in cells) == ["full", "lora", "lora+gc", "qlora", "qlora+gc"]
    assert all(cell["status"] == "ok" for cell in cells), [cell["reason"] for cell in cells]
    page = (folder / "out/report.html").read_text(encoding="utf-8")
    assert "QLoRA" in page
    assert "<svg" in page


def test_the_files_it_leaves_can_be_trained_on(quick):
    _, folder = quick
    rows = [json.loads(line) for line in (folder / "out/shop.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [message["role"] for message in rows[0]["messages"]] == ["user", "assistant"]


def test_a_folder_in_use_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine", encoding="utf-8")
    done = tunesmith("demo", "--output", ".", cwd=tmp_path)
    assert done.returncode == 2
    assert "is not empty" in done.stderr
    assert (tmp_path / "notes.txt").read_text(encoding="utf-8") == "mine"


def test_a_shops_manner_is_learnt_and_the_answers_come_from_the_context(tmp_path):
    """Exact answers to held-out questions: below 20 % before, above 80 % after, below 20 % under shuffled contexts."""
    from tunesmith.bench.quality import evaluate
    from tunesmith.cli.demo import RECIPES
    from tunesmith.engine.llm import LLM
    from tunesmith.recipe.load import load_recipe
    from tunesmith.train.run import train

    def measure(model: str, *, shuffled: bool):
        llm = LLM(model, dtype="float32", max_running=8)
        wrong = evaluate(llm, questions=SHUFFLED, max_new_tokens=48) if shuffled else None
        return evaluate(llm, data=HELDOUT, questions=HELDOUT, max_new_tokens=48), wrong

    before, _ = measure("builtin:tiny", shuffled=False)
    recipe = load_recipe(RECIPES / "demo-quality.yaml", ["log.trackers=[]"])
    run = train(recipe, run_dir=tmp_path / "quality", quiet=True)
    after, shuffled = measure(str(run.run_dir), shuffled=True)
    assert before.accuracy.accuracy < 0.2
    assert after.accuracy.accuracy > 0.8
    assert shuffled.accuracy.accuracy < 0.2
    assert after.perplexity.perplexity < 0.1 * before.perplexity.perplexity
