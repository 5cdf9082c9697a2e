"""Many adapters on one base: each row gets its own, names come and go, and a run is followed while it trains."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.load import load_model
from tunesmith.checkpoint.state import TrainingState, save_state
from tunesmith.engine.adapter_reader import Base
from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.fixed_rows import FixedRows, fix_rows
from tunesmith.errors import AdapterError, RequestError, RunDirError, UnsupportedModelError
from tunesmith.model.attention import PackedAttention
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdapterOptions
from tunesmith.model.methods import adapted_linears, add_adapters, block_linears
from tunesmith.model.packed import packed
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.rundir.layout import RunDir, create_run

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe")
DOCUMENTS = ([5, 9, 200, 31, 7, 77, 12], [3, 250, 8, 14], [1, 2], [9, 8, 7, 6, 5, 4, 3, 2, 1, 0, 3])
# Float32: the same sums in another order, relative to the largest logit.
TOLERANCE = 1e-5
SPREAD = 0.2


def random_adapter(base: Path, out: Path, seed: int, keep: Callable[[str], bool], rslora: bool = False) -> Path:
    """An adapter on the projections that `keep` takes, of different ranks, saved in PEFT's format."""
    model = load_model(base, device="cpu", dtype=torch.float32)
    chosen = {target.path: [part for part in target.parts if keep(part)] for target in block_linears(model)}
    add_adapters(
        model,
        {path: parts for path, parts in chosen.items() if parts},
        lambda name: AdapterOptions(1 + (len(name) + seed) % 4, 6.0, rslora=rslora),
        seed=seed,
    )
    shake(model, seed)
    save_adapter(model, out, base)
    return out


def shake(model: Any, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for linear in adapted_linears(model).values():
            for parameter in linear.adapters.parameters():
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def logits_of(model: Any, documents: tuple[list[int], ...] = DOCUMENTS) -> list[Tensor]:
    assert isinstance(model, Decoder)
    pack = packed(torch.tensor([token for document in documents for token in document]), [len(d) for d in documents])
    with torch.inference_mode():
        hidden = model(pack.tokens_T, pack.positions_T, PackedAttention(model.config, pack))
        return list(model.logits(hidden).split([len(d) for d in documents]))


def slots_of(pool: AdapterPool, names: tuple[str | None, ...]) -> np.ndarray:
    """Each document's adapter, by token; held from now on."""
    slots = [-1 if name is None else pool.acquire(name) for name in names]
    assert None not in slots
    return np.repeat(np.array(slots, dtype=np.int32), [len(document) for document in DOCUMENTS])


def assert_near(mine: Tensor, truth: Tensor, tolerance: float = TOLERANCE) -> None:
    assert (mine - truth).abs().max() / truth.abs().max() < tolerance


@pytest.fixture
def pool_of() -> Iterator[Callable[..., AdapterPool]]:
    made: list[AdapterPool] = []

    def make(directory: Path, max_adapters: int = 4, max_rank: int = 8, **options: Any) -> AdapterPool:
        model = load_for_inference(directory, device="cpu", dtype=torch.float32, quantize=options.pop("quantize", None))
        made.append(AdapterPool(model, max_adapters, max_rank, **options))
        return made[-1]

    yield make
    for pool in made:
        pool.close()


@pytest.mark.parametrize("family", FAMILIES)
def test_a_mixed_batch_gives_what_each_adapter_gives_alone(
    family: str, tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    base = tiny_model_dir(family, initializer_range=SPREAD)
    everywhere = random_adapter(base, tmp_path / "everywhere", 1, lambda part: True)
    some = random_adapter(
        base, tmp_path / "some", 2, lambda part: part in ("q_proj", "v_proj", "c_attn", "up_proj", "w3"), rslora=True
    )
    pool = pool_of(base, base=Base(base))
    alone = {None: logits_of(load_model(base, device="cpu", dtype=torch.float32))}
    for name, directory in (("everywhere", everywhere), ("some", some)):
        pool.load(name, directory)
        alone[name] = logits_of(load_model(base, adapter=directory, device="cpu", dtype=torch.float32))
    for names in (("everywhere", None, "some", "everywhere"), (None,) * 4, ("some",) * 4):
        pool.choose(slots_of(pool, names))
        for number, (name, mine) in enumerate(zip(names, logits_of(pool.stacks.model), strict=True)):
            assert_near(mine, alone[name][number])
    assert not torch.allclose(alone["some"][0], alone["everywhere"][0], atol=1e-2)


@pytest.mark.parametrize(
    ("quantize", "tolerance"), [("nf4", TOLERANCE), ("fp8", TOLERANCE), ("int8", 1e-3), ("int4", 1e-3)]
)
def test_on_a_quantised_base(
    quantize: str,
    tolerance: float,
    tiny_model_dir: Callable[..., Path],
    tmp_path: Path,
    pool_of: Callable[..., AdapterPool],
) -> None:
    base = tiny_model_dir("qwen2", initializer_range=SPREAD, hidden_size=64)
    pool = pool_of(base, quantize=quantize)
    expected = []
    for seed in (1, 2):
        directory = random_adapter(base, tmp_path / str(seed), seed, lambda part: True)
        pool.load(str(seed), directory)
        options: dict[str, Any] = {"quantize": quantize, "adapter": directory}
        expected.append(logits_of(load_for_inference(base, device="cpu", dtype=torch.float32, **options)))
    pool.choose(slots_of(pool, ("1", "2", "1", "2")))
    for number, mine in enumerate(logits_of(pool.stacks.model)):
        # Products of int8 and int4 weights round their input: a last bit's difference may move a rounding.
        assert_near(mine, expected[number % 2][number], tolerance)


def test_what_replaces_the_base_of_a_linear_is_used(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    """Batch-invariant mode puts linears that compute a fixed number of rows under the adapters."""
    base = tiny_model_dir("qwen2", initializer_range=SPREAD)
    pool = pool_of(base)
    pool.load("a", random_adapter(base, tmp_path / "a", 1, lambda part: True))
    pool.choose(slots_of(pool, ("a", None, "a", None)))
    model, seen = pool.stacks.model, []
    before = logits_of(model)
    fix_rows(model.blocks, 16)
    for module in model.modules():
        if isinstance(module, FixedRows):
            module.register_forward_pre_hook(lambda module, arguments: seen.append(arguments[0].shape))
    for mine, truth in zip(logits_of(model), before, strict=True):
        assert_near(mine, truth)
    assert len(seen) == 4 * len(model.blocks)


def test_the_blocks_written_form_gives_the_same(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    base = tiny_model_dir("qwen3", initializer_range=SPREAD)
    pool = pool_of(base)
    pool.load("a", random_adapter(base, tmp_path / "a", 1, lambda part: True))
    pool.choose(slots_of(pool, ("a", None, "a", None)))
    model = pool.stacks.model
    eager = logits_of(model)
    model.is_fused = True
    for mine, truth in zip(logits_of(model), eager, strict=True):
        assert_near(mine, truth)
    assert model.num_fused_blocks == len(model.blocks)


def test_names_come_and_go_and_places_are_held_by_who_uses_them(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    base = tiny_model_dir("qwen2")
    folders = [random_adapter(base, tmp_path / str(seed), seed, lambda part: part == "q_proj") for seed in (1, 2)]
    pool = pool_of(base, max_adapters=1)
    with pytest.raises(RequestError, match=r"there is no adapter 'a' \(none is loaded\)"):
        pool.acquire("a")
    pool.load("a", folders[0])
    first = pool.acquire("a")
    assert first is not None
    key = pool.cache_key(first)
    with pytest.raises(AdapterError, match=r"1 adapters are loaded \(a\).*max-loras"):
        pool.load("b", folders[1])
    # A newer version: requests that begin now take it, the one that runs keeps its own.
    pool.load("a", folders[1])
    second = pool.acquire("a")
    assert second is not None
    assert second != first
    assert pool.cache_key(second) != key == pool.cache_key(first)
    # No place is left for a third until a request ends.
    pool.load("a", folders[0])
    assert pool.acquire("a") == second
    pool.release(first)
    pool.poll()
    third = pool.acquire("a")
    assert third == first
    assert pool.cache_key(third) not in (key, pool.cache_key(second))
    assert [(info.name, info.num_running, info.follows) for info in pool.list()] == [("a", 1, False)]
    assert not pool.unload("a")
    for slot in (second, second, third):
        assert pool.is_held("a")
        pool.release(slot)
    assert not pool.is_held("a")
    assert pool.list() == []
    pool.load("b", folders[1])
    with pytest.raises(RequestError, match=r"there is no adapter 'a'.*loaded: b"):
        pool.check("a")
    with pytest.raises(AdapterError, match="there is no adapter 'bb', did you mean 'b'"):
        pool.unload("bb")


def until(ready: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not ready():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_requests_wait_while_theirs_is_read(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    base = tiny_model_dir("qwen2")
    pool = pool_of(base)
    good = random_adapter(base, tmp_path / "good", 1, lambda part: part == "q_proj")
    bad = random_adapter(base, tmp_path / "bad", 1, lambda part: part == "q_proj")
    (bad / "adapter_model.safetensors").write_bytes(b"torn")
    pool.load("good", good, wait=False)
    pool.load("bad", bad, wait=False)
    assert pool.acquire("good") is None
    assert pool.is_busy

    def settled() -> bool:
        pool.wait(0.1)
        pool.poll()
        return not pool.is_busy

    until(settled)
    assert pool.acquire("good") is not None
    with pytest.raises(RequestError, match=r"the adapter 'bad' could not be loaded: .*torn"):
        pool.acquire("bad")


def test_what_does_not_fit_is_refused_by_name(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    base, other = tiny_model_dir("qwen2"), tiny_model_dir("qwen2", initializer_range=0.5)
    pool = pool_of(base, max_rank=2, base=Base(base))
    folder = random_adapter(base, tmp_path / "a", 1, lambda part: part == "q_proj")

    def refused(directory: Path, match: str, **changes: Any) -> None:
        config = json.loads((directory / "adapter_config.json").read_text())
        (directory / "adapter_config.json").write_text(json.dumps({**config, **changes}))
        with pytest.raises(AdapterError, match=match):
            pool.load("x", directory)
        assert pool.list() == []
        (directory / "adapter_config.json").write_text(json.dumps(config))

    refused(folder, "DoRA.*tunesmith merge", use_dora=True)
    refused(folder, r"has rank 9, and places .* of rank 2 .*--max-lora-rank 9", r=9, rank_pattern={})
    pool.reader.max_rank = 8
    refused(folder, r"of shape .* its rank 5 and this model", r=5, rank_pattern={})
    refused(random_adapter(other, tmp_path / "other", 1, lambda part: True), "trained on another base")
    with pytest.raises(AdapterError, match="there is no directory"):
        pool.load("x", tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="can't be followed"):
        pool.load("x", folder, follow=True)
    with pytest.raises(AdapterError, match=r"adapter_config\.json"):
        pool.load("x", tmp_path)


def test_a_model_with_an_adapter_on_it_is_refused_and_close_gives_the_model_back(
    tiny_model_dir: Callable[..., Path], tmp_path: Path
) -> None:
    base = tiny_model_dir("mixtral")
    adapter = random_adapter(base, tmp_path / "a", 1, lambda part: part == "q_proj")
    with pytest.raises(UnsupportedModelError, match="has an adapter on it already"):
        AdapterPool(load_model(base, adapter=adapter, device="cpu"))
    model = load_model(base, device="cpu")
    before = {name: type(module) for name, module in model.named_modules()}  # type: ignore[attr-defined]
    AdapterPool(model, 1, 4).close()
    assert {name: type(module) for name, module in model.named_modules()} == before  # type: ignore[attr-defined]


def state_of(base: Path, step: int, **method: Any) -> TrainingState:
    """A training state of a run that trains q_proj and down_proj with rank 3."""
    model = load_model(base, device="cpu", dtype=torch.float32)
    assert isinstance(model, Decoder)
    chosen = {t.path: [p for p in t.parts if p in ("q_proj", "down_proj")] for t in block_linears(model)}
    add_adapters(model, {k: v for k, v in chosen.items() if v}, lambda _: AdapterOptions(3, 6.0, **method), seed=0)
    shake(model, step)
    tensors = {f"model.{name}": p.detach() for name, p in model.named_parameters() if ".adapters." in name}
    return TrainingState(step, {**tensors, "rng.torch": torch.zeros(4, dtype=torch.uint8)}, {})


def run_of(base: Path, path: Path, **method: Any) -> RunDir:
    section = {"kind": "lora", "rank": 3, "alpha": 6, "targets": ["q_proj", "down_proj"], **method}
    recipe = recipe_from_mapping({"model": {"path": str(base)}, "method": section, "data": {"format": "tokens"}})
    return create_run(recipe, path=path)


def test_a_run_is_followed_while_it_trains(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    """The newest whole checkpoint, never a torn one; a request keeps the version that it began with."""
    base = tiny_model_dir("qwen2", initializer_range=SPREAD)
    run = run_of(base, tmp_path / "run")
    pool = pool_of(base, base=Base(base), follow_s=0.02)
    pool.load("live", run.path, follow=True)
    assert pool.acquire("live") is None  # no checkpoint yet

    def at(step: float) -> bool:
        pool.poll()
        return [info.step for info in pool.list()] == [step]

    save_state(run.checkpoints, state_of(base, 1), keep=2)
    until(lambda: at(1))
    old = pool.acquire("live")
    assert old is not None
    save_state(run.checkpoints, state_of(base, 2), keep=2)
    until(lambda: at(2))
    # Torn: passed over. Then a whole one.
    torn = run.checkpoints / "step-00000003"
    save_state(run.checkpoints, state_of(base, 3), keep=3)
    (torn / "tensors.safetensors").write_bytes((torn / "tensors.safetensors").read_bytes()[:-1])
    time.sleep(0.1)
    pool.poll()
    steps = [info.step for info in pool.list()]
    assert steps in ([2], [3])  # 3 only where it was read before it was torn
    new = pool.acquire("live")
    assert new is not None
    tokens = np.repeat(np.array([old, new, old, new], dtype=np.int32), [len(d) for d in DOCUMENTS])
    pool.choose(tokens)
    for number, mine in enumerate(logits_of(pool.stacks.model)):
        step = 1 if number % 2 == 0 else int(steps[0] or 0)
        expected = load_model(base, device="cpu", dtype=torch.float32)
        chosen = {t.path: [p for p in t.parts if p in ("q_proj", "down_proj")] for t in block_linears(expected)}
        add_adapters(expected, {k: v for k, v in chosen.items() if v}, lambda _: AdapterOptions(3, 6.0), seed=0)
        shake(expected, step)
        assert_near(mine, logits_of(expected)[number])
    pool.release(old)
    save_state(run.checkpoints, state_of(base, 4), keep=2)
    until(lambda: at(4))
    # Its outcome comes last.
    random_adapter(base, run.final, 9, lambda part: part == "q_proj")
    run.set_status("finished")
    until(lambda: at(4.5))


def test_runs_that_can_not_be_followed_say_why(
    tiny_model_dir: Callable[..., Path], tmp_path: Path, pool_of: Callable[..., AdapterPool]
) -> None:
    base, other = tiny_model_dir("qwen2"), tiny_model_dir("qwen2", initializer_range=0.5)
    pool = pool_of(base, base=Base(base))
    for name, match, run in (
        ("full", "trains the whole model", run_of(base, tmp_path / "full", kind="full")),
        ("dora", "DoRA", run_of(base, tmp_path / "dora", dora=True)),
        ("other", "another base", run_of(other, tmp_path / "other")),
    ):
        save_state(run.checkpoints, state_of(base, 1), keep=1)
        with pytest.raises(AdapterError, match=match):
            pool.load(name, run.path, follow=True)
    run = run_of(base, tmp_path / "young")
    with pytest.raises(AdapterError, match=r"no checkpoint yet.*follow=True"):
        pool.load("young", run.path)
    (run.path / "run.json").write_text("{}")
    with pytest.raises(RunDirError):
        pool.load("young", run.path, follow=True)
    run = run_of(base, tmp_path / "good")
    save_state(run.checkpoints, state_of(base, 7), keep=1)
    pool.load("good", run.path)
    assert [(info.step, info.follows) for info in pool.list()] == [(7, False)]
