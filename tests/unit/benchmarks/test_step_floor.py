"""The floor of a step: its products are the cost model's operations, and the script adds what it measured."""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from tunesmith.arch import read_config
from tunesmith.cost.flops import attention_flops, training_flops
from tunesmith.cost.shapes import MethodShape

ROOT = Path(__file__).parents[3]
SHAPE = ROOT / "recipes" / "configs" / "llama-3.2-3b"


@pytest.fixture(scope="module")
def bench() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_floor", ROOT / "benchmarks" / "step_floor.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_products_of_a_full_step_are_the_cost_models_operations(bench: ModuleType) -> None:
    config = read_config(SHAPE)
    counted = bench.products(config, 512, is_full=True)
    flops = training_flops(config, MethodShape(kind="full"), 512)
    attention = 3 * sum(attention_flops(config, layer, 512) for layer in range(config.num_hidden_layers))
    ours = sum(product.flops * times for product, times in counted.items())
    assert ours == flops.forward + flops.backward - attention


def test_frozen_weights_have_no_gradient(bench: ModuleType) -> None:
    config = read_config(SHAPE)
    full, frozen = (bench.products(config, 512, is_full=is_full) for is_full in (True, False))
    assert sum(full.values()) * 2 == sum(frozen.values()) * 3
    assert all(product.rows == 512 for product in frozen)


def test_the_last_line_is_the_sum_of_what_was_measured(
    bench: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "small.yaml"
    recipe.write_text(
        "version: 1\nname: small\nmodel: {path: builtin:tiny, dtype: float32, device: cpu}\nmethod: {kind: full}\n"
        "data: {format: tokens, max_length: 16, validation_fraction: 0}\n"
        "train: {micro_batch_tokens: 32, precision: float32}\n",
        encoding="utf-8",
    )
    monkeypatch.setattr(
        sys, "argv", ["step_floor.py", str(recipe), "--runs", "1", "--device", "cpu", "--measured", "5"]
    )
    bench.main()
    *products, last = map(json.loads, capsys.readouterr().out.splitlines())
    assert last["products_ms"] == pytest.approx(sum(row["ms"] * row["times"] for row in products), rel=0.05, abs=0.05)
    whole = last["products_ms"] + last["attention_ms"] + last["optimiser_ms"]
    assert last["floor_ms"] == pytest.approx(whole, abs=0.01)
    assert last["share_of_floor"] == pytest.approx(5 / last["floor_tokens_per_s"], abs=1e-4)
