"""What all runners share is made once, in a process of its own: the resolved recipe, the token ids, a checkpoint.

stdin: {"recipe": mapping, "scratch": folder, "checkpoint": whether one is wanted, "tokenizer": folder or null}
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from tunesmith.arch import read_raw_config
from tunesmith.bench.peers.batches import Documents, documents_of, save_windows
from tunesmith.bench.peers.job import Job
from tunesmith.bench.peers.weights import names_of
from tunesmith.bench.peers.wire import Say, serve
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder
from tunesmith.checkpoint.source import resolve_model, resolve_tokenizer
from tunesmith.errors import RecipeError
from tunesmith.hardware import describe_device
from tunesmith.model.methods import ROUTERS
from tunesmith.recipe.load import recipe_from_mapping, with_overrides
from tunesmith.recipe.schema import Recipe
from tunesmith.text.dataset import load_data
from tunesmith.text.tokenizer import load_tokenizer
from tunesmith.train.batches import Dataset, RandomTokens, build_micro_batch
from tunesmith.train.order import DataOrder
from tunesmith.train.resolve import DTYPES, resolve_recipe
from tunesmith.train.schedules import learning_rate
from tunesmith.train.session import DEFAULT_RANDOM_ROWS

BUILTIN_TOKENIZER = "builtin:tiny"


def run(mapping: Mapping[str, Any], say: Say) -> dict[str, Any]:
    """Make what runners need. Returns: the job, the device's name, the numbers of the row."""
    recipe = resolved(recipe_from_mapping(mapping["recipe"]))
    scratch = Path(mapping["scratch"])
    directory = resolve_model(recipe.model.path, recipe.model.revision)
    windows = plan_windows(recipe, directory)
    save_windows(windows, scratch / "batches.safetensors")
    total = len(windows)
    job = Job(
        recipe=recipe,
        batches=scratch / "batches.safetensors",
        rates=tuple(learning_rate(recipe.train, step, total) for step in range(total)),
        targets=adapter_targets(recipe, directory),
        checkpoint=write_checkpoint(recipe, directory, scratch, mapping["tokenizer"])
        if mapping["checkpoint"]
        else None,
    )
    name = describe_device(recipe.model.device).name
    return {"job": job.plain(), "chip": name, "lengths": list(windows[0][0].lengths)}


def resolved(recipe: Recipe) -> Recipe:
    """The recipe with its autos decided and as many steps as warm-up and timing take."""
    steps = recipe.bench.warmup_steps + recipe.bench.steps
    return resolve_recipe(with_overrides(recipe, {"train.max_steps": steps}))


def plan_windows(recipe: Recipe, directory: Path) -> list[list[Documents]]:
    """Every step's micro-batches on the host: what a session of this recipe trains on."""
    tokens = recipe.train.micro_batch_tokens
    assert tokens is not None
    vocab_size = int(read_raw_config(directory)["vocab_size"])
    dataset = _dataset(recipe, vocab_size)
    order = DataOrder(dataset.lengths, recipe.data, recipe.train, tokens)
    return [
        [
            documents_of(build_micro_batch(dataset, pack, tokens, recipe.data, vocab_size), recipe.data)
            for pack in order.window(step).packs
        ]
        for step in range(order.total_steps)
    ]


def _dataset(recipe: Recipe, vocab_size: int) -> Dataset:
    data = recipe.data
    if data.format == "tokens":
        return RandomTokens(data.max_rows or DEFAULT_RANDOM_ROWS, data.max_length, vocab_size, recipe.train.seed)
    if not data.train:
        raise RecipeError("data.train is empty: name a file, or set data.format to tokens for random ids")
    return load_data(data, load_tokenizer(resolve_tokenizer(recipe)), seed=recipe.train.seed).train


def adapter_targets(recipe: Recipe, directory: Path) -> tuple[str, ...]:
    """The projections that get adapters, by the names that PEFT finds them by; none where nothing is adapted."""
    if recipe.method.kind not in ("lora", "qlora"):
        return ()
    if recipe.method.targets != "all":
        return tuple(recipe.method.targets)
    parts = [item for item in names_of(directory) if item.module.startswith("blocks.") and item.kind == "weight"]
    projections = {item.name.split(".")[-2] for item in parts if item.part is not None and item.part not in ROUTERS}
    return tuple(sorted(projections))


def write_checkpoint(recipe: Recipe, directory: Path, scratch: Path, tokenizer: str | None) -> Path:
    """A directory with the row's weights and a tokenizer: the model's own where its weights are read.

    Random ones are written as they are drawn; `tokenizer` is a folder to take the tokenizer from (None: the embedded
    model's; no id goes through it).
    """
    if recipe.model.weights != "random":
        return directory
    made = scratch / directory.name
    device = torch.device(recipe.model.device)
    decoder = load_decoder(
        directory, device=device, dtype=DTYPES[recipe.model.dtype], weights="random", seed=recipe.train.seed
    )
    save_decoder(decoder, made)
    source = resolve_model(BUILTIN_TOKENIZER) if tokenizer is None else Path(tokenizer)
    for file in sorted([*source.glob("token*"), *source.glob("special_tokens*"), *source.glob("*.jinja")]):
        shutil.copy(file, made)
    return made


if __name__ == "__main__":
    serve(run)
