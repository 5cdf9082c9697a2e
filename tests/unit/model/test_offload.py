"""Offloading's bookkeeping with copies that a CPU makes: as late as allowed, so that nothing is read or freed early."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.cost.memory import offloaded_bytes
from tunesmith.errors import DeviceError
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.offload import Offloader
from tunesmith.model.packed import pack_documents
from tunesmith.model.transfer import CudaTransfer
from tunesmith.recipe.schema import MethodSection

Make = Callable[..., Path]
DOCUMENTS = [[1, 2, 3, 4, 5], [6, 7], [8, 9, 10] * 7, [3]]
METHODS: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "lora": {"kind": "lora", "rank": 4},
    "qlora": {"kind": "qlora", "rank": 4},
    "attention": {"kind": "lora", "rank": 4, "targets": ["q_proj", "v_proj"]},
    "dora": {"kind": "lora", "rank": 4, "dora": True},
    "freeze": {"kind": "freeze", "trainable": ["last:2"]},
}
NUM_BLOCKS = 5


class LateTransfer:
    """Copies when they are waited for; a target holds rubbish until then. Counts what is on the device.

    What is on the device is held by nobody here, so it is gone at the wait if it was freed too early.
    """

    def __init__(self) -> None:
        self.buffers: dict[int, Tensor] = {}
        self.tensors: dict[int, tuple[weakref.ref[Tensor], int]] = {}
        self.pending: dict[int, list[tuple[bool, Tensor, weakref.ref[Tensor]]]] = {}
        self.sent: list[list[int]] = []
        self.fetched: list[list[int]] = []
        self.most_batches = 0
        self.number = 0

    def allocate(self, num_bytes: int) -> Tensor:
        buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self.buffers[buffer.untyped_storage().data_ptr()] = buffer
        return buffer

    def copy(self, pairs: Iterable[tuple[Tensor, Tensor]]) -> int:
        pairs = list(pairs)
        self.number += 1
        to_host = self._is_host(pairs[0][0])
        self.pending[self.number] = []
        assert all(self._is_host(target) == to_host != self._is_host(source) for target, source in pairs)
        (self.sent if to_host else self.fetched).append([source.data_ptr() for _, source in pairs])
        for target, source in pairs:
            target.fill_(0xFF)
            device = source if to_host else target
            self.pending[self.number].append((to_host, target if to_host else source, weakref.ref(device)))
            self.tensors[id(device)] = (weakref.ref(device), self.number)
        alive = {number for tensor, number in self.tensors.values() if tensor() is not None}
        self.most_batches = max(self.most_batches, len(alive))
        return self.number

    def wait(self, ticket: int) -> None:
        for to_host, host, reference in self.pending.pop(ticket):
            device = reference()
            assert device is not None, "freed while it was copied"
            target, source = (host, device) if to_host else (device, host)
            target.copy_(source)

    def _is_host(self, tensor: Tensor) -> bool:
        return tensor.untyped_storage().data_ptr() in self.buffers


def _decoder(make: Make, method: str, family: str = "qwen2") -> Decoder:
    quantize: Any = "nf4-double" if method == "qlora" else None
    decoder = load_decoder(make(family, num_hidden_layers=NUM_BLOCKS), quantize=quantize).train()
    apply_method(decoder, MethodSection(**METHODS[method]), seed=3)
    decoder.is_fused = True
    with torch.no_grad():
        for name, parameter in decoder.named_parameters():
            if name.endswith(".B"):
                parameter.copy_(torch.linspace(-0.1, 0.1, parameter.numel()).view_as(parameter))
    return decoder


def _offloading(decoder: Decoder, least_bytes: int = 1024, kind: Any = "offload") -> tuple[LateTransfer, Offloader]:
    transfer = LateTransfer()
    decoder.checkpointing = kind
    decoder.offloader = Offloader(transfer, least_bytes)
    return transfer, decoder.offloader


def _loss(decoder: Decoder, shift: int = 0) -> Tensor:
    hidden = decoder.hidden(pack_documents([[token + shift for token in document] for document in DOCUMENTS]))
    weights = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1))
    return (hidden * weights).sum()


def _gradients(decoder: Decoder, times: int = 1) -> dict[str, Tensor]:
    decoder.zero_grad()
    for shift in range(times):
        _loss(decoder, shift).backward()
    return {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}


def _assert_same(expected: dict[str, Tensor], got: dict[str, Tensor]) -> None:
    assert expected
    assert expected.keys() == got.keys()
    assert [name for name in expected if not torch.equal(expected[name], got[name])] == []


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "gpt2", "qwen3_moe"])
@pytest.mark.parametrize("method", METHODS)
def test_gradients_are_those_without_it_bit_for_bit(family: str, method: str, tiny_model_dir: Make) -> None:
    if family == "gpt2":
        if method in ("attention", "freeze"):
            pytest.skip("GPT-2's projections have other names")
        decoder = _decoder(lambda name, **_: tiny_model_dir(name, n_layer=NUM_BLOCKS), method, family)
    else:
        decoder = _decoder(tiny_model_dir, method, family)
    expected = _gradients(decoder, times=2)
    transfer, offloader = _offloading(decoder, least_bytes=1)
    for _ in range(2):
        _assert_same(expected, _gradients(decoder, times=2))
    assert transfer.sent
    assert len(transfer.sent) == len(transfer.fetched)
    assert transfer.pending == {}
    assert offloader.host.leased_bytes == 0


@pytest.mark.parametrize("method", ["lora", "qlora", "full", "dora"])
@pytest.mark.parametrize("tile_tokens", [None, 5])
def test_blocks_made_again_from_offloaded_inputs(method: str, tile_tokens: int | None, tiny_model_dir: Make) -> None:
    """The same gradients, and of each block but the last its input alone has moved."""
    decoder = _decoder(tiny_model_dir, method)
    decoder.mlp_tile_tokens = tile_tokens
    expected = _gradients(decoder, times=2)
    transfer, offloader = _offloading(decoder, kind="offload-block")
    for _ in range(2):
        _assert_same(expected, _gradients(decoder, times=2))
    assert {len(addresses) for addresses in transfer.sent} == {1}
    assert transfer.pending == {}
    tokens = sum(map(len, DOCUMENTS))
    held = offloaded_bytes(decoder.config, MethodSection(), tokens, "float32", inputs_only=True)
    assert offloader.host.total_bytes == held
    assert offloader.host.leased_bytes == 0


@pytest.mark.parametrize("kind", ["offload", "offload-block"])
def test_spared_blocks_stay_on_the_device(kind: Any, tiny_model_dir: Make) -> None:
    """The same gradients, and what the spared blocks save does not move."""
    decoder = _decoder(tiny_model_dir, "lora")
    expected = _gradients(decoder, times=2)
    for decoder.skip_last in range(NUM_BLOCKS + 1):
        transfer, offloader = _offloading(decoder, kind=kind)
        _assert_same(expected, _gradients(decoder, times=2))
        assert len(transfer.sent) == 2 * (NUM_BLOCKS - max(1, decoder.skip_last))
        assert len(transfer.fetched) == len(transfer.sent)
        tokens = sum(map(len, DOCUMENTS))
        if kind == "offload-block":
            held = offloaded_bytes(decoder.config, MethodSection(), tokens, "float32", True, decoder.skip_last)
            assert offloader.host.total_bytes == held
        assert offloader.host.leased_bytes == 0


def test_every_storage_moves_once_and_what_is_small_or_fixed_stays(tiny_model_dir: Make) -> None:
    """Query, key and value are three views of one storage; the low-rank activation of gate and up is too small."""
    decoder = _decoder(tiny_model_dir, "lora")
    transfer, offloader = _offloading(decoder)
    _gradients(decoder)
    assert len(transfer.sent) == NUM_BLOCKS - 1  # the last block's stay
    assert all(len(set(addresses)) == len(addresses) for addresses in transfer.sent)
    weights = {parameter.data_ptr() for parameter in decoder.parameters()}
    assert weights.isdisjoint(address for addresses in transfer.sent for address in addresses)
    tokens = sum(map(len, DOCUMENTS))
    # The stream, qkv, what attention made of them, the stream after that, and the low-rank activation of q, k and v.
    widths = 32 + 64 + 32 + 32 + 3 * 4
    # On a CPU each document's attention is a call of its own, whose output is saved besides.
    longest = 32 * max(map(len, DOCUMENTS))
    assert offloader.host.total_bytes == 4 * (NUM_BLOCKS - 1) * (tokens * widths + longest)


def test_host_memory_is_used_again(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir, "lora")
    _, offloader = _offloading(decoder)
    _gradients(decoder)
    before = offloader.host.total_bytes
    _gradients(decoder, times=3)
    assert offloader.host.total_bytes == before > 0


def test_at_most_two_blocks_are_on_the_device(tiny_model_dir: Make) -> None:
    """Counted at every copy, in both directions: the block that is copied and the one at work."""
    decoder = _decoder(tiny_model_dir, "lora")
    transfer, _ = _offloading(decoder)
    _gradients(decoder)
    assert transfer.most_batches == 2
    assert len(transfer.fetched) == NUM_BLOCKS - 1


def test_tiles_of_the_mlp_are_offloaded_as_well(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir, "lora")
    decoder.mlp_tile_tokens = 7
    expected = _gradients(decoder)
    transfer, _ = _offloading(decoder)
    _assert_same(expected, _gradients(decoder))
    assert len(transfer.sent) == NUM_BLOCKS - 1


def test_two_passes_may_be_open_at_once(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir, "lora")
    expected = _gradients(decoder, times=2)
    _, offloader = _offloading(decoder)
    decoder.zero_grad()
    first, second = _loss(decoder, 0), _loss(decoder, 1)
    first.backward()
    second.backward()
    _assert_same(expected, {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})
    assert offloader.host.leased_bytes == 0


def test_a_pass_without_a_backward_pass_leaves_nothing(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir, "lora")
    transfer, offloader = _offloading(decoder)
    loss = _loss(decoder)
    assert offloader.host.leased_bytes > 0
    del loss
    assert offloader.host.leased_bytes == 0
    with torch.no_grad():
        _loss(decoder)
    decoder.eval()
    _loss(decoder)
    assert len(transfer.sent) == NUM_BLOCKS - 1


@pytest.mark.parametrize("where", ["forward", "backward"])
@pytest.mark.parametrize("index", range(NUM_BLOCKS))
def test_an_exception_on_the_way_leaves_no_state(where: str, index: int, tiny_model_dir: Make) -> None:
    """A loop variable, not pytest.raises, holds no traceback afterwards: it would hold the pass."""
    decoder = _decoder(tiny_model_dir, "lora")
    expected = _gradients(decoder)
    transfer, offloader = _offloading(decoder)
    _break(decoder, where, index)
    assert offloader.host.leased_bytes == 0
    assert transfer.pending == {}
    _assert_same(expected, _gradients(decoder))


def _break(decoder: Decoder, where: str, index: int) -> None:
    block = decoder._fused.of(decoder.blocks, torch.float32)[index]
    assert block.down is not None
    name = "forward" if where == "forward" else "parameter_grads"

    def fail(*_: Any) -> None:
        raise ArithmeticError("out of something")

    setattr(block.down, name, fail)
    try:
        _loss(decoder).backward()
    except ArithmeticError:
        pass
    else:
        pytest.fail("it did not break")
    finally:
        delattr(block.down, name)


def test_a_graph_gone_through_twice(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir, "lora")
    expected = _gradients(decoder)
    _offloading(decoder)
    decoder.zero_grad()
    loss = _loss(decoder)
    loss.backward(retain_graph=True)
    decoder.zero_grad()
    loss.backward()
    _assert_same(expected, {name: p.grad for name, p in decoder.named_parameters() if p.grad is not None})


def test_what_is_computed_and_dropped_inside_a_block_is_not_moved() -> None:
    """Attention kernels are tried out on copies inside the first block: that must cost no host memory."""
    transfer = LateTransfer()
    offloader = Offloader(transfer, 1)

    def block(x: Tensor) -> Tensor:
        trial = x.detach().clone().requires_grad_()
        torch.autograd.grad((trial * trial).sum(), trial)
        return (x * x).clone()

    x = torch.ones(4, requires_grad=True)
    run = offloader.begin()
    hidden = run.run(block, x, kept=[], is_last=False)
    run.run(block, hidden, kept=[], is_last=True).sum().backward()
    assert x.grad is not None
    assert x.grad.tolist() == [4.0] * 4
    assert offloader.host.total_bytes == 16


def test_a_storage_that_a_block_and_the_next_save_moves_once() -> None:
    transfer = LateTransfer()
    offloader = Offloader(transfer, 1)
    shared = torch.arange(1.0, 5.0)
    x = torch.ones(4, requires_grad=True)
    run = offloader.begin()
    hidden = x
    for layer in range(3):
        hidden = run.run(lambda x: x * shared, hidden, kept=[], is_last=layer == 2)
    hidden.sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, shared**3)
    assert [address for sent in transfer.sent for address in sent].count(shared.data_ptr()) == 1


def test_a_cpu_has_nothing_to_offload(tiny_model_dir: Make) -> None:
    with pytest.raises(DeviceError, match=r"on cpu: use --set train\.checkpointing=selective"):
        CudaTransfer(torch.device("cpu"))
    decoder = _decoder(tiny_model_dir, "lora")
    decoder.checkpointing = "offload"
    with pytest.raises(DeviceError, match="nothing to move"):
        _loss(decoder)


def test_the_eager_blocks_take_it_as_selective(tiny_model_dir: Make) -> None:
    decoder = _decoder(tiny_model_dir, "lora")
    decoder.is_fused = False
    decoder.checkpointing = "selective"
    expected = _gradients(decoder)
    decoder.checkpointing = "offload"
    _assert_same(expected, _gradients(decoder))
