"""DeepSpeed's offload to NVMe, in a folder here: losses as with the host's memory, and its states' bits."""

from __future__ import annotations

import importlib.util
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.parallel.deepspeed_install import nvme_lacks

HERE = str(Path(__file__).resolve().parent)
RESULTS = Path(HERE).parents[1] / "build" / "test-long"
COMMAND = "python -m pytest -m long tests/long/test_nvme.py"
LACKS = nvme_lacks(with_cuda=False)
HAS_DEEPSPEED = importlib.util.find_spec("deepspeed") is not None
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(3000),
    pytest.mark.skipif(not HAS_DEEPSPEED, reason="deepspeed is not installed: pip install deepspeed"),
    pytest.mark.skipif(bool(LACKS), reason=f"DeepSpeed's async_io lacks {', '.join(LACKS)}"),
]
BUILD_S = 2400.0  # ninja and one core: six minutes here
STEPS, BOUND = 6, 1e-6
# Shares of 1 MiB and more go to the disk, so a block's largest weight has 2 of bfloat16.
SIZES = {"hidden_size": 512, "intermediate_size": 1024, "num_hidden_layers": 2, "vocab_size": 1100}


def build() -> None:
    """Compiles the operator, as a first run does."""
    from tunesmith.parallel.deepspeed_install import require_deepspeed

    require_deepspeed("cpu")
    from deepspeed.accelerator import get_accelerator

    get_accelerator().create_op_builder("AsyncIOBuilder").load(verbose=False)


def train(
    model_dir: str,
    kind: str,
    precision: str,
    place: str | None,
    file: str | None,
    first: int = 0,
    stop: int = STEPS,
    states: str | None = None,
) -> list[float]:
    """The losses of steps `first` to `stop` under ZeRO-3.

    Args: place: of offload, a folder of nvme's or cpu; file: a ds_config.json; states: where a state is read from
    before the first step, but for step 0, and written to after each.
    """
    if HERE not in sys.path:
        sys.path.insert(0, HERE)
    import equality_campaign as campaign

    from tunesmith.checkpoint.agreement import checkpoint_group
    from tunesmith.checkpoint.load import load_decoder
    from tunesmith.checkpoint.sharded import save_shards
    from tunesmith.checkpoint.state import load_latest
    from tunesmith.model.methods import apply_method
    from tunesmith.parallel.mesh import joined
    from tunesmith.recipe.parallel import ParallelSection
    from tunesmith.recipe.schema import MethodSection, TrainSection
    from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config
    from tunesmith.train.resolve import DTYPES

    settings = ParallelSection(
        strategy="zero3",
        engine="deepspeed",
        offload={None: "none", "cpu": "cpu"}.get(place, "nvme"),  # type: ignore[arg-type]
        offload_folder=None if place == "cpu" else place,
        deepspeed_config=file,
    )
    recipe = TrainSection(learning_rate=1e-3, schedule="constant", warmup_ratio=0.0, precision=precision)  # type: ignore[arg-type]
    recipe = recipe.model_copy(update={"master_weights": "float32"})
    method = MethodSection(kind="full") if kind == "full" else MethodSection(kind="lora", rank=4)
    model = load_decoder(Path(model_dir))
    apply_method(model, method, seed=0)
    model.compute_dtype, model.is_fused = DTYPES[recipe.precision], True
    model.train()
    with joined(settings, "cpu") as mesh:
        packs = campaign.PACKS // mesh.world_size
        config = deepspeed_config(settings, recipe, model, STEPS, mesh, micro_batches=packs)
        updater = DeepSpeedUpdater(model, recipe, STEPS, config, mesh)
        try:
            if states is not None and first:
                updater.restore(load_latest(Path(states), agreement=checkpoint_group())[1])
            losses, facts = [], {"optimizer": {}, "rng": {}, "scaler": None}
            for number in range(first, stop):
                losses.append(campaign._step(updater, number, mesh).loss)
                if states is not None:
                    save_shards(Path(states), number + 1, updater.shards(), facts, keep=1, agreement=checkpoint_group())
            return losses
        finally:
            updater.close()


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> str:
    sys.path.insert(0, HERE)
    import equality_campaign as campaign

    before = dict(campaign.CONFIG)
    campaign.CONFIG.update(SIZES)
    try:
        return campaign.save_model(tmp_path_factory.mktemp("model"))
    finally:
        campaign.CONFIG.update(before)
        sys.path.remove(HERE)


@pytest.fixture(scope="module")
def compare() -> Iterator[Callable[..., None]]:
    """Holds every rank's losses beside what they should be; all that was held goes into a JSON file."""
    from tunesmith.rundir.environment import environment_fingerprint, git_commit
    from tunesmith.rundir.io import write_json_atomic

    cases: list[dict[str, Any]] = []

    def hold(name: str, found: list[list[float]], expected: list[list[float]], written_bytes: int) -> None:
        distance = float(np.max(np.abs(np.array(found) / np.array(expected) - 1)))
        cases.append(
            {
                "name": name,
                "ranks": len(found),
                "loss_relative_distance": distance,
                "last_loss": found[0][-1],
                "written_bytes": written_bytes,
            }
        )
        assert distance <= BOUND

    yield hold
    RESULTS.mkdir(parents=True, exist_ok=True)
    facts = {"schema": "tunesmith.nvme", "schema_version": 1, "command": COMMAND, "bound": BOUND, "steps": STEPS}
    commit = (git_commit() or {}).get("commit")
    environment = environment_fingerprint()
    write_json_atomic(RESULTS / "nvme.json", {**facts, "commit": commit, "cases": cases, "environment": environment})


def states_on(place: Path) -> str:
    """A ds_config.json that puts the optimiser's states alone on a disk."""
    file = place.with_suffix(".json")
    offload = {"offload_optimizer": {"device": "nvme", "nvme_path": str(place)}, "offload_param": {"device": "cpu"}}
    file.write_text(json.dumps({"zero_optimization": {"stage": 3, **offload}}), encoding="utf-8")
    return str(file)


def written(place: Path) -> int:
    """Bytes that lie on the disk."""
    return sum(file.stat().st_size for file in place.rglob("*.swp"))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora"])
def test_weights_and_states_on_disk_train_as_in_memory(
    ranks: Callable[..., list[Any]],
    compare: Callable[..., None],
    model_dir: str,
    tmp_path: Path,
    kind: str,
    world_size: int,
) -> None:
    """LoRA's frozen blocks asked for more buffers than DeepSpeed's five."""
    ranks(build, 1, timeout_s=BUILD_S)
    expected = ranks(train, world_size, model_dir, kind, "bfloat16", "cpu", None)
    found = ranks(train, world_size, model_dir, kind, "bfloat16", str(tmp_path), None)
    compare(f"{kind}-dp{world_size}-bfloat16-beside-cpu", found, expected, written(tmp_path))
    for rank in range(world_size):
        assert list((tmp_path / "zero_stage_3" / "bfloat16params" / f"rank{rank}").glob("*.swp"))
        if kind == "full":  # an adapter's states are too small to be written
            assert list((tmp_path / "zero_stage_3" / "optimizer" / f"rank{rank}").glob("exp_avg_sq*.swp"))


@pytest.mark.parametrize("world_size", [1, 2])
def test_a_file_puts_states_alone_on_disk_in_float32(
    ranks: Callable[..., list[Any]], compare: Callable[..., None], model_dir: str, tmp_path: Path, world_size: int
) -> None:
    ranks(build, 1, timeout_s=BUILD_S)
    place = tmp_path / "disk"
    file = states_on(place)
    expected = ranks(train, world_size, model_dir, "full", "float32", None, None)
    found = ranks(train, world_size, model_dir, "full", "float32", None, file)
    compare(f"full-dp{world_size}-float32-states-beside-none", found, expected, written(place))
    assert list(place.glob("zero_stage_3/optimizer/rank0/exp_avg_sq*.swp"))


@pytest.mark.parametrize("world_size", [1, 2])
@pytest.mark.parametrize("kind", ["full", "lora", "states alone"])
def test_a_state_on_disk_is_saved_and_resumed_bit_for_bit(
    ranks: Callable[..., list[Any]], model_dir: str, tmp_path: Path, kind: str, world_size: int
) -> None:
    """DeepSpeed gave views of buffers that the next read went into; before a first step, tensors without values."""
    from tunesmith.checkpoint.state import load_latest

    ranks(build, 1, timeout_s=BUILD_S)
    half, whole, broken = STEPS // 2, tmp_path / "whole", tmp_path / "broken"
    run = (model_dir, "full", "float32") if kind == "states alone" else (model_dir, kind, "bfloat16")

    def place(name: str) -> tuple[str | None, str | None]:
        return (None, states_on(tmp_path / name)) if kind == "states alone" else (str(tmp_path / name), None)

    unbroken = ranks(train, world_size, *run, "cpu", None, 0, STEPS, str(whole))
    before = ranks(train, world_size, *run, *place("disk"), 0, half, str(broken))
    after = ranks(train, world_size, *run, *place("other"), half, STEPS, str(broken))
    assert [a + b for a, b in zip(before, after, strict=True)] == unbroken
    expected, found = (load_latest(folder)[1].tensors for folder in (whole, broken))
    assert expected.keys() == found.keys()
    assert [name for name in expected if not expected[name].equal(found[name])] == []
    assert not list(tmp_path.rglob("*.copy"))
