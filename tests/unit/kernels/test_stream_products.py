"""Norms inside the products around them: kernels equal plain torch under Triton's interpreter, and lose nothing."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.add_rms_norm import add_rms_norm_reference_
from tunesmith.kernels.stream_products import (
    RAISED,
    Unscaled,
    added_reference,
    factors_of,
    normed_reference,
    wants_raised,
)

KERNEL = """
import itertools
import torch
from tunesmith.kernels.fp8 import dequantize_fp8_weight, quantize_fp8_weight
from tunesmith.kernels.gemv_operators import added_few_operator, normed_few_operator
from tunesmith.kernels.gemv_quads_triton import quads
from tunesmith.kernels.int8 import dequantize_int8, quantize_int8
from tunesmith.kernels.stream_products import RAISED, Added, Unscaled, added_reference, factors_of, normed_reference

torch.manual_seed(0)
bfloat16, float32 = torch.bfloat16, torch.float32

def held(format_id, dense):
    if format_id == 0:
        return dense.to(bfloat16), None, dense.to(bfloat16).float()
    if format_id == 1:
        weight = quantize_int8(dense)
        return weight.codes, weight.scale, dequantize_int8(weight.codes, weight.scale, float32)
    weight = quantize_fp8_weight(dense)
    return weight.codes, weight.scale, dequantize_fp8_weight(weight, float32)

def close(found, wanted, what, units=2):
    # The interpreter cuts bfloat16, it does not round.
    size = wanted.float().abs().amax(1, keepdim=True) + wanted.float().abs()
    assert found.shape == wanted.shape, what
    assert ((found.float() - wanted.float()).abs() <= units * 2.0**-8 * size).all(), what

def check_added(format_id, tokens, rows, has_bias, is_raised, shape=None):
    what = format_id, tokens, rows, has_bias, is_raised, shape
    weight, scale, dense = held(format_id, torch.randn(rows, 256) * 0.1)
    x, stream = torch.randn(tokens, 256).to(bfloat16), (torch.randn(tokens, rows) * 3).to(bfloat16)
    bias, norm = torch.randn(rows).to(bfloat16) if has_bias else None, torch.rand(rows).to(bfloat16)
    before = stream.clone()
    if shape is None:
        new, out, squares = added_few_operator(format_id, x, weight, scale, bias, stream, norm, is_raised)
    else:
        new, out = torch.full_like(stream, float("nan")), torch.full_like(stream, float("nan"))
        squares = torch.full((tokens, -(-rows // shape[0])), float("nan"))
        code = weight.view(torch.int8) if format_id == 2 else weight
        given = Added(stream, norm, is_raised, new, squares)
        assert quads(format_id, x, code, scale, None, bias, out, shape=shape, added=given)
    y = (x.float() @ dense.T + (0 if bias is None else bias.float())).to(bfloat16)
    wanted, unscaled = added_reference(stream, y, norm, 1e-5, is_raised)
    assert torch.equal(stream, before)
    close(new, wanted, what)
    close(out.float() / (RAISED if is_raised else 1), new.float() * norm.to(bfloat16).float(), what, 1)
    torch.testing.assert_close(squares.sum(1), new.float().square().sum(1), rtol=1e-5, atol=1e-6)
    return new, out, squares

def check_normed(format_id, unscaled, rows, has_bias, is_gated, shape=None):
    what = format_id, rows, has_bias, is_gated, shape
    tokens, width = unscaled.x_TD.shape
    weight, scale, dense = held(format_id, torch.randn(rows, width) * 0.1)
    bias = torch.randn(rows).to(bfloat16) if has_bias else None
    x, squares, eps = unscaled.x_TD, unscaled.squares_TP, unscaled.eps
    if shape is None:
        found = normed_few_operator(format_id, x, squares, eps, unscaled.is_raised, weight, scale, bias, is_gated)
    else:
        found = torch.full((tokens, rows // (1 + is_gated)), float("nan"), dtype=bfloat16)
        code = weight.view(torch.int8) if format_id == 2 else weight
        assert quads(format_id, x, code, scale, None, bias, found, shape=shape, is_gated=is_gated, normed=unscaled)
    close(found, normed_reference(unscaled, dense, bias, is_gated), what, 2 + 2 * is_gated)

# A chain of both, as a block has it: every format writes for every other.
for format_id, tokens, has_bias, readers in (
    (0, 1, True, (0, 2)), (1, 2, False, (1,)), (2, 5, True, (2, 0)), (0, 8, False, (0,)), (2, 1, False, (2,))):
    for reader in readers:
        _, out, squares = check_added(format_id, tokens, 64, has_bias, reader == 2)
        out, squares = out.repeat(1, 4), squares.repeat(1, 4)  # as wide as what is read
        unscaled = Unscaled(out, squares, 1e-5, reader == 2)
        check_normed(reader, unscaled, 40, has_bias, True)
        check_normed(reader, unscaled, 21, not has_bias, False)
# Every way a program can be cut, rows that no program divides.
for shape in ((8, 4, 1), (16, 2, 2), (16, 8, 1)):
    _, out, squares = check_added(0, 3, 45, True, False, shape)
for format_id, shape in ((1, (16, 2, 1)), (2, (16, 16, 1)), (2, (8, 2, 1))):
    check_added(format_id, 7, 27, False, True, shape)
for format_id, shape, parts in ((0, (16, 4, 1), 12), (1, (16, 2, 1), 132), (2, (16, 8, 1), 300)):
    x = torch.randn(3, 256).to(bfloat16)
    unscaled = Unscaled(x * (RAISED if format_id == 2 else 1), torch.rand(3, parts) * 5, 1e-6, format_id == 2)
    check_normed(format_id, unscaled, 19, True, False, shape)
    check_normed(format_id, unscaled, 38, False, True, shape)
# A stream of zeros, and one with outliers, beside each other.
for format_id in (0, 1, 2):
    stream = torch.randn(3, 256).to(bfloat16)
    stream[0] = 0
    stream[1, 7], stream[1, 100] = 2e4, -9e3
    norm = torch.rand(256) * 8
    _, unscaled = added_reference(stream, torch.zeros_like(stream), norm, 1e-6, format_id == 2)
    check_normed(format_id, unscaled, 32, True, False)
"""
LAUNCHES = """
import torch
from torch.library import opcheck
from tunesmith.kernels.gemv_operators import added_few_operator, normed_few_operator

bfloat16 = torch.bfloat16
x, weight, norm = torch.randn(2, 64).to(bfloat16), torch.randn(64, 64).to(bfloat16), torch.ones(64)
new, out, squares = added_few_operator(0, x, weight, None, None, x, norm, False)
assert new.data_ptr() not in (x.data_ptr(), out.data_ptr())
opcheck(normed_few_operator, (0, out, squares, 1e-6, False, weight, None, None, False),
        test_utils=("test_schema", "test_faketensor"))
opcheck(added_few_operator, (0, x, weight, None, None, x, norm, False), test_utils=("test_schema",))
"""
PASS = """
import torch
from tunesmith.arch import config_from_dict
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import StepBatch
from tunesmith.engine.fused_pass import FusedPass
from tunesmith.engine.pages import PagedCache
from tunesmith.kernels import paged_attention
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.quick import quick
from tunesmith.kernels.gemv_quads_triton import quad_kernel
from tunesmith.model.decode_linears import use_decode_linears
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import quantise_linears_fp8, Fp8Linear

CONFIG = {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "vocab_size": 64, "hidden_size": 128,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 1,
    "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu"}

def made(**changes):
    torch.manual_seed(1)
    decoder = Decoder(config_from_dict({**CONFIG, **changes})).eval().requires_grad_(False)
    for name, weight in decoder.named_parameters():
        if weight.dim() > 1:
            weight.copy_(torch.randn_like(weight) * 0.08)
        else:
            weight.add_(torch.randn_like(weight) * 0.2)
    decoder = decoder.bfloat16()
    quantise_linears_fp8(decoder)
    for module in decoder.modules():
        if isinstance(module, Fp8Linear):
            module.compute = "weights"  # a CPU has no other
    return decoder

def step(tokens, positions, starts, context):
    pages = torch.tensor([[0], [1]], dtype=torch.int32)
    owner = [r for r in range(2) for _ in range(starts[r + 1] - starts[r])]
    return StepBatch(
        tokens_T=torch.tensor(tokens), positions_T=torch.tensor(positions),
        slots_T=torch.tensor([r * 16 + p for r, p in zip(owner, positions)]),
        query_starts_R1=torch.tensor(starts, dtype=torch.int32), context_R=torch.tensor(context, dtype=torch.int32),
        block_tables_RP=pages, max_query=max(b - a for a, b in zip(starts, starts[1:])), max_context=max(context),
        sample_rows_B=torch.tensor([starts[1] - 1, starts[2] - 1]), sample_slots_B=torch.tensor([0, 1]),
        sample_positions_B=torch.tensor(context), sequence_slots=[0, 1], is_decode=len(tokens) == 2)

STEPS = [step([3, 9, 4], [0, 1, 0], [0, 2, 3], [2, 1])]

def hidden(decoder, run):
    cache = PagedCache(decoder.config, 2, dtype=torch.bfloat16, device=torch.device("cpu"))
    return torch.cat([run(b.tokens_T, b.positions_T, PagedAttention(cache, b)) for b in STEPS]).double()

paged_attention.use_kernel = lambda _: False  # the interpreter's dot takes no bfloat16
launched = []
launch = type(quick(quad_kernel)).__getitem__
def noted(self, grid):
    def call(*args, **constants):
        launched.append((constants.get("NORMED", False), constants.get("ADDED", False)))
        return launch(self, grid)(*args, **constants)
    return call
type(quick(quad_kernel)).__getitem__ = noted

decoder = made(model_type="qwen3", head_dim=32)
with torch.inference_mode():
    truth = hidden(decoder, decoder)
    with kernels_on("cpu"):
        use_decode_linears(decoder)
        found = hidden(decoder, FusedPass(decoder))
assert launched.count((True, False)) == launched.count((False, True)) == 3, launched
error = (found - truth).square().mean().sqrt() / truth.square().mean().sqrt()
# Norms apart are as far off: every kernel is interpreted, and bfloat16 cut.
assert error < 0.03, float(error)
"""


def test_kernels_equal_plain_torch_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


def test_a_pass_has_the_decoders_hidden_states(check_interpreted: Callable[[str], None]) -> None:
    """Products, norms and heads of a pass under the interpreter, which cuts bfloat16."""
    check_interpreted(PASS)


def test_they_are_operators(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(LAUNCHES)


def rms(x: torch.Tensor) -> float:
    return float(x.double().square().mean().sqrt())


@pytest.mark.parametrize("outliers", [False, True])
def test_norm_and_product_lose_no_more_than_apart(outliers: bool) -> None:
    """Beside float64: the operand once rounded instead of twice, and what is made of it."""
    generator = torch.Generator().manual_seed(3)
    stream, delta = (torch.randn(256, 1024, generator=generator).bfloat16() * size for size in (4, 1))
    if outliers:
        stream[:, ::100] *= 1000
    norm = (torch.rand(1024, generator=generator) + 0.5).bfloat16()
    weight = torch.randn(512, 1024, generator=generator).bfloat16().float() * 0.05
    new, unscaled = added_reference(stream, delta, norm, 1e-6, True)
    after = stream.clone()
    today = add_rms_norm_reference_(after, delta, norm, 1e-6)
    assert torch.equal(new, after)
    wide = new.double()
    exact = wide * torch.rsqrt(wide.square().mean(1, keepdim=True) + 1e-6) * norm.double()
    mine = unscaled.x_TD.double() / RAISED * factors_of(unscaled).double()
    assert rms(mine - exact) < 0.85 * rms(today.double() - exact)
    ended, apart = normed_reference(unscaled, weight, None, False), (today.float() @ weight.t()).bfloat16()
    truth = exact @ weight.double().t()
    assert rms(ended.double() - truth) < 1.01 * rms(apart.double() - truth)


def test_the_way_between_them_has_room_for_what_streams_hold() -> None:
    """Times 2^60 nothing leaves bfloat16, and the bits stay: outliers, large weights, values that nearly vanish."""
    stream = torch.tensor([[1e-20, 1e-3, 1.0, 3e4, -6e4]]).bfloat16()
    norm = torch.tensor([1e-6, 1.0, 2.0**60, 1e3, 500.0]).bfloat16()
    zeros = torch.zeros_like(stream)
    (_, plain), (_, raised) = (added_reference(stream, zeros, norm, 0.0, is_raised) for is_raised in (False, True))
    assert raised.x_TD.isfinite().all()
    assert torch.equal(raised.x_TD.double(), plain.x_TD.double() * RAISED)
    # float16 has no such room, and never comes here.
    assert not (stream.to(torch.float16) * norm.to(torch.float16)).isfinite().all()


def test_a_stream_of_zeros_has_a_finite_norm() -> None:
    zeros = torch.zeros(2, 64).bfloat16()
    _, unscaled = added_reference(zeros, zeros, torch.ones(64), 1e-6, False)
    torch.testing.assert_close(factors_of(unscaled), torch.full((2, 1), 1e3))
    bias = torch.arange(4.0)
    y_TF = normed_reference(unscaled, torch.ones(4, 64), bias, False)
    assert torch.equal(y_TF, bias.bfloat16().expand(2, 4))


def test_only_products_in_fp8_take_their_input_raised() -> None:
    assert [wants_raised(format_id) for format_id in range(5)] == [False, False, True, False, False]
    x, squares = torch.ones(1, 4).bfloat16(), torch.ones(1, 1)
    weight = torch.ones(3, 4)
    plain, raised = Unscaled(x, squares, 0.0), Unscaled(x * RAISED, squares, 0.0, True)
    assert torch.equal(normed_reference(plain, weight, None, False), normed_reference(raised, weight, None, False))
