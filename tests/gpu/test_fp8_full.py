"""Full fine-tuning with fp8 products on a GPU: kernels, products, gradients, graphs, training beside bfloat16.

Rounding to fp8 makes training chaotic: a difference of one last bit in bfloat16 moves a value across the edge between
two codes, sixteen times as far apart, and after a few blocks two ways of running that differ in a bit anywhere differ
as two independent roundings do. So gradients are compared after one pass from the same weights, and courses of losses
only in the mean of several.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.source import resolve_model
from tunesmith.kernels.fp8 import has_fp8
from tunesmith.kernels.fp8_columns import quantize_columns_fp8, quantize_columns_reference
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import inner_blocks
from tunesmith.model.layers import Linear
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.model.trained_fp8 import TrainedFp8Linear
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.recipe.schema import MethodSection
from tunesmith.train.session import build_session

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (torch.cuda.is_available() and has_fp8("cuda")), reason="needs a GPU with fp8 products (sm_89 or newer)"
    ),
]
DEVICE = "cuda"
FULL_IN_FP8: dict[str, Any] = {"kind": "full", "fp8_compute": True}
# Three bits of mantissa: uniform in a step of 2^-3, relative to 1 to 2, 2.6 % at the root mean square. A product of
# two rounded operands is off by sqrt(2) of that, where neither its terms nor their errors have a common sign.
OPERAND_ERROR = 0.026
PRODUCT_ERROR = math.sqrt(2) * OPERAND_ERROR
# What ways of running with the same kernels may differ by, as a share of what fp8 differs from bfloat16 by.
ALIKE = 0.1
WAYS: dict[str, dict[str, Any]] = {
    "graphs": {"is_captured": True},
    "block": {"checkpointing": "block"},
    "selective": {"checkpointing": "selective"},
    "graphs and block": {"is_captured": True, "checkpointing": "block"},
    "graphs and selective": {"is_captured": True, "checkpointing": "selective"},
}


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


def decoder(
    method: dict[str, Any] = FULL_IN_FP8,
    *,
    is_fused: bool = True,
    checkpointing: Any = "none",
    is_captured: bool = False,
) -> Decoder:
    made = load_decoder(resolve_model("builtin:tiny"), device=DEVICE, dtype=torch.bfloat16).train()
    apply_method(made, MethodSection(**method), seed=3)
    made.is_fused, made.checkpointing = is_fused, checkpointing
    made.captured = CapturedBlocks() if is_captured else None
    return made


def gradients(model: Decoder, seed: int = 0) -> dict[str, Tensor]:
    """The hidden states of a pack and the gradients of every block; documents so short that attention has one order."""
    generator = torch.Generator().manual_seed(seed)
    pack = pack_documents([torch.randint(1, 1000, (64,), generator=generator).tolist() for _ in range(4)], DEVICE)
    model.zero_grad(set_to_none=True)
    hidden = model.hidden(pack)
    (hidden.float() * torch.randn(hidden.shape, generator=generator).to(hidden.device)).sum().backward()
    if model.captured is not None:
        assert model.captured.refused is None
    found = {name: p.grad.float().clone() for name, p in model.blocks.named_parameters() if p.grad is not None}
    return {"hidden": hidden.detach().float().clone(), **found}


def distance(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """Of all the gradients together, relative to theirs."""
    assert mine.keys() == theirs.keys()
    names = [name for name in theirs if name != "hidden"]
    squares = sum(float((mine[name] - theirs[name]).square().sum()) for name in names)
    return math.sqrt(squares / sum(float(theirs[name].square().sum()) for name in names))


def of_hidden(mine: dict[str, Tensor], theirs: dict[str, Tensor]) -> float:
    """The same of the hidden states."""
    return float((mine["hidden"] - theirs["hidden"]).norm() / theirs["hidden"].norm())


def test_gradients_are_bfloat16s_but_for_the_formats_rounding() -> None:
    """Four products a block lead to a gradient forward, four backward, and one makes it. Their errors are independent,
    and the residual stream passes by each: together at most the root of their number times one's. On a CPU, by the
    reference, the gradients are 0.15 off and the bound is 0.21; a wrong scale is off by its factor."""
    model = decoder()
    products = 8 * len(inner_blocks(model.blocks)) + 1
    mine, theirs = gradients(model), gradients(decoder({"kind": "full"}))
    print(distance(mine, theirs), of_hidden(mine, theirs))
    assert OPERAND_ERROR < distance(mine, theirs) < math.sqrt(products) * PRODUCT_ERROR
    assert OPERAND_ERROR / 2 < of_hidden(mine, theirs) < math.sqrt(products // 2) * PRODUCT_ERROR


@pytest.mark.parametrize("way", WAYS)
def test_graphs_and_checkpointing_find_the_same_gradients(way: str) -> None:
    """The same kernels on the same values have the same codes. The second pass is the recording's first replay of
    another micro-batch."""
    model, plain, wide = decoder(**WAYS[way]), decoder(), decoder({"kind": "full"})
    for seed in (0, 1):
        found, expected, exact = gradients(model, seed), gradients(plain, seed), gradients(wide, seed)
        print(distance(found, expected), of_hidden(found, expected))
        assert distance(found, expected) < ALIKE * distance(expected, exact)
        assert of_hidden(found, expected) < ALIKE * of_hidden(expected, exact)
    assert model.captured is None or model.captured.num_graphs == 1


@pytest.mark.parametrize("way", ["none", *WAYS])
def test_weights_are_quantised_anew_after_every_step(way: str) -> None:
    """Gradients after two steps of the optimiser are those of a model that was never anything else: codes or scales of
    weights that are no more, in a recording or elsewhere, would leave them where they were, or in between."""
    model = decoder(**WAYS.get(way, {}))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, fused=True)
    first = gradients(model, 5)
    for seed in (0, 1):
        gradients(model, seed)
        optimizer.step()
    found = gradients(model, 5)
    plain, wide = decoder(), decoder({"kind": "full"})
    plain.load_state_dict(model.state_dict())
    wide.load_state_dict(model.state_dict())
    expected, exact = gradients(plain, 5), gradients(wide, 5)
    print(distance(found, expected), distance(expected, exact), distance(first, expected))
    assert distance(found, expected) < ALIKE * distance(expected, exact)
    assert distance(first, expected) > 3 * distance(expected, exact)


def test_eager_blocks_round_no_worse() -> None:
    """They round to bfloat16 elsewhere than the written-out ones, which moves codes everywhere: two roundings of the
    same values, as large in the mean of several packs. (On a CPU, by the reference, ten packs are 0.140 off bfloat16 in
    the mean written out and 0.141 eager, with scatters of 0.012 and 0.018: the mean of eight is good to 6 %.) What both
    compute is compared without these roundings, in float32, where fp8 is the reference's
    (tests/unit/model/test_trained_fp8.py)."""
    written, operators, wide = decoder(), decoder(is_fused=False), decoder({"kind": "full"})
    fused_off, eager_off, apart = [], [], []
    for seed in range(8):
        fused, eager, exact = gradients(written, seed), gradients(operators, seed), gradients(wide, seed)
        fused_off.append(distance(fused, exact))
        eager_off.append(distance(eager, exact))
        apart.append(distance(eager, fused))
    print(fused_off, eager_off, apart)
    assert sum(eager_off) == pytest.approx(sum(fused_off), rel=0.15)
    assert sum(apart) < math.sqrt(2) * sum(fused_off)


def losses(method: dict[str, Any], seed: int, precision: str = "bfloat16", steps: int = 12) -> list[float]:
    recipe = {
        "model": {"path": "builtin:tiny", "device": DEVICE},
        "method": method,
        "data": {"train": ["builtin:shop"], "max_rows": 256, "max_length": 256, "workers": 0},
        "train": {
            "max_steps": steps,
            "micro_batch_tokens": 1024,
            "learning_rate": 1e-4,
            "seed": seed,
            "precision": precision,
        },
    }
    session = build_session(recipe_from_mapping(recipe))
    found = [session.step().loss for _ in range(steps)]
    session.close()
    return found


def test_training_follows_float32_nearer_than_bfloat16_does() -> None:
    """Four orders of the data, twelve steps each at a learning rate where the loss is still above half of what it was:
    beyond, a text learnt by heart multiplies every difference.

    Weights in fp8 are made from the float32 masters, those of bfloat16 products are rounded to bfloat16: at these steps
    (1e-4, beside weights of a few hundredths) that costs more. On a CPU, by the reference, the sums of the last five
    losses are 1.0 % above float32's in the mean of four orders, bfloat16's 3.5 %, with scatters of 0.4 and 0.6 %.
    """
    ratios: dict[str, list[float]] = {"fp8": [], "bfloat16": []}
    for seed in range(4):
        exact = losses({"kind": "full"}, seed, "float32")
        for name, method in (("fp8", FULL_IN_FP8), ("bfloat16", {"kind": "full"})):
            found = losses(method, seed)
            assert found[0] != exact[0]
            assert found[0] == pytest.approx(exact[0], rel=0.01)
            assert sum(found[-5:]) < 0.8 * sum(found[:5])
            ratios[name].append(sum(found[-5:]) / sum(exact[-5:]))
    print(ratios)
    off = {name: abs(sum(found) / len(found) - 1) for name, found in ratios.items()}
    assert off["fp8"] < 0.02
    assert off["fp8"] < off["bfloat16"]
