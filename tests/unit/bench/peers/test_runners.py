"""transformers + PEFT beside ours, really: the same weights, ids and updates give the same losses and norms."""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tunesmith.bench.peers import bitsandbytes, ours, transformers, trl
from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.verdict import difference
from tunesmith.bench.peers.wire import NotApplicableError
from tunesmith.recipe.schema import Recipe

# What peers deprecate among themselves is not ours to mend.
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
Make = Callable[..., Recipe]
Prepared = Callable[..., dict[str, Any]]
Measured = Callable[..., dict[str, Any]]


def equal_steps(mine: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-4) -> bool:
    """Whether every step's loss and norm agree, far below the verdict's 1 %."""
    pairs = zip(mine["steps"], other["steps"], strict=True)
    return all(
        abs(b[key] - a[key]) <= tolerance * max(abs(a[key]), 1e-6) for a, b in pairs for key in ("loss", "grad_norm")
    )


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("qwen2", {}),
    "lora of random weights": ("qwen2", {"model": {"weights": "random"}}),
    "chosen targets, rslora": ("llama", {"method": {"targets": ["q_proj", "v_proj"], "rslora": True}}),
    "full": ("llama", {"method": {"kind": "full"}, "train": {"learning_rate": 1e-3}}),
    "full, random, checkpointing": (
        "qwen3",
        {"method": {"kind": "full"}, "model": {"weights": "random"}, "train": {"checkpointing": "block"}},
    ),
    "lora, checkpointing": ("qwen2", {"train": {"checkpointing": "block"}}),
    "accumulation, decay, warm-up": (
        "qwen2",
        {"train": {"accumulation": 3, "weight_decay": 0.1, "warmup_ratio": 0.3, "max_grad_norm": 0.01}},
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_peft_and_ours_do_the_same_work(name: str, peer_recipe: Make, prepared: Prepared, measured: Measured) -> None:
    family, sections = CASES[name]
    job = prepared(peer_recipe(family, **sections))["job"]
    mine, other = measured(ours.run, job), measured(transformers.run, job)
    assert len(mine["steps"]) == 3
    assert difference(other, mine) is None
    # Adam divides by the root of gradients that may be next to nothing: later steps of full training agree less.
    assert equal_steps(mine, other, 1e-2 if name.startswith("full") else 1e-4)
    assert mine["steps"][0]["loss"] != mine["steps"][2]["loss"]


@pytest.mark.parametrize("weights", ["random", "checkpoint"])
def test_bitsandbytes_and_ours_do_the_same_work(
    weights: str,
    peer_recipe: Make,
    prepared: Prepared,
    measured: Measured,
    tiny_model_dir: Callable[..., Path],
) -> None:
    """NF4 of the same weights; widths are multiples of 64, where bitsandbytes' CPU path is right."""
    directory = tiny_model_dir("llama", hidden_size=64, intermediate_size=128)
    job = prepared(peer_recipe(method={"kind": "qlora"}, model={"path": str(directory), "weights": weights}))["job"]
    mine, other = measured(ours.run, job), measured(bitsandbytes.run, job)
    assert difference(other, mine) is None
    assert equal_steps(mine, other, 1e-3)


@pytest.mark.parametrize("packing", [True, False])
def test_documents_of_many_lengths_are_the_same_work(
    packing: bool, peer_recipe: Make, prepared: Prepared, measured: Measured, tmp_path: Path
) -> None:
    rows = tmp_path / "rows.jsonl"
    lines = [f'{{"text": "{"ab c" * (1 + i % 5)}"}}' for i in range(40)]
    rows.write_text("\n".join(lines), encoding="utf-8")
    data = {"format": "auto", "train": [str(rows)], "max_length": 24, "packing": packing, "cache": False, "workers": 0}
    recipe = peer_recipe(data=data, train={"micro_batch_tokens": 48})
    job = prepared(recipe)["job"]
    mine, other = measured(ours.run, job), measured(transformers.run, job)
    assert len({*mine["tokens"]}) > 0
    assert difference(other, mine) is None
    assert equal_steps(mine, other)


def test_what_is_held_in_another_dtype_runs_under_autocast(
    peer_recipe: Make, prepared: Prepared, measured: Measured
) -> None:
    job = prepared(peer_recipe(model={"dtype": "bfloat16"}, train={"precision": "bfloat16"}))["job"]
    asked = Job.of(job)
    assert asked.needs_autocast
    assert (asked.base_dtype, asked.trained_dtype) == (torch.bfloat16, torch.float32)
    other = measured(transformers.run, job)
    assert other["dtypes"] == {"trained": ["float32"], "frozen": ["bfloat16"], "optimizer": ["float32"]}
    assert difference(other, measured(ours.run, job)) is None


def test_bfloat16_adapters_need_no_autocast(peer_recipe: Make, prepared: Prepared, measured: Measured) -> None:
    train = {"precision": "bfloat16", "master_weights": "compute"}
    job = prepared(peer_recipe(model={"dtype": "bfloat16"}, train=train))["job"]
    assert not Job.of(job).needs_autocast
    other = measured(transformers.run, job)
    assert other["dtypes"]["trained"] == other["dtypes"]["optimizer"] == ["bfloat16"]
    assert difference(other, measured(ours.run, job)) is None


@pytest.mark.parametrize(
    ("runner", "sections"),
    [
        (transformers.run, {"method": {"kind": "qlora"}}),
        (bitsandbytes.run, {}),
        (transformers.run, {"method": {"kind": "freeze", "trainable": ["head"]}}),
    ],
)
def test_what_a_peer_does_not_do_is_said(
    runner: Any, sections: dict[str, Any], peer_recipe: Make, prepared: Prepared, measured: Measured
) -> None:
    job = prepared(peer_recipe(**sections))["job"]
    with pytest.raises(NotApplicableError):
        measured(runner, job)


@pytest.fixture
def trl_on_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A `trl` whose SFTTrainer is the Trainer of transformers that the real one is built on."""
    from transformers import Trainer, TrainingArguments

    def arguments(dataset_kwargs: dict[str, Any], **settings: Any) -> TrainingArguments:
        assert dataset_kwargs == {"skip_prepare_dataset": True}
        return TrainingArguments(**settings)

    module = ModuleType("trl")
    module.__spec__ = ModuleSpec("trl", None)
    module.SFTTrainer, module.SFTConfig = Trainer, arguments  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "trl", module)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.usefixtures("trl_on_transformers")
@pytest.mark.parametrize("accumulation", [1, 3])
def test_a_trainer_s_losses_and_norms_are_taken_without_its_log(
    accumulation: int, peer_recipe: Make, prepared: Prepared, measured: Measured
) -> None:
    job = prepared(peer_recipe("llama", train={"accumulation": accumulation, "max_grad_norm": 0.01}))["job"]
    mine, other = measured(ours.run, job), measured(trl.run, job)
    assert difference(other, mine) is None
    assert equal_steps(mine, other)
    assert other["waits"] is None
