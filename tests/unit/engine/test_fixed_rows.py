"""Products in groups of rows: the same values, and the same bits wherever a row stands."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.fixed_rows import FixedRows, fix_experts, fix_rows, in_groups
from tunesmith.model.language_model import logits
from tunesmith.model.layers import Linear


@pytest.mark.parametrize("num", [1, 7, 8, 9, 40])
def test_a_row_is_the_same_bits_in_any_company(num: int) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = Linear(48, {"a": 30, "b": 25}, bias=True).requires_grad_(False)
    linear.weight.normal_(generator=generator)
    x = torch.randn(num, 48, generator=generator)
    fixed = FixedRows(linear, 8)
    whole = fixed(x)
    torch.testing.assert_close(whole, linear(x))
    assert whole.shape == (num, 55) and fixed.parts == linear.parts
    for row in range(num):
        assert torch.equal(fixed(x[row : row + 1])[0], whole[row])
    assert torch.equal(in_groups(linear, x.flip(0), 8).flip(0), whole)


@pytest.mark.parametrize("family", ["qwen2", "gpt2"])
def test_a_decoder_with_fixed_rows_says_the_same(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    model = load_decoder(tiny_model_dir(family), dtype=torch.float32).eval()
    ids = [list(range(40))]
    expected = logits(model, ids)[0]
    assert fix_rows(model.blocks, 16) == 8, "four in each of two blocks"
    assert fix_rows(model.blocks, 16) == 0, "once"
    torch.testing.assert_close(logits(model, ids)[0], expected, atol=1e-5, rtol=1e-5)


def test_an_experts_row_is_the_same_bits_whoever_else_it_gets(tiny_model_dir: Callable[..., Path]) -> None:
    """The router sends an expert any number of a pass's rows."""
    model = load_decoder(tiny_model_dir("mixtral", initializer_range=0.2), dtype=torch.float32).eval()
    mixture = model.blocks[0].mlp  # type: ignore[union-attr]
    x = torch.randn(16, 32, generator=torch.Generator().manual_seed(0))
    plain = mixture(x)  # type: ignore[operator]
    assert fix_experts(model.blocks, 16) == 2 * 4 * 2, "two linears of four experts in each of two blocks"
    whole = mixture(x)  # type: ignore[operator]
    torch.testing.assert_close(whole, plain)
    for row in range(16):
        others = torch.randn(16, 32, generator=torch.Generator().manual_seed(row))
        others[3] = x[row]
        assert torch.equal(mixture(others)[3], whole[row])  # type: ignore[operator]


def test_adapters_stay_on_top(tiny_model_dir: Callable[..., Path]) -> None:
    from tunesmith.engine.adapters import AdapterPool

    model = load_decoder(tiny_model_dir("qwen2"), dtype=torch.float32).eval()
    pool = AdapterPool(model, 2, 8, invariant=True)
    assert fix_rows(model.blocks, 16) == 8
    attention = model.blocks[0].attention  # type: ignore[union-attr]
    assert isinstance(attention.qkv.base, FixedRows)  # type: ignore[union-attr]
    pool.close()
    assert isinstance(attention.qkv, FixedRows)  # type: ignore[union-attr]
