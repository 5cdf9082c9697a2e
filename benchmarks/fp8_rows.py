"""How fast rows are quantised to fp8, in one pass and in two: `python benchmarks/fp8_rows.py [--out DIR]`, on a GPU.

A JSON line for every width (3584, 4096, 18944, 37888), without and with factors for the columns, and every way to run
it: the fastest of `--runs` runs between CUDA events, each after 1 GiB was overwritten; GB/s of the bytes that have to
move (every input once, every output once), and these bytes' time at `--bandwidth` (what an H200's memory gives) as
`floor_ms`. `once`: a row is held (`kernels/fp8_held_triton.Held`), `by_columns`: so many columns at a time, which reads
wider rows twice. The codes of every way are compared with those of the first. The last lines say for every width what
was fastest beside what the rule takes today: `FORMS` is set by them.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from tunesmith.kernels import fp8_triton
from tunesmith.kernels.fp8 import FP8, has_fp8
from tunesmith.kernels.fp8_held_triton import Held, held, launch_held
from tunesmith.kernels.fp8_triton import launch_by_columns
from tunesmith.kernels.warm_up import compile_all, recorded

WIDTHS = (3584, 4096, 18944, 37888)
BANDWIDTH = 4.29e12
WARM_UP = 2
FLUSH_BYTES = 2**30
COMPARED_ROWS = 64

NARROW = (
    Held(512, 2),
    Held(512, 2, rows=2),
    Held(1024, 4),
    Held(1024, 4, rows=2),
    Held(1024, 4, rows=4),
    Held(1024, 4, wide=True),
    Held(1024, 4, rows=2, wide=True),
    Held(1024, 2, vector=16),
)
WIDE = (
    Held(1024, 4, registers=128),
    Held(2048, 8),
    Held(2048, 8, registers=128),
    Held(2048, 8, rows=2, registers=128),
    Held(2048, 8, wide=True),
    Held(4096, 16),
    Held(4096, 16, registers=64),
    Held(4096, 16, rows=2, registers=128),
    Held(4096, 16, registers=128, wide=True),
    Held(4096, 8, registers=128, vector=16),
    Held(8192, 32),
    Held(8192, 32, registers=64, wide=True),
)


@dataclass(frozen=True)
class ByColumns:
    """So many columns at a time."""

    columns: int
    warps: int


Form = Held | ByColumns


def rule(width: int) -> Form:
    """What `quantize_rows_fp8` takes for rows of bfloat16 today."""
    columns = min(fp8_triton.WIDEST, 1 << (width - 1).bit_length())
    form = None if columns >= width else held(2 * width)
    return form or ByColumns(columns, max(1, min(8, columns // fp8_triton._COLUMNS_PER_WARP)))


def forms(width: int, folded: bool) -> list[Form]:
    """All ways for a width, the one with the fewest questions first. Products are held only where there are factors."""
    whole = 1 << (width - 1).bit_length()
    if whole <= fp8_triton.WIDEST:
        found: list[Form] = [ByColumns(whole, warps) for warps in (4, 2, 8)]
    else:
        found = [ByColumns(*size) for size in ((8192, 8), (4096, 4), (4096, 8), (8192, 16), (16384, 16))]
    found += [form for form in (NARROW if whole <= fp8_triton.WIDEST else WIDE) if folded or not form.wide]
    found.append(rule(width))
    return list(dict.fromkeys(found))


def launch(form: Form, x: Tensor, fold: Tensor | None, codes: Tensor, scale: Tensor) -> None:
    """Codes and scales of x by a form."""
    if isinstance(form, Held):
        launch_held(x, fold, codes, scale, form)
    else:
        launch_by_columns(x, fold, codes, scale, form.columns, form.warps)


def tensors(rows: int, width: int, folded: bool, device: str) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """x, the factors, and memory for codes and scales."""
    x = torch.randn(rows, width, device=device, dtype=torch.bfloat16)
    fold = torch.rand(width, device=device) + 0.5 if folded else None
    codes = torch.empty(rows, width, device=device, dtype=FP8)
    return x, fold, codes, torch.empty(rows, 1, device=device)


def compile_forms(rows: int) -> None:
    """All kernels at once, a process for every core, before the GPU is touched."""

    def every() -> None:
        for width in WIDTHS:
            for folded in (False, True):
                made = tensors(rows, width, folded, "meta")
                for form in forms(width, folded):
                    launch(form, *made)

    compile_all(recorded(every), torch.cuda.get_device_capability(), os.cpu_count() or 1)


def best_ms(run: Callable[[], None], flush: Tensor, runs: int) -> float:
    """The fastest run, each with nothing of its inputs in the cache."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    found = []
    for number in range(WARM_UP + runs):
        flush.zero_()
        begin.record()
        run()
        end.record()
        end.synchronize()
        if number >= WARM_UP:
            found.append(begin.elapsed_time(end))
    return min(found)


def rows_of(width: int, folded: bool, options: argparse.Namespace, flush: Tensor) -> Iterator[dict[str, object]]:
    """A row for every form that runs, and one for what does not; at last the fastest."""
    x, fold, codes, scale = tensors(options.tokens, width, folded, "cuda")
    num_bytes = x.nbytes + codes.nbytes + scale.nbytes + (0 if fold is None else fold.nbytes)
    truth: tuple[Tensor, Tensor] | None = None
    measured: dict[Form, float] = {}
    for form in forms(width, folded):
        kind = "once" if isinstance(form, Held) else "by_columns"
        row: dict[str, object] = {"width": width, "folded": folded, "kernel": kind, **asdict(form)}
        codes.view(torch.uint8).zero_()
        try:
            ms = best_ms(partial(launch, form, x, fold, codes, scale), flush, options.runs)
        except RuntimeError as error:
            yield {**row, "error": str(error)[:200]}
            continue
        found = codes[:COMPARED_ROWS].view(torch.uint8).clone(), scale.clone()
        truth = truth or found
        same = all(torch.equal(ours, first) for ours, first in zip(found, truth, strict=True))
        if same:
            measured[form] = ms
        floor_ms = num_bytes / options.bandwidth * 1e3
        rates = {"ms": round(ms, 4), "floor_ms": round(floor_ms, 4), "gb_per_s": round(num_bytes / ms / 1e6)}
        yield {**row, **rates, "same_bits": same}
    today = rule(width)
    best = min(measured, key=lambda form: measured[form])
    found_ms = {"best_ms": round(measured[best], 4), "rule_ms": round(measured.get(today, float("nan")), 4)}
    yield {"width": width, "folded": folded, "best": repr(best), "rule": repr(today), **found_ms}


def main(arguments: list[str] | None = None) -> int:
    """Measure all widths."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, help="directory; fp8_rows.jsonl is appended to")
    parser.add_argument("--tokens", type=int, default=8192, help="rows")
    parser.add_argument("--runs", type=int, default=8)
    parser.add_argument("--bandwidth", type=float, default=BANDWIDTH, help="bytes a second of the chip's memory")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() or not has_fp8("cuda"):
        print("benchmarks/fp8_rows.py needs a GPU with fp8 (sm_89 or newer): see tunesmith doctor", file=sys.stderr)
        return 2
    compile_forms(options.tokens)
    flush = torch.empty(FLUSH_BYTES, dtype=torch.uint8, device="cuda")
    lines = []
    for width in WIDTHS:
        for folded in (False, True):
            for row in rows_of(width, folded, options, flush):
                lines.append(json.dumps(row))
                print(lines[-1], flush=True)
    if options.out is not None:
        options.out.mkdir(parents=True, exist_ok=True)
        with (options.out / "fp8_rows.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in lines)
    return 0


if __name__ == "__main__":
    sys.exit(main())
