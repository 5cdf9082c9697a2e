"""The floor of a training step, from products measured at its shapes: `python benchmarks/step_floor.py RECIPE`

    RECIPE                 as recipes/peers/3b-full.yaml: documents of `data.max_length` fill `train.micro_batch_tokens`
    --bandwidth 4.29e12    bytes per second that the device's memory gives (an H200's)
    --measured 24479       tokens per second that training reached: the last line says what share of the floor that is
    --runs 20              of each product; the median counts
    --device cuda          or cpu, where only the arithmetic is worth reading

One JSON line a product: rows x inner x columns, milliseconds, TFLOP/s, and how often a step takes it. Trained weights
take three products (forward, gradient of the input, gradient of the weight), frozen ones two. The last line adds causal
attention of the documents, forward and backward, by the fastest of torch's kernels, and the bytes of the optimiser:
gradients read for their norm and for the update, weights and both moments read and written. Norms, rope, SwiGLU,
adapters and launches are left out: no step can be faster than this sum.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.source import resolve_model
from tunesmith.cost.shapes import linears
from tunesmith.recipe.load import load_recipe

WARM_UP = 3
KERNELS = (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


class Product(NamedTuple):
    """One matrix product: [rows, inner] by [inner, columns]."""

    rows: int
    inner: int
    columns: int

    @property
    def flops(self) -> int:
        """Operations: a multiplication and an addition are two."""
        return 2 * self.rows * self.inner * self.columns


def products(config: ModelConfig, num_tokens: int, *, is_full: bool) -> Counter[Product]:
    """Every product of a step by how often it is taken; a frozen weight has no gradient."""
    counted: Counter[Product] = Counter()
    weights = [(linear.in_features, linear.out_features, linear.active) for linear in linears(config)]
    for inner, columns, times in [*weights, (config.hidden_size, config.vocab_size, 1)]:
        counted[Product(num_tokens, inner, columns)] += times
        counted[Product(num_tokens, columns, inner)] += times
        counted[Product(inner, num_tokens, columns)] += times * is_full
    return +counted


def optimiser_bytes(config: ModelConfig, weight_bytes: int) -> int:
    """What clipping and AdamW move for all trained weights, of one dtype: two reads of the gradient, six others."""
    weights = sum(linear.in_features * linear.out_features * linear.copies for linear in linears(config))
    embeddings = config.hidden_size * config.vocab_size * (1 if config.tie_word_embeddings else 2)
    return 8 * weight_bytes * (weights + embeddings)


def milliseconds(work: Callable[[], object], device: torch.device, runs: int) -> float:
    """Median time of `work`, between CUDA events where there are any."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(runs):
        if device.type == "cuda":
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            work()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last))
        else:
            began = time.perf_counter()
            work()
            times.append((time.perf_counter() - began) * 1e3)
    return statistics.median(times)


def product_ms(product: Product, device: torch.device, dtype: torch.dtype, runs: int) -> float:
    """Time of a product of random values, the second operand held transposed as weights are."""
    left = torch.randn(product.rows, product.inner, device=device, dtype=dtype)
    right = torch.randn(product.columns, product.inner, device=device, dtype=dtype)
    out = torch.empty(product.rows, product.columns, device=device, dtype=dtype)
    return milliseconds(lambda: torch.mm(left, right.T, out=out), device, runs)


def attention_ms(
    config: ModelConfig, length: int, num_tokens: int, device: torch.device, dtype: torch.dtype, runs: int
) -> float:
    """Forward and backward of one layer's causal attention, by the fastest of torch's kernels that takes it."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.num_key_value_heads)
    query, key, value = (
        torch.randn(num_tokens // length, n, length, config.head_dim, device=device, dtype=dtype).requires_grad_()
        for n in heads
    )
    grad = torch.randn_like(query)

    def step() -> None:
        F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True).backward(grad)

    return min(_attention_times(step, device, runs))


def _attention_times(step: Callable[[], None], device: torch.device, runs: int) -> Iterator[float]:
    reason = "no kernel"
    for kernel in KERNELS:
        try:
            with sdpa_kernel(kernel):
                yield milliseconds(step, device, runs)
        except RuntimeError as error:
            reason = str(error)
            continue
        if kernel is not SDPBackend.CUDNN_ATTENTION:
            return
    raise SystemExit(f"no kernel of torch takes this attention: {reason}")


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--bandwidth", type=float, default=4.29e12)
    parser.add_argument("--measured", type=float)
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    asked = parser.parse_args()
    recipe, device = load_recipe(asked.recipe), torch.device(asked.device)
    config = read_config(resolve_model(recipe.model.path, recipe.model.revision))
    num_tokens, dtype = recipe.train.micro_batch_tokens, DTYPES[recipe.train.precision]
    is_full = recipe.method.kind == "full"
    total = 0.0
    for product, times in products(config, num_tokens, is_full=is_full).items():
        took = product_ms(product, device, dtype, asked.runs)
        total += took * times
        rate = product.flops / took / 1e9
        print(
            json.dumps({**product._asdict(), "ms": round(took, 4), "tflops": round(rate, 1), "times": times}),
            flush=True,
        )
    length = min(recipe.data.max_length or num_tokens, num_tokens)
    attention = attention_ms(config, length, num_tokens, device, dtype, asked.runs) * config.num_hidden_layers
    optimiser = optimiser_bytes(config, dtype.itemsize) / asked.bandwidth * 1e3 if is_full else 0.0
    floor = total + attention + optimiser
    parts = {"products_ms": total, "attention_ms": attention, "optimiser_ms": optimiser, "floor_ms": floor}
    line = {"recipe": recipe.name, **{name: round(value, 3) for name, value in parts.items()}}
    line["floor_tokens_per_s"] = round(num_tokens / floor * 1e3, 1)
    if asked.measured is not None:
        line["share_of_floor"] = round(asked.measured / line["floor_tokens_per_s"], 4)
    print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main()
