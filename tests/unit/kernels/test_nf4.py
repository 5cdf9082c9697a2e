"""The NF4 codec on its own; bit-exactness with bitsandbytes is in tests/parity/test_nf4.py."""

from __future__ import annotations

import sys
from collections.abc import Callable

import pytest
import torch

from tunesmith.formats import FORMATS
from tunesmith.kernels import nf4
from tunesmith.kernels.codebooks import dynamic_values, midpoints, nf4_values
from tunesmith.kernels.nf4 import NF4Weight, dequantize_nf4, dequantize_reference, empty_nf4, quantize_nf4

CPU = torch.device("cpu")


def test_values_are_symmetric_in_range_and_contain_zero() -> None:
    values = nf4_values(CPU)
    assert len(values) == 16
    assert (values[0], values[7], values[15]) == (-1, 0, 1)
    assert torch.equal(values.sort().values, values)
    # Appendix E of the paper prints them; this one with 16 digits.
    assert float(values[1]) == -0.6961928009986877
    dynamic = dynamic_values(CPU)
    assert len(dynamic.unique()) == 256
    assert dynamic.max() == 1
    assert dynamic.min() == pytest.approx(-0.9930, abs=1e-4)
    assert dynamic_values(CPU, False).min() == 0


def test_every_value_of_the_table_comes_back_exactly() -> None:
    """Two blocks: the table, scaled by the largest, four times over."""
    weight = torch.cat([nf4_values(CPU).repeat(4) * 3.0, nf4_values(CPU).repeat(4) * 0.25]).view(2, 64)
    quantised = quantize_nf4(weight, double=False)
    assert torch.equal(quantised.scales, torch.tensor([3.0, 0.25]))
    assert quantised.codes.view(-1)[:2].tolist() == [0x01, 0x23]
    assert torch.equal(dequantize_nf4(quantised), weight)


def test_halfway_goes_to_the_lower_code() -> None:
    values = nf4_values(CPU)
    weight = torch.zeros(1, 64)
    weight[0, :15] = midpoints(values)
    weight[0, 63] = 1.0
    codes = quantize_nf4(weight, double=False).codes.view(-1)
    unpacked = torch.stack((codes >> 4, codes & 15), 1).view(-1)
    assert unpacked[:15].tolist() == list(range(15))
    weight[0, :15] = torch.nextafter(midpoints(values), torch.tensor(2.0))
    codes = quantize_nf4(weight, double=False).codes.view(-1)
    assert torch.stack((codes >> 4, codes & 15), 1).view(-1)[:15].tolist() == list(range(1, 16))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (7, 64), (5, 130), (129, 65)])
@pytest.mark.parametrize("double", [False, True])
def test_error_is_bounded_by_the_widest_gap(shape: tuple[int, int], double: bool) -> None:
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    quantised = quantize_nf4(weight, double)
    error = (dequantize_reference(quantised) - weight).abs().view(-1)
    gap = float(nf4_values(CPU).diff().max()) / 2
    scales = nf4.plain_scales(quantize_nf4(weight, False)).repeat_interleave(64)[: error.numel()]
    # Doubly quantised scales are off by at most half the widest gap of the dynamic map around their mean.
    slack = 0.02 * float(scales.max()) if double else 1e-6
    assert bool((error <= gap * scales + slack).all())


def test_zero_blocks_stay_zero() -> None:
    weight = torch.zeros(4, 64)
    weight[2] = 1.0
    for double in (False, True):
        restored = dequantize_nf4(quantize_nf4(weight, double))
        assert torch.isfinite(restored).all()
        assert restored[[0, 1, 3]].abs().max() < (1e-6 if not double else 0.02)
    assert torch.equal(dequantize_nf4(quantize_nf4(torch.zeros(2, 96), True)), torch.zeros(2, 96))


def test_chunks_do_not_change_the_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 77, generator=torch.Generator().manual_seed(1))
    whole = quantize_nf4(weight, True)
    monkeypatch.setattr(nf4, "CHUNK", 128)
    pieces = quantize_nf4(weight, True)
    for field in ("codes", "scales", "scale_scales", "offset"):
        assert torch.equal(getattr(whole, field), getattr(pieces, field))


def test_a_transposed_view_is_quantised_in_its_own_order() -> None:
    weight = torch.randn(64, 48, generator=torch.Generator().manual_seed(2))
    assert torch.equal(quantize_nf4(weight.t()).codes, quantize_nf4(weight.t().contiguous()).codes)


def test_dtype_of_the_source_is_passed_through() -> None:
    """A bfloat16 weight dequantises to bfloat16 values also in float32, as bitsandbytes does."""
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(3)).bfloat16()
    quantised = quantize_nf4(weight, False)
    wide = dequantize_nf4(quantised, torch.float32)
    assert torch.equal(wide, dequantize_nf4(quantised).float())
    assert dequantize_nf4(quantised).dtype == torch.bfloat16


@pytest.mark.parametrize(("name", "double"), [("nf4", False), ("nf4-double", True)])
@pytest.mark.parametrize("shape", [(64, 64), (100, 256), (3, 5)])
def test_bytes_are_those_of_the_format(name: str, double: bool, shape: tuple[int, int]) -> None:
    weight = quantize_nf4(torch.ones(shape), double)
    assert weight.num_bytes == FORMATS[name].bytes_for(shape[0] * shape[1])
    assert empty_nf4(shape, torch.float32, double, "meta").num_bytes == weight.num_bytes


def test_several_weights_come_out_below_each_other() -> None:
    parts = [quantize_nf4(torch.randn(rows, 64), True) for rows in (5, 3)]
    whole = dequantize_nf4(parts, torch.bfloat16)
    assert torch.equal(whole, torch.cat([dequantize_nf4(part, torch.bfloat16) for part in parts]))


def test_missing_triton_is_said_once(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    nf4._has_triton.cache_clear()
    assert not nf4.use_kernel(torch.device("cuda"))
    assert not nf4.use_kernel(torch.device("cuda"))
    assert [record.message.split(":")[0] for record in caplog.records] == ["triton is not installed"]
    nf4._has_triton.cache_clear()


KERNEL = """
import sys
import torch
from tunesmith.kernels.nf4 import dequantize_reference, quantize_nf4
from tunesmith.kernels.nf4_triton import dequantize_operator, dequantize_parts

generator = torch.Generator().manual_seed(0)
float32, float16, bfloat16 = torch.float32, torch.float16, torch.bfloat16
cases = [(float32, float32, False), (float32, float32, True), (float32, bfloat16, True), (float16, float16, True),
         (bfloat16, bfloat16, False), (bfloat16, float32, True)]
for source, out, double in cases:
    parts = [quantize_nf4(torch.randn(f, 96, generator=generator).to(source), double) for f in (37, 3, 22, 2)]
    truth = torch.cat([dequantize_reference(part, out) for part in parts])
    mine = dequantize_parts(parts, out)
    assert mine.dtype == out and mine.shape == truth.shape
    # The interpreter cuts bfloat16 off where a GPU rounds it: one unit in the last place.
    if bfloat16 in (source, out):
        assert torch.allclose(mine.float(), truth.float(), rtol=2**-7, atol=0), (source, out, double)
    else:
        assert torch.equal(mine, truth), (source, out, double)
for columns in (64, 96):  # whole blocks are read four bytes at a time
    whole = [quantize_nf4(torch.randn(f, columns, generator=generator), double) for f in (34, 2, 60, 4)]
    assert torch.equal(dequantize_parts(whole, float32), torch.cat([dequantize_reference(p, float32) for p in whole]))
# Whole blocks, but a row of 12 is no whole number of words: taken for words, they were an error of torch's view.
narrow = quantize_nf4(torch.randn(16, 12, generator=generator), True)
assert torch.equal(dequantize_parts([narrow], float32), dequantize_reference(narrow, float32))
odd = quantize_nf4(torch.randn(5, 5, generator=generator), True)
assert torch.equal(dequantize_parts([odd], torch.float32), dequantize_reference(odd, torch.float32))
arguments = ([odd.codes], [odd.scales], [odd.scale_scales], [odd.offset], [5], 5, float32, float16)
torch.library.opcheck(dequantize_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


def test_meta_weights_have_a_shape_and_no_storage() -> None:
    weight = empty_nf4((8, 128), torch.bfloat16, True, "meta")
    restored = dequantize_nf4(weight)
    assert isinstance(weight, NF4Weight)
    assert restored.shape == (8, 128)
    assert restored.is_meta
