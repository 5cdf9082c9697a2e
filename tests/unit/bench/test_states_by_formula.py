"""What processes hold under every strategy and method, measured, beside the formula: within one percent."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from tunesmith.arch import read_config
from tunesmith.bench.optimizer_watch import held_bytes
from tunesmith.bench.scale_summary import owner_mapping
from tunesmith.checkpoint.load import load_decoder
from tunesmith.cost.shards import Formats, Layout, rank_states
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.apply import spread_out
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.parallel.tensor import own_targets, shard_tensors
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import DataSection, MethodSection, TrainSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch
from tunesmith.train.losses import cross_entropy_sum, head_of
from tunesmith.train.update import Updater

TOKENS = 32
METHODS: dict[str, MethodSection] = {
    "full": MethodSection(kind="full"),
    "lora": MethodSection(kind="lora", rank=4),
    "dora": MethodSection(kind="lora", rank=4, dora=True),
    "qlora": MethodSection(kind="qlora", rank=4),
    "fp8": MethodSection(kind="lora", rank=4, base="fp8"),
    "freeze": MethodSection(kind="freeze", trainable=["last:1", "head"]),
}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def _loss(module: nn.Module, batch: MicroBatch, mesh: Mesh) -> tuple[Tensor, int]:
    """The loss of this process's own tokens."""
    hidden = cast(Decoder, module).hidden(batch.pack)
    index, targets = own_targets(batch.index, batch.targets, batch.pack.tokens_T.numel(), mesh)
    return cross_entropy_sum(hidden, index, targets, head_of(cast(Decoder, module)), 64), batch.num_trained


def hold(
    model_dir: str, method: str, strategy: str, optimizer: str, tensor: int, dtype: str
) -> tuple[dict[str, int], dict[str, int]]:
    """One step of this process: (bytes by owner as measured at the update, the same by formula)."""
    settings = ParallelSection(strategy=strategy, tensor=tensor)  # type: ignore[arg-type]
    section = METHODS[method]
    with joined(settings, "cpu") as mesh:
        decoder = load_decoder(Path(model_dir), dtype=DTYPES[dtype], quantize=section.quantisation)
        apply_method(decoder, section, seed=0)
        if tensor > 1:
            shard_tensors(decoder, mesh)
        spread = spread_out(decoder, mesh, settings)
        updater = Updater(decoder, TrainSection(learning_rate=1e-3, optimizer=optimizer), 4, spread)  # type: ignore[arg-type]
        found: list[dict[str, int]] = []
        updater.optimizer.register_step_post_hook(lambda *_: found.append(held_bytes(decoder, updater.optimizer)))
        documents = RandomTokens(8, 16, 272, seed=1)
        batch = build_micro_batch(documents, (0, 1), TOKENS, DataSection(format="tokens", max_length=16), 272)
        decoder.train()
        updater.step(
            0,
            [batch],
            lambda module, one: _loss(module, one, mesh),
            denominator=batch.num_trained * mesh.size("dp"),
            describe=lambda one: "a batch",
        )
        masters: Any = "float32" if method in ("lora", "dora", "qlora", "fp8") else dtype
        formats = Formats(dtype, masters, "float32", optimizer)  # type: ignore[arg-type]
        layout = Layout(strategy, mesh.size("dp"), tensor)  # type: ignore[arg-type]
        return found[0], owner_mapping(rank_states(read_config(Path(model_dir)), section, layout, formats).held)


CASES: list[tuple[str, str, str, int, str]] = [
    ("full", "ddp", "adamw", 1, "float32"),
    ("full", "zero1", "adamw", 1, "float32"),
    ("full", "zero2", "adamw", 1, "float32"),
    ("full", "zero3", "adamw", 1, "float32"),
    ("full", "zero3", "adamw", 1, "bfloat16"),
    ("full", "zero3", "adamw8bit", 1, "bfloat16"),
    ("full", "zero3", "sgd", 1, "float32"),
    ("lora", "ddp", "adamw", 1, "bfloat16"),
    ("lora", "zero3", "adamw", 1, "bfloat16"),
    ("dora", "zero3", "adamw", 1, "float32"),
    ("qlora", "ddp", "adamw", 1, "float32"),
    ("qlora", "zero3", "adamw", 1, "bfloat16"),
    ("fp8", "zero3", "adamw", 1, "bfloat16"),
    ("freeze", "zero3", "adamw", 1, "float32"),
    ("full", "ddp", "adamw", 2, "float32"),
    ("lora", "ddp", "adamw", 2, "float32"),
    ("qlora", "ddp", "adamw", 2, "float32"),
]


@pytest.mark.parametrize(("method", "strategy", "optimizer", "tensor", "dtype"), CASES)
def test_states_are_what_the_formula_says(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    method: str,
    strategy: str,
    optimizer: str,
    tensor: int,
    dtype: str,
) -> None:
    """The model is so small that a tensor's own scale or step counter would show: a block of 8-bit states is 256."""
    model = tiny_model_dir("qwen2", hidden_size=128, intermediate_size=384)
    for measured, formula in ranks(hold, 2, str(model), method, strategy, optimizer, tensor, dtype):
        for owner, size in formula.items():
            assert measured.get(owner, sum(measured.values())) == pytest.approx(size, rel=0.01), owner
