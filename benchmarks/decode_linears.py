"""Products of few tokens in every weight format: time, bandwidth, and share of the floor, beside cuBLAS in bfloat16.

    python benchmarks/decode_linears.py --models qwen2.5-7b --tokens 1,16 > decode_linears.jsonl
    python benchmarks/decode_linears.py --table --tokens 1,16 --seconds 20
    python benchmarks/decode_linears.py --sweep --models qwen2.5-7b --tokens 1,2,4,16,64,256

The second prints the same as a table, and what all blocks of a model take together. The third tries every kernel that
has the product, with several tiles: a line for each, with its error against float64.

A line of JSON for each format, linear and number of tokens. The floor is the bytes of the weight as held over the
bandwidth that a copy reaches here, measured first. Weights are cycled through, so that none comes from the cache.
Ends when `--seconds` are over and says what was left out.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import cast

import torch
from torch import Tensor

from tunesmith.bench.decode_tiles import RUNS, Rest, in_bytes, tiles
from tunesmith.kernels import gemv
from tunesmith.kernels.fp8 import FP8, dequantize_rows, fp8_product, has_fp8, quantize_fp8_weight, quantize_rows_fp8
from tunesmith.kernels.int4 import Int4Weight, dequantize_int4, empty_int4, quantize_int4
from tunesmith.kernels.int4_bytes import MOST_TOKENS as BYTES_TOKENS
from tunesmith.kernels.int4_bytes import int4_bytes_product
from tunesmith.kernels.int8 import dequantize_int8, int8_integer_product, quantize_int8
from tunesmith.kernels.launch import num_processors, overlapped
from tunesmith.kernels.nf4 import NF4Weight, dequantize_nf4, quantize_nf4
from tunesmith.kernels.warm_up import compile_all, taken_down
from tunesmith.model.decode_linears import FP8_WEIGHT_TOKENS

LINEARS = {
    "qwen2.5-7b": {"qkv": (4608, 3584), "output": (3584, 3584), "gate_up": (37888, 3584), "down": (3584, 18944)},
    "qwen3-0.6b": {"qkv": (4096, 1024), "output": (1024, 2048), "gate_up": (6144, 1024), "down": (1024, 3072)},
}
FORMATS = ("bf16", "int8", "w8a8", "fp8", "fp8-products", "int4", "int4-bytes", "nf4")
NUM_BLOCKS = 28  # of both models
FORMAT_IDS = {"bf16": 0, "int8": 1, "fp8": 2, "int4": 3}
CYCLED_BYTES = 2**28
Product = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Held:
    """A weight in a format: what the kernels take, in what it is stored, and what it stands for."""

    codes: Tensor
    scales: Tensor | None
    zeros: Tensor | None
    num_bytes: int
    dequantised: Callable[[Tensor, torch.dtype], Tensor]
    whole: Int4Weight | NF4Weight | None = None


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


def product_of(name: str, held: Held, codes: Tensor) -> Product:
    """The product with a copy of a weight's codes, by the kernel that an engine takes for a number of tokens."""
    scales, whole = cast(Tensor, held.scales), held.whole
    if name == "int4-bytes":
        # Its input in bytes, as a norm or SwiGLU leaves it.
        weight = replace(cast(Int4Weight, whole), words=codes)
        return lambda x: int4_bytes_product(in_bytes(x), weight, None, x.dtype)
    if name == "int4":
        return lambda x: gemv.int4_product(x, replace(cast(Int4Weight, whole), words=codes), None)
    if name == "nf4":
        return lambda x: gemv.nf4_product(x, [replace(cast(NF4Weight, whole), codes=codes)], None)
    if name in ("int8", "w8a8"):
        run = gemv.int8_product if name == "int8" else int8_integer_product
        return lambda x: run(x, codes, scales, None)
    if name == "bf16":
        return lambda x: gemv.float_product(x, codes, None)
    few = FP8_WEIGHT_TOKENS if name == "fp8" else 0
    widened = partial(gemv.fp8_weight_product, codes_FD=codes.view(FP8), scale_F=scales, bias_F=None)
    return lambda x: widened(x) if x.shape[0] <= few else in_fp8(x, codes, scales)


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
            for name in arguments.formats.split(","):
                if name == "fp8-products" and not has_fp8("cuda"):
                    continue
                if time.monotonic() > deadline:
                    left_out.append(f"{model} {linear} {name}")
                    continue
                weight = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) * 0.02
                held = hold(name, weight)
                made = [product_of(name, held, codes) for codes in cycled(held.codes)]
                dense: list[Product] = [partial(torch.nn.functional.linear, weight=copy) for copy in cycled(weight)]
                for tokens in map(int, arguments.tokens.split(",")):
                    if name == "int4-bytes" and tokens > BYTES_TOKENS[128]:
                        continue
                    x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                    ours = time_of(made, x)
                    yield {
                        "model": model,
                        "linear": linear,
                        "rows": rows,
                        "width": width,
                        "format": name,
                        "tokens": tokens,
                        "time_us": round(ours * 1e6, 2),
                        "weight_bytes": held.num_bytes,
                        "gb_per_s": round(held.num_bytes / ours / 1e9, 1),
                        "floor_share_percent": round(100 * held.num_bytes / bandwidth / ours, 1),
                        "cublas_bf16_us": round(time_of(dense, x) * 1e6, 2),
                    }
                del weight, held, made, dense
    if left_out:
        yield {"left_out_for_time": left_out}


def table(rows: Iterator[dict[str, object]]) -> Iterator[str]:
    """The rows as lines of text; then of each model, format and number of tokens what its blocks take, in ms."""
    totals: dict[tuple[object, object, object], list[float]] = {}
    for row in rows:
        if "time_us" not in row:
            yield json.dumps(row)
            continue
        mine, theirs = cast(float, row["time_us"]), cast(float, row["cublas_bf16_us"])
        key = (row["model"], row["format"], row["tokens"])
        sums = totals.setdefault(key, [0.0, 0.0])
        sums[0], sums[1] = sums[0] + mine, sums[1] + theirs
        yield f"{row['linear']!s:8} {key!s:36} {mine:8.2f} us  cuBLAS in bfloat16 {theirs:8.2f}  {row['gb_per_s']} GB/s"
    for (model, name, tokens), sums in totals.items():
        mine, theirs = (each * NUM_BLOCKS / 1000 for each in sums)
        yield f"all blocks {(model, name, tokens)!s:36} {mine:8.3f} ms  cuBLAS in bfloat16 {theirs:8.3f}"


@dataclass(frozen=True)
class Candidate:
    """A kernel with programs of a shape. run: (input, a copy of the weight, output), which it may leave alone.

    is_quantised: it has the weight that it is compared with.
    """

    kernel: str
    tile: tuple[int, ...]
    copies: list[Tensor]
    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    is_quantised: bool = True


def sweep(arguments: argparse.Namespace, bandwidth: float, deadline: float) -> Iterator[dict[str, object]]:
    """A line for each kernel, tile, format, linear and number of tokens: time, bandwidth, and error against float64.

    Each kernel's present tile comes first. A candidate that fails is a line with its error.
    """
    formats = [name for name in arguments.formats.split(",") if name in FORMAT_IDS]
    shapes = {
        f"{model} {linear}": shape for model in arguments.models.split(",") for linear, shape in LINEARS[model].items()
    }
    counts = list(map(int, arguments.tokens.split(",")))
    try:
        yield compiled(formats, set(shapes.values()), counts, arguments.processes)
    except Exception as problem:  # each launch compiles its own then
        yield {"compiled": 0, "error": f"{type(problem).__name__}: {problem}"[:200]}
    left_out = []
    for linear, (rows, width) in shapes.items():
        for name in formats:
            if time.monotonic() > deadline:
                left_out.append(f"{linear} {name}")
                continue
            weight = torch.randn(rows, width, device="cuda", dtype=torch.bfloat16) * 0.02
            held = hold(name, weight)
            copies = cycled(held.codes)
            wide = copies if held.codes is weight else cycled(weight)
            dense = held.dequantised(held.codes, torch.float32).double().t()
            for tokens in counts:
                x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
                truth, size = x.double() @ dense, x.double().abs() @ dense.abs()
                what = {"linear": linear, "rows": tokens, "shape": [rows, width], "format": name}
                for candidate in candidates(name, held, copies, wide, tokens):
                    if time.monotonic() > deadline:
                        left_out.append(f"{linear} {name} {tokens} {candidate.kernel} {candidate.tile}")
                        continue
                    line = {**what, "kernel": candidate.kernel, "tile": candidate.tile}
                    yield {**line, **tried(candidate, x, truth, size, held.num_bytes, bandwidth)}
            del weight, held, copies, wide, dense
    if left_out:
        yield {"left_out_for_time": left_out}


def tried(
    candidate: Candidate,
    x_TD: Tensor,
    truth_TF: Tensor,
    size_TF: Tensor,
    num_bytes: int,
    bandwidth: float,
) -> dict[str, object]:
    """What a candidate reached, or its error. max_error is over the sum of magnitudes, and is to be below 2^-7."""
    out = torch.full(truth_TF.shape, float("nan"), device=x_TD.device, dtype=x_TD.dtype)
    try:
        y = candidate.run(x_TD, candidate.copies[0], out)
        error = float(((y.double() - truth_TF).abs() / size_TF).max())
        taken = seconds_of(lambda: [candidate.run(x_TD, codes, out) for codes in candidate.copies], 1)
        taken /= len(candidate.copies)
    except Exception as problem:
        return {"error": f"{type(problem).__name__}: {problem}"[:200]}
    num_bytes = num_bytes if candidate.is_quantised else candidate.copies[0].nbytes
    line: dict[str, object] = {
        "us": round(taken * 1e6, 2),
        "gb_per_s": round(num_bytes / taken / 1e9, 1),
        "floor_share_percent": round(100 * num_bytes / bandwidth / taken, 1),
    }
    return {**line, "max_error": error, "is_right": error < 2.0**-7} if candidate.is_quantised else line


def candidates(name: str, held: Held, copies: list[Tensor], wide: list[Tensor], tokens: int) -> Iterator[Candidate]:
    """What has this product: our kernels, cuBLAS on `wide` (in bfloat16), on what was dequantised, and in fp8."""
    format_id, rest = FORMAT_IDS[name], (held.scales, held.zeros, None)
    rows, width = wide[0].shape
    for kernel, tile in tiles(format_id, rows, width, tokens, num_processors(wide[0].device)):
        yield Candidate(kernel, tile, copies, partial(RUNS[kernel], format_id, rest, tile))
    yield Candidate("cublas-bf16", (), wide, lambda x, weight, out: torch.nn.functional.linear(x, weight), False)
    if tokens >= 16 and format_id:
        yield Candidate(
            "dequantised",
            (),
            copies,
            lambda x, codes, out: torch.nn.functional.linear(x, held.dequantised(codes, x.dtype)),
        )
    if name == "fp8" and tokens > 1 and has_fp8("cuda"):
        scales = cast(Tensor, held.scales)
        yield Candidate("fp8-products", (), copies, lambda x, codes, out: in_fp8(x, codes, scales, fp8_product))
        yield Candidate("fp8-parts", (), copies, lambda x, codes, out: in_fp8(x, codes, scales))


def in_fp8(x: Tensor, codes: Tensor, scale: Tensor, product: Callable[..., Tensor] = gemv.fp8_few_product) -> Tensor:
    """The input quantised by rows, and a product of fp8 with fp8: by default the one that an engine takes."""
    return product(*quantize_rows_fp8(x), codes.view(FP8), scale, None, x.dtype)


def compiled(formats: list[str], shapes: set[tuple[int, int]], counts: list[int], processes: int) -> dict[str, object]:
    """Compile all candidates' kernels side by side, into the cache where their launches find them."""
    processors = num_processors(torch.device("cuda"))
    with taken_down() as launches:
        for (rows, width), name, tokens in itertools.product(shapes, formats, counts):
            x = torch.empty(tokens, width, device="meta", dtype=torch.bfloat16)
            out = torch.empty(tokens, rows, device="meta", dtype=torch.bfloat16)
            codes, rest = unfilled(name, rows, width)
            for kernel, tile in tiles(FORMAT_IDS[name], rows, width, tokens, processors):
                RUNS[kernel](FORMAT_IDS[name], rest, tile, x, codes, out)
    once = list({launch.key: launch for launch in launches}.values())
    done = compile_all(once, torch.cuda.get_device_capability(), processes)
    return {"compiled": done.kernels, "seconds": round(done.duration_s, 1), "failed": sorted(set(done.failed))}


def unfilled(name: str, rows: int, width: int) -> tuple[Tensor, Rest]:
    """Codes; scales, zero points and no bias: of a weight without storage."""
    if name == "bf16":
        return torch.empty(rows, width, dtype=torch.bfloat16, device="meta"), (None, None, None)
    if name == "int4":
        held = empty_int4((rows, width), torch.bfloat16, 128, False, device="meta")
        return held.words, (held.scales, held.zeros, None)
    codes = torch.empty(rows, width, dtype=torch.int8, device="meta")
    return codes, (torch.empty(rows, device="meta"), None, None)


def cycled(weight: Tensor) -> list[Tensor]:
    """Copies enough that none is in the cache when its turn comes, the weight first."""
    return [weight, *(weight.clone() for _ in range(min(23, CYCLED_BYTES // weight.nbytes)))]


def hold(name: str, weight_FD: Tensor) -> Held:
    """A weight in a format."""
    if name == "bf16":
        return Held(weight_FD, None, None, weight_FD.nbytes, lambda codes, dtype: codes.to(dtype))
    if name in ("int8", "w8a8"):
        int8 = quantize_int8(weight_FD)
        widen = lambda c, d: dequantize_int8(c, int8.scale, d)  # noqa: E731
        return Held(int8.codes, int8.scale, None, int8.num_bytes, widen)
    if name in ("fp8", "fp8-products"):
        fp8 = quantize_fp8_weight(weight_FD)
        widen = lambda c, d: dequantize_rows(c.view(FP8), fp8.scale, d)  # noqa: E731
        return Held(fp8.codes.view(torch.int8), fp8.scale, None, fp8.num_bytes, widen)
    if name == "nf4":
        nf4 = quantize_nf4(weight_FD, double=False)
        return Held(nf4.codes, None, None, nf4.num_bytes, lambda c, d: dequantize_nf4([replace(nf4, codes=c)], d), nf4)
    int4 = quantize_int4(weight_FD, 128, clips=(1.0,))
    of = Held(
        int4.words, int4.scales, int4.zeros, int4.num_bytes, lambda c, d: dequantize_int4(replace(int4, words=c), d)
    )
    return replace(of, whole=int4)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", default=",".join(LINEARS))
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--tokens", default="1,2,4,8,16,32,64,256")
    parser.add_argument("--seconds", type=float, default=85)
    parser.add_argument("--sweep", action="store_true", help="try kernels and their tiles instead")
    parser.add_argument("--table", action="store_true", help="lines of text, and sums over a model's blocks")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="that compile for --sweep")
    arguments = parser.parse_args()
    deadline = time.monotonic() + arguments.seconds
    bandwidth = copy_bandwidth()
    print(json.dumps({"device": torch.cuda.get_device_name(), "copy_gb_per_s": round(bandwidth / 1e9, 1)}), flush=True)
    rows = (sweep if arguments.sweep else rows_of)(arguments, bandwidth, deadline)
    with overlapped():  # where TUNESMITH_OVERLAP=1, as inside an engine's pass
        for line in table(rows) if arguments.table else map(json.dumps, rows):
            print(line, flush=True)


if __name__ == "__main__":
    main()
