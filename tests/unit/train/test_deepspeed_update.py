"""DeepSpeed's ZeRO on two ranks: the losses and norms of one process, whatever is sharded or offloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.mesh import joined
from tunesmith.recipe.parallel import ParallelSection, Strategy
from tunesmith.recipe.schema import DataSection, MethodSection, TrainSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch
from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config
from tunesmith.train.session import language_model_loss
from tunesmith.train.update import Updater

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None, reason="deepspeed is not installed: pip install deepspeed"
)
STEPS, PACKS, TOKENS = 20, 4, 48
METHODS = {
    "full": MethodSection(kind="full"),
    "lora": MethodSection(kind="lora", rank=4),
    "dora": MethodSection(kind="lora", rank=4, dora=True),
    "qlora": MethodSection(kind="qlora", rank=4),
}


def _window(step: int, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's of four packs a step; the third step has three packs, so that a rank gets one without any token."""
    data = DataSection(format="tokens", max_length=24)
    documents = RandomTokens(STEPS * PACKS * 2, 20, 272, seed=3)
    packs = [(2 * (PACKS * step + i), 2 * (PACKS * step + i) + 1) for i in range(3 if step == 2 else PACKS)]
    mine: list[tuple[int, ...]] = list(packs[rank::ranks])
    mine += [()] * (-(-len(packs) // ranks) - len(mine))
    return [build_micro_batch(documents, pack, TOKENS, data, 272) for pack in mine]


def _trained_tokens(step: int) -> int:
    return sum(batch.num_trained for batch in _window(step, 0, 1))


def _loss(module: Any, batch: MicroBatch) -> Any:
    return language_model_loss(module, batch, 64)


def _model(model_dir: str, method: str, blocks: str, checkpointing: str) -> Decoder:
    model = load_decoder(Path(model_dir), quantize=METHODS[method].quantisation)
    apply_method(model, METHODS[method], seed=0)
    assert isinstance(model, Decoder)
    model.is_fused = blocks == "fused"
    model.checkpointing = checkpointing  # type: ignore[assignment]
    return model.train()


def train(
    model_dir: str,
    method: str,
    strategy: Strategy | None,
    offload: Literal["none", "cpu"] = "none",
    blocks: str = "fused",
    checkpointing: str = "none",
) -> dict[str, Any]:
    """Twenty steps; strategy None: the native engine on one process."""
    settings = ParallelSection(strategy=strategy or "auto", engine="deepspeed", offload=offload)
    recipe = TrainSection(learning_rate=1e-3, schedule="cosine", weight_decay=0.1, precision="float32")
    model = _model(model_dir, method, blocks, checkpointing)
    with joined(settings, "cpu") as mesh:
        updater: Updater | DeepSpeedUpdater
        if strategy is None:
            updater = Updater(model, recipe, STEPS)
        else:
            batches = PACKS // mesh.world_size
            config = deepspeed_config(settings, recipe, model, STEPS, mesh, micro_batches=batches)
            updater = DeepSpeedUpdater(model, recipe, STEPS, config, mesh)
        losses, norms = [], []
        for step in range(STEPS):
            window = _window(step, mesh.rank, mesh.world_size)
            update = updater.step(
                step, window, _loss, denominator=_trained_tokens(step), describe=lambda batch: "a batch"
            )
            losses.append(update.loss)
            norms.append(update.grad_norm)
        held = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
        if isinstance(updater, DeepSpeedUpdater):
            updater.close()
    return {"losses": losses, "norms": norms, "held": held}


CASES: list[tuple[str, Strategy, Literal["none", "cpu"], str, str]] = [
    ("full", "zero1", "none", "fused", "none"),
    ("full", "zero2", "none", "fused", "none"),
    ("full", "zero3", "none", "fused", "none"),
    ("full", "zero3", "none", "eager", "none"),
    ("full", "zero3", "none", "fused", "block"),
    ("full", "zero3", "none", "fused", "selective"),
    ("full", "zero1", "cpu", "fused", "none"),
    ("full", "zero2", "cpu", "eager", "none"),
    ("full", "zero3", "cpu", "fused", "none"),
    ("lora", "zero1", "none", "fused", "none"),
    ("lora", "zero2", "none", "fused", "none"),
    ("lora", "zero3", "none", "fused", "none"),
    ("lora", "zero3", "cpu", "fused", "none"),
    ("dora", "zero3", "none", "fused", "none"),
    ("qlora", "zero1", "none", "fused", "none"),
    ("qlora", "zero2", "cpu", "fused", "none"),
    ("qlora", "zero3", "none", "fused", "none"),
    ("qlora", "zero3", "cpu", "eager", "none"),
]


@pytest.mark.parametrize(("method", "strategy", "offload", "blocks", "checkpointing"), CASES)
def test_two_ranks_train_as_one(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    method: str,
    strategy: Strategy,
    offload: str,
    blocks: str,
    checkpointing: str,
) -> None:
    folder = str(tiny_model_dir("qwen2"))
    alone = train(folder, method, None)
    for rank in ranks(train, 2, folder, method, strategy, offload, blocks, checkpointing):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], alone["norms"], rtol=1e-4)
