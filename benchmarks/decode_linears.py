"""Products of few tokens in every weight format: time, bandwidth, and share of the floor, beside cuBLAS in bfloat16.

    python benchmarks/decode_linears.py --models qwen2.5-7b --tokens 1,16 > decode_linears.jsonl
    python benchmarks/decode_linears.py --sweep --models qwen2.5-7b        shapes of the programs, the best ones first

A line of JSON for each format, linear and number of tokens. The floor is the bytes of the weight as held over the
bandwidth that a copy reaches here, measured first. Weights are cycled through, so that none comes from the cache.
Ends when `--seconds` are over and says what was left out.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor

from tunesmith.kernels import gemv
from tunesmith.kernels.fp8 import fp8_product, has_fp8, quantize_fp8_weight, quantize_rows_fp8
from tunesmith.kernels.gemv_dot_triton import dot
from tunesmith.kernels.gemv_triton import gemv as one_token
from tunesmith.kernels.int4 import dequantize_int4, quantize_int4
from tunesmith.kernels.int8 import int8_integer_product, quantize_int8
from tunesmith.kernels.nf4 import quantize_nf4

LINEARS = {
    "qwen2.5-7b": {"qkv": (4608, 3584), "output": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "qwen3-0.6b": {"qkv": (4096, 1024), "output": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
}
FORMATS = ("bf16", "int8", "w8a8", "fp8", "fp8-products", "int4", "int4-dense", "nf4")
CYCLED_BYTES = 2**28
Product = Callable[[Tensor], Tensor]


def copy_bandwidth() -> float:
    """Bytes a second that a kernel reads and writes (a recorded `copy_` goes to the copy engine, which is slower)."""
    source = torch.zeros(2**27, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds_of(lambda: torch.neg(source, out=target), 20)


def seconds_of(call: Callable[[], object], repeats: int) -> float:
    """Seconds of one call, recorded as a CUDA graph: the best of five rounds."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    best = float("inf")
    for _ in range(5):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        best = min(best, begin.elapsed_time(end) / 1000 / repeats)
    return best


def products(name: str, weight_FD: Tensor) -> tuple[Product, int]:
    """The product in a format, and the bytes of the weight as held."""
    if name == "bf16":
        return lambda x: gemv.float_product(x, weight_FD, None), weight_FD.nbytes
    if name in ("int8", "w8a8"):
        int8 = quantize_int8(weight_FD)
        run = gemv.int8_product if name == "int8" else int8_integer_product
        return lambda x: run(x, int8.codes, int8.scale, None), int8.num_bytes
    if name in ("fp8", "fp8-products"):
        fp8 = quantize_fp8_weight(weight_FD)
        if name == "fp8":
            return lambda x: gemv.fp8_weight_product(x, fp8.codes, fp8.scale, None), fp8.num_bytes
        return lambda x: fp8_product(*quantize_rows_fp8(x), fp8.codes, fp8.scale, None, x.dtype), fp8.num_bytes
    if name in ("int4", "int4-dense"):
        int4 = quantize_int4(weight_FD, 128, clips=(1.0,))
        if name == "int4":
            return lambda x: gemv.int4_product(x, int4, None), int4.num_bytes
        return lambda x: gemv.dense_product(x, dequantize_int4(int4, x.dtype), None), int4.num_bytes
    nf4 = quantize_nf4(weight_FD, double=False)
    return lambda x: gemv.nf4_product(x, [nf4], None), nf4.num_bytes


def time_of(makers: list[Product], x_TD: Tensor) -> float:
    """Seconds of one product, going through the copies of the weight in turn."""

    def call() -> None:
        for product in makers:
            product(x_TD)

    return seconds_of(call, max(1, 24 // len(makers))) / len(makers)


def rows_of(arguments: argparse.Namespace, bandwidth: float, deadline: float) -> Iterator[dict[str, object]]:
    """A row for each measurement; one that says what was left out where the time is over."""
    left_out = []
    for model in arguments.models.split(","):
        for linear, (rows, width) in LINEARS[model].items():
            copies = min(24, -(-CYCLED_BYTES // (rows * width // 2)))
            for name in arguments.formats.split(","):
                if name == "fp8-products" and not has_fp8("cuda"):
                    continue
                if time.monotonic() > deadline:
                    left_out.append(f"{model} {linear} {name}")
                    continue
                weights = [torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) * 0.02 for _ in range(copies)]
                made = [products(name, weight) for weight in weights]
                dense = [lambda x, w=weight: torch.nn.functional.linear(x, w) for weight in weights]
                for tokens in map(int, arguments.tokens.split(",")):
                    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                    ours = time_of([product for product, _ in made], x)
                    yield {
                        "model": model,
                        "linear": linear,
                        "rows": rows,
                        "width": width,
                        "format": name,
                        "tokens": tokens,
                        "time_us": round(ours * 1e6, 2),
                        "weight_bytes": made[0][1],
                        "gb_per_s": round(made[0][1] / ours / 1e9, 1),
                        "floor_share_percent": round(100 * made[0][1] / bandwidth / ours, 1),
                        "cublas_bf16_us": round(time_of(dense, x) * 1e6, 2),
                    }
                del weights, made, dense
    if left_out:
        yield {"left_out_for_time": left_out}


def sweep(arguments: argparse.Namespace, bandwidth: float, deadline: float) -> Iterator[dict[str, object]]:
    """Program shapes of one format and linear after the other: the three fastest of each."""
    for model in arguments.models.split(","):
        for linear, (rows, width) in LINEARS[model].items():
            for format_id, name in enumerate(("bf16", "int8", "fp8", "int4")):
                if name not in arguments.formats.split(","):
                    continue
                weight, scales, zeros = held(name, rows, width)
                copies = [weight.clone() for _ in range(min(24, -(-CYCLED_BYTES // weight.nbytes)))]
                for tokens in map(int, arguments.tokens.split(",")):
                    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                    out = torch.empty(tokens, rows, device="cuda", dtype=torch.bfloat16)
                    found = []
                    for kernel, shape in shapes(tokens, name):
                        if time.monotonic() > deadline:
                            return
                        run = partial(launch, kernel, shape, format_id, x, out, scales, zeros)
                        try:
                            taken = seconds_of(lambda run=run, copies=copies: [run(w) for w in copies], 1) / len(copies)
                        except Exception as error:  # a shape that does not fit this chip
                            print(f"{name} {shape}: {error}", file=sys.stderr)
                            continue
                        found.append((taken, kernel, shape))
                    for taken, kernel, shape in sorted(found)[:3]:
                        share = round(100 * weight.nbytes / bandwidth / taken, 1)
                        yield {
                            "model": model,
                            "linear": linear,
                            "format": name,
                            "tokens": tokens,
                            "kernel": kernel,
                            "shape": shape,
                            "time_us": round(taken * 1e6, 2),
                            "floor_share_percent": share,
                        }


def launch(
    kernel: str,
    shape: tuple[int, ...],
    format_id: int,
    x_TD: Tensor,
    out_TF: Tensor,
    scales: Tensor | None,
    zeros: Tensor | None,
    weight: Tensor,
) -> None:
    """One product by a kernel with programs of this shape."""
    if kernel == "one":
        has_zeros = zeros is not None
        one_token(format_id, x_TD[0], weight, scales, zeros, None, out_TF[0], shape=shape, has_zeros=has_zeros)
    else:
        dot(format_id, x_TD, weight, scales, zeros, None, out_TF, shape=shape)


def held(name: str, rows: int, width: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Codes, scales and zero points of a random weight."""
    weight = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) * 0.02
    if name == "bf16":
        return weight, None, None
    if name == "int8":
        int8 = quantize_int8(weight)
        return int8.codes, int8.scale, None
    if name == "fp8":
        fp8 = quantize_fp8_weight(weight)
        return fp8.codes.view(torch.int8), fp8.scale, None
    int4 = quantize_int4(weight, 128, clips=(1.0,))
    return int4.words, int4.scales, int4.zeros


def shapes(tokens: int, name: str) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Shapes worth trying: of the kernel for one token, and of the one through the tensor cores."""
    if tokens == 1:
        yield from (("one", (rows, warps)) for rows in (2, 4, 8, 16) for warps in (1, 2, 4, 8))
    steps = (16, 32, 64) if name == "int4" else (64, 128, 256)
    yield from (
        ("dot", (rows, step, 4, stages)) for rows in (16, 32, 64, 128) for step in steps for stages in (3, 4, 6)
    )


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(LINEARS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,256")
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--sweep", action="store_true", help="try program shapes instead")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    bandwidth = copy_bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gb_per_s": round(bandwidth / 1e9, 1)}), flush=True)
    for row in (sweep if arguments.sweep else rows_of)(arguments, bandwidth, deadline):
        print(json.dumps(row), flush=True)


if __name__ == "__main__":
    main()
