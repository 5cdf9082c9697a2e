"""A copy of the head: the codes are those of the stored one, which stays; where it fits and where it can't be used."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tunesmith.checkpoint.foreseen import foreseen_for_inference
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.names import tensor_names
from tunesmith.kernels.chip import Chip, foreseeing
from tunesmith.kernels.gemv import MOST_TOKENS
from tunesmith.kernels.int8 import quantize_int8
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.warm_up import taken_down
from tunesmith.model.decode_linears import hold_head_in_int8
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import copied_logits, copy_head, keeps_share, lacks_for_copy
from tunesmith.model.int8 import Int8Linear

ROOT = Path(__file__).parents[3]
H200 = Chip((9, 0), 132)


def load(directory: Path, dtype: torch.dtype = torch.bfloat16) -> Decoder:
    return load_decoder(directory, device="cpu", dtype=dtype).eval()


@pytest.mark.parametrize("tied", [False, True])
def test_the_stored_head_stays(tied: bool, tiny_model_dir: Callable[..., Path]) -> None:
    decoder = load(tiny_model_dir("qwen2", tie_word_embeddings=tied))
    decoder.requires_grad_(False)
    hidden_TD = torch.randn(3, 32).bfloat16()
    before, names = decoder.logits(hidden_TD), list(tensor_names(decoder))
    copy_head(decoder)
    copy = cast(Int8Linear, decoder.head_copy)
    weight = decoder.embedding.weight if decoder.head is None else decoder.head.weight
    held = quantize_int8(weight.detach())
    assert torch.equal(copy.codes, held.codes) and torch.equal(copy.scale, held.scale)
    assert torch.equal(decoder.logits(hidden_TD), before)
    assert list(tensor_names(decoder)) == names  # it is no tensor of a checkpoint
    assert not any(parameter.requires_grad for parameter in copy.parameters())
    close = copied_logits(copy, hidden_TD).float() - before.float()
    assert 0 < float(close.norm() / before.float().norm()) < 0.02


@pytest.mark.parametrize("rows", [1, MOST_TOKENS["int8"], MOST_TOKENS["int8"] + 1, 200])
def test_no_product_has_more_rows_than_the_kernel(rows: int) -> None:
    seen: list[int] = []

    class Copy(torch.nn.Module):
        def forward(self, x_TD: torch.Tensor) -> torch.Tensor:
            seen.append(len(x_TD))
            return x_TD * 2

    hidden_TD = torch.randn(rows, 4)
    assert torch.equal(copied_logits(Copy(), hidden_TD), hidden_TD * 2)
    assert sum(seen) == rows and max(seen) <= MOST_TOKENS["int8"]


def foreseen(quantize: str | None, config: str = "qwen2.5-7b") -> tuple[Decoder, int]:
    directory = ROOT / "recipes" / "configs" / config
    with foreseeing(H200), kernels_on("meta"), taken_down():
        decoder = foreseen_for_inference(
            directory, quantize=quantize, dtype=torch.bfloat16, weights="random", head="stored"
        )
    return decoder, json.loads((directory / "config.json").read_text(encoding="utf-8"))["num_hidden_layers"]


@pytest.mark.parametrize(
    ("config", "quantize", "keeps"),
    [
        ("qwen2.5-7b", "fp8", True),  # 57.2 % are 60.8
        ("qwen2.5-7b", "int8", True),
        ("qwen2.5-7b", "int4", False),  # 36.7 % would be 40.3
        ("qwen2.5-7b", "int4-sym", True),  # 36.4 % are 39.99
        ("llama-3.1-8b", "int4", True),
        ("qwen3-0.6b", "int4", True),  # more than 40 % with and without
    ],
)
def test_a_copy_takes_no_model_across_the_limit(config: str, quantize: str, keeps: bool) -> None:
    pytest.importorskip("triton")
    decoder, num_layers = foreseen(quantize, config)
    assert keeps_share(decoder, num_layers) is keeps


def test_what_it_takes_is_counted_of_the_whole_model() -> None:
    """Qwen2.5-7B in int4: bytes of all 28 blocks, though three are looked at."""
    pytest.importorskip("triton")
    decoder, num_layers = foreseen("int4")
    assert not keeps_share(decoder, num_layers)
    assert keeps_share(decoder, 3)  # of so few blocks more than the limit is embedding and head
    assert keeps_share(decoder, 200)


def test_where_it_can_not_be_used_is_said(tiny_model_dir: Callable[..., Path]) -> None:
    directory = tiny_model_dir("qwen2")
    assert "wants a GPU" in str(lacks_for_copy(load(directory)))
    with kernels_on("cpu"):
        if pytest.importorskip("triton"):
            assert lacks_for_copy(load(directory)) is None
        assert "float32 [272, 32]" in str(lacks_for_copy(load(directory, torch.float32)))
        assert "columns at once" in str(lacks_for_copy(load(tiny_model_dir("qwen2", hidden_size=24))))
        held: Any = load(directory)
        hold_head_in_int8(held)
        assert "quantised already" in str(lacks_for_copy(held))
