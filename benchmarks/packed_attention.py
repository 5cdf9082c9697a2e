"""Attention kernels of training on packed documents, each measured: `python benchmarks/packed_attention.py`, on a GPU.

    --heads 28x4x128       query heads x key heads x head dim (Qwen2.5-7B's)
    --tokens 8192          of a pack
    --flex                 torch's FlexAttention too, which is compiled first

Packs of one length, of few long documents, of many short ones, and within a window of 1,024; one JSON line each:
milliseconds of a forward and backward pass by every kernel that is right for it, and which one training would take.
`seconds` is the whole time that choosing took, compiling included.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from typing import Any, cast

import torch

from tunesmith.arch import ModelConfig
from tunesmith.model.attention import PackedAttention
from tunesmith.model.attention_choice import choices, offer
from tunesmith.model.packed import packed

WINDOW = 1024


class Heads:
    """All that attention reads of a configuration."""

    def __init__(self, reach: int | None) -> None:
        self.reach = reach

    def window(self, _layer: int) -> int | None:
        """The window of every layer."""
        return self.reach


def packs(num_tokens: int) -> dict[str, tuple[tuple[int, ...], int | None]]:
    """Document lengths and window by name."""
    draw = random.Random(0)

    def uneven(low: int, high: int) -> tuple[int, ...]:
        lengths: list[int] = []
        while (left := num_tokens - sum(lengths)) > high:
            lengths.append(draw.randint(low, high))
        return (*lengths, left)

    even = (num_tokens // 4,) * 4
    return {
        "four of one length": (even, None),
        "long, uneven": (uneven(num_tokens // 8, num_tokens // 3), None),
        "short, uneven": (uneven(50, 570), None),
        "long, uneven, window": (uneven(num_tokens // 8, num_tokens // 3), WINDOW),
        "one": ((num_tokens,), None),
    }


def measured(lengths: tuple[int, ...], window: int | None, heads: tuple[int, int, int]) -> dict[str, Any]:
    """What training would choose for a pack, and the times of all that it chose from."""
    num_tokens, device = sum(lengths), torch.device("cuda")
    query, key, value = (
        torch.randn(num_tokens, count, heads[2], device=device, dtype=torch.bfloat16)
        for count in (heads[0], heads[1], heads[1])
    )
    tokens = torch.zeros(num_tokens, dtype=torch.int64, device=device)
    known = len(choices())
    attend = PackedAttention(cast(ModelConfig, Heads(window)), packed(tokens, lengths))
    began = time.perf_counter()
    attend[0](query, key, value)
    torch.cuda.synchronize()
    seconds = time.perf_counter() - began
    new = choices()[known:]
    return {**(new[0] if new else {}), "documents": len(lengths), "seconds": round(seconds, 2)}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--heads", default="28x4x128")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--flex", action="store_true")
    asked = parser.parse_args()
    heads = cast("tuple[int, int, int]", tuple(map(int, asked.heads.split("x"))))
    offer("flex", asked.flex)
    for name, (lengths, window) in packs(asked.tokens).items():
        print(json.dumps({"pack": name, **measured(lengths, window, heads)}), flush=True)


if __name__ == "__main__":
    main()
