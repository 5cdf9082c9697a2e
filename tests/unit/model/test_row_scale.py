"""DoRA's norms and ratios without W + scale B A, against those made from it."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.quant import quantised_as
from tunesmith.model.row_scale import RowScale, refresh_ratios

PARTS = {"q_proj": 16, "k_proj": 8, "v_proj": 8}


def adapted(targets: tuple[str, ...] = tuple(PARTS), quantisation: Any = None) -> AdaptedLinear:
    torch.manual_seed(0)
    base = Linear(64, PARTS, bias=False)
    torch.nn.init.normal_(base.weight)
    held = base if quantisation is None else quantised_as(base, quantisation)
    linear = AdaptedLinear(held, PARTS, {part: AdapterOptions(4, 8, dora=True) for part in targets})
    for part in targets:
        adapter = linear.adapter(part)
        torch.nn.init.normal_(adapter.A)
        torch.nn.init.normal_(adapter.B)
    return linear


@pytest.mark.parametrize("quantisation", [None, "nf4", "nf4-double", "fp8"])
@pytest.mark.parametrize("targets", [tuple(PARTS), ("q_proj", "v_proj"), ("k_proj",)])
def test_ratios_are_the_eager_ones(targets: tuple[str, ...], quantisation: Any) -> None:
    linear = adapted(targets, quantisation)
    rows = RowScale(linear, torch.float32)
    rows.measure()
    refresh_ratios([rows])
    expected = linear._ratio(*linear._fused_adapters(torch.float32))
    torch.testing.assert_close(rows.ratio_F, expected.detach(), rtol=1e-5, atol=1e-6)


def test_ratios_begin_at_one_and_follow_magnitudes_without_measuring() -> None:
    linear = adapted(("q_proj",))
    rows = RowScale(linear, torch.float32)
    refresh_ratios([rows])
    torch.testing.assert_close(rows.ratio_F, torch.ones(32))
    (magnitude,) = rows.magnitudes
    with torch.no_grad():
        magnitude.mul_(3)
    refresh_ratios([rows])
    torch.testing.assert_close(rows.ratio_F[:16], torch.full((16,), 3.0))
    torch.testing.assert_close(rows.ratio_F[16:], torch.ones(16))


def test_a_row_that_cancels_out_has_a_positive_norm() -> None:
    linear = adapted(("k_proj",))
    adapter = linear.adapter("k_proj")
    with torch.no_grad():
        assert isinstance(linear.base, Linear)
        linear.base.part_weight("k_proj").copy_(-2 * adapter.B @ adapter.A)
    rows = RowScale(linear, torch.float32)
    rows.measure()
    assert bool((rows.norm_F > 0).all())
    assert bool(rows.norm_F.isfinite().all())


def test_bfloat16_is_close() -> None:
    linear = adapted()
    exact, rough = RowScale(linear, torch.float32), RowScale(linear, torch.bfloat16)
    for rows in (exact, rough):
        rows.measure()
    refresh_ratios([exact, rough])
    assert rough.ratio_F.dtype == torch.bfloat16
    torch.testing.assert_close(rough.ratio_F.float(), exact.ratio_F, rtol=2e-2, atol=0)
    torch.testing.assert_close(rough.norm_F, exact.norm_F, rtol=5e-3, atol=0)
