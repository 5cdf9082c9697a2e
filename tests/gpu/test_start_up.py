"""On a GPU: kernels compiled ahead are the ones that a run looks for, and offloaded block inputs change no gradient."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.engine.asked import Asked
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.session import build_session

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
ROOT = Path(__file__).parents[2]
RECIPE: dict[str, Any] = {
    "model": {"path": "recipes/configs/llama-3.2-3b", "weights": "random"},
    "data": {"format": "tokens", "max_length": 512, "max_rows": 8, "validation_fraction": 0},
    "train": {"micro_batch_tokens": 2048, "max_steps": 1, "learning_rate": 1e-4},
}
_RUN = """
import json, sys
from triton import knobs
misses = []
knobs.compilation.listener = lambda **facts: None if facts["cache_hit"] else misses.append(str(facts["src"].name))
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.session import build_session
from tunesmith.verify.certificate import certify
recipe = recipe_from_mapping(json.loads(sys.argv[1]))
certify(recipe, full=False)
session = build_session(recipe)
session.step()
session.close()
print(json.dumps(misses))
"""

_ANSWER = """
import json, sys
from pathlib import Path
from triton import knobs
misses = []
knobs.compilation.listener = lambda **facts: None if facts["cache_hit"] else misses.append(str(facts["src"].name))
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.engine import Engine
from tunesmith.engine.loading import make_config, make_runner
from tunesmith.engine.request import SamplingParams
asked = json.loads(sys.argv[1])
model = load_for_inference(
    Path(asked["model"]), quantize=asked["quantize"], dtype="bfloat16", device="cuda", weights="random"
)
config = make_config(model, max_model_len=asked["max_model_len"], enforce_eager=asked["enforce_eager"])
engine = Engine(make_runner(model, config), config=config)
for num, length in ((1, 5), (8, 200), (3, 900)):
    for _ in range(num):
        engine.submit([7] * length, SamplingParams(max_tokens=20, temperature=0.8, ignore_eos=True))
    while engine.has_work:
        engine.step()
while engine.idle():
    pass
print(json.dumps(misses))
"""

_STEP = """
import json, sys
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.session import build_session
session = build_session(recipe_from_mapping(json.loads(sys.argv[1])))
session.step()
session.close()
"""


@pytest.mark.parametrize("method", [{"kind": "lora"}, {"kind": "qlora"}, {"kind": "lora", "base": "fp8"}])
def test_a_run_compiles_nothing_that_was_compiled_ahead(method: dict[str, Any], tmp_path: Path) -> None:
    raw = {**RECIPE, "method": method}
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path)}
    request = json.dumps({"recipe": raw, "marker": str(tmp_path / "marker")})
    command = [sys.executable, "-m", "tunesmith.verify.warm_up_worker"]
    answer = json.loads(_output(command, environment, request))
    assert answer["failed"] == []
    assert answer["kernels"] >= 10
    run = [sys.executable, "-c", _RUN, json.dumps(raw)]
    assert json.loads(_output(run, environment).splitlines()[-1]) == []


@pytest.mark.parametrize("quantize", [None, "fp8", "int4", "int8", "nf4"])
@pytest.mark.parametrize("enforce_eager", [False, True])
def test_an_engine_compiles_nothing_that_was_compiled_ahead(
    quantize: str | None, enforce_eager: bool, tmp_path: Path
) -> None:
    asked = Asked(
        "recipes/configs/qwen3-0.6b",
        quantize=quantize,
        dtype="bfloat16",
        weights="random",
        max_model_len=4096,
        enforce_eager=enforce_eager,
    )
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path / "triton"), "XDG_CACHE_HOME": str(tmp_path)}
    request = json.dumps({"asked": asdict(asked), "marker": str(tmp_path / "marker")})
    answer = json.loads(_output([sys.executable, "-m", "tunesmith.engine.compiling_worker"], environment, request))
    assert answer["failed"] == []
    assert answer["kernels"] >= 20
    assert (tmp_path / "marker").exists()
    run = [sys.executable, "-c", _ANSWER, json.dumps(asdict(asked))]
    assert json.loads(_output(run, environment).splitlines()[-1]) == []


@pytest.mark.parametrize("more", [{}, {"graphs": "off"}, {"blocks": "eager"}])
def test_a_first_step_without_a_certificate_warns_of_nothing(more: dict[str, Any]) -> None:
    """Where nothing ran before it, as when the certificate is kept from an earlier run."""
    raw = {**RECIPE, "method": {"kind": "lora"}, "train": {**RECIPE["train"], **more}}
    _output([sys.executable, "-c", _STEP, json.dumps(raw)], dict(os.environ))


def test_a_run_names_its_seconds_and_imports_no_compiler(tmp_path: Path) -> None:
    """torch's switch for determinism, which only runs on a GPU touch, once imported all of it: four unnamed seconds."""
    recipe = tmp_path / "recipe.yaml"
    raw = {**RECIPE, "model": {"path": "builtin:tiny"}, "output": str(tmp_path / "runs")}
    recipe.write_text(json.dumps({**raw, "method": {"kind": "lora"}}), encoding="utf-8")
    _output([sys.executable, "-m", "tunesmith", "train", str(recipe)], dict(os.environ))
    (run,) = (tmp_path / "runs").iterdir()
    account = json.loads((run / "run.json").read_text(encoding="utf-8"))["facts"]["start_up"]
    slow = {"torch._dynamo", "torch._inductor", "sympy", "torch.distributed.tensor"}
    assert not slow & set(account["imported"])
    assert account["seconds"]["other"] < 0.2
    unnamed = {name: value for name, value in account["seconds"].items() if name.startswith("before ") and value > 0.5}
    assert not unnamed


def _output(command: list[str], environment: dict[str, str], request: str = "") -> str:
    """What a program prints, at the repository's root; a program that fails is shown with what it wrote."""
    done = subprocess.run(command, input=request, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr[-4000:]
    assert "UserWarning" not in done.stderr, done.stderr[-4000:]
    return done.stdout


def test_block_inputs_on_the_host_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    losses, norms, peaks = [], [], []
    for kind in ("block", "offload-block"):
        train = {**RECIPE["train"], "checkpointing": kind, "mlp_tile_tokens": 512, "graphs": "off"}
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        session = build_session(recipe_from_mapping({**RECIPE, "method": {"kind": "qlora"}, "train": train}))
        metrics = session.step()
        session.close()
        losses.append(metrics.loss)
        norms.append(metrics.grad_norm)
        peaks.append(torch.cuda.max_memory_allocated())
        del session
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert norms[0] == pytest.approx(norms[1], rel=1e-2)
    assert peaks[1] < peaks[0]
