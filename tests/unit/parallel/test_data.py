"""DDP and FSDP2: the losses and weights of one process, whatever is sharded."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.apply import spread_out, strategy_of
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import DataSection, MethodSection, TrainSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch
from tunesmith.train.session import language_model_loss
from tunesmith.train.update import Updater

STEPS, PACKS, TOKENS = 20, 4, 48
METHODS = {
    "full": MethodSection(kind="full"),
    "lora": MethodSection(kind="lora", rank=4),
    "qlora": MethodSection(kind="qlora", rank=4),
    "dora": MethodSection(kind="lora", rank=4, dora=True),
    "fp8": MethodSection(kind="lora", rank=4, base="fp8"),
}


def _window(step: int, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's of four packs a step; packs have documents of several lengths, and the third step has three packs."""
    data = DataSection(format="tokens", max_length=24)
    documents = RandomTokens(STEPS * PACKS * 2, 20, 272, seed=3)
    documents.lengths = np.where(np.arange(len(documents)) % 3 == 0, 20, 20)
    packs = [(2 * (PACKS * step + i), 2 * (PACKS * step + i) + 1) for i in range(3 if step == 2 else PACKS)]
    mine: list[tuple[int, ...]] = list(packs[rank::ranks])
    mine += [()] * (-(-len(packs) // ranks) - len(mine))
    return [build_micro_batch(documents, pack, TOKENS, data, 272) for pack in mine]


def _trained_tokens(step: int) -> int:
    return sum(batch.num_trained for batch in _window(step, 0, 1))


def train(model_dir: str, method: str, strategy: str, blocks: str, checkpointing: str = "none") -> dict[str, Any]:
    """Twenty steps; the losses, the norms, and this rank's share of a weight."""
    settings = ParallelSection(strategy=strategy)  # type: ignore[arg-type]
    with joined(settings, "cpu") as mesh:
        model = load_decoder(Path(model_dir), quantize=METHODS[method].quantisation)
        apply_method(model, METHODS[method], seed=0)
        assert isinstance(model, Decoder)
        model.is_fused = blocks == "fused"
        model.checkpointing = checkpointing  # type: ignore[assignment]
        spread = spread_out(model, mesh, settings)
        recipe = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
        updater = Updater(model, recipe, STEPS, spread)
        model.train()
        losses, norms = [], []
        for step in range(STEPS):
            window = _window(step, mesh.index("dp"), mesh.size("dp"))
            update = updater.step(
                step,
                window,
                lambda module, batch: language_model_loss(module, batch, 64),
                denominator=_trained_tokens(step),
                describe=lambda batch: "a batch",
            )
            losses.append(update.loss)
            norms.append(update.grad_norm)
        held = sum(p.numel() for p in (piece.local for piece in updater.pieces))
        return {"losses": losses, "norms": norms, "strategy": strategy_of(spread), "held": held}


CASES = [
    ("full", "ddp", "fused", "none"),
    ("full", "zero1", "fused", "none"),
    ("full", "zero2", "eager", "none"),
    ("full", "zero3", "fused", "none"),
    ("lora", "ddp", "fused", "none"),
    ("lora", "zero3", "fused", "none"),
    ("qlora", "zero3", "fused", "none"),
]
MORE_CASES = [
    ("full", "zero3", "fused", "selective"),
    ("dora", "zero3", "fused", "none"),
    ("qlora", "ddp", "fused", "none"),
    ("full", "zero3", "eager", "none"),
    ("full", "zero3", "fused", "block"),
    ("qlora", "zero2", "fused", "none"),
]
"""Of `make test-long`: each strategy, method and form of block is among the others too."""


@pytest.fixture(scope="module")
def one_rank(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path]
) -> Callable[[str, str], dict[str, Any]]:
    """What one process makes of a method and kind of blocks: trained once for all that are compared with it."""

    @cache
    def alone(method: str, blocks: str) -> dict[str, Any]:
        (outcome,) = ranks(train, 1, str(tiny_model_dir("qwen2")), method, "ddp", blocks)
        return outcome

    return alone


@pytest.mark.parametrize(
    ("method", "strategy", "blocks", "checkpointing"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE_CASES)],
)
def test_two_ranks_train_as_one(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    method: str,
    strategy: str,
    blocks: str,
    checkpointing: str,
    one_rank: Callable[[str, str], dict[str, Any]],
) -> None:
    alone = one_rank(method, blocks)
    for rank in ranks(train, 2, str(tiny_model_dir("qwen2")), method, strategy, blocks, checkpointing):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], alone["norms"], rtol=1e-4)
        assert rank["strategy"] == strategy
        if strategy.startswith("zero") and method == "full":
            assert rank["held"] < 0.52 * alone["held"]


@pytest.mark.parametrize(("method", "strategy"), [("full", "zero3"), ("full", "ddp"), ("qlora", "zero3")])
def test_four_ranks_train_as_one(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    method: str,
    strategy: str,
    one_rank: Callable[[str, str], dict[str, Any]],
) -> None:
    alone = one_rank(method, "fused")
    for rank in ranks(train, 4, str(tiny_model_dir("qwen2")), method, strategy, "fused"):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-5)


def sums_of_a_second_start(model_dir: str, strategy: str, method: str) -> tuple[dict[str, bytes], dict[str, bytes]]:
    """The weights after six steps: of one start, and of a second start that takes the weights of step 3."""
    settings = ParallelSection(strategy=strategy)  # type: ignore[arg-type]
    recipe = TrainSection(learning_rate=0.1, schedule="constant", warmup_ratio=0.0, optimizer="sgd")

    def begin(mesh: Mesh) -> Updater:
        model = load_decoder(Path(model_dir), quantize=METHODS[method].quantisation)
        apply_method(model, METHODS[method], seed=0)
        assert isinstance(model, Decoder)
        return Updater(model, recipe, STEPS, spread_out(model.train(), mesh, settings))

    def go_on(mesh: Mesh, updater: Updater, steps: range) -> None:
        for step in steps:
            window = _window(step, mesh.index("dp"), mesh.size("dp"))
            loss = partial(language_model_loss, chunk_tokens=64)
            updater.step(step, window, loss, denominator=_trained_tokens(step), describe=lambda batch: "a batch")

    with joined(settings, "cpu") as mesh:
        updater = begin(mesh)
        go_on(mesh, updater, range(3))
        held = [piece.local.detach().clone() for piece in updater.pieces]
        go_on(mesh, updater, range(3, 6))
        second = begin(mesh)
        with torch.no_grad():
            for piece, value in zip(second.pieces, held, strict=True):
                piece.local.copy_(value)
        go_on(mesh, second, range(3, 6))
        return _bits(updater), _bits(second)


def _bits(updater: Updater) -> dict[str, bytes]:
    return {piece.name: piece.local.detach().numpy().tobytes() for piece in updater.pieces}


@pytest.mark.parametrize(("method", "strategy"), [("lora", "ddp"), ("full", "ddp"), ("full", "zero2")])
def test_a_second_start_sums_as_the_first_did(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], method: str, strategy: str
) -> None:
    """The bug: DDP lays its buckets out anew after the first step; from three processes on, sums go by the place."""
    for whole, again in ranks(sums_of_a_second_start, 4, str(tiny_model_dir("qwen2")), strategy, method):
        assert whole == again


def test_auto_is_ddp_for_adapters_and_zero3_else() -> None:
    from tunesmith.parallel.apply import resolve_strategy

    assert resolve_strategy(ParallelSection(), has_adapters=True) == "ddp"
    assert resolve_strategy(ParallelSection(), has_adapters=False) == "zero3"
    assert resolve_strategy(ParallelSection(offload="cpu"), has_adapters=True) == "zero3"
