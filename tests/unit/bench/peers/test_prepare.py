"""What all runners share: steps, rates, targets, and a checkpoint that holds the weights everybody draws."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.weights import random_tensors
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import tensors_of
from tunesmith.recipe.schema import Recipe
from tunesmith.train.schedules import learning_rate

Make = Callable[..., Recipe]
Prepared = Callable[..., dict[str, Any]]


def test_the_job_survives_json_and_has_every_step(peer_recipe: Make, prepared: Prepared) -> None:
    result = prepared(peer_recipe(train={"schedule": "cosine", "warmup_ratio": 0.5}))
    job = Job.of(result["job"])
    assert job.plain() == result["job"]
    assert job.recipe.train.max_steps == 3
    assert job.rates == tuple(learning_rate(job.recipe.train, step, 3) for step in range(3))
    assert result["lengths"] == [16, 16]
    assert result["chip"]


def test_targets_are_what_peft_calls_them(peer_recipe: Make, prepared: Prepared) -> None:
    def targets(**sections: Any) -> tuple[str, ...]:
        return Job.of(prepared(peer_recipe(**sections))["job"]).targets

    attention = ("k_proj", "o_proj", "q_proj", "v_proj")
    assert targets() == ("down_proj", "gate_proj", *attention[:2], "q_proj", "up_proj", "v_proj")
    assert targets(method={"targets": ["v_proj"]}) == ("v_proj",)
    assert targets(method={"kind": "full"}) == ()
    assert targets(family="gpt2") == ("c_attn", "c_fc", "c_proj")


def test_random_weights_are_the_decoder_s_own(tiny_model_dir: Callable[..., Path]) -> None:
    for family in ("llama", "gpt2"):
        directory = tiny_model_dir(family)
        decoder = load_decoder(directory, dtype=torch.bfloat16, weights="random", seed=3)
        mine = dict(tensors_of(decoder))
        drawn = dict(random_tensors(directory, torch.bfloat16, torch.device("cpu"), 3))
        assert mine.keys() == drawn.keys()
        assert all(torch.equal(mine[name], drawn[name]) for name in mine)


def test_a_checkpoint_of_random_weights_has_them_and_a_tokenizer(peer_recipe: Make, prepared: Prepared) -> None:
    job = Job.of(prepared(peer_recipe(model={"weights": "random"}), checkpoint=True)["job"])
    assert job.checkpoint is not None
    stored = load_file(job.checkpoint / "model.safetensors")
    drawn = dict(random_tensors(job.directory, job.base_dtype, job.device, job.recipe.train.seed))
    assert all(torch.equal(stored[name], tensor) for name, tensor in drawn.items())
    assert (job.checkpoint / "tokenizer.json").is_file()
    assert (job.checkpoint / "config.json").is_file()


def test_a_real_checkpoint_is_used_where_it_lies(peer_recipe: Make, prepared: Prepared) -> None:
    job = Job.of(prepared(peer_recipe(), checkpoint=True)["job"])
    assert job.checkpoint == job.directory
