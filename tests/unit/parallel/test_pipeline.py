"""Pipelines of two and four stages: the losses and gradient norms of one process, whatever the stages hold."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import nn

from tunesmith.arch import config_from_dict
from tunesmith.checkpoint.load import load_decoder
from tunesmith.errors import ModelError, TunesmithError
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.apply import spread_out, strategy_of
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.parallel.pipeline import Piped, _causes
from tunesmith.parallel.stages import plan_stages
from tunesmith.parallel.tensor import own_targets, shard_tensors
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
    tensor: int = 1
    steps: int = STEPS

    def __str__(self) -> str:
        return "-".join(str(v) for v, d in zip(vars(self).values(), vars(Case()).values(), strict=True) if v != d)


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


def _loss(mesh: Mesh) -> Any:
    """The loss of this process's own tokens, where several share a pack."""

    def loss(module: Any, batch: MicroBatch) -> Any:
        tokens, count = batch.pack.tokens_T.numel(), batch.num_trained
        index, targets = own_targets(batch.index, batch.targets, tokens, mesh)
        return language_model_loss(module, replace(batch, index=index, targets=targets), 64)[0], count

    return loss


def train(model_dir: str, case: Case) -> dict[str, Any]:
    """The losses of the steps, the norms, a validation, and what is held here at the end."""
    settings = ParallelSection(strategy=case.strategy, pipeline=case.pipeline, tensor=case.tensor)
    with joined(settings, "cpu") as mesh:
        model = _model(model_dir, case, mesh)
        spread = spread_out(model, mesh, settings)
        recipe = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0)
        updater = Updater(model, recipe, case.steps, spread)
        model.train()
        losses, norms = [], []
        for step in range(case.steps):
            window = _window(step, case, mesh.index("dp"), mesh.size("dp"))
            denominator = sum(batch.num_trained for batch in _window(step, case, 0, 1))
            update = updater.step(step, window, _loss(mesh), denominator=denominator, describe=lambda batch: "a batch")
            losses.append(update.loss)
            norms.append(update.grad_norm)
        return {
            "losses": losses,
            "norms": norms,
            "strategy": strategy_of(spread),
            "validation": _validated(spread, model, case, mesh),
            "held": sum(p.numel() for p in model.parameters()),
            "states": sum(piece.local.numel() for piece in updater.pieces),
            "weights": _weights(spread, model),
            "own": [(piece.name, box) for piece in updater.pieces if piece.is_own for _, box in piece.boxes],
        }


def _model(model_dir: str, case: Case, mesh: Mesh) -> Decoder:
    quantize = METHODS[case.method].quantisation
    model = load_decoder(Path(model_dir), quantize=quantize, mesh=mesh if case.loads_stage else None)
    apply_method(model, METHODS[case.method], seed=0)
    shard_tensors(model, mesh)
    model.is_fused = case.blocks == "fused"
    model.checkpointing = case.checkpointing  # type: ignore[assignment]
    return model


def _validated(spread: Any, model: Decoder, case: Case, mesh: Mesh) -> float:
    """The mean loss of five packs of several lengths, with the weights as trained."""
    window = _window(0, replace(case, packs=(PACKS,)), 0, 1) + _window(1, replace(case, has_tails=False), 0, 1)[:1]
    model.eval()
    if isinstance(spread, Piped):
        losses, counts = spread.evaluate(_loss(mesh), window)
    else:
        with torch.no_grad():
            losses, counts = map(list, zip(*(_loss(mesh)(model, batch) for batch in window), strict=True))
    return float(spread.total(torch.stack(losses).sum())) / spread.count(sum(counts))


def _weights(spread: Any, model: Decoder) -> dict[str, np.ndarray]:
    if isinstance(spread, Piped):
        spread.settle()
    return {name: p.detach().numpy().copy() for name, p in model.named_parameters() if p.requires_grad}


def _check(ranks: Ranks, folder: Path, case: Case, world_size: int) -> list[dict[str, Any]]:
    """Train by one process and by several, and compare."""
    alone = _alone(ranks, folder, case)
    outcomes = ranks(train, world_size, str(folder), case)
    names: set[str] = set()
    for outcome in outcomes:
        np.testing.assert_allclose(outcome["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(outcome["norms"], alone["norms"], rtol=1e-4)
        np.testing.assert_allclose(outcome["validation"], alone["validation"], rtol=1e-5)
        for name, weight in outcome["weights"].items():
            if weight.shape == alone["weights"][name].shape:
                np.testing.assert_allclose(weight, alone["weights"][name], rtol=0, atol=2e-4, err_msg=name)
        names |= outcome["weights"].keys()
    assert names == alone["weights"].keys()
    owned = [piece for outcome in outcomes for piece in outcome["own"]]
    assert len(owned) == len(set(owned)), "each piece is written once"
    assert {name for name, _ in owned} == names
    return outcomes


_cache: dict[Any, dict[str, Any]] = {}


def _alone(ranks: Ranks, folder: Path, case: Case) -> dict[str, Any]:
    """One process, kept for other cases; longer runs begin with the same steps."""
    alone = Case(case.method, packs=case.packs, has_tails=case.has_tails, steps=case.steps)
    if (folder, alone) not in _cache:
        (_cache[folder, alone],) = ranks(train, 1, str(folder), alone)
    return _cache[folder, alone]


SHORT = 3
TWO_STAGES = [
    Case("full"),
    Case("lora", loads_stage=True, packs=(2,)),
    Case("qlora", loads_stage=True, packs=(2,)),
    Case("full", blocks="eager", steps=SHORT),
    Case("full", checkpointing="block", steps=SHORT),
    Case("full", checkpointing="selective", steps=SHORT),
    Case("fp8", steps=SHORT),
    Case("full", packs=(1, 4, 3), has_tails=False, steps=SHORT),
]


MORE = [Case("full", blocks="eager", checkpointing="selective", steps=SHORT), Case("dora", steps=SHORT)]
"""Of `make test-long`."""


@pytest.mark.parametrize("case", [*TWO_STAGES, *(pytest.param(case, marks=pytest.mark.long) for case in MORE)], ids=str)
def test_two_stages_train_as_one_process(ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case) -> None:
    folder = tiny_model_dir("qwen2", num_hidden_layers=4)
    first, last = _check(ranks, folder, replace(case, pipeline=2), 2)
    assert not any(name.startswith(("blocks.0", "embedding")) for name in last["weights"])
    assert not any(name.startswith(("blocks.3", "head")) for name in first["weights"])
    assert max(first["held"], last["held"]) < 0.75 * _alone(ranks, folder, case)["held"]


FOUR_STAGES = [Case("full"), Case("qlora", steps=SHORT), Case("full", packs=(1, 2, 3), steps=SHORT)]


@pytest.mark.parametrize("case", FOUR_STAGES, ids=str)
def test_four_stages_train_as_one_process(ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case) -> None:
    _check(ranks, tiny_model_dir("qwen2", num_hidden_layers=4), replace(case, pipeline=4), 4)


@pytest.mark.parametrize(("count", "steps"), [(2, 6), (4, SHORT)])
def test_a_tied_embedding_is_one_on_both_ends(
    ranks: Ranks, tiny_model_dir: Callable[..., Path], count: int, steps: int
) -> None:
    folder = tiny_model_dir("qwen2", num_hidden_layers=4, tie_word_embeddings=True)
    outcomes = _check(ranks, folder, Case("full", pipeline=count, loads_stage=True, steps=steps), count)
    first, last = outcomes[0], outcomes[-1]
    assert first["weights"]["embedding.weight"].tobytes() == last["weights"]["embedding.weight"].tobytes()
    assert not any("embedding.weight" in outcome["weights"] for outcome in outcomes[1:-1])


@pytest.mark.parametrize(
    ("case", "ties"),
    [
        (Case("full"), False),
        (Case("full", strategy="ddp", packs=(4, 3), steps=SHORT), True),
        (Case("full", packs=(4, 3), steps=SHORT), True),
        (Case("qlora", steps=SHORT), False),
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
    assert all(o["states"] <= share * size for o, size in zip(outcomes, trained, strict=True))


@pytest.mark.parametrize("case", [Case("full", steps=SHORT), Case("qlora", steps=SHORT)], ids=str)
def test_stages_whose_matrices_are_shared(ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case) -> None:
    """Two stages of two processes each; every second pack has an odd number of tokens."""
    folder = tiny_model_dir(
        "qwen2", num_hidden_layers=4, tie_word_embeddings=True, hidden_size=128, intermediate_size=128
    )
    case = replace(case, pipeline=2, tensor=2, has_tails=False, loads_stage=True)
    _check(ranks, folder, case, 4)


@pytest.mark.parametrize("family", ["gpt2", "qwen3_moe"])
def test_other_families(ranks: Ranks, tiny_model_dir: Callable[..., Path], family: str) -> None:
    layers = {"n_layer" if family == "gpt2" else "num_hidden_layers": 4}
    _check(ranks, tiny_model_dir(family, **layers), Case("full", pipeline=2, steps=SHORT), 2)


def _refused(model_dir: str, case: Case, settings: ParallelSection) -> str:
    with joined(settings, "cpu") as mesh:
        model = _model(model_dir, case, mesh)
        with pytest.raises(TunesmithError) as caught:
            spread = cast(Piped, spread_out(model, mesh, settings))
            spread.backward(_loss(mesh), _window(0, case, 0, 1), 1.0)
        return str(caught.value)


@pytest.mark.parametrize(
    ("case", "settings", "message"),
    [
        (Case("full"), {"pipeline": 4}, "2 blocks can't be divided into 4 stages: set parallel.pipeline to at most 2"),
        (Case("last"), {"pipeline": 2}, "1 of the pipeline's 2 stages would train nothing"),
        (Case("full", checkpointing="offload"), {"pipeline": 2}, "use --set train.checkpointing=selective"),
        (Case("full"), {"pipeline": 2, "offload": "cpu"}, "parallel.offload cpu does not go with parallel.pipeline"),
    ],
)
def test_what_a_pipeline_can_not_do_is_refused_by_all(
    ranks: Ranks, tiny_model_dir: Callable[..., Path], case: Case, settings: dict[str, Any], message: str
) -> None:
    parallel = ParallelSection(**settings)
    for text in ranks(_refused, parallel.pipeline, str(tiny_model_dir("qwen2")), case, parallel):
        assert message in text


def test_what_a_stage_raises_is_not_wrapped() -> None:
    """torch says that a stage failed, with what it was given, and the reason below."""
    with pytest.raises(ModelError, match=r"^40 tokens$") as caught, _causes():
        try:
            raise ModelError("40 tokens")
        except ModelError as error:
            raise RuntimeError("[Stage 0] failed to run forward") from error
    assert caught.value.__cause__ is None
    with pytest.raises(RuntimeError, match="lost"), _causes():
        raise RuntimeError("connection lost")


def _buffers() -> list[tuple[int, int]]:
    """Of sixteen micro-batches: (activations received, their buffers) of each stage."""
    from tunesmith.parallel.pipeline_stage import Wire, make_schedule  # late: it imports torch's compiler

    with joined(ParallelSection(pipeline=4), "cpu") as mesh:
        module = nn.Linear(8, 8) if mesh.index("pp") < 3 else nn.Sequential(nn.Linear(8, 1), nn.Flatten(0), _Sum())
        inputs = iter([torch.ones(4, 8)] * 16)
        stage = _First(module, inputs) if mesh.index("pp") == 0 else module
        schedule = make_schedule(stage, mesh, 16, Wire(4, 8, torch.float32))
        if mesh.index("pp") == 3:
            schedule.step(target=torch.arange(16))
        else:
            schedule.step()
        received: list[Any] = [infos[0].buffer for infos in schedule._stage.args_recv_info.values() if infos]
        return [(len(received), len({buffer.data_ptr() for buffer in received}))]


class _First(nn.Module):
    def __init__(self, inner: nn.Module, inputs: Any) -> None:
        super().__init__()
        self.inner, self.inputs = inner, inputs

    def forward(self) -> Any:
        return self.inner(next(self.inputs))


class _Sum(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.sum(0, keepdim=True)


def test_as_many_buffers_as_micro_batches_under_way(ranks: Ranks) -> None:
    assert ranks(_buffers, 4) == [[(0, 0)], [(16, 3)], [(16, 2)], [(16, 1)]]


def test_stages_are_equal_in_work() -> None:
    small = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    even = config_from_dict({**small, "num_hidden_layers": 10, "vocab_size": 8})
    assert [len(stage) for stage in plan_stages(even, 2)] == [5, 5]
    assert [len(stage) for stage in plan_stages(even, 3)] == [3, 4, 3]
    assert [len(stage) for stage in plan_stages(even, 4)] == [2, 3, 3, 2]
    large_head = config_from_dict({**small, "num_hidden_layers": 8, "vocab_size": 8000})
    plan = plan_stages(large_head, 4)
    assert [len(stage) for stage in plan] == [2, 2, 3, 1]
    assert [layer for stage in plan for layer in stage] == list(range(8))
