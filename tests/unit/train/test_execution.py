"""What run.json says of how the blocks ran."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.captured import CapturedBlocks
from tunesmith.train.execution import execution_facts, execution_line

Make = Callable[..., Path]


@pytest.mark.parametrize(("family", "whole"), [("llama", 2), ("qwen3", 2), ("qwen3_moe", 0), ("gpt2", 0)])
def test_blocks_that_are_written_out_are_counted(family: str, whole: int, tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir(family))
    assert execution_facts(decoder)["fused_blocks"] == 0
    assert execution_line(execution_facts(decoder)) is None
    decoder.is_fused = True
    facts = execution_facts(decoder)
    assert (facts["blocks"], facts["fused_blocks"]) == (2, whole)
    line = execution_line(facts)
    assert (line or "").startswith("2 of the model's 2 blocks ran on tunesmith's own faster passes" if whole else "")


@pytest.mark.parametrize(
    ("family", "fused", "had"),
    [
        ("llama", True, {"selective-qkv": 1, "none": 1}),
        ("llama", False, {"selective": 1, "none": 1}),
        ("qwen3_moe", True, {"selective": 1, "none": 1}),
        ("gpt2", True, {"selective": 1, "none": 1}),
    ],
)
def test_what_was_had_of_checkpointing_is_kept(
    family: str, fused: bool, had: dict[str, int], tiny_model_dir: Make
) -> None:
    """Blocks that can't remake query, key and value were `selective` without a word."""
    decoder = load_decoder(tiny_model_dir(family))
    decoder.is_fused, decoder.checkpointing, decoder.skip_last = fused, "selective-qkv", 1
    assert execution_facts(decoder)["checkpointing"] == had


def test_refused_graphs_are_said(tiny_model_dir: Make) -> None:
    decoder = load_decoder(tiny_model_dir("llama"))
    decoder.is_fused, decoder.captured = True, CapturedBlocks()
    decoder.captured.refused = "operation not permitted when stream is capturing"
    line = execution_line(execution_facts(decoder))
    assert line is not None
    assert line.endswith("not recorded as CUDA graphs: operation not permitted when stream is capturing")
