"""DeepSpeed's configuration: made from a recipe; a file as it is, its autos resolved, its contradictions named."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import RecipeError
from tunesmith.parallel.deepspeed_config import ZeroConfig, make_config
from tunesmith.parallel.deepspeed_conflicts import RunFacts
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection

FACTS = RunFacts(
    world_size=2, micro_batches=3, learning_rate=1e-4, total_steps=100, warmup_steps=3, sequences=2, hidden_size=64
)
TRAIN = TrainSection(precision="bfloat16", learning_rate=1e-4, max_grad_norm=1.0, weight_decay=0.1)
AUTOS: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "fp16": {"enabled": "auto", "loss_scale_window": 1000},
    "optimizer": {"type": "AdamW", "params": dict.fromkeys(("lr", "betas", "eps", "weight_decay"), "auto")},
    "scheduler": {
        "type": "WarmupCosineLR",
        "params": dict.fromkeys(("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps"), "auto"),
    },
    "zero_optimization": {
        "stage": 3,
        "reduce_bucket_size": "auto",
        "stage3_prefetch_bucket_size": "auto",
        "stage3_param_persistence_threshold": "auto",
        "sub_group_size": 1e9,
    },
}


def _from_file(folder: Path, value: Any, train: TrainSection = TRAIN, **section: Any) -> ZeroConfig:
    path = folder / "ds.json"
    path.write_text(value if isinstance(value, str) else json.dumps(value, indent=1))
    return make_config(ParallelSection(engine="deepspeed", deepspeed_config=str(path), **section), train, FACTS)


def _made(train: TrainSection = TRAIN, facts: RunFacts = FACTS, **section: Any) -> dict[str, Any]:
    return make_config(ParallelSection(engine="deepspeed", **section), train, facts).values


def test_a_recipe_becomes_a_configuration() -> None:
    values = _made(strategy="zero3", offload="cpu")
    assert values["train_batch_size"] == 2 * 3 * 2
    assert (values["train_micro_batch_size_per_gpu"], values["gradient_accumulation_steps"]) == (2, 3)
    assert (values["bf16"], values["fp16"]) == ({"enabled": True}, {"enabled": False})
    assert values["gradient_clipping"] == 1.0
    zero = values["zero_optimization"]
    assert (zero["stage"], zero["offload_optimizer"]["device"], zero["offload_param"]["device"]) == (3, "cpu", "cpu")
    assert values["data_types"] == {"grad_accum_dtype": "fp32"}
    assert values["zero_allow_untested_optimizer"] and not values["zero_force_ds_cpu_optimizer"]


@pytest.mark.parametrize(
    ("section", "has_adapters", "stage"),
    [({}, True, 1), ({}, False, 3), ({"offload": "cpu"}, True, 3), ({"strategy": "zero2"}, False, 2)],
)
def test_auto_goes_by_what_is_trained(section: dict[str, Any], has_adapters: bool, stage: int) -> None:
    values = _made(facts=replace(FACTS, has_adapters=has_adapters), **section)
    assert values["zero_optimization"]["stage"] == stage
    assert "offload_param" not in values["zero_optimization"] or stage == 3


def test_nvme_names_its_folder() -> None:
    zero = _made(strategy="zero3", offload="nvme", offload_folder="/disk")["zero_optimization"]
    assert zero["offload_param"]["nvme_path"] == zero["offload_optimizer"]["nvme_path"] == "/disk"


@pytest.mark.parametrize(
    ("train", "section", "message"),
    [
        (TRAIN.model_copy(update={"optimizer": "adamw8bit"}), {}, "train.optimizer adamw8bit"),
        (TRAIN.model_copy(update={"optimizer_in_backward": True}), {}, "train.optimizer_in_backward"),
        (TRAIN.model_copy(update={"master_weights": "compute"}), {}, "train.master_weights compute"),
        (TRAIN, {"strategy": "ddp"}, "parallel.strategy ddp"),
        (TRAIN, {"strategy": "zero2", "offload": "nvme", "offload_folder": "x"}, "offload nvme goes with"),
    ],
)
def test_what_deepspeed_does_not_have_is_refused(train: TrainSection, section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message.replace(".", r"\.")):
        _made(train, **section)


def test_every_auto_is_resolved_from_the_recipe(tmp_path: Path) -> None:
    config = _from_file(tmp_path, AUTOS)
    zero = config.values["zero_optimization"]
    assert (zero["reduce_bucket_size"], zero["stage3_prefetch_bucket_size"]) == (4096, 3686)
    assert zero["stage3_param_persistence_threshold"] == 640
    assert zero["sub_group_size"] == 1e9
    assert config.values["train_batch_size"] == 12
    assert config.values["bf16"]["enabled"] is True
    assert config.values["fp16"] == {"enabled": False, "loss_scale_window": 1000}
    assert "auto" not in json.dumps(config.values)
    assert (config.own_optimizer, config.stage) == ("adamw", 3)
    assert "optimizer" not in config.values and "scheduler" not in config.values
    assert len(config.notes) == 2


def test_what_a_file_does_not_say_the_recipe_says(tmp_path: Path) -> None:
    values = _from_file(tmp_path, '{ // only this\n "zero_optimization": {"stage": 2,}, }').values
    assert values["zero_optimization"] == {"stage": 2}
    assert (values["gradient_clipping"], values["bf16"]["enabled"], values["train_batch_size"]) == (1.0, True, 12)


def test_an_optimizer_that_only_deepspeed_has_stays(tmp_path: Path) -> None:
    lamb = {"type": "Lamb", "params": {"lr": "auto"}}
    config = _from_file(tmp_path, {"zero_optimization": {"stage": 1}, "optimizer": lamb})
    assert config.own_optimizer is None
    assert config.values["optimizer"]["params"] == {"lr": 1e-4}
    assert "zero_allow_untested_optimizer" not in config.values


def test_a_module_of_unknown_batches_takes_the_files_number(tmp_path: Path) -> None:
    path = tmp_path / "ds.json"
    path.write_text('{"zero_optimization": {"stage": 1}, "train_micro_batch_size_per_gpu": 8}')
    settings = ParallelSection(engine="deepspeed", deepspeed_config=str(path))
    values = make_config(settings, TRAIN, replace(FACTS, sequences=None, hidden_size=None)).values
    assert (values["train_micro_batch_size_per_gpu"], values["train_batch_size"]) == (8, 8 * 3 * 2)


def _changed(**changes: Any) -> dict[str, Any]:
    return {"zero_optimization": {"stage": 2}, **changes}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (
            _changed(gradient_clipping=0.5),
            r"gradient_clipping is 0.5, and the recipe's train.max_grad_norm makes it 1.0",
        ),
        (_changed(bf16={"enabled": False}), "bf16.enabled is false, and the recipe's train.precision bfloat16"),
        (_changed(fp16={"enabled": True}), "fp16.enabled is true, and the recipe's train.precision bfloat16"),
        (_changed(train_batch_size=13), "train_batch_size is 13, .* makes it 12"),
        (
            _changed(gradient_accumulation_steps=4),
            "gradient_accumulation_steps is 4, .*train.accumulation.* makes it 3",
        ),
        (
            _changed(optimizer={"type": "AdamW", "params": {"lr": 3e-5}}),
            "optimizer.params.lr is 3e-05, and the recipe's train.learning_rate makes it 0.0001",
        ),
        (
            _changed(optimizer={"type": "AdamW", "params": {"betas": [0.9, 0.95]}}),
            r"betas is \[0.9, 0.95\], and the recipe's train.beta1 and train.beta2 makes it \[0.9, 0.999\]",
        ),
        (_changed(scheduler={"type": "WarmupLR", "params": {}}), "scheduler.type is WarmupLR, .* train.schedule"),
        (_changed(scheduler={"type": "OneCycle", "params": {}}), "scheduler.type OneCycle is none of"),
        (
            _changed(scheduler={"type": "WarmupCosineLR", "params": {"warmup_num_steps": 10}}),
            "warmup_num_steps is 10, and the recipe's train.warmup_ratio makes it 3",
        ),
        (_changed(gradient_allreduce_op="sum"), "gradient_allreduce_op is sum"),
        (_changed(sequence_parallel_size=2), "sequence_parallel_size is 2: leave it out"),
        (_changed(data_efficiency={"enabled": True}), "the order of samples is tunesmith's"),
        (_changed(bf16={"enabled": True, "check_grad_overflow": False}), "a NaN would reach the weights"),
        ({"zero_optimization": {"stage": 0}}, "plain data parallelism"),
        ({"zero_optimization": {"stage": 4}}, "must be 1, 2 or 3"),
        ({"gradient_clipping": 1.0}, "has no zero_optimization"),
        (_changed(aio={"block_size": "auto"}), "aio.block_size is 'auto', and the recipe decides nothing"),
        (_changed(bf16=True), "bf16 of DeepSpeed's configuration must be an object"),
    ],
)
def test_a_contradiction_names_both_sides_and_the_line(tmp_path: Path, file: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _from_file(tmp_path, file)


def test_the_line_is_the_keys(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"ds\.json:3: gradient_clipping"):
        _from_file(tmp_path, '{\n "zero_optimization": {"stage": 2},\n "gradient_clipping": 7\n}')


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"strategy": "zero3"}, "zero_optimization.stage is 2, and the recipe's parallel.strategy makes it zero3"),
        ({"offload": "cpu"}, "offload_optimizer.device is none, and the recipe's parallel.offload makes it cpu"),
    ],
)
def test_the_section_must_agree_with_the_file(tmp_path: Path, section: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _from_file(tmp_path, {"zero_optimization": {"stage": 2}}, **section)
