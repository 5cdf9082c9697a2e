"""`tunesmith bench scale` as it is typed: mistakes are one line and nothing is run."""

from __future__ import annotations

from pathlib import Path

import pytest

from tunesmith.arch import read_config
from tunesmith.cli.main import run
from tunesmith.cost.shards import Formats, Layout, rank_states
from tunesmith.recipe.load import load_recipe

ROOT = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "one"], "--gpus is numbers"),
        (["--gpus", "0,1"], "--gpus is numbers"),
        (["--mode", "stron"], "did you mean"),
        (["--nodes", "4"], "--nodes and --network go together"),
        (["--network", "400Gb"], "--nodes and --network go together"),
        (["--nodes", "4", "--network", "quick"], "--network is what a node has"),
        (["--cpu", "--gpus", "1", "--nodes", "4", "--network", "400Gb"], "measure two GPUs or more"),
        (["--cpu", "--gpus", "1,2", "--set", "parallel.tensor=2"], "--gpus 1 can't be divided"),
        (["--language", "fr"], "not one of auto, en, zh"),
        (["--set", "parallel.strateg=ddp"], "strategy"),
    ],
)
def test_mistakes_of_use(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "recipe.yaml").write_text("version: 1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert run(["bench", "scale", "recipe.yaml", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "runs").exists()


def test_the_recipe_is_what_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    recipe = load_recipe(ROOT / "recipes" / "scale-qwen2.5-7b.yaml")
    assert (recipe.method.kind, recipe.parallel.strategy) == ("full", "zero3")
    assert (recipe.train.micro_batch_tokens, recipe.data.max_length) == (2 * 4096, 4096)
    assert (recipe.train.master_weights, recipe.train.checkpointing) == ("float32", "selective")
    variants = (
        ["train.master_weights=compute", "model.dtype=bfloat16"],
        ["method.fp8_compute=true"],
        ["parallel.strategy=ddp"],
        ["parallel.engine=deepspeed"],
        ["model.path=recipes/configs/llama-3.1-8b", "name=scale-llama-3.1-8b"],
        ["train.checkpointing_skip_last=5"],
    )
    for overrides in variants:
        load_recipe(ROOT / "recipes" / "scale-qwen2.5-7b.yaml", overrides)


def test_a_70b_shape_fits_by_formula_as_its_recipe_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    path = ROOT / "recipes" / "scale-llama-3.1-70b-qlora.yaml"
    recipe, config = load_recipe(path), read_config(ROOT / "recipes" / "configs" / "llama-3.1-70b")
    tokens, cap = recipe.train.micro_batch_tokens, recipe.train.device_memory_gb
    assert tokens is not None and cap is not None
    states = rank_states(config, recipe.method, Layout("zero3", 2), Formats())
    inputs = 2 * tokens * config.hidden_size * config.num_hidden_layers
    said = (states.held.weights, states.held.total - states.held.weights, states.gathered, states.most, inputs)
    header = path.read_text(encoding="utf-8").partition("version:")[0]
    assert [f"{size / 1e9:.2f}" in header for size in said] == [True] * len(said)
    assert states.most + inputs < 0.85 * cap * 1e9
    alone = rank_states(config, recipe.method, Layout(), Formats())
    assert alone.held.total > cap * 1e9
