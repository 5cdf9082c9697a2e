"""How near the memory's speed each kernel runs: `python benchmarks/kernels.py --out DIR [--only NAME]`, on a CUDA GPU.

Every case prints one JSON line, also appended to DIR/kernels.jsonl: kernel, shape, dtype, the median of 20 runs between
CUDA events after warm-up, the bytes that have to move (every input read once, every output written once), GB/s, and the
share of the bandwidth that a plain copy of 1 GiB reaches on the same chip in the same process. Before every run another
1 GiB is overwritten: no input lies in the cache, the kernel pays for writing back what an earlier one left there (as it
leaves its own to the next), and the device lags behind the host, so that no launch is timed.
To add a kernel: write a function that yields cases, and put it into SOURCES.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TextIO

import torch
from torch import Tensor
from torch.optim.adamw import adamw

from tunesmith.kernels.adamw import AdamWSettings, Updated, update
from tunesmith.kernels.fp8 import FAST_SUMS, FP8, fp8_product, has_fp8, quantize_rows_fp8, transpose_fp8
from tunesmith.kernels.grad_norm import global_norm
from tunesmith.kernels.nf4 import quantize_nf4
from tunesmith.kernels.nf4_fp8 import nf4_row_scales, nf4_to_fp8
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_again, rms_norm_backward
from tunesmith.kernels.rope import rope_, rope_tables_half
from tunesmith.kernels.swiglu import swiglu, swiglu_backward
from tunesmith.kernels.swiglu_low_rank import swiglu_low_rank, swiglu_low_rank_backward
from tunesmith.kernels.swiglu_low_rank_grads import swiglu_low_rank_grads
from tunesmith.model.low_rank import wide_product

RUNS = 20
WARM_UP = 3
FLUSH_BYTES = 2**30
COPY_BYTES = 2**30


@dataclass(frozen=True)
class Work:
    """One kernel's call with its inputs made, what it moves and (for products) what it computes."""

    run: Callable[[], object]
    moved_bytes: int
    flops: int | None = None


@dataclass(frozen=True)
class Case:
    """A kernel at a shape. `make` allocates the inputs, on the GPU, only when the case runs."""

    name: str
    shape: dict[str, int]
    dtype: torch.dtype
    make: Callable[[], Work]


def norm_cases(tokens: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """RMSNorm, its recomputation, and its gradient with the stream's, of a frozen and of a trained weight."""
    shape = {"T": tokens, "D": width}

    def inputs() -> tuple[Tensor, Tensor, Tensor]:
        x = torch.randn(tokens, width, device="cuda", dtype=dtype)
        weight = torch.ones(width, device="cuda", dtype=dtype)
        return x, weight, rms_norm(x, weight, 1e-6)[1]

    def forward() -> Work:
        x, weight, rstd = inputs()
        return Work(lambda: rms_norm(x, weight, 1e-6), 2 * x.nbytes + rstd.nbytes)

    def again() -> Work:
        x, weight, rstd = inputs()
        return Work(lambda: rms_norm_again(x, weight, rstd), 2 * x.nbytes + rstd.nbytes)

    def backward(weight_grad: bool) -> Work:
        x, weight, rstd = inputs()
        grad, add = torch.randn_like(x), torch.randn_like(x)
        return Work(lambda: rms_norm_backward(grad, x, weight, rstd, add, weight_grad), 4 * x.nbytes + rstd.nbytes)

    yield Case("rms_norm", shape, dtype, forward)
    yield Case("rms_norm_again", shape, dtype, again)
    yield Case("rms_norm_backward", shape, dtype, lambda: backward(False))
    yield Case("rms_norm_backward_weight", shape, dtype, lambda: backward(True))


def head_norm_cases(tokens: int, heads: int, others: int, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """RMSNorm of the first heads of a fused projection, and its gradient with the weight's."""
    shape = {"T": tokens, "N": heads, "H": head_dim}

    def inputs() -> tuple[Tensor, Tensor, int]:
        fused = torch.randn(tokens, heads + others, head_dim, device="cuda", dtype=dtype)
        x = fused[:, :heads]
        return x, torch.ones(head_dim, device="cuda", dtype=dtype), x.numel() * x.element_size()

    def forward() -> Work:
        x, weight, size = inputs()
        return Work(lambda: rms_norm(x, weight, 1e-6), 2 * size + 4 * tokens * heads)

    def backward() -> Work:
        x, weight, size = inputs()
        grad, rstd = torch.randn_like(x), rms_norm(x, weight, 1e-6)[1]
        return Work(lambda: rms_norm_backward(grad, x, weight, rstd, None, True), 3 * size + rstd.nbytes)

    yield Case("rms_norm_heads", shape, dtype, forward)
    yield Case("rms_norm_heads_backward_weight", shape, dtype, backward)


def rope_cases(tokens: int, heads: int, others: int, head_dim: int, dtype: torch.dtype) -> Iterator[Case]:
    """The first heads of a fused projection rotated in place."""

    def make() -> Work:
        fused = torch.randn(tokens, (heads + others) * head_dim, device="cuda", dtype=dtype)
        x = fused[:, : heads * head_dim].view(tokens, heads, head_dim)
        inverse = 1.0 / 10_000 ** (torch.arange(0, head_dim, 2, device="cuda") / head_dim)
        cos, sin = rope_tables_half(inverse, torch.arange(tokens, device="cuda"))
        moved = 2 * x.numel() * x.element_size() + cos.nbytes + sin.nbytes
        return Work(lambda: rope_(x, cos, sin), moved)

    yield Case("rope_", {"T": tokens, "N": heads, "H": head_dim}, dtype, make)


def swiglu_cases(tokens: int, width: int, dtype: torch.dtype) -> Iterator[Case]:
    """SwiGLU, and its gradient in place: alone, and with h once more."""
    shape = {"T": tokens, "I": width}

    def make(backward: bool, want_h: bool) -> Work:
        gate_up = torch.randn(tokens, 2 * width, device="cuda", dtype=dtype)
        if not backward:
            return Work(lambda: swiglu(gate_up), gate_up.nbytes * 3 // 2)
        grad_h = torch.randn(tokens, width, device="cuda", dtype=dtype)
        moved = 2 * gate_up.nbytes + grad_h.nbytes * (2 if want_h else 1)
        # Its own gradient takes the input's place at every run: only the time is looked at.
        return Work(lambda: swiglu_backward(grad_h, gate_up, want_h, out=gate_up), moved)

    yield Case("swiglu", shape, dtype, lambda: make(False, False))
    yield Case("swiglu_backward", shape, dtype, lambda: make(True, False))
    yield Case("swiglu_backward_with_h", shape, dtype, lambda: make(True, True))


def elementwise_cases() -> Iterator[Case]:
    """The shapes of Qwen2.5-7B, Llama-3.2-3B and Qwen3-8B (whose heads are normed) in a step of 8,192 tokens."""
    for tokens, width in [(8192, 3584), (2048, 3072), (8192, 4096), (8192, 8192)]:
        yield from norm_cases(tokens, width, torch.bfloat16)
    yield from norm_cases(8192, 3584, torch.float32)
    yield from head_norm_cases(8192, 32, 16, 128, torch.bfloat16)
    for tokens, heads, others, head_dim in [
        (8192, 32, 4, 128),
        (2048, 32, 8, 128),
        (8192, 40, 8, 128),
        (8192, 40, 8, 64),
    ]:
        yield from rope_cases(tokens, heads, others, head_dim, torch.bfloat16)
    for tokens, width in [(8192, 18944), (2048, 8192), (8192, 12288)]:
        yield from swiglu_cases(tokens, width, torch.bfloat16)


def skinny_swiglu_cases(tokens: int, width: int, rank: int, dtype: torch.dtype) -> Iterator[Case]:
    """SwiGLU of an adapted gate-up activation and its gradient in place; and as before, the sums made by torch."""
    shape = {"T": tokens, "I": width, "R": rank}

    def make(run: Callable[..., object], forward: bool, want_h: bool = False) -> Work:
        gate_up, low, up = (
            torch.randn(*size, device="cuda", dtype=dtype)
            for size in ((tokens, 2 * width), (tokens, 2 * rank), (2 * width, 2 * rank))
        )
        moved = gate_up.nbytes + low.nbytes + up.nbytes
        if forward:
            return Work(lambda: run(gate_up, low, up), moved + gate_up.nbytes // 2)
        grad_h, dlow, down = (
            torch.randn(*size, device="cuda", dtype=dtype) for size in ((tokens, width), (tokens, rank), (rank, width))
        )
        moved += gate_up.nbytes + grad_h.nbytes * (2 if want_h else 1) + dlow.nbytes + down.nbytes
        # Its own gradient takes the input's place at every run: only the time is looked at.
        return Work(lambda: run(grad_h, gate_up, low, up, dlow, down, want_h, out=gate_up), moved)

    def summed(gate_up: Tensor, low: Tensor, up: Tensor) -> Tensor:
        return swiglu(gate_up.addmm_(low, up.t()))

    def summed_backward(
        grad_h: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, dlow: Tensor, down: Tensor, want_h: bool, out: Tensor
    ) -> object:
        return swiglu_backward(grad_h.addmm_(dlow, down), gate_up, want_h, out)

    yield Case("swiglu_low_rank", shape, dtype, lambda: make(swiglu_low_rank, True))
    yield Case("swiglu_low_rank_summed_before", shape, dtype, lambda: make(summed, True))
    for want_h in (False, True):
        name = "swiglu_low_rank_backward" + ("_with_h" if want_h else "")
        yield Case(name, shape, dtype, partial(make, swiglu_low_rank_backward, False, want_h))
        yield Case(name + "_summed_before", shape, dtype, partial(make, summed_backward, False, want_h))


def adapter_sum_cases(tokens: int, width: int, rank: int, dtype: torch.dtype) -> Iterator[Case]:
    """SwiGLU's gradient with the adapters' gradients in one launch, and by products of their own afterwards."""
    shape = {"T": tokens, "I": width, "R": rank}

    def make(run: Callable[..., object]) -> Work:
        gate_up, low, up = (
            torch.randn(*size, device="cuda", dtype=dtype)
            for size in ((tokens, 2 * width), (tokens, 2 * rank), (2 * width, 2 * rank))
        )
        grad_h, dlow, down = (
            torch.randn(*size, device="cuda", dtype=dtype) for size in ((tokens, width), (tokens, rank), (rank, width))
        )
        moved = 2 * gate_up.nbytes + grad_h.nbytes + low.nbytes + up.nbytes + dlow.nbytes + down.nbytes
        # Its own gradient takes the input's place at every run: only the time is looked at.
        return Work(lambda: run(grad_h, gate_up, low, up, dlow, down), moved)

    def products(
        grad_h: Tensor, gate_up: Tensor, low: Tensor, up: Tensor, dlow: Tensor, down: Tensor
    ) -> tuple[Tensor, Tensor]:
        grad, h = swiglu_low_rank_backward(grad_h, gate_up, low, up, dlow, down, True, out=gate_up)
        assert h is not None
        return wide_product(grad.t(), low), wide_product(dlow.t(), h)

    yield Case("swiglu_low_rank_grads", shape, dtype, lambda: make(swiglu_low_rank_grads))
    yield Case("swiglu_low_rank_grads_afterwards", shape, dtype, lambda: make(products))


def product_cases(tokens: int, width: int, rows: int) -> Iterator[Case]:
    """An fp8 product x [T, D] by w [F, D], its sums in short registers or in float32, and the same in bfloat16."""
    shape = {"T": tokens, "D": width, "F": rows}

    def make(dtype: torch.dtype, fast: bool = True) -> Work:
        x, w = (torch.randn(n, width, device="cuda", dtype=torch.bfloat16) for n in (tokens, rows))
        flops, out_bytes = 2 * tokens * width * rows, 2 * tokens * rows
        if dtype == torch.bfloat16:
            return Work(lambda: x @ w.t(), x.nbytes + w.nbytes + out_bytes, flops)
        codes, (w_codes, w_scale) = quantize_rows_fp8(x), quantize_rows_fp8(w)

        def product() -> object:
            FAST_SUMS.forward = fast
            return fp8_product(*codes, w_codes, w_scale.view(-1), None, torch.bfloat16)

        return Work(product, codes[0].nbytes + w_codes.nbytes + out_bytes, flops)

    yield Case("fp8_product_fast_sums", shape, FP8, lambda: make(FP8))
    yield Case("fp8_product_wide_sums", shape, FP8, lambda: make(FP8, False))
    yield Case("bf16_product", shape, torch.bfloat16, lambda: make(torch.bfloat16))


def fp8_weight_cases(rows: int, width: int, double: bool) -> Iterator[Case]:
    """A weight [F, D] on its way to a product: NF4 to fp8, as it lies and transposed, and fp8 codes transposed."""
    shape = {"F": rows, "D": width, "double": int(double)}

    def from_nf4(transposed: bool) -> Work:
        weight = quantize_nf4(torch.randn(rows, width, device="cuda", dtype=torch.bfloat16), double)
        scale = nf4_row_scales(weight)
        moved = weight.num_bytes + scale.nbytes + rows * width
        return Work(lambda: nf4_to_fp8(weight, transposed, scale), moved)

    def transposed_codes() -> Work:
        codes = torch.randn(rows, width, device="cuda").to(FP8)
        return Work(lambda: transpose_fp8(codes), 2 * codes.nbytes)

    yield Case("nf4_to_fp8", shape, FP8, lambda: from_nf4(False))
    yield Case("nf4_to_fp8_transposed", shape, FP8, lambda: from_nf4(True))
    if double:
        yield Case("fp8_transpose", shape, FP8, transposed_codes)


def quantise_cases(tokens: int, width: int) -> Iterator[Case]:
    """Rows of activations and (with a fold) of gradients."""

    def make(fold: bool) -> Work:
        x = torch.randn(tokens, width, device="cuda", dtype=torch.bfloat16)
        factors = torch.ones(width, device="cuda") if fold else None
        return Work(lambda: quantize_rows_fp8(x, factors), x.nbytes + x.numel() + 4 * tokens)

    yield Case("quantize_rows", {"T": tokens, "D": width}, torch.bfloat16, lambda: make(False))
    yield Case("quantize_rows_folded", {"T": tokens, "D": width}, torch.bfloat16, lambda: make(True))


def low_precision_cases() -> Iterator[Case]:
    """What steps with an fp8 or NF4 base of Qwen2.5-7B are made of, where the chip has fp8."""
    if not has_fp8("cuda"):
        return
    for width, rows in [(3584, 4608), (3584, 3584), (3584, 37888), (18944, 3584), (37888, 3584)]:
        yield from product_cases(8192, width, rows)
    for double in (True, False):
        for rows, width in [(37888, 3584), (3584, 18944), (4608, 3584), (3584, 3584)]:
            yield from fp8_weight_cases(rows, width, double)
    for width in (3584, 18944, 37888):
        yield from quantise_cases(8192, width)


def low_rank_cases() -> Iterator[Case]:
    """The kernels with the adapters' sums, not what they are compared with: of Qwen2.5-7B and Llama-3.2-3B."""
    yield from (case for case in adapted_cases() if not case.name.endswith(("_before", "_afterwards")))


def adapted_cases() -> Iterator[Case]:
    """SwiGLU with the adapters' sums."""
    for tokens, width, rank in [(8192, 18944, 16), (2048, 8192, 8)]:
        yield from skinny_swiglu_cases(tokens, width, rank, torch.bfloat16)
        yield from adapter_sum_cases(tokens, width, rank, torch.bfloat16)


def adamw_cases(weights: int, values: int, dtype: torch.dtype, moments: torch.dtype) -> Iterator[Case]:
    """AdamW of `weights` equal tensors with a guard, by our kernel and, all being of one dtype, by torch's fused one.

    torch's writes the divided gradients back too, which need not move.
    """
    shape = {"weights": weights, "N": values}
    settings = AdamWSettings(1e-4, (0.9, 0.999), 1e-8, 0.01)

    def make(by_torch: bool) -> Work:
        weight, grad = ([torch.ones(values, device="cuda", dtype=dtype) for _ in range(weights)] for _ in range(2))
        mean, square = ([torch.zeros(values, device="cuda", dtype=moments) for _ in range(weights)] for _ in range(2))
        step = [torch.ones((), device="cuda") for _ in range(weights)]
        divisor, stopped = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
        moved = sum(2 * w.nbytes + g.nbytes + 4 * m.nbytes for w, g, m in zip(weight, grad, mean, strict=True))
        if not by_torch:
            return Work(lambda: update(Updated(weight, grad, mean, square, step), settings, divisor, stopped), moved)
        numbers = {"beta1": 0.9, "beta2": 0.999, "lr": 1e-4, "weight_decay": 0.01, "eps": 1e-8}
        flags = {"amsgrad": False, "maximize": False, "fused": True}
        guard = {"grad_scale": divisor, "found_inf": stopped}
        return Work(lambda: adamw(weight, grad, mean, square, [], step, **flags, **guard, **numbers), moved)  # type: ignore[arg-type]

    name = "adamw" if moments == dtype else "adamw_wide_moments"
    yield Case(name, shape, dtype, lambda: make(False))
    if moments == dtype:
        yield Case("adamw_torch", shape, dtype, lambda: make(True))


def gradient_norm_cases(weights: int, values: int, dtype: torch.dtype) -> Iterator[Case]:
    """The norm over `weights` equal gradients, as training finds it, and by torch alone."""
    shape = {"weights": weights, "N": values}

    def make(run: Callable[[list[Tensor]], object]) -> Work:
        grads = [torch.ones(values, device="cuda", dtype=dtype) for _ in range(weights)]
        return Work(lambda: run(grads), sum(grad.nbytes for grad in grads))

    def by_torch(grads: list[Tensor]) -> object:
        return torch.linalg.vector_norm(torch.stack(list(torch._foreach_norm(grads, 2, dtype=torch.float32))))

    yield Case("gradient_norm", shape, dtype, lambda: make(global_norm))
    yield Case("gradient_norm_torch", shape, dtype, lambda: make(by_torch))


def optimiser_cases() -> Iterator[Case]:
    """The wide and the narrow matrices of Qwen2.5-7B, and around where a launch for each tensor begins to pay."""
    brain, wide = torch.bfloat16, torch.float32
    for weights, values in [(8, 37888 * 3584), (32, 3584 * 3584), (64, 2**22), (128, 2**21), (256, 2**20)]:
        yield from adamw_cases(weights, values, brain, brain)
        yield from gradient_norm_cases(weights, values, brain)
    yield from adamw_cases(4, 37888 * 3584, brain, wide)
    yield from adamw_cases(4, 37888 * 3584, wide, wide)


SOURCES: list[Callable[[], Iterator[Case]]] = [elementwise_cases, adapted_cases, low_precision_cases, optimiser_cases]


def cases() -> Iterator[Case]:
    """All cases of all sources."""
    for source in SOURCES:
        yield from source()


def median_ms(run: Callable[[], object], runs: int = RUNS) -> float:
    """The median time of a run, with a cold cache."""
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    for _ in range(WARM_UP):
        run()
    torch.cuda.synchronize()
    events = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(runs)]
    for start, end in events:
        flush.zero_()
        start.record()
        run()
        end.record()
    torch.cuda.synchronize()
    return statistics.median(start.elapsed_time(end) for start, end in events)


def copy_bytes_per_s() -> float:
    """Bytes read and written in a second by a plain copy: what this chip's memory gives."""
    source = torch.empty(COPY_BYTES, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * COPY_BYTES / (median_ms(lambda: target.copy_(source)) / 1e3)


def measure(case: Case, copy_rate: float) -> dict[str, object]:
    """The case's line."""
    work = case.make()
    time_ms = median_ms(work.run)
    rate = work.moved_bytes / (time_ms / 1e3)
    line: dict[str, object] = {
        "name": case.name,
        "shape": case.shape,
        "dtype": str(case.dtype).removeprefix("torch."),
        "median_ms": round(time_ms, 5),
        "moved_bytes": work.moved_bytes,
        "gb_per_s": round(rate / 1e9, 1),
        "copy_ratio": round(rate / copy_rate, 4),
    }
    if work.flops is not None:
        line["tflops_per_s"] = round(work.flops / (time_ms / 1e3) / 1e12, 1)
    return line


def chip_line(copy_rate: float) -> dict[str, object]:
    """The line that says what the others were measured on."""
    import triton

    return {
        "name": "copy",
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "moved_bytes": 2 * COPY_BYTES,
        "gb_per_s": round(copy_rate / 1e9, 1),
    }


def write(file: TextIO, line: dict[str, object]) -> None:
    """The line on stdout and in the file."""
    text = json.dumps(line)
    print(text, flush=True)
    file.write(text + "\n")
    file.flush()


def main(arguments: list[str] | None = None) -> int:
    """Measure all cases, or those whose name holds --only."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory; kernels.jsonl is appended to")
    parser.add_argument("--only", default="", help="only cases whose name holds this")
    chosen = parser.parse_args(arguments)
    if not torch.cuda.is_available():
        print(
            "benchmarks/kernels.py needs a CUDA GPU, and torch finds none here: tunesmith doctor says why",
            file=sys.stderr,
        )
        return 2
    chosen.out.mkdir(parents=True, exist_ok=True)
    copy_rate = copy_bytes_per_s()
    with (chosen.out / "kernels.jsonl").open("a", encoding="utf-8") as file:
        write(file, chip_line(copy_rate))
        for case in cases():
            if chosen.only in case.name:
                write(file, measure(case, copy_rate))
    return 0


if __name__ == "__main__":
    sys.exit(main())
