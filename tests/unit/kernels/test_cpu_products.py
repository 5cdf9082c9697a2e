"""Products of the compiled step as other machines compile them: without the matrix unit, without AVX-512."""

from __future__ import annotations

import ctypes
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest
import torch

import tunesmith.kernels
from tunesmith.kernels.cpu_compile import find_compiler
from tunesmith.kernels.int4 import dequantize_reference, quantize_int4
from tunesmith.kernels.int8 import quantize_int8

KERNELS = Path(tunesmith.kernels.__file__).parent
INT8, INT4 = 2, 3
EMULATED = (
    "-march=native",
    *(f"-D__AMX_{part}__" for part in ("TILE", "BF16", "INT8")),
    *("-include", str(Path(__file__).with_name("emulated_tiles.hpp"))),
)
PROGRAM = """
#include "cpu_products.hpp"
#include <vector>
extern "C" int multiply(const Weight *w, const float *x, int64_t tokens, int64_t first, int64_t last, float *y) {
    int64_t ld = padded(w->width);
    std::vector<uint16_t> half(MOST * ld), tiles(MOST * ld);
    std::vector<int16_t> codes(MOST * ld);
    std::vector<float> steps(MOST), sums(MOST * ld / FINEST);
    Input in{x, w->width, ld, half.data(), tiles.data(), codes.data(), steps.data(), sums.data()};
    for (int me = 0; me < 3; me++) prepare(*w, x, w->width, in, tokens, me, 3);
    product(*w, in, int(tokens), first, last, {y, w->rows, SET});
    return WIDE + TILES;
}
"""


class Weight(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_int64) for name in ("kind", "rows", "width", "group")),
        *((name, ctypes.c_void_p) for name in ("data", "scale", "zeros", "bias")),
    ]


def flags_of_this_machine() -> set[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return set()
    return set(next((line.split(":")[1].split() for line in lines if line.startswith("flags")), []))


def compiled(folder: Path, *flags: str) -> ctypes.CDLL:
    compiler = find_compiler()
    if compiler is None:
        pytest.skip("no C++ compiler")
    source, target = folder / "products.cpp", folder / "products.so"
    source.write_text(PROGRAM, encoding="utf-8")
    common = ("-O2", "-std=c++17", "-ffp-contract=fast", "-shared", "-fPIC", f"-I{KERNELS}")
    empty = subprocess.run([compiler, *flags, "-E", "-x", "c++", "/dev/null"], capture_output=True, check=False)
    if empty.returncode:
        pytest.skip(f"this compiler does not know {' '.join(flags)}")
    subprocess.run([compiler, *common, *flags, str(source), "-o", str(target)], check=True)
    return ctypes.CDLL(str(target))


def check(library: ctypes.CDLL, held: str, width: int, rows: int) -> int:
    """Every format of weights against its dequantised form; rows in parts, as threads take them. How it was made."""
    draw = torch.Generator().manual_seed(width)
    dense = torch.randn(rows, width, generator=draw)
    if held == "int8":
        whole = quantize_int8(dense)
        codes, scale = whole.codes, whole.scale
        truth = codes.double() * scale.double()[:, None]
        weight = Weight(INT8, rows, width, 0, codes.data_ptr(), scale.data_ptr(), None, None)
        kept = [codes, scale]
    else:
        form = quantize_int4(dense, int(held.split("-")[1]), held.endswith("sym"))
        scales, truth = form.scales.float(), dequantize_reference(form, torch.float32).double()
        zeros = None if form.zeros is None else form.zeros.data_ptr()
        weight = Weight(INT4, rows, width, form.group_size, form.words.data_ptr(), scales.data_ptr(), zeros, None)
        kept = [form.words, scales]
    made = 0
    for tokens in range(1, 17):
        x, y = torch.randn(tokens, width, generator=draw), torch.full((tokens, rows), float("nan"))
        for first, last in pairwise((0, rows // 3 // 16 * 16, rows)):
            places = (ctypes.c_void_p(tensor.data_ptr()) for tensor in (x, y))
            given, put = places
            counts = (ctypes.c_int64(count) for count in (tokens, first, last))
            made = library.multiply(ctypes.byref(weight), given, *counts, put)
        off = x.double().abs().amax(1, keepdim=True) / 65534
        sizes = x.double().abs() @ truth.abs().t()
        assert ((y - x.double() @ truth.t()).abs() <= 1.001 * off * truth.abs().sum(1) + 1e-6 * sizes).all(), tokens
    assert kept
    return made


@pytest.mark.long
@pytest.mark.parametrize(
    ("flags", "needs", "made"),
    [
        ((), (), 0),
        (("-march=x86-64-v3",), ("avx2", "fma"), 0),
        (("-march=icelake-server",), ("avx512_vnni", "avx512vbmi"), 0),
        (("-march=icelake-server", "-mavx512bf16"), ("avx512_bf16", "avx512vbmi"), 1),
        (("-march=sapphirerapids",), ("amx_int8", "avx512_fp16"), 2),
        (EMULATED, ("avx512_bf16", "avx512vbmi"), 2),
    ],
)
def test_every_way_of_compiling_is_right(
    flags: tuple[str, ...], needs: tuple[str, ...], made: int, tmp_path: Path
) -> None:
    if lacks := set(needs) - flags_of_this_machine():
        pytest.skip(f"this processor has no {', '.join(sorted(lacks))}")
    library = compiled(tmp_path, *flags)
    for held in ("int8", "int4-128", "int4-128-sym", "int4-64", "int4-32"):
        for width, rows in ((64, 16), (96, 17), (704, 75), (1000, 33), (2560, 100)):
            assert check(library, held, width, rows) == made
