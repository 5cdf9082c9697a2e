"""Training states as models and adapters: what `final/` is, whoever wrote the state, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
import textwrap
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from tunesmith.checkpoint.consolidate import can_stream, consolidate
from tunesmith.checkpoint.sharded import save_shards
from tunesmith.checkpoint.shards import Shard
from tunesmith.checkpoint.state import TrainingState, load_latest, save_state
from tunesmith.errors import CheckpointError, RunDirError
from tunesmith.recipe.load import load_recipe, recipe_from_mapping
from tunesmith.rundir.layout import open_run
from tunesmith.train.run import train

METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "freeze": {"kind": "freeze", "trainable": ["last:1"]},
    "lora": {"kind": "lora", "rank": 4},
    "dora": {"kind": "lora", "rank": 4, "dora": True, "targets": ["q_proj", "down_proj"]},
    "qlora": {"kind": "qlora", "rank": 4},
}


class Threads:
    """An agreement of threads."""

    def __init__(self, rank: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.world_size = rank, len(shared)
        self._shared, self._barrier = shared, barrier

    def gather(self, value: Any) -> list[Any]:
        self._shared[self.rank] = json.dumps(value)
        self._barrier.wait()
        values = [json.loads(text) for text in self._shared]
        self._barrier.wait()
        return values


def run_of(folder: Path, model: Path, method: str, weights: str = "checkpoint", **changes: Any) -> Path:
    """A finished run of two steps."""
    recipe = {
        "model": {"path": str(model), "device": "cpu", "weights": weights},
        "method": METHODS[method],
        "data": {"format": "tokens", "max_length": 32, "max_rows": 8},
        "train": {"max_steps": 2, "micro_batch_tokens": 64, "learning_rate": 1e-2, **changes},
        "log": {"trackers": []},
    }
    return train(recipe, run_dir=folder / "run", quiet=True).run_dir


def tensors_in(directory: Path) -> dict[str, Tensor]:
    return {k: v for path in sorted(directory.glob("*.safetensors")) for k, v in load_file(path).items()}


def assert_same(made: Path, expected: Path) -> None:
    """Tensors bit for bit, and every other file but the order of keys."""
    ours, theirs = tensors_in(made), tensors_in(expected)
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert ours[name].dtype == tensor.dtype
        assert torch.equal(ours[name], tensor), name
    assert {path.name for path in made.iterdir()} == {path.name for path in expected.iterdir()}
    for path in expected.glob("*.json"):
        assert json.loads((made / path.name).read_text("utf-8")) == json.loads(path.read_text("utf-8")), path.name
    for path in expected.glob("*.safetensors"):
        with safe_open(path, "pt") as one, safe_open(made / path.name, "pt") as other:
            assert one.metadata() == other.metadata()


@pytest.mark.parametrize(
    ("family", "method"),
    [
        ("qwen2", "full"),
        ("gpt2", "full"),
        ("mixtral", "full"),
        ("qwen2", "freeze"),
        ("qwen2", "lora"),
        ("llama", "dora"),
        ("qwen2", "qlora"),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("gpt2", "freeze"), ("gpt2", "lora"))),
    ],
)
def test_it_is_what_the_run_wrote_itself(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], family: str, method: str
) -> None:
    changes = {"hidden_size": 64} if family != "gpt2" else {}
    run = run_of(tmp_path, tiny_model_dir(family, **changes), method)
    recipe, (_, state) = load_recipe(run / "recipe.yaml"), load_latest(run / "checkpoints")
    assert can_stream(recipe)
    result = consolidate(recipe, state, tmp_path / "out")
    assert_same(tmp_path / "out", run / "final")
    assert (result.kind, result.step) == ("model" if method in ("full", "freeze") else "adapter", 2)
    assert result.tensors == len(tensors_in(run / "final"))


def test_in_bfloat16_and_in_shards(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    """Masters in float32, products in bfloat16: the model is stored in bfloat16 unless asked otherwise."""
    run = run_of(tmp_path, tiny_model_dir("qwen2"), "full", precision="bfloat16")
    recipe, (_, state) = load_recipe(run / "recipe.yaml"), load_latest(run / "checkpoints")
    consolidate(recipe, state, tmp_path / "out", max_shard_bytes=20_000)
    assert len(list((tmp_path / "out").glob("model-*-of-*.safetensors"))) > 2
    ours, theirs = tensors_in(tmp_path / "out"), tensors_in(run / "final")
    assert ours.keys() == theirs.keys() == set(_weight_map(tmp_path / "out"))
    assert all(torch.equal(ours[name], tensor) and tensor.dtype == torch.bfloat16 for name, tensor in theirs.items())
    consolidate(recipe, state, tmp_path / "wide", dtype=torch.float32)
    wide = tensors_in(tmp_path / "wide")
    assert all(torch.equal(wide[name].bfloat16(), tensor) for name, tensor in theirs.items())
    assert any(not torch.equal(wide[name], tensor.float()) for name, tensor in theirs.items())


def _weight_map(directory: Path) -> dict[str, str]:
    return json.loads((directory / "model.safetensors.index.json").read_text("utf-8"))["weight_map"]


def cut_over(state: TrainingState, rank: int, size: int) -> list[Shard]:
    """Every tensor of two dimensions by rows, or by columns, as its name's length says; the rest everywhere."""
    shards = []
    for name, tensor in state.tensors.items():
        slices = [[0, length] for length in tensor.shape]
        if tensor.dim() == 2:
            dim = len(name) % 2
            chunk = -(-tensor.shape[dim] // size)
            slices[dim] = [min(tensor.shape[dim], edge * chunk) for edge in (rank, rank + 1)]
        part = tensor[tuple(slice(*one) for one in slices)]
        shards.append(Shard(name, part, tuple(tensor.shape), tuple((a, b) for a, b in slices)))
    return shards


@pytest.mark.parametrize(("family", "method"), [("gpt2", "full"), ("qwen2", "lora")])
def test_of_a_state_that_several_processes_wrote(
    tmp_path: Path, tiny_model_dir: Callable[..., Path], family: str, method: str
) -> None:
    run = run_of(tmp_path, tiny_model_dir(family), method)
    state = load_latest(run / "checkpoints")[1]
    shared: list[Any] = [None] * 3
    barrier = threading.Barrier(3)

    def write(rank: int) -> None:
        agreement = Threads(rank, shared, barrier)
        save_shards(tmp_path / "cut", 7, cut_over(state, rank, 3), state.facts, keep=1, agreement=agreement)

    threads = [threading.Thread(target=write, args=(rank,)) for rank in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    consolidate(load_recipe(run / "recipe.yaml"), load_latest(tmp_path / "cut")[1], tmp_path / "out")
    assert_same(tmp_path / "out", run / "final")


def test_an_output_that_is_there(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    run = run_of(tmp_path, tiny_model_dir("qwen2"), "lora")
    recipe, (_, state) = load_recipe(run / "recipe.yaml"), load_latest(run / "checkpoints")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine", encoding="utf-8")
    with pytest.raises(RunDirError, match="exists already"):
        consolidate(recipe, state, tmp_path / "out")
    assert (tmp_path / "out" / "mine.txt").exists()
    consolidate(recipe, state, tmp_path / "out", replace=True)
    assert not (tmp_path / "out" / "mine.txt").exists()


def test_a_state_of_another_model_is_named_and_leaves_nothing(
    tmp_path: Path, tiny_model_dir: Callable[..., Path]
) -> None:
    run = run_of(tmp_path, tiny_model_dir("qwen2"), "full")
    recipe, (_, state) = load_recipe(run / "recipe.yaml"), load_latest(run / "checkpoints")
    tensors = dict(state.tensors)
    del tensors["model.blocks.1.mlp.down.weight"]
    save_state(tmp_path / "less", TrainingState(2, tensors), keep=1)
    with pytest.raises(CheckpointError, match=r"no tensor 'model.blocks.1.mlp.down.weight'"):
        consolidate(recipe, load_latest(tmp_path / "less")[1], tmp_path / "out")
    tensors["model.blocks.1.mlp.down.weight"] = torch.zeros(4, 4)
    save_state(tmp_path / "other", TrainingState(2, tensors), keep=1)
    with pytest.raises(CheckpointError, match=r"mlp.down.weight is \[4, 4\] there, \[32, 64\] here"):
        consolidate(recipe, load_latest(tmp_path / "other")[1], tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_can_not_be_streamed(tiny_model_dir: Callable[..., Path]) -> None:
    path = str(tiny_model_dir("qwen2"))
    freeze = {"kind": "freeze", "trainable": ["last:1"]}
    assert not can_stream(recipe_from_mapping({"model": {"path": path, "backend": "transformers"}}))
    assert not can_stream(recipe_from_mapping({"model": {"path": path, "weights": "random"}, "method": freeze}))
    assert can_stream(recipe_from_mapping({"model": {"path": path}, "method": freeze}))


PEAK = """
    import resource, sys
    from pathlib import Path
    import torch
    from tunesmith.checkpoint import consolidate as module
    from tunesmith.checkpoint.state import load_latest
    from tunesmith.recipe.load import load_recipe

    module.SLAB_BYTES = 2**20
    def once(run):
        run = Path(run)
        state = load_latest(run / "checkpoints")[1]
        module.consolidate(load_recipe(run / "recipe.yaml"), state, run / "out", max_shard_bytes=48_000_000)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    before = once(sys.argv[1])
    print(before, once(sys.argv[2]))
"""


def test_memory_is_a_slab_whatever_the_model(tmp_path: Path, tiny_model_dir: Callable[..., Path]) -> None:
    """190 MB of weights and as much again of an optimiser's state; the limit is a tenth of the weights."""
    small = run_of(tmp_path / "small", tiny_model_dir("qwen2"), "full")
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 3, "vocab_size": 1024}
    config = json.loads((tiny_model_dir("qwen2") / "config.json").read_text("utf-8"))
    large = tmp_path / "large"
    (large / "model").mkdir(parents=True)
    changed = {**config, **sizes, "head_dim": 256, "layer_types": ["full_attention"] * 3}
    (large / "model" / "config.json").write_text(json.dumps(changed), encoding="utf-8")
    run = run_of(large, large / "model", "full", "random", optimizer="sgd", max_steps=1)
    weights = sum(path.stat().st_size for path in (run / "final").glob("*.safetensors"))
    assert weights > 180e6
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(PEAK), str(small), str(run)], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stderr
    before, after = map(int, done.stdout.split())
    assert after - before < weights / 10
    ours, theirs = tensors_in(run / "out"), tensors_in(open_run(run).final)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], tensor) for name, tensor in theirs.items())
