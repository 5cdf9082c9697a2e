"""How near the chip's limits attention over pages runs: `python benchmarks/paged_attention.py`, on a CUDA GPU.

    --shape 28,4,128      query heads, key heads, head size (several may be given; default Qwen2.5-7B and Qwen3-0.6B)
    --decode 256x1024     requests x context, every context that long; 256x100..2048: uniform between, seed 0
    --prefill 4x2048+0    requests x new tokens + tokens already in the cache
    --kv bf16 fp8         what the pages hold
    --invariant           also the form whose results do not depend on the batch
    --splits              in decoding, other shortest parts of a context
    --sweep               other tiles too, to find a chip's best
    --peers               beside torch's SDPA on keys gathered before (not timed), and FlashAttention-3 and FlashInfer
                          where they are installed, by the calls that the engine makes of them

Every case prints one JSON line: the median of 20 runs between CUDA events, each after 1 GiB was overwritten (nothing
lies in the cache, and no launch is timed), GB/s of the bytes that have to move, TFLOP/s, and the share of the floor:
the time that moving those bytes at a plain copy's rate or computing those products at --peak-tflops takes, whichever is
longer, over the time measured.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.kernels import flash_attention_3, flashinfer_attention
from tunesmith.kernels import paged_attention_tiles as tiles
from tunesmith.kernels.flash_attention_3 import FlashAttention3
from tunesmith.kernels.flashinfer_attention import FlashInferAttention
from tunesmith.kernels.fp8_weight import FP8
from tunesmith.kernels.kv_cache import write_kv
from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.kernels.paged_attention_fresh import SEEN, attend_fresh, pays_fresh
from tunesmith.kernels.paged_attention_tiles import LEAST_SPLIT, Tile, with_tile
from tunesmith.kernels.paged_step import HostLengths, PagedHeads, PagedKernel, PagedStep
from tunesmith.units import ceil_div

SLOTS, RUNS, WARM_UP, FLUSH_BYTES = 16, 20, 2, 2**30
SHAPES = ["28,4,128", "16,8,128"]
DECODE = ["1x1024", "1x16384", "8x2048", "64x1024", "256x100..2048"]
PREFILL = ["4x2048+0", "1x8192+0", "2x1024+4096", "64x16+1000"]
LEAST_SPLITS = (32, 64, 128, 256)
DECODE_TILES = [Tile(16, k, w, s) for k, w, s in product((32, 64, 128), (2, 4, 8), (3, 4, 5))]
PREFILL_TILES = [
    *(Tile(64, k, 4, s) for k, s in product((64, 128), (3, 4))),
    *(Tile(128, k, w, s) for k, w, s in product((64, 128), (4, 8), (3, 4))),
]


@dataclass
class Batch:
    """A step's tensors. `lengths`: new tokens and contexts."""

    query: Tensor
    keys: Tensor
    values: Tensor
    tables: Tensor
    starts: Tensor
    context: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    lengths: list[tuple[int, int]]
    arrivals: Tensor

    def run(self, out: Tensor, invariant: bool = False, joins: bool = True) -> None:
        paged_attention(
            self.query,
            self.keys,
            self.values,
            self.tables,
            self.starts,
            self.context,
            max_query=max(new for new, _ in self.lengths),
            max_context=max(context for _, context in self.lengths),
            window=None,
            key_scales_PK=self.key_scales,
            value_scales_PK=self.value_scales,
            out=out,
            invariant=invariant,
            arrivals=self.arrivals if joins else None,
        )

    @property
    def moved_bytes(self) -> int:
        """Queries read, outputs written, keys and values of every context read once."""
        of_position = 2 * self.keys.shape[2] * self.keys.shape[3] * self.keys.element_size()
        return 2 * self.query.nbytes + of_position * sum(context for _, context in self.lengths)

    @property
    def flops(self) -> int:
        """Two products for every pair of a query head and a key that it sees."""
        pairs = sum(new * context - new * (new - 1) // 2 for new, context in self.lengths)
        return 4 * pairs * self.query.shape[1] * self.query.shape[2]


def make(lengths: list[tuple[int, int]], heads: int, kv_heads: int, head_dim: int, kv: str) -> Batch:
    """Pages in random order."""
    num_pages = [ceil_div(context, SLOTS) for _, context in lengths]
    order = torch.randperm(sum(num_pages), device="cuda").int()
    tables = torch.zeros(len(lengths), max(num_pages), dtype=torch.int32, device="cuda")
    for request, part in enumerate(order.split(num_pages)):
        tables[request, : len(part)] = part
    pages = [torch.randn(sum(num_pages), SLOTS, kv_heads, head_dim, device="cuda").bfloat16() for _ in range(2)]
    scales: list[Tensor | None] = [None, None]
    if kv == "fp8":
        pages = [page.to(FP8) for page in pages]
        scales = [torch.ones(sum(num_pages), kv_heads, device="cuda") for _ in range(2)]
    counts = torch.tensor([0, *(new for new, _ in lengths)], device="cuda")
    query = torch.randn(int(counts.sum()), heads, head_dim, device="cuda").bfloat16()
    context = torch.tensor([context for _, context in lengths], device="cuda").int()
    keys, values = pages
    arrivals = torch.zeros(len(lengths) * kv_heads, dtype=torch.int32, device="cuda")
    return Batch(query, keys, values, tables, counts.cumsum(0).int(), context, scales[0], scales[1], lengths, arrivals)


def median_us(run: Callable[[], object]) -> float:
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UP):
        run()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(RUNS)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return 1e3 * statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bytes_per_s() -> float:
    source = torch.empty(2**30, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.nbytes / (median_us(lambda: target.copy_(source)) / 1e6)


def sdpa(batch: Batch) -> Callable[[], object] | None:
    """torch's attention over keys gathered before; contexts of one length only, in the queries' dtype only."""
    if len(set(batch.lengths)) > 1 or batch.key_scales is not None:
        return None
    new, context = batch.lengths[0]
    keys, values = (
        pages[batch.tables.long()].flatten(1, 2)[:, :context].transpose(1, 2) for pages in (batch.keys, batch.values)
    )
    query = batch.query.view(len(batch.lengths), new, *batch.query.shape[1:]).transpose(1, 2)
    if new == 1:
        return lambda: F.scaled_dot_product_attention(query, keys, values, enable_gqa=True)
    if new == context:
        return lambda: F.scaled_dot_product_attention(query, keys, values, is_causal=True, enable_gqa=True)
    from torch.nn.attention.bias import causal_lower_right

    # torch's bias knows no groups.
    group = batch.query.shape[1] // batch.keys.shape[2]
    keys, values = keys.repeat_interleave(group, 1), values.repeat_interleave(group, 1)
    return lambda: F.scaled_dot_product_attention(query, keys, values, attn_mask=causal_lower_right(new, context))


def step_of(batch: Batch) -> PagedStep:
    """What other libraries' kernels are told of a batch."""
    counts = [new for new, _ in batch.lengths]
    host = HostLengths(*(tensor.cpu().numpy() for tensor in (batch.starts, batch.context, batch.tables)))
    longest = max(context for _, context in batch.lengths)
    return PagedStep(batch.tables, batch.starts, batch.context, max(counts), longest, min(counts), host)


def kernel_of(name: str, batch: Batch) -> PagedKernel | None:
    """Another library's, where it is installed and for these heads; else a line says why not."""
    is_installed, make = LIBRARIES[name]
    shape = (batch.query.shape[1], batch.keys.shape[2], batch.query.shape[2])
    capability = torch.cuda.get_device_capability()
    heads = PagedHeads(*shape, batch.query.dtype, batch.keys.dtype, SLOTS, (None,), capability)
    reason: str | None = "it is not installed"
    if is_installed():
        try:
            kernel = make()
            reason = kernel.refused(heads)
        except (ImportError, OSError) as error:
            reason = f"{type(error).__name__}: {error}"
    if reason is None:
        return kernel
    print(json.dumps({"kernel": name, "refused": reason}), flush=True)
    return None


def library(name: str, batch: Batch) -> Callable[[], Tensor] | None:
    """Attention as the engine asks a library for it; FlashInfer's plan is made once, as for all layers of a step."""
    kernel = kernel_of(name, batch)
    if kernel is None:
        return None
    step, scale = step_of(batch), batch.query.shape[2] ** -0.5
    return lambda: kernel(batch.query, batch.keys, batch.values, step, window=None, scale=scale)


def fresh(batch: Batch) -> Callable[[], object] | None:
    """What serves prompts without anything in the cache: torch's kernels on the new keys."""
    if any(new != context or new == 1 for new, context in batch.lengths) or batch.key_scales is not None:
        return None
    shape = (batch.query.shape[0], *batch.keys.shape[2:])
    key, value = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    lengths, out = [new for new, _ in batch.lengths], torch.empty_like(batch.query)
    for _ in range(SEEN + 1):
        pays_fresh(lengths, batch.query.shape[1], batch.query.shape[2], batch.query.dtype, batch.query.device)
    return lambda: attend_fresh(batch.query, key, value, lengths, out)


def writing(batch: Batch) -> tuple[Callable[[], object], int]:
    """The step's keys and values into their pages, and the bytes that move."""
    shape = (batch.query.shape[0], *batch.keys.shape[2:])
    key, value = (torch.randn(shape, device="cuda").bfloat16() for _ in range(2))
    slots = torch.cat(
        [
            batch.tables[request].long().repeat_interleave(SLOTS)[context - new : context] * SLOTS
            + torch.arange(context - new, context, device="cuda") % SLOTS
            for request, (new, context) in enumerate(batch.lengths)
        ]
    )
    moved = key.nbytes + value.nbytes + 2 * key.numel() * batch.keys.element_size()
    return lambda: write_kv(key, value, batch.keys, batch.values, slots, batch.key_scales, batch.value_scales), moved


def lengths_of(text: str, decode: bool) -> list[tuple[int, int]]:
    """`256x1024`, `256x100..2048` or `4x2048+512` as new tokens and contexts."""
    number, _, rest = text.partition("x")
    if not decode:
        new, _, before = rest.partition("+")
        return [(int(new), int(new) + int(before or 0))] * int(number)
    shortest, _, longest = rest.partition("..")
    draw = random.Random(0)
    return [(1, draw.randint(int(shortest), int(longest or shortest))) for _ in range(int(number))]


def report(label: dict[str, object], run: Callable[[], object], moved: int, flops: int) -> None:
    """One line."""
    try:
        time_us = median_us(run)
    except Exception as error:  # a tile that does not fit is a line too
        print(json.dumps({**label, "error": f"{type(error).__name__}: {error}"[:200]}), flush=True)
        return
    floor_us = max(moved / RATES["bytes_per_s"], flops / RATES["flops_per_s"]) * 1e6
    line = {
        "us": round(time_us, 1),
        "gb_per_s": round(moved / time_us / 1e3, 1),
        "tflop_per_s": round(flops / time_us / 1e6, 1),
        "floor_us": round(floor_us, 1),
        "floor_ratio": round(floor_us / time_us, 3),
    }
    print(json.dumps({**label, **line}), flush=True)


RATES: dict[str, float] = {}
LIBRARIES: dict[str, tuple[Callable[[], bool], Callable[[], PagedKernel]]] = {
    flash_attention_3.NAME: (flash_attention_3.is_installed, FlashAttention3),
    flashinfer_attention.NAME: (flashinfer_attention.is_installed, FlashInferAttention),
}


def error_of(batch: Batch, out: Tensor) -> float:
    """The largest difference to plain torch over the first and the last request."""
    from tunesmith.kernels.paged_attention import paged_attention_reference

    worst = 0.0
    for request in {0, len(batch.lengths) - 1}:
        start, end = batch.starts[request : request + 2].tolist()
        truth = paged_attention_reference(
            batch.query[start:end],
            batch.keys,
            batch.values,
            batch.tables[request : request + 1],
            torch.tensor([0, end - start]),
            batch.context[request : request + 1],
            window=None,
            scale=batch.query.shape[2] ** -0.5,
            key_scales_PK=batch.key_scales,
            value_scales_PK=batch.value_scales,
        )
        worst = max(worst, float((out[start:end].float() - truth.float()).abs().max()))
    return worst


def measure(label: dict[str, object], batch: Batch, decode: bool, options: argparse.Namespace) -> None:
    """All lines of one batch."""
    moved, flops, out = batch.moved_bytes, batch.flops, torch.empty_like(batch.query)
    batch.run(out)
    ours = {"kernel": "ours", **label, "error": round(error_of(batch, out), 5)}
    report(ours, lambda: batch.run(out), moved, flops)
    if decode:
        report({"kernel": "ours-joined-by-a-kernel", **label}, lambda: batch.run(out, joins=False), moved, flops)
    for least in LEAST_SPLITS if decode and options.splits else ():
        tiles.LEAST_SPLIT = least
        report({"kernel": "ours", **label, "least_split": least}, lambda: batch.run(out), moved, flops)
    tiles.LEAST_SPLIT = LEAST_SPLIT
    if options.invariant:
        report({"kernel": "ours-invariant", **label}, lambda: batch.run(out, True), moved, flops)
    if options.sweep:
        for tile in DECODE_TILES if decode else PREFILL_TILES:
            with with_tile("decode" if decode else "prefill", tile):
                report({"kernel": "ours", **label, "tile": str(tile)}, lambda: batch.run(out), moved, flops)
    write, written = writing(batch)
    report({"kernel": "write_kv", **label}, write, written, 0)
    peers = {"fresh": fresh(batch)}
    if options.peers:
        peers["sdpa-gathered"] = sdpa(batch)
    for name, run in peers.items():
        if run is not None:
            report({"kernel": name, **label}, run, moved, flops)
    for name in LIBRARIES if options.peers else ():
        attend = library(name, batch)
        if attend is not None:
            try:
                wrong = error_of(batch, attend())
            except Exception as error:  # what a library can't do is a line too
                print(
                    json.dumps({"kernel": name, **label, "error": f"{type(error).__name__}: {error}"[:200]}), flush=True
                )
                continue
            report({"kernel": name, **label, "error": round(wrong, 5)}, attend, moved, flops)


def cases(options: argparse.Namespace) -> Iterator[tuple[str, str, str, bool]]:
    for shape, kv in product(options.shape, options.kv):
        yield from ((shape, kv, text, True) for text in options.decode)
        yield from ((shape, kv, text, False) for text in options.prefill)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="*", default=SHAPES)
    parser.add_argument("--decode", nargs="*", default=DECODE)
    parser.add_argument("--prefill", nargs="*", default=PREFILL)
    parser.add_argument("--kv", nargs="*", default=["bf16"], choices=["bf16", "fp8"])
    parser.add_argument("--peak-tflops", type=float, default=776.0, help="bf16 products the chip reaches")
    for flag in ("invariant", "splits", "sweep", "peers"):
        parser.add_argument(f"--{flag}", action="store_true")
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("this needs a CUDA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    RATES.update(bytes_per_s=copy_bytes_per_s(), flops_per_s=options.peak_tflops * 1e12)
    print(json.dumps({"device": torch.cuda.get_device_name(), **RATES}), flush=True)
    with torch.inference_mode():
        for shape, kv, text, decode in cases(options):
            heads, kv_heads, head_dim = map(int, shape.split(","))
            batch = make(lengths_of(text, decode), heads, kv_heads, head_dim, kv)
            kind = "decode" if decode else "prefill"
            measure({"kind": kind, "batch": text, "shape": shape, "kv": kv}, batch, decode, options)
            del batch
            torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main())
