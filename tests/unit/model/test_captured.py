"""What a pair of CUDA graphs is recorded for; the recording itself needs a GPU (tests/gpu/test_captured.py)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.captured import CapturedBlocks, Signature
from tunesmith.model.packed import PackedTokens, pack_documents

Make = Callable[..., Path]


def _pack(lengths: list[int]) -> PackedTokens:
    return pack_documents([[1] * length for length in lengths])


def _signature(lengths: list[int], kind: str = "none") -> Signature:
    return Signature.of(torch.zeros(sum(lengths), 4), _pack(lengths), kind)


@pytest.mark.parametrize(
    ("lengths", "same_as"),
    [([30, 34], [33, 31]), ([10, 20, 34], [20, 8, 33, 3]), ([33, 1, 30], [40, 8, 15, 1])],
)
def test_uneven_packs_share_graphs_by_their_bounds(lengths: list[int], same_as: list[int]) -> None:
    assert _signature(lengths) == _signature(same_as)
    assert _signature(lengths).lengths == ()


def test_even_packs_have_graphs_of_their_own() -> None:
    assert _signature([32, 32]).lengths == (32, 32)
    assert _signature([32, 32]) != _signature([31, 33])
    assert _signature([32, 32]) != _signature([16] * 4)


def test_bounds_hold_every_pack_of_the_signature() -> None:
    signature = _signature([5] * 12 + [4])
    assert signature.num_documents == 16
    assert signature.max_length == 8
    assert _signature([1] * 3 + [61]).max_length == 64
    assert _signature([1, 36]).max_length == 37  # never longer than the pack


def test_what_else_a_graph_depends_on() -> None:
    assert _signature([32, 32], "block") != _signature([32, 32])
    pack, hidden = _pack([32, 32]), torch.zeros(64, 4)
    assert Signature.of(hidden.clone().requires_grad_(), pack, "none") != Signature.of(hidden, pack, "none")
    assert Signature.of(hidden.bfloat16(), pack, "none") != Signature.of(hidden, pack, "none")


def test_a_cpu_has_no_graphs(tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir("llama")).train()
    decoder.is_fused, decoder.captured = True, CapturedBlocks()
    assert decoder.hidden(_pack([5, 6])).requires_grad
    assert decoder.captured.num_graphs == 0
