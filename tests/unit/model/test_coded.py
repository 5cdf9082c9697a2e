"""Codes that travel with a tensor: handed over once, only as long as they are the tensor's."""

from __future__ import annotations

import torch
from torch import Tensor

from tunesmith.kernels.fp8 import quantize_rows_fp8
from tunesmith.model.coded import hand_over, row_codes


def matrix() -> Tensor:
    return torch.randn(3, 16, generator=torch.Generator().manual_seed(0))


def same(mine: tuple[Tensor, Tensor], theirs: tuple[Tensor, Tensor]) -> bool:
    return all(torch.equal(a.float(), b.float()) for a, b in zip(mine, theirs, strict=True))


def test_what_is_handed_over_is_taken_once() -> None:
    x = matrix()
    codes = quantize_rows_fp8(torch.zeros(3, 16))
    hand_over(x, codes)
    assert row_codes(x.flatten(0, -2))[0] is codes[0]
    assert same(row_codes(x), quantize_rows_fp8(x))


def test_a_tensor_written_to_since_is_quantised_anew() -> None:
    x = matrix()
    hand_over(x, quantize_rows_fp8(x))
    x.mul_(2)
    x[0] += 1
    assert same(row_codes(x), quantize_rows_fp8(x))


def test_codes_belong_to_what_was_folded_in() -> None:
    x, fold = matrix(), torch.rand(16)
    hand_over(x, quantize_rows_fp8(x))
    assert same(row_codes(x, fold), quantize_rows_fp8(x, fold))
    codes = quantize_rows_fp8(x, fold)
    hand_over(x, codes, fold)
    assert row_codes(x, fold)[0] is codes[0]


def test_views_and_inference_tensors_are_quantised() -> None:
    x = matrix()
    hand_over(x, quantize_rows_fp8(torch.zeros(3, 16)))
    assert same(row_codes(x[1:]), quantize_rows_fp8(x[1:]))
    with torch.inference_mode():
        other = matrix()
        assert same(row_codes(other), quantize_rows_fp8(other))
