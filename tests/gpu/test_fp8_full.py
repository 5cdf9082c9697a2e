"""Full fine-tuning with fp8 products on a GPU: kernels, the three products, graphs, training beside bfloat16."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.kernels.fp8 import has_fp8
from tunesmith.kernels.fp8_columns import quantize_columns_fp8, quantize_columns_reference
from tunesmith.model.layers import Linear
from tunesmith.model.trained_fp8 import TrainedFp8Linear
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.train.session import build_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_fp8("cuda")), reason="needs a GPU with fp8 products (sm_89 or newer)"
    ),
]
FULL_IN_FP8 = {"kind": "full", "fp8_compute": True}


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype).cuda()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("shape", [(1, 48), (17, 200), (200, 257), (1000, 3584), (4096, 96)])
def test_columns_are_quantised_as_by_the_reference(shape: tuple[int, int], dtype: torch.dtype) -> None:
    x = random(*shape, dtype=dtype)
    (codes, scale), (expected, expected_scale) = quantize_columns_fp8(x), quantize_columns_reference(x)
    assert torch.equal(scale, expected_scale)
    assert torch.equal(codes.view(torch.uint8), expected.view(torch.uint8))


def test_a_column_with_nan_is_nan() -> None:
    x = random(300, 64)
    x[257, 9] = float("nan")
    codes, scale = quantize_columns_fp8(x)
    assert scale.isnan().nonzero().tolist() == [[9, 0]]
    assert codes[9].float().isnan().all()


@pytest.mark.parametrize("num_tokens", [16, 100, 4096])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_three_products_are_near_the_exact_ones(num_tokens: int, weight_dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    dense = Linear(512, {"gate_proj": 768, "up_proj": 768}, True).cuda()
    torch.nn.init.normal_(dense.weight, std=0.02)
    made = TrainedFp8Linear(dense.to(weight_dtype))
    x, g = random(num_tokens, 512, dtype=torch.bfloat16).requires_grad_(), random(num_tokens, 1536, seed=1)
    y = made(x)
    y.backward(g.to(y.dtype))
    assert x.grad is not None
    assert made.weight.grad is not None
    assert made.bias is not None
    wide, weight = x.detach().float(), made.weight.detach().float()
    pairs = (
        (y, wide @ weight.t() + made.bias.float()),
        (x.grad, g @ weight),
        (made.weight.grad, g.t() @ wide),
    )
    for found, exact in pairs:
        assert (found.float() - exact).norm() / exact.norm() < 0.05


def losses(method: dict[str, Any], steps: int = 20, **train: Any) -> list[float]:
    recipe = {
        "model": {"path": "builtin:tiny", "device": "cuda"},
        "method": method,
        "data": {"train": ["builtin:shop"], "max_rows": 64, "max_length": 256, "workers": 0},
        "train": {"max_steps": 20, "micro_batch_tokens": 1024, "learning_rate": 1e-3, **train},
    }
    session = build_session(recipe_from_mapping(recipe))
    found = [session.step().loss for _ in range(steps)]
    session.close()
    return found


def test_training_follows_bfloat16() -> None:
    mine, theirs = losses(FULL_IN_FP8), losses({"kind": "full"})
    assert mine[0] != theirs[0]
    assert mine[0] == pytest.approx(theirs[0], rel=0.01)
    assert sum(mine[-5:]) == pytest.approx(sum(theirs[-5:]), rel=0.03)
    assert sum(mine[-5:]) < 0.8 * sum(mine[:5])


def test_graphs_and_checkpointing_train_alike() -> None:
    expected = losses(FULL_IN_FP8, 6, graphs="off")
    for train in ({"graphs": "auto"}, {"checkpointing": "block"}, {"checkpointing": "selective"}, {"blocks": "eager"}):
        assert losses(FULL_IN_FP8, 6, **train) == pytest.approx(expected, rel=0.01), train
