"""Processes that share a model say what one says: greedy and sampled, adapters and cached prefixes included."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import msgpack
import psutil
import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.inference_share import load_share_for_inference
from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine import attend as attend_module
from tunesmith.engine import graphs as graphs_module
from tunesmith.engine.adapter_stacks import attach
from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.engine import Engine
from tunesmith.engine.fused_pass import FusedPass
from tunesmith.engine.graphs import DecodeGraphs, Kind
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams, StructuredSpec
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.speculate import NgramDrafter
from tunesmith.engine.tensor_graphs import SharedGraphs, Together, WarmUpError
from tunesmith.engine.tensor_messages import Message
from tunesmith.engine.tensor_parallel import ShareRunner, TensorParallelRunner, share_to_serve
from tunesmith.engine.tensor_serving import SharedSource, follow_passes, tell_of_adapters
from tunesmith.engine.tensor_shared import load_shared
from tunesmith.errors import ParallelError, RequestError
from tunesmith.kernels import paged_attention_fresh
from tunesmith.kernels.paged_attention_fresh import attend_fresh
from tunesmith.model.quant import set_compute
from tunesmith.parallel.collectives import Team
from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.recipe.parallel import ParallelSection

Ranks = Callable[..., list[Any]]
SPREAD = 0.2
CONFIG = EngineConfig(max_model_len=128, max_num_seqs=4, max_num_batched_tokens=48, debug_pages=True)
WIDE = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 8}
PARAMS = [
    SamplingParams(max_tokens=12),
    SamplingParams(max_tokens=12, temperature=0.9, seed=3, top_k=20),
    SamplingParams(max_tokens=12, prompt_logprobs=1, logprobs=1),
]


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    first = torch.randint(0, 256, (60,), generator=generator).tolist()
    return [first, [5, 6, 7] * 6, [*first[:40], 9]]


def answers(engine: Engine, adapters: tuple[str | None, ...]) -> list[list[int]]:
    """Two rounds of the same requests: the second finds their prefixes in the cache."""
    said: list[list[int]] = []
    for _ in range(2):
        ids = [
            engine.submit(ids, params, adapter=adapter)
            for ids, params, adapter in zip(prompts(), PARAMS, adapters, strict=True)
        ]
        done: dict[int, list[int]] = {}
        while engine.has_work:
            done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion is not None})
        said += [done[i] for i in ids]
    assert engine.stats().prefix_hits_tokens > 0
    return said


def engine_of(runner: NativeRunner, pool: AdapterPool | None, drafts: bool) -> Engine:
    if pool is not None:
        attach(pool.stacks, runner)
    return Engine(runner, config=runner.config, adapters=pool, drafter=NgramDrafter(3, 1) if drafts else None)


def broadcast(message: Message | None) -> Message:
    """A message from the first rank to all; the others give None."""
    packed = b"" if message is None else msgpack.packb(message)
    length = torch.tensor([len(packed)])
    torch.distributed.broadcast(length, 0)
    body = torch.zeros(int(length), dtype=torch.uint8) if message is None else torch.tensor(list(packed)).byte()
    torch.distributed.broadcast(body, 0)
    return dict(msgpack.unpackb(body.numpy().tobytes()))


class Repeating:
    """A recorder for a CPU: what is recorded is done again by every replay."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def warm_up(self, work: Callable[[], object]) -> None:
        work()

    def record(self, work: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        made = work()

        def replay() -> None:
            for into, tensor in zip(made, work(), strict=True):
                into.copy_(tensor)

        return replay, made

    def borrow(self, tensor: torch.Tensor) -> torch.Tensor:
        return tensor

    def free_bytes(self) -> int | None:
        return None


def serve_recorded(directory: str, adapter: str) -> tuple[list[list[int]] | None, int, list[int]]:
    """As `serve`, by a GPU's pass, decoding through graphs; how many steps this process replayed, and the lengths of
    prompts that went over their own keys."""
    graphs: list[DecodeGraphs] = []
    lengths: list[int] = []

    def fresh(*given: Any) -> None:
        lengths.extend(given[3])
        attend_fresh(*given)

    def make(self: ShareRunner, *arguments: Any, **options: Any) -> None:
        original(self, *arguments, **options)
        self._fused = FusedPass(self.model)  # what a GPU runs
        self.graphs = self._make_graphs()
        graphs.append(self.graphs)

    original, ShareRunner.__init__ = ShareRunner.__init__, make  # type: ignore[method-assign]
    recorder, graphs_module.CudaRecorder = graphs_module.CudaRecorder, Repeating  # type: ignore[assignment,misc]
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(paged_attention_fresh, "_fits", lambda *_: True)
            patch.setattr(paged_attention_fresh, "LEAST_TOKENS", 1)
            patch.setattr(attend_module, "attend_fresh", fresh)
            return serve(directory, adapter, CONFIG, None), graphs[0].stats.num_replays, lengths
    finally:
        ShareRunner.__init__ = original  # type: ignore[method-assign]
        graphs_module.CudaRecorder = recorder  # type: ignore[misc]


def serve(directory: str, adapter: str | None, config: EngineConfig, quantize: Any) -> list[list[int]] | None:
    """What each rank does: the first serves, the others follow."""
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    with joined(ParallelSection(tensor=size), "cpu") as mesh:
        decoder = shared_decoder(Path(directory), mesh, quantize)
        if rank:
            follow_passes(decoder, lambda: broadcast(None), lambda kind: None)
            return None
        pool = None
        if adapter is not None:
            pool = AdapterPool(decoder, 2, 4)
            tell_of_adapters(pool, broadcast)
            pool.load("a", adapter)
        broadcast({"kind": "runner", "config": vars(config), "num_pages": 30})
        engine = engine_of(TensorParallelRunner(decoder, config, broadcast, num_pages=30), pool, adapter is None)
        said = answers(engine, ("a", None, "a") if adapter is not None else (None,) * 3)
        broadcast({"kind": "stop"})
        if pool is not None:
            pool.close()
        return said


def shared_decoder(directory: Path, mesh: Mesh, quantize: Any = None) -> Any:
    decoder = load_share_for_inference(directory, mesh, quantize=quantize, dtype=torch.float32)
    set_compute(decoder, "weights")  # products in fp8 would round each process's columns of x by their own maximum
    return share_to_serve(decoder, mesh).eval()


def one_process(
    directory: Path, adapter: Path | None = None, config: EngineConfig = CONFIG, quantize: Any = None
) -> list[list[int]]:
    decoder: Any = load_for_inference(directory, device="cpu", dtype=torch.float32, quantize=quantize)
    set_compute(decoder, "weights")
    pool = None
    if adapter is not None:
        pool = AdapterPool(decoder, 2, 4)
        pool.load("a", adapter)
    engine = engine_of(NativeRunner(decoder, config, 30), pool, False)
    return answers(engine, ("a", None, "a") if adapter is not None else (None,) * 3)


@pytest.mark.parametrize(
    ("family", "count"),
    [
        ("llama", 2),
        ("gpt2", 2),
        *(pytest.param(*case, marks=pytest.mark.long) for case in (("qwen3", 4), ("mistral", 2), ("mixtral", 2))),
    ],
)
def test_several_processes_say_what_one_says(
    ranks: Ranks, family: str, count: int, tiny_model_dir: Callable[..., Path]
) -> None:
    """Guesses and cached prefixes too; gpt2 has biases on what is summed."""
    changes: dict[str, Any] = WIDE if family != "gpt2" else {}
    if family == "mixtral":
        changes = {**WIDE, "intermediate_size": 64}
    directory = tiny_model_dir(family, initializer_range=SPREAD, **changes)
    said = ranks(serve, count, str(directory), None, CONFIG, None)
    assert said == [one_process(directory), *[None] * (count - 1)]


def test_with_adapters(ranks: Ranks, tiny_model_dir: Callable[..., Path], make_adapter: Callable[..., Path]) -> None:
    """Each process holds its part of them, on quantised weights."""
    directory = tiny_model_dir("qwen2", initializer_range=SPREAD, **WIDE)
    adapter = make_adapter(directory)
    for quantize in ("fp8", "w8a8"):
        said = ranks(serve, 2, str(directory), str(adapter), CONFIG, quantize)
        expected = one_process(directory, adapter, quantize=quantize)
        assert said[0] == expected
        assert expected != one_process(directory, quantize=quantize)


def test_recorded_steps_are_recorded_and_replayed_by_all(
    ranks: Ranks, tiny_model_dir: Callable[..., Path], make_adapter: Callable[..., Path]
) -> None:
    directory = tiny_model_dir("qwen2", initializer_range=SPREAD, **WIDE)
    adapter = make_adapter(directory)
    (said, replays, fresh), (_, others, others_fresh) = ranks(serve_recorded, 2, str(directory), str(adapter))
    assert said == one_process(directory, adapter)
    assert replays == others > 0
    # The others' prompts went through pages: nobody told them which ones have nothing there.
    assert fresh == others_fresh and sum(fresh) > 40


def test_in_passes_of_a_fixed_size(ranks: Ranks, tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("llama", initializer_range=SPREAD, **WIDE)
    config = EngineConfig(**{**vars(CONFIG), "batch_invariant": True})
    said = ranks(serve, 2, str(directory), None, config, None)
    assert said[0] == one_process(directory, config=config)


def refused(directory: str) -> str:
    with joined(ParallelSection(tensor=2), "cpu") as mesh, pytest.raises(ParallelError) as error:
        share_to_serve(load_decoder(Path(directory), device="cpu"), mesh)
    return str(error.value)


def test_heads_that_can_not_be_divided(ranks: Ranks, tiny_model_dir: Callable[..., Path]) -> None:
    said = ranks(refused, 2, str(tiny_model_dir("qwen2", num_key_value_heads=1)))
    assert "tensor_parallel_size 2 does not divide the model's 1 key-value heads" in said[0]


def test_what_can_not_be_shared_is_refused_before_anything_starts(tiny_model_dir: Callable[..., Path]) -> None:
    with pytest.raises(RequestError, match=r"no weight format 'int3'.*int4-g32"):
        load_shared(SharedSource(str(tiny_model_dir()), quantize="int3"), 2)
    with pytest.raises(ParallelError, match="asks for 2 GPUs"):
        load_shared(SharedSource(str(tiny_model_dir()), device_type="cuda"), 2)


def agree(case: str) -> tuple[bool, dict[Kind, str], int]:
    """What a process whose recording fails, or that has no memory for it, and the other make of a graph."""
    rank = torch.distributed.get_rank()
    graphs = object.__new__(SharedGraphs)
    graphs.team = Team(cast(Any, torch.distributed.group.WORLD), 2, rank)
    graphs.device, graphs.refused, graphs._graphs = torch.device("cpu"), {}, {Kind(8): {4: cast(Any, "made")}}
    graphs._has_room = lambda kind: rank == 0 or case != "room"  # type: ignore[method-assign]
    graphs._add = lambda kind, size: rank == 0 or case != "record"  # type: ignore[method-assign]
    return graphs._record(Kind(8), 4), graphs.refused, len(graphs._graphs[Kind(8)])


def test_a_graph_is_in_all_processes_or_in_none(ranks: Ranks) -> None:
    """The first process used to wait in a sum for one that was short of memory."""
    for case, reason in (("room", "memory is short"), ("record", "could not record")):
        for did_record, refused, left in ranks(agree, 2, case):
            assert not did_record and reason in refused[Kind(8)] and left == (case == "room")
    assert [found[0] for found in ranks(agree, 2, "neither")] == [True, True]


def test_a_first_run_that_breaks_off_is_no_mere_refusal() -> None:
    """Others are in the middle of it: it must not be taken for a recording that can be done without."""

    class Broken(Repeating):
        def warm_up(self, work: Callable[[], object]) -> None:
            raise RuntimeError("out of memory")

    with pytest.raises(WarmUpError, match=r"out of memory; set enforce_eager") as caught:
        Together(Broken(torch.device("cpu"))).warm_up(lambda: None)
    assert not isinstance(caught.value, RuntimeError)


@pytest.mark.long
@pytest.mark.parametrize("count", [2, 4])
def test_processes_of_its_own(count: int, tiny_model_dir: Callable[..., Path]) -> None:
    """As LLM starts them; one that dies while requests run is an error, and nothing hangs."""
    directory = tiny_model_dir("llama", initializer_range=SPREAD, **WIDE)
    model = load_shared(SharedSource(str(directory)), count)
    try:
        engine = engine_of(model.runner(CONFIG), None, False)
        assert answers(engine, (None,) * 3) == one_process(directory)
        engine.submit(prompts()[0], SamplingParams(max_tokens=40))
        engine.step()
        os.kill(model.team.workers[-1].process.pid, signal.SIGKILL)
        with pytest.raises(ParallelError, match=rf"process {count - 1} of the {count} .*exit code -9"):
            while engine.has_work:
                engine.step()
    finally:
        model.close()


@pytest.mark.long
def test_a_model_that_can_not_be_shared_says_so(tiny_model_dir: Callable[..., Path]) -> None:
    with pytest.raises(ParallelError, match="tensor_parallel_size 2 does not divide"):
        load_shared(SharedSource(str(tiny_model_dir("qwen2", num_key_value_heads=1))), 2)


@pytest.mark.long
def test_grammars_and_guesses_of_a_draft_model() -> None:
    """Tokens are chosen, masked and guessed in the first process alone; the others see passes only."""
    prompts = ["Hello, what are", "Say: ", "Once upon a time", "Pick: "]
    params = [
        SamplingParams(max_tokens=16),
        SamplingParams(max_tokens=24, structured=StructuredSpec("regex", "[a-z]{3,8} [0-9]{2}")),
        SamplingParams(max_tokens=16, temperature=0.9, seed=4),
        SamplingParams(max_tokens=20, structured=StructuredSpec("choice", ("shop hours", "the weather"))),
    ]
    said = []
    draft = {"method": "draft", "model": "builtin:tiny", "num_tokens": 3}
    for options in ({}, {"tensor_parallel_size": 2, "speculative": draft}):
        llm = LLM("builtin:tiny", quantize="w8a8", device="cpu", max_model_len=256, max_num_seqs=4, **options)  # type: ignore[arg-type]
        try:
            said.append([done.text for done in llm.generate(prompts, params)])
        finally:
            llm.close()
    assert said[0] == said[1]


@pytest.mark.long
def test_an_engine_that_can_not_be_made_leaves_no_process() -> None:
    """They used to stay until this process ended."""
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(RequestError, match="max_model_len"):
        LLM("builtin:tiny", device="cpu", tensor_parallel_size=2, max_model_len=10**6)
    assert set(psutil.Process().children(recursive=True)) <= before
