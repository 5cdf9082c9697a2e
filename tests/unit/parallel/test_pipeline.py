"""Pipelines of two and four stages: the losses and gradient norms of one process, whatever the stages hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.errors import ParallelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.apply import spread_out, strategy_of
from tunesmith.parallel.mesh import joined
from tunesmith.parallel.pipeline import Piped
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import DataSection, MethodSection, TrainSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch
from tunesmith.train.session import language_model_loss
from tunesmith.train.update import Updater

Ranks = Callable[..., list[Any]]
STEPS, PACKS, TOKENS = 20, 4, 48
METHODS = {
    "full": MethodSection(kind="full"),
    "lora": MethodSection(kind="lora", rank=4),
    "qlora": MethodSection(kind="qlora", rank=4),
    "dora": MethodSection(kind="lora", rank=4, dora=True),
    "fp8": MethodSection(kind="lora", rank=4, base="fp8"),
    "last": MethodSection(kind="freeze", trainable=["last:1"]),
}


@dataclass(frozen=True)
class Case:
    """How a model is trained, and cut."""

    method: str = "full"
    pipeline: int = 1
    strategy: str = "auto"
    blocks: str = "fused"
    checkpointing: str = "none"
    loads_stage: bool = False
    packs: tuple[int, ...] = (PACKS,)
    has_tails: bool = True


def _window(step: int, case: Case, rank: int, ranks: int) -> list[MicroBatch]:
    """This rank's packs of a step: ragged documents, their numbers in turn those of the case."""
    data = DataSection(format="tokens", max_length=24)
    documents = RandomTokens(STEPS * PACKS * 2, 24, 272, seed=3)
    documents.lengths = 12 + np.arange(len(documents)) * 5 % 13
    count = case.packs[step % len(case.packs)]
    packs = [(2 * (PACKS * step + i), 2 * (PACKS * step + i) + 1) for i in range(count)]
    mine: list[tuple[int, ...]] = list(packs[rank::ranks])
    mine += [()] * (-(-len(packs) // ranks) - len(mine))
    built = [build_micro_batch(_Ragged(documents), pack, TOKENS, data, 272) for pack in mine]
    return built if case.has_tails else [batch.without_tail() if batch.lengths else batch for batch in built]


class _Ragged:
    """Random documents, cut to their lengths."""

    def __init__(self, documents: RandomTokens) -> None:
        self.documents, self.lengths, self.hashes = documents, documents.lengths, documents.hashes

    def __len__(self) -> int:
        return len(self.documents)

    def arrays(self, index: int) -> Any:
        return tuple(values[: self.lengths[index]] for values in self.documents.arrays(index))

    def __getitem__(self, index: int) -> Any:
        document = self.documents[index]
        length = self.lengths[index]
        return replace(document, tokens=document.tokens[:length], trained=document.trained[:length])


def _loss(module: Any, batch: MicroBatch) -> Any:
    return language_model_loss(module, batch, 64)


def train(model_dir: str, case: Case) -> dict[str, Any]:
    """Twenty steps: the losses, the norms, a validation, and what is held here at the end."""
    settings = ParallelSection(strategy=case.strategy, pipeline=case.pipeline)  # type: ignore[arg-type]
    with joined(settings, "cpu") as mesh:
        quantize = METHODS[case.method].quantisation
        model = load_decoder(Path(model_dir), quantize=quantize, mesh=mesh if case.loads_stage else None)
        apply_method(model, METHODS[case.method], seed=0)
        assert isinstance(model, Decoder)
        model.is_fused = case.blocks == "fused"
        model.checkpointing = case.checkpointing  # type: ignore[assignment]
        spread = spread_out(model, mesh, settings)
        recipe = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
        updater = Updater(model, recipe, STEPS, spread)
        model.train()
        losses, norms = [], []
        for step in range(STEPS):
            window = _window(step, case, mesh.index("dp"), mesh.size("dp"))
            denominator = sum(batch.num_trained for batch in _window(step, case, 0, 1))
            update = updater.step(step, window, _loss, denominator=denominator, describe=lambda batch: "a batch")
            losses.append(update.loss)
            norms.append(update.grad_norm)
        return {
            "losses": losses,
            "norms": norms,
            "strategy": strategy_of(spread),
            "validation": _validated(spread, model, case),
            "held": sum(p.numel() for p in model.parameters()),
            "states": sum(piece.local.numel() for piece in updater.pieces),
            "weights": _weights(spread, model),
            "own": [(piece.name, piece.slices) for piece in updater.pieces if piece.is_own],
        }


def _validated(spread: Any, model: Decoder, case: Case) -> float:
    """The mean loss of five packs of several lengths, with the weights as trained."""
    window = _window(0, replace(case, packs=(PACKS,)), 0, 1) + _window(1, replace(case, has_tails=False), 0, 1)[:1]
    model.eval()
    if isinstance(spread, Piped):
        losses, counts = spread.evaluate(_loss, window)
    else:
        with torch.no_grad():
            losses, counts = map(list, zip(*(_loss(model, batch) for batch in window), strict=True))
    return float(torch.stack(losses).sum()) / sum(counts)


def _weights(spread: Any, model: Decoder) -> dict[str, np.ndarray]:
    if isinstance(spread, Piped):
        spread.settle()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}


def _check(ranks: Ranks, folder: Path, case: Case, world_size: int) -> list[dict[str, Any]]:
    """Train by one process and by several, and compare."""
    alone = _alone(ranks, folder, replace(case, pipeline=1, strategy="auto", checkpointing="none", loads_stage=False))
    outcomes = ranks(train, world_size, str(folder), case)
    names: set[str] = set()
    for outcome in outcomes:
        np.testing.assert_allclose(outcome["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(outcome["norms"], alone["norms"], rtol=1e-4)
        np.testing.assert_allclose(outcome["validation"], alone["validation"], rtol=1e-5)
        for name, weight in outcome["weights"].items():
            np.testing.assert_allclose(weight, alone["weights"][name], rtol=0, atol=2e-4, err_msg=name)
        names |= outcome["weights"].keys()
    assert names == alone["weights"].keys()
    owned = [piece for outcome in outcomes for piece in outcome["own"]]
    assert len(owned) == len(set(owned)), "each piece is written once"
    assert {name for name, _ in owned} == names
    return outcomes


_cache: dict[Any, dict[str, Any]] = {}


def _alone(ranks: Ranks, folder: Path, case: Case) -> dict[str, Any]:
    key = (folder, case)
    if key not in _cache:
        (_cache[key],) = ranks(train, 1, str(folder), case)
    return _cache[key]


@pytest.mark.parametrize(
    "case",
    [
        Case("full"),
        Case("full", blocks="eager"),
        Case("full", checkpointing="block"),
        Case("full", checkpointing="selective"),
        Case("full", blocks="eager", checkpointing="selective"),
        Case("lora", loads_stage=True),
        Case("dora"),
        Case("qlora", loads_stage=True),
        Case("qlora", checkpointing="selective"),
        Case("fp8"),
        Case("full", packs=(1, 4, 2, 3), has_tails=False),
    ],
    ids=str,
)
def test_two_stages_train_as_one_process(ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case) -> None:
    folder = tiny_model_dir("qwen2", num_hidden_layers=4)
    first, last = _check(ranks, folder, replace(case, pipeline=2), 2)
    assert "blocks.0.attention.qkv.weight" not in last["weights"]
    assert first["held"] < 0.75 * _alone(ranks, folder, replace(case, checkpointing="none", loads_stage=False))["held"]


@pytest.mark.parametrize("case", [Case("full"), Case("lora"), Case("full", packs=(1, 2, 3))], ids=str)
def test_four_stages_train_as_one_process(ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case) -> None:
    _check(ranks, tiny_model_dir("qwen2", num_hidden_layers=4), replace(case, pipeline=4), 4)


@pytest.mark.parametrize("count", [2, 4])
def test_a_tied_embedding_is_one_on_both_ends(ranks: Ranks, tiny_model_dir: Callable[..., Path], count: int) -> None:
    folder = tiny_model_dir("qwen2", num_hidden_layers=4, tie_word_embeddings=True)
    outcomes = _check(ranks, folder, Case("full", pipeline=count, loads_stage=True), count)
    first, last = outcomes[0], outcomes[-1]
    assert first["weights"]["embedding.weight"].tobytes() == last["weights"]["embedding.weight"].tobytes()
    assert not any("embedding.weight" in outcome["weights"] for outcome in outcomes[1:-1])


@pytest.mark.parametrize(
    ("case", "ties"),
    [
        (Case("full", strategy="ddp", packs=(4, 3)), True),
        (Case("full", packs=(4, 3)), True),
        (Case("full"), False),
        (Case("qlora"), False),
    ],
    ids=str,
)
def test_pipelines_beside_each_other_train_as_one_process(
    ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case, ties: bool
) -> None:
    folder = tiny_model_dir("qwen2", num_hidden_layers=4, tie_word_embeddings=ties)
    outcomes = _check(ranks, folder, replace(case, pipeline=2), 4)
    expected = "zero1" if case.strategy == "auto" and case.method == "full" else "ddp"
    assert {outcome["strategy"] for outcome in outcomes} == {expected}
    trained = [sum(weight.size for weight in outcome["weights"].values()) for outcome in outcomes]
    share = 0.52 if expected == "zero1" else 1.0
    assert all(o["states"] <= share * all_ for o, all_ in zip(outcomes, trained, strict=True))


def test_other_families(ranks: Ranks, tiny_model_dir: Callable[..., Path]) -> None:
    for family in ("gpt2", "mistral", "qwen3_moe"):
        layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
        _check(ranks, tiny_model_dir(family, **layers), Case("full", pipeline=2), 2)
