"""The kernels with the adapters' sums compile for every chip that can run them, without a GPU."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
CHIPS = (80, 86, 89, 90, 100, 120)
# What a block gets on every chip without asking for more; half of what the larger ones give to one that does.
SHARED_BYTES, LARGER = 48 * 1024, dict.fromkeys((80, 90, 100), 80 * 1024)
RANKS = {"RANK": 32, "CHUNK": 32}
GRAD_RANKS = {"GRAD_RANK": 16, "GRAD_CHUNK": 16}


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, int], int]]:
    """Every kernel with its arguments' types (strides are multiples of 16), its constants and its warps."""
    from tunesmith.kernels import swiglu_low_rank_grads_triton as sums
    from tunesmith.kernels import swiglu_low_rank_triton as low

    stream, wide, count = "*bf16", "*fp32", "i32"
    forward = {**dict.fromkeys(("gate_up", "low", "up", "h"), stream), "num_rows": count, "stride": count}
    backward = {**forward, **dict.fromkeys(("grad_h", "dlow", "down", "out"), stream)}
    backward |= dict.fromkeys(("grad_stride", "out_stride"), count)
    gradients = {"of_up": wide, "of_down": wide}
    shape: dict[str, int] = {"WIDTH": 18944, "ROWS": low.ROWS, "COLUMNS": low.COLUMNS, "STEPS": low.STEPS, **RANKS}
    below: dict[str, int] = {"ROWS": low.BACKWARD_ROWS, "STEPS": low.BACKWARD_STEPS}
    rest: dict[str, int] = {**GRAD_RANKS, "WANT_H": 1}
    return {
        "swiglu_low_rank": (low._forward_kernel, forward, shape, low.WARPS),
        "swiglu_low_rank_backward": (low._backward_kernel, backward, {**shape, **rest, **below}, low.WARPS),
        "swiglu_low_rank_grads": (
            sums._grads_kernel,
            {**{name: kind for name, kind in backward.items() if name not in ("h", "out", "out_stride")}, **gradients},
            {**shape, **GRAD_RANKS, "ROWS": sums.ROWS, "COLUMNS": sums.COLUMNS, "STEPS": sums.STEPS}
            | {"STAGES": sums.STAGES},
            sums.WARPS,
        ),
    }


def stages_of(chip: int) -> dict[str, int]:
    """The constants that go by the chip."""
    from tunesmith.kernels import swiglu_low_rank_grads_triton as sums

    return {"STAGES": sums.MOST_STAGES if chip in LARGER else sums.STAGES}


NAMES = ["swiglu_low_rank", "swiglu_low_rank_backward", "swiglu_low_rank_grads"]


@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_every_chip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    aligned = [argument for argument, kind in types.items() if not argument.startswith("num_")]
    attributes = {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    for chip in CHIPS:
        chosen = constants | {key: value for key, value in stages_of(chip).items() if key in constants}
        fixed = {(names.index(argument),): value for argument, value in chosen.items()}
        source = ASTSource(kernel, signature, fixed, attributes)
        options = {"num_warps": warps, "num_stages": 1, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        ptx = compiled.asm["ptx"]
        assert f".target sm_{chip}" in ptx
        assert compiled.metadata.shared <= (LARGER.get(chip, SHARED_BYTES) if "STAGES" in constants else SHARED_BYTES)
        stores = re.findall(r"st\.global\S*\.[bf]\d+", ptx)
        # Sixteen bytes at a time.
        assert {store for store in stores if "v4.b32" not in store} <= {"st.global.b32"}, (chip, stores)
        loads = re.findall(r"ld\.global\S*\.[bf]\d+", ptx)
        assert not [load for load in loads if "b16" in load or "b8" in load], (chip, loads)
        # Tiles that are on their way while others are computed go straight to shared memory.
        # Only of a rank of 16 is there less than 16 bytes for each thread.
        copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (\w+)", ptx)
        assert set(copies) <= {"0x8", "0x10"}, (chip, copies)
        assert sum("v4.b32" in load for load in loads) + copies.count("0x10") >= 4
        assert re.search(r"wgmma|mma\.sync|tcgen05\.mma", ptx), chip
