"""What a pair of CUDA graphs is recorded for; the recording itself needs a GPU (tests/gpu/test_captured.py)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model import captured as captured_module
from tunesmith.model.captured import CapturedBlocks, Signature
from tunesmith.model.packed import PackedTokens, pack_documents

Make = Callable[..., Path]


def _pack(lengths: list[int]) -> PackedTokens:
    return pack_documents([[1] * length for length in lengths])


def _signature(lengths: list[int], kind: str = "none") -> Signature:
    return Signature.of(torch.zeros(sum(lengths), 4), _pack(lengths), kind)


@pytest.mark.parametrize(
    ("lengths", "same_as"),
    [([30, 34], [33, 31]), ([10, 20, 34], [20, 8, 33, 3]), ([33, 1, 30], [40, 8, 15, 1])],
)
def test_uneven_packs_share_graphs_by_their_bounds(lengths: list[int], same_as: list[int]) -> None:
    assert _signature(lengths) == _signature(same_as)
    assert _signature(lengths).lengths == ()


def test_even_packs_have_graphs_of_their_own() -> None:
    assert _signature([32, 32]).lengths == (32, 32)
    assert _signature([32, 32]) != _signature([31, 33])
    assert _signature([32, 32]) != _signature([16] * 4)


def test_bounds_hold_every_pack_of_the_signature() -> None:
    signature = _signature([5] * 12 + [4])
    assert signature.num_documents == 16
    assert signature.max_length == 8
    assert _signature([1] * 3 + [61]).max_length == 64
    assert _signature([1, 36]).max_length == 37  # never longer than the pack


def test_what_else_a_graph_depends_on() -> None:
    assert _signature([32, 32], "block") != _signature([32, 32])
    pack, hidden = _pack([32, 32]), torch.zeros(64, 4)
    assert Signature.of(hidden.clone().requires_grad_(), pack, "none") != Signature.of(hidden, pack, "none")
    assert Signature.of(hidden.bfloat16(), pack, "none") != Signature.of(hidden, pack, "none")


def test_a_cpu_has_no_graphs(tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir("llama")).train()
    decoder.is_fused, decoder.captured = True, CapturedBlocks()
    assert decoder.hidden(_pack([5, 6])).requires_grad
    assert decoder.captured.num_graphs == 0


class _Fake:
    """A recording that only remembers what it was made for."""

    made: ClassVar[list[Signature]] = []
    fails: ClassVar[list[Exception]] = []

    def __init__(self, run: Any, hidden: Any, pack: Any, signature: Signature, *_: Any) -> None:
        if self.fails:
            raise self.fails.pop(0)
        self.made.append(signature)
        self.num_bytes, self.current = 100, True

    def is_current(self, parameters: Any) -> bool:
        return self.current


@pytest.fixture
def free_bytes(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Recordings are fakes, and the device has so much memory free."""
    monkeypatch.setattr(captured_module, "Recording", _Fake)
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", object)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    _Fake.made, _Fake.fails = [], []

    def set_free(free: int) -> None:
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1000))

    set_free(1000)
    return set_free


def _find(captured: CapturedBlocks, lengths: list[int]) -> Any:
    return captured._recording(_run, torch.zeros(sum(lengths), 4), _pack(lengths), "none", [], None)


def _run(hidden: torch.Tensor, _pack: PackedTokens, _seed: torch.Tensor | None) -> torch.Tensor:
    return hidden


@pytest.mark.usefixtures("free_bytes")
def test_uneven_packs_soon_share_one_recording() -> None:
    captured = CapturedBlocks()
    for lengths in ([40, 24], [10, 20, 34], [1, 2, 3, 58], [30, 20, 14], [8, 8, 16, 16, 15, 1], [33, 31]):
        assert _find(captured, lengths) is not None
    assert [(made.num_documents, made.max_length) for made in _Fake.made] == [(2, 64), (4, 64), (8, 64)]
    assert captured.num_graphs == 1
    assert _find(captured, [16] * 4) is not None
    assert captured.num_graphs == 2


def test_another_shape_is_not_recorded_where_it_would_not_fit(free_bytes: Callable[[int], None]) -> None:
    captured = CapturedBlocks()
    assert _find(captured, [32, 32]) is not None
    free_bytes(90)
    assert _find(captured, [40, 24]) is None
    assert captured.num_graphs == 0
    assert "more memory to record than is free" in (captured.refused or "")
    assert _find(captured, [32, 32]) is None


@pytest.mark.usefixtures("free_bytes")
def test_what_cannot_be_recorded_is_tried_twice() -> None:
    captured = CapturedBlocks()
    _Fake.fails = [RuntimeError("still loading")]
    assert _find(captured, [32, 32]) is not None
    assert captured.refused is None
    captured, _Fake.fails = (
        CapturedBlocks(),
        [RuntimeError("asks the device\nmore"), RuntimeError("asks the device\nmore")],
    )
    assert _find(captured, [32, 32]) is None
    assert captured.refused == "asks the device"
    captured, _Fake.fails = CapturedBlocks(), [torch.OutOfMemoryError("out")]
    assert _find(captured, [32, 32]) is None
    assert captured.refused == "recording takes more memory than there is"


@pytest.mark.usefixtures("free_bytes")
def test_moved_parameters_are_recorded_again() -> None:
    captured = CapturedBlocks()
    _find(captured, [32, 32]).current = False
    assert _find(captured, [32, 32]).current
    assert len(_Fake.made) == 2


class _Stream:
    """Known by its identity."""

    def wait_stream(self, other: _Stream) -> None:
        """Everything happens at once here."""


class _Cuda:
    """Recording as torch does it, without a GPU: what is recorded runs at once."""

    def __init__(self) -> None:
        self.default = _Stream()
        self.stream = self.default
        self.streams: list[_Stream] = []
        self.is_recording = False
        self.end_fails = False

    def make_stream(self, _: torch.device) -> _Stream:
        """torch.cuda.Stream."""
        self.streams.append(_Stream())
        return self.streams[-1]

    @contextmanager
    def graph(self, *_: Any, stream: _Stream, **__: Any) -> Iterator[None]:
        """torch's context manager ends the recording and puts the stream back, in this order, with no `finally`."""
        before, self.stream, self.is_recording = self.stream, stream, True
        try:
            yield
        finally:
            self.is_recording = False
            if self.end_fails:
                raise RuntimeError("operation failed due to a previous error during capture")
            self.stream = before

    @contextmanager
    def within(self, stream: _Stream) -> Iterator[None]:
        """torch.cuda.stream."""
        before, self.stream = self.stream, stream
        yield
        self.stream = before

    def set_stream(self, stream: _Stream) -> None:
        """torch.cuda.set_stream."""
        self.stream = stream


class _Graph:
    """Repeats nothing."""

    def replay(self) -> None:
        """The results are there since they were recorded."""


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Iterator[_Cuda]:
    fake = _Cuda()
    for name, stand_in in {
        "graph": fake.graph,
        "current_stream": lambda: fake.stream,
        "set_stream": fake.set_stream,
        "stream": fake.within,
        "Stream": fake.make_stream,
        "synchronize": lambda: None,
        "CUDAGraph": _Graph,
        "graph_pool_handle": object,
        "memory_reserved": lambda: 0,
        "empty_cache": lambda: None,
        "mem_get_info": lambda: (1000, 1000),
    }.items():
        monkeypatch.setattr(torch.cuda, name, stand_in)
    captured_module._stream.cache_clear()
    yield fake
    captured_module._stream.cache_clear()


def test_a_recording_has_nodes_of_its_own_for_gradients(cuda: _Cuda) -> None:
    """A graph that someone holds keeps its parameters' nodes, and they the default stream: no recording may join it."""
    weight = nn.Parameter(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    updates: list[Tensor] = []
    weight.register_post_accumulate_grad_hook(lambda parameter: updates.append(parameter.detach().clone()))
    loss = (weight * 2).sum()
    held = get_gradient_edge(weight).node
    nodes = []

    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        nodes.append((cuda.is_recording, get_gradient_edge(weight).node))
        return hidden * weight

    address, captured = weight.data_ptr(), CapturedBlocks()
    out = captured(run, torch.ones(64, 4), _pack([32, 32]), "none", [weight])
    assert captured.refused is None
    assert [is_recording for is_recording, _ in nodes] == [False, False, True]
    assert all(node is not held for _, node in nodes)
    assert nodes[-1][1] not in [node for _, node in nodes[:-1]]  # though the list holds them
    assert weight.data_ptr() == address
    # Both graphs end in the same parameter, with its hooks.
    loss.backward()
    assert weight.grad is not None and weight.grad.tolist() == [2.0] * 4
    out.sum().backward()
    assert len(updates) == 2
    assert weight.tolist() == [1.0, 2.0, 3.0, 4.0]


def test_a_recording_that_fails_leaves_the_stream_and_names_the_first_error(cuda: _Cuda) -> None:
    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        if cuda.is_recording:
            raise RuntimeError("asks the device\nmore")
        return hidden * weight

    cuda.end_fails = True
    weight, captured = nn.Parameter(torch.ones(4)), CapturedBlocks()
    out = captured(run, torch.ones(64, 4), _pack([32, 32]), "none", [weight])
    assert captured.refused == "asks the device"
    assert cuda.stream is cuda.default
    out.sum().backward()
    assert weight.grad is not None and weight.grad.tolist() == [64.0] * 4


def test_memory_that_runs_out_while_recording_is_told_apart(cuda: _Cuda) -> None:
    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        if cuda.is_recording:
            raise torch.OutOfMemoryError("out")
        return hidden * weight

    cuda.end_fails = True
    weight, captured = nn.Parameter(torch.ones(4)), CapturedBlocks()
    captured(run, torch.ones(64, 4), _pack([32, 32]), "none", [weight])
    assert captured.refused == "recording takes more memory than there is"


def test_all_is_warmed_up_and_recorded_on_one_stream(cuda: _Cuda) -> None:
    """cuBLAS keeps its workspace for every stream that it ever multiplied on."""
    weight, captured, used = nn.Parameter(torch.ones(4)), CapturedBlocks(), set()

    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        used.add(cuda.stream)
        return hidden * weight

    for lengths in ([32, 32], [40, 24]):
        captured(run, torch.ones(64, 4), _pack(lengths), "none", [weight]).sum().backward()
    assert captured.num_graphs == 2
    assert used == set(cuda.streams)
    assert len(used) == 1


@pytest.mark.usefixtures("cuda")
def test_recordings_of_other_shapes_take_a_micro_batch_memory_too() -> None:
    """They lie in one memory: a backward pass after another shape's forward pass would read that one's numbers."""
    weight, captured = nn.Parameter(torch.ones(4)), CapturedBlocks()

    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        return hidden * weight

    first = captured(run, torch.ones(64, 4), _pack([32, 32]), "none", [weight])
    second = captured(run, torch.ones(64, 4), _pack([40, 24]), "none", [weight])
    assert captured.num_graphs == 2
    with pytest.raises(RuntimeError, match="go backward through it before the next goes forward"):
        first.sum().backward()
    second.sum().backward()


@pytest.mark.usefixtures("cuda")
def test_other_trained_parameters_are_recorded_anew() -> None:
    """A graph has no gradient for a parameter that was frozen when it was recorded."""
    weight, bias, captured = nn.Parameter(torch.ones(4)), nn.Parameter(torch.zeros(4)), CapturedBlocks()

    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        return hidden * weight + bias

    held = []
    for parameters in ([weight], [weight], [weight, bias], [bias, weight]):
        captured(run, torch.ones(64, 4), _pack([32, 32]), "none", parameters).sum().backward()
        held.append(next(iter(captured._recordings.values())))
    assert captured.num_graphs == 1
    assert [held[0] is held[1], held[1] is held[2], held[2] is held[3]] == [True, False, False]
    assert bias.grad is not None


@pytest.mark.usefixtures("cuda")
def test_blocks_that_were_made_again_are_recorded_again() -> None:
    weight, captured = nn.Parameter(torch.ones(4)), CapturedBlocks()

    def run(hidden: Tensor, _pack: PackedTokens, _seed: Tensor | None) -> Tensor:
        return hidden * weight

    blocks: list[int] = []
    for now, graphs in ((blocks, 0), (blocks, 1), ([], 0)):
        captured.belong_to(now)
        assert captured.num_graphs == graphs
        captured(run, torch.ones(64, 4), _pack([32, 32]), "none", [weight])
