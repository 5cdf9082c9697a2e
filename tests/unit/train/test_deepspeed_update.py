"""DeepSpeed's ZeRO on two ranks: the losses and norms of one process, whatever is sharded or offloaded."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from tunesmith.checkpoint.agreement import checkpoint_group
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.sharded import save_shards
from tunesmith.checkpoint.state import load_latest, save_state
from tunesmith.cli.main import run as tunesmith
from tunesmith.errors import NonFiniteError
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.parallel.mesh import joined
from tunesmith.recipe.parallel import ParallelSection, Strategy
from tunesmith.recipe.schema import DataSection, MethodSection, TrainSection
from tunesmith.train.batches import MicroBatch, RandomTokens, build_micro_batch
from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config
from tunesmith.train.session import language_model_loss
from tunesmith.train.states import _restore_optimizer, capture_state, restore_weights
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
    *,
    first: int = 0,
    stop: int = STEPS,
    states: str | None = None,
) -> dict[str, Any]:
    """Steps `first` to `stop`; strategy None: the native engine on one process.

    states: where a state is read from before the first step, but for step 0, and written to after the last.
    """
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
        if states is not None and first:
            _restore(updater, Path(states))
        for step in range(first, stop):
            window = _window(step, mesh.rank, mesh.world_size)
            update = updater.step(
                step, window, _loss, denominator=_trained_tokens(step), describe=lambda batch: "a batch"
            )
            losses.append(update.loss)
            norms.append(update.grad_norm)
        held = sum(p.numel() * p.element_size() for p in [*model.parameters(), *model.buffers()])
        if states is not None and stop < STEPS:
            _save(updater, Path(states), stop)
        if isinstance(updater, DeepSpeedUpdater):
            updater.close()
    return {"losses": losses, "norms": norms, "held": held}


@cache
def one_process(model_dir: str, method: str) -> dict[str, Any]:
    """What the native engine makes of all steps on one process: trained once for all that are compared with it."""
    return train(model_dir, method, None)


def _save(updater: Updater | DeepSpeedUpdater, states: Path, step: int) -> None:
    facts = {"optimizer": {}, "rng": {}, "scaler": None}
    if isinstance(updater, DeepSpeedUpdater):
        save_shards(states, step, updater.shards(), facts, keep=1, agreement=checkpoint_group())
    else:
        weights = {name: p for name, p in updater.module.named_parameters() if p.requires_grad}
        save_state(states, capture_state(step, weights, updater, updater.device, {}), keep=1)


def _restore(updater: Updater | DeepSpeedUpdater, states: Path) -> None:
    if isinstance(updater, DeepSpeedUpdater):
        updater.restore(load_latest(states, agreement=checkpoint_group())[1])
        return
    _, state = load_latest(states)
    weights = {name: p for name, p in updater.module.named_parameters() if p.requires_grad}
    restore_weights(state, weights)
    _restore_optimizer(state, updater)


Case = tuple[str, Strategy, Literal["none", "cpu"], str, str]
CASES: list[Case] = [
    ("full", "zero1", "none", "fused", "none"),
    ("full", "zero2", "none", "fused", "none"),
    ("full", "zero3", "none", "fused", "none"),
    ("full", "zero3", "none", "fused", "selective"),
    ("full", "zero2", "cpu", "eager", "none"),
    ("full", "zero3", "cpu", "fused", "none"),
    ("lora", "zero3", "none", "fused", "none"),
    ("qlora", "zero3", "none", "fused", "none"),
]
"""Every stage, offload and form of block in one of them at least; `make test-long` has the rest."""
MORE_CASES: list[Case] = [
    ("dora", "zero3", "none", "fused", "none"),
    ("qlora", "zero2", "cpu", "fused", "none"),
    ("full", "zero3", "none", "eager", "none"),
    ("full", "zero3", "none", "fused", "block"),
    ("full", "zero1", "cpu", "fused", "none"),
    ("lora", "zero1", "none", "fused", "none"),
    ("lora", "zero2", "none", "fused", "none"),
    ("lora", "zero3", "cpu", "fused", "none"),
    ("qlora", "zero1", "none", "fused", "none"),
    ("qlora", "zero3", "cpu", "eager", "none"),
]


@pytest.mark.parametrize(
    ("method", "strategy", "offload", "blocks", "checkpointing"),
    [*CASES, *(pytest.param(*case, marks=pytest.mark.long) for case in MORE_CASES)],
)
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
    alone = one_process(folder, method)
    for rank in ranks(train, 2, folder, method, strategy, offload, blocks, checkpointing):
        np.testing.assert_allclose(rank["losses"], alone["losses"], rtol=1e-5)
        np.testing.assert_allclose(rank["norms"], alone["norms"], rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "chain"),
    [
        pytest.param("full", ("zero1", "zero3"), marks=pytest.mark.long),
        ("full", (None, "zero2")),
        ("full", ("zero3-cpu", "zero3")),
        pytest.param("lora", ("zero3", None), marks=pytest.mark.long),
        ("lora", ("zero3-cpu", "zero3")),
    ],
)
def test_a_state_goes_from_engine_to_engine(
    ranks: Callable[..., list[Any]],
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    method: str,
    chain: tuple[str | None, str | None],
) -> None:
    folder = str(tiny_model_dir("qwen2"))
    alone = one_process(folder, method)
    losses: list[float] = []
    for first, stop, kind in zip((0, 10), (10, STEPS), chain, strict=True):
        strategy, _, offload = (kind or "").partition("-")
        world = 1 if kind is None else 2
        (*_, done) = ranks(
            train, world, folder, method, strategy or None, offload or "none", first=first, stop=stop,
            states=str(tmp_path),
        )  # fmt: skip
        losses += done["losses"]
    np.testing.assert_allclose(losses, alone["losses"], rtol=1e-5)


@pytest.mark.parametrize(
    "strategy", [*(pytest.param(name, marks=pytest.mark.long) for name in ("zero1", "zero2")), "zero3"]
)
def test_a_resumed_run_has_the_same_bits(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], tmp_path: Path, strategy: str
) -> None:
    folder = str(tiny_model_dir("qwen2"))
    whole = ranks(train, 2, folder, "full", strategy)[0]["losses"]
    begun = ranks(train, 2, folder, "full", strategy, stop=7, states=str(tmp_path))[0]["losses"]
    ended = ranks(train, 2, folder, "full", strategy, first=7, states=str(tmp_path))[0]["losses"]
    assert begun + ended == whole


def spoil(model_dir: str, strategy: Strategy, what: str) -> tuple[str, float, float, float]:
    """A good step, a step that is NaN on the second rank only, a good step again."""
    settings = ParallelSection(strategy=strategy, engine="deepspeed")
    recipe = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, precision="float32")
    model = _model(model_dir, "full", "fused", "none")

    def spoiled(module: Any, batch: MicroBatch) -> Any:
        loss, count = language_model_loss(module, batch, 64)
        if what == "loss":
            return loss * float("nan"), count
        loss = loss.clone()
        loss.register_hook(lambda gradient: gradient * float("inf"))
        return loss, count

    with joined(settings, "cpu") as mesh:
        config = deepspeed_config(settings, recipe, model, STEPS, mesh, micro_batches=2)
        updater = DeepSpeedUpdater(model, recipe, STEPS, config, mesh)

        def step(number: int, function: Any) -> float:
            window = _window(number, mesh.rank, 2)
            tokens = _trained_tokens(number)
            return updater.step(number, window, function, denominator=tokens, describe=lambda b: "row 7").loss

        def look() -> float:
            with torch.no_grad():
                return float(updater.engine.total(updater.engine.loss(_loss, _window(0, mesh.rank, 2)[0])[0]))

        first = step(0, _loss)
        before = look()
        with pytest.raises(NonFiniteError) as caught:
            step(1, spoiled if mesh.rank == 1 else _loss)
        after = look()
        step(1, _loss)
        updater.close()
    return str(caught.value), before, after, first


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_nan_on_one_rank_stops_all_before_the_update(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], strategy: str, what: str
) -> None:
    first, second = ranks(spoil, 2, str(tiny_model_dir("qwen2")), strategy, what)
    for message, before, after, _ in (first, second):
        assert message.startswith("step 2: ") and "nothing was updated" in message
        assert after == before
    if what == "loss":
        assert "the loss is nan" in second[0] and "Batch: row 7" in second[0]
        assert "the loss of another process is nan" in first[0]


def narrow(model_dir: str, method: str, strategy: Strategy | None, precision: str) -> list[float]:
    """Twenty steps in bfloat16 or float16; strategy None: the native engine on one process."""
    settings = ParallelSection(strategy=strategy or "auto", engine="deepspeed")
    recipe = TrainSection(learning_rate=1e-3, precision=precision, master_weights="float32")  # type: ignore[arg-type]
    model = _model(model_dir, method, "fused", "none")
    model.compute_dtype = torch.bfloat16 if precision == "bfloat16" else torch.float16
    with joined(settings, "cpu") as mesh:
        updater: Updater | DeepSpeedUpdater = Updater(model, recipe, STEPS)
        if strategy is not None:
            config = deepspeed_config(settings, recipe, model, STEPS, mesh, micro_batches=PACKS // mesh.world_size)
            updater = DeepSpeedUpdater(model, recipe, STEPS, config, mesh)
        losses = []
        for step in range(STEPS):
            window = _window(step, mesh.rank, mesh.world_size)
            tokens = _trained_tokens(step)
            losses.append(updater.step(step, window, _loss, denominator=tokens, describe=lambda b: "a batch").loss)
        if isinstance(updater, DeepSpeedUpdater):
            assert next(model.parameters()).dtype == model.compute_dtype
            updater.close()
    return losses


@pytest.mark.parametrize(
    ("method", "strategy"),
    [
        ("full", "zero3"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("full", "zero1"), ("qlora", "zero3"))),
    ],
)
def test_bfloat16_with_float32_masters_trains_as_one_does(
    ranks: Callable[..., list[Any]], tiny_model_dir: Callable[..., Path], method: str, strategy: str
) -> None:
    folder = str(tiny_model_dir("qwen2"))
    alone = narrow(folder, method, None, "bfloat16")
    for losses in ranks(narrow, 2, folder, method, strategy, "bfloat16"):
        np.testing.assert_allclose(losses, alone, rtol=3e-3)


def digits(strategy: Strategy | None) -> dict[str, float]:
    """The example: a module that is no language model, its items counted on the way; None: the native engine."""
    spec = importlib.util.spec_from_file_location("digits", Path(__file__).parents[3] / "examples/digits_deepspeed.py")
    assert spec is not None and spec.loader is not None
    example = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(example)
    engine: Literal["native", "deepspeed"] = "native" if strategy is None else "deepspeed"
    return example.train(ParallelSection(engine=engine, strategy=strategy or "auto"), "cpu", 25)


@pytest.mark.parametrize("strategy", [pytest.param("zero2", marks=pytest.mark.long), "zero3"])
def test_any_module_trains_under_either_engine(ranks: Callable[..., list[Any]], strategy: Strategy) -> None:
    alone = digits(None)
    for rank in ranks(digits, 2, strategy):
        for key in ("first_loss", "last_loss"):
            np.testing.assert_allclose(rank[key], alone[key], rtol=1e-5)
        assert rank["accuracy"] == alone["accuracy"] > 0.5


def run_recipe(out: str, engine: Literal["native", "deepspeed"], changes: dict[str, Any]) -> list[float]:
    """A whole run by its recipe; its losses, the validation's last. Four packs a step, however many processes."""
    from tunesmith.recipe.load import recipe_from_mapping
    from tunesmith.rundir.io import read_jsonl
    from tunesmith.train.run import train as train_recipe

    recipe = recipe_from_mapping(
        {
            "output": out,
            "model": {"path": "builtin:tiny", "device": "cpu"},
            "data": {"train": ["builtin:shop"], "max_rows": 120, "max_length": 128},
            "train": {"max_steps": 3, "micro_batch_tokens": 256, "precision": "float32", "accumulation": 4},
            "log": {"trackers": []},
            "checkpoint": {"every_steps": 2},
        },
        [f"parallel.engine={engine}", "parallel.micro_batches=4", *(f"{k}={v}" for k, v in changes.items())],
    )
    done = train_recipe(recipe, quiet=True)
    rows = read_jsonl(done.run_dir / "metrics.jsonl")
    return [row.get("loss", row.get("validation_loss")) for row in rows]


@pytest.mark.parametrize(
    ("changes", "file"),
    [
        ({"method.kind": "lora", "method.rank": 4}, "adapter_model.safetensors"),
        pytest.param({"method.kind": "full"}, "model.safetensors", marks=pytest.mark.long),
    ],
    ids=["lora", "full"],
)
def test_a_recipe_runs_under_deepspeed_and_its_states_are_consolidated(
    ranks: Callable[..., list[Any]], tmp_path: Path, changes: dict[str, Any], file: str
) -> None:
    (alone,) = ranks(run_recipe, 1, str(tmp_path / "native"), "native", changes)
    both = ranks(run_recipe, 2, str(tmp_path / "both"), "deepspeed", {**changes, "parallel.strategy": "zero3"})
    assert len(alone) >= 4
    np.testing.assert_allclose(both[0], alone, rtol=1e-5)
    (final,) = (tmp_path / "both").glob(f"*/final/{file}")
    out = tmp_path / "out"
    assert tunesmith(["consolidate", str(final.parents[1]), "--output", str(out)]) == 0
    made, expected = load_file(out / file), load_file(final)
    assert made.keys() == expected.keys()
    assert all(torch.equal(made[name], tensor) for name, tensor in expected.items())
