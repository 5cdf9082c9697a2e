"""fp8 on a GPU: the kernels against the reference, torch's product against float64, and training beside bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.fp8 import (
    FAST_SUMS,
    FP8,
    fp8_product,
    has_fp8,
    quantize_fp8_weight,
    quantize_rows_fp8,
    quantize_rows_reference,
    transpose_fp8,
)
from tunesmith.kernels.nf4 import quantize_nf4
from tunesmith.kernels.nf4_fp8 import nf4_row_scales, nf4_to_fp8, nf4_to_fp8_reference
from tunesmith.model.fp8 import quantised_fp8
from tunesmith.model.layers import Linear
from tunesmith.model.quant import quantised, set_compute
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.session import build_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_fp8("cuda")), reason="needs a GPU with fp8 products (sm_89 or newer)"
    ),
]
SHAPES = [(1, 48), (3, 96), (17, 200), (130, 3584), (33, 18944)]


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("fold", [False, True])
def test_rows_are_quantised_as_by_the_reference(shape: tuple[int, int], dtype: torch.dtype, fold: bool) -> None:
    x = random(*shape, dtype=dtype)
    factors = random(shape[1], seed=1).abs() if fold else None
    codes, scale = quantize_rows_fp8(x, factors)
    expected, expected_scale = quantize_rows_reference(x, factors)
    assert torch.equal(scale, expected_scale)
    assert same(codes, expected)


def test_what_is_not_finite_is_not_hidden() -> None:
    x = random(3, 64)
    x[1, 5], x[2, 7] = float("nan"), float("inf")
    y = fp8_product(*quantize_rows_fp8(x), torch.ones(32, 64, device="cuda").to(FP8), None, None, torch.bfloat16)
    assert y[0].isfinite().all()
    assert y[1:].isnan().all()
    zeros, scale = quantize_rows_fp8(torch.zeros(2, 64, device="cuda"))
    assert zeros.float().eq(0).all()
    assert scale.gt(0).all()


@pytest.mark.parametrize("shape", [(1, 48), (17, 200), (1000, 3584)])
def test_transpose(shape: tuple[int, int]) -> None:
    codes = random(*shape).to(FP8)
    assert same(transpose_fp8(codes), codes.view(torch.uint8).t().contiguous())


@pytest.mark.parametrize("out_dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("sizes", [(1, 64, 48), (17, 512, 256), (300, 3584, 1024), (8, 200, 40)])
@pytest.mark.parametrize("bias", [False, True])
def test_product_against_float64(sizes: tuple[int, int, int], out_dtype: torch.dtype, bias: bool) -> None:
    """The last sizes are no multiples of 16: there the reference runs."""
    tokens, width, rows = sizes
    (x_codes, x_scale), weight = (
        quantize_rows_fp8(random(tokens, width)),
        quantize_fp8_weight(random(rows, width, seed=1)),
    )
    bias_N = random(rows, seed=2) if bias else None
    exact = (x_codes.double() * x_scale) @ (weight.codes.double() * weight.scale[:, None]).t()
    exact = exact if bias_N is None else exact + bias_N
    y = fp8_product(x_codes, x_scale, weight.codes, weight.scale, bias_N, out_dtype)
    assert y.dtype == out_dtype
    assert (y.double() - exact).norm() / exact.norm() < 0.01
    plain = fp8_product(x_codes, x_scale, weight.codes, None, None, out_dtype)
    exact = (x_codes.double() * x_scale) @ weight.codes.double().t()
    assert (plain.double() - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("fast", [False, True])
def test_what_fast_accumulation_costs_at_worst(fast: bool, backward: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sum whose terms all have one sign, 3,584 of them: the tensor cores' short accumulator rounds most there."""
    monkeypatch.setattr(FAST_SUMS, "backward" if backward else "forward", fast)
    codes, scale = quantize_rows_fp8(random(256, 3584).abs())
    weight = quantize_fp8_weight(random(512, 3584, seed=1).abs())
    exact = (codes.double() * scale) @ (weight.codes.double() * weight.scale[:, None]).t()
    y = fp8_product(codes, scale, weight.codes, weight.scale, None, torch.bfloat16, backward=backward)
    error = float((y.double() - exact).norm() / exact.norm())
    print({"fast": fast, "backward": backward, "error": error})
    assert error < (0.08 if fast else 0.005)


@pytest.mark.parametrize("double", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (77, 192), (1000, 3584), (33, 200)])
def test_nf4_to_fp8_equals_the_reference(shape: tuple[int, int], transposed: bool, double: bool) -> None:
    parts = [quantize_nf4(random(*shape, dtype=torch.bfloat16), double), quantize_nf4(random(5, shape[1]), double)]
    scale = nf4_row_scales(parts)
    made = nf4_to_fp8(parts, transposed)
    assert torch.equal(made.scale, scale)
    assert same(made.codes, nf4_to_fp8_reference(parts, scale, transposed))


@pytest.mark.parametrize("kind", ["fp8", "nf4"])
def test_linears_are_near_their_dequantised_weight(kind: str) -> None:
    torch.manual_seed(0)
    dense = Linear(512, {"q_proj": 512, "k_proj": 128, "v_proj": 128}, True).cuda().to(torch.bfloat16)
    torch.nn.init.normal_(dense.weight, std=0.02)
    made: Any = quantised_fp8(dense) if kind == "fp8" else quantised(dense, True)
    set_compute(made, "fp8")
    x = random(100, 512, dtype=torch.bfloat16).requires_grad_()
    y = made(x)
    g = random(100, 768, dtype=torch.bfloat16, seed=3)
    (dx,) = torch.autograd.grad(y, x, g)
    weight = made.weight(torch.float32)
    for found, exact in ((y, x.float() @ weight.t() + dense.bias.float()), (dx, g.float() @ weight)):  # type: ignore[union-attr]
        assert (found.float() - exact).norm() / exact.norm() < 0.05


def test_the_backward_pass_holds_one_copy_of_the_codes() -> None:
    """The transposed codes are scratch: freed when the product is done."""
    made = quantised_fp8(Linear(4096, {"up_proj": 8192}, False).cuda().to(torch.bfloat16))
    x = random(64, 4096, dtype=torch.bfloat16).requires_grad_()
    made(x).sum().backward()
    torch.cuda.synchronize()
    held = torch.cuda.memory_allocated()
    x.grad = None
    y = made(x)
    assert torch.cuda.memory_allocated() - held < 8 * 2**20
    y.sum().backward()
    assert torch.cuda.memory_allocated() - held < 8 * 2**20


@pytest.mark.parametrize(
    ("method", "plain"), [({"base": "fp8"}, {}), ({"kind": "qlora", "fp8_compute": True}, {"kind": "qlora"})]
)
def test_training_follows_bfloat16(method: dict[str, Any], plain: dict[str, Any]) -> None:
    def losses(chosen: dict[str, Any]) -> list[float]:
        recipe = {
            "model": {"path": "builtin:tiny", "device": "cuda"},
            "method": {"rank": 8, **chosen},
            "data": {"train": ["builtin:shop"], "max_rows": 64, "max_length": 256, "workers": 0},
            "train": {"max_steps": 20, "micro_batch_tokens": 1024, "learning_rate": 1e-3},
        }
        session = build_session(recipe_from_mapping(recipe))
        found = [session.step().loss for _ in range(20)]
        session.close()
        return found

    mine, theirs = losses(method), losses(plain)
    assert mine[0] == pytest.approx(theirs[0], rel=0.01)
    assert sum(mine[-5:]) == pytest.approx(sum(theirs[-5:]), rel=0.03)
    assert sum(mine[-5:]) < 0.8 * sum(mine[:5])
