"""The kernels of paged attention compile for every chip, without a GPU, within its shared memory, to what they should.

Products are the tensor cores', keys and values are copied ahead, sixteen bytes at a time.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.hardware import GENERATIONS
from tunesmith.kernels import paged_attention_tiles as tiles

triton = pytest.importorskip("triton")
CHIPS = {10 * major + minor: generation for (major, minor), generation in GENERATIONS.items() if major >= 8}
BYTES = {"bf16": 2, "fp16": 2, "fp32": 4, "fp8e4nv": 1}
KINDS = ["decode", "prefill", "invariant", "invariant-decode"]
GROUP = 7


def attend(kind: str, head_dim: int, value: str, page: str, shared: int, window: bool) -> tuple[Any, ...]:
    """The kernel with its arguments' types, its constants, and its tile."""
    from tunesmith.kernels.paged_attention_triton import attend_kernel

    sizes = head_dim, BYTES[value], BYTES[page]
    if kind.startswith("invariant"):
        tile = tiles.invariant_tile(*sizes)
    else:
        tile = tiles.decode_tile(*sizes, GROUP, shared) if kind == "decode" else tiles.prefill_tile(*sizes, shared)
    types = {"query": f"*{value}", "keys": f"*{page}", "values": f"*{page}", "out": f"*{value}", "scale": "fp32"}
    types |= dict.fromkeys(("key_scales", "value_scales", "found", "statistics"), "*fp32")
    types |= dict.fromkeys(("tables", "starts", "contexts", "arrivals"), "*i32")
    types |= dict.fromkeys(("num_requests", "window", "most_parts", "held_rows"), "i32")
    types |= dict.fromkeys(
        ("table_stride", "token_stride", "head_stride", "out_token_stride", "out_head_stride"), "i32"
    )
    constants: dict[str, object] = {"NUM_HEADS": 4, "GROUP": GROUP, "SLOTS": 16, "WIDTH": head_dim}
    constants |= {"COLUMNS": tiles.padded(head_dim), "ROWS": tile.rows, "KEYS": tile.keys, "WINDOW": window}
    constants |= {"DECODE": "decode" in kind, "SPLIT": "decode" in kind, "SMALL": 16 if kind == "prefill" else 0}
    joined = tiles.JOINED_ROWS if kind == "decode" else 0
    constants |= {"JOIN_ROWS": joined, "JOIN_AT_ONCE": tiles.parts_at_once(joined, head_dim)}
    constants |= {"FIXED": tiles.INVARIANT_SPLIT if "invariant" in kind else 0, "LEAST": tiles.LEAST_SPLIT}
    constants |= {"FP8": page == "fp8e4nv", "PHASES": 2 if tile.rows >= tiles.INVARIANT_ROWS and not window else 1}
    return attend_kernel, types, constants, tile


def compiled(
    kernel: Any, types: dict[str, str], constants: dict[str, object], chip: int, warps: int, stages: int
) -> Any:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    aligned = [argument for argument, kind in types.items() if kind.startswith("*") or argument.endswith("stride")]
    attributes = {(names.index(argument),): [["tt.divisibility", 16]] for argument in aligned}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": True}
    return triton.compile(
        ASTSource(kernel, signature, fixed, attributes), target=GPUTarget("cuda", chip, 32), options=options
    )


def check(kind: str, head_dim: int, value: str, page: str, chip: int, window: bool = False) -> None:
    shared = CHIPS[chip].shared_bytes
    kernel, types, constants, tile = attend(kind, head_dim, value, page, shared, window)
    result = compiled(kernel, types, constants, chip, tile.warps, tile.stages)
    assert result.metadata.shared <= shared, (kind, head_dim, value, page, chip, tile)
    ptx = result.asm["ptx"]
    assert f".target sm_{chip}" in ptx
    assert re.search(r"cp\.async", ptx)
    assert value == "fp32" or re.search(r"wgmma\.mma_async|mma\.sync|tcgen05\.mma", ptx)
    if page != "fp8e4nv":
        assert not re.findall(r"ld\.global\S*\.b16", ptx)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize(
    ("kind", "page", "chip"), [("decode", "bf16", 86), ("prefill", "bf16", 90), ("decode", "fp8e4nv", 89)]
)
def test_compiles_for_a_chip(kind: str, page: str, chip: int) -> None:
    check(kind, 128, "bf16", page, chip)


@pytest.mark.long
@pytest.mark.parametrize("head_dim", [64, 96, 128, 256])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("value", "page"),
    [
        ("bf16", "bf16"),
        ("fp16", "fp16"),
        ("fp32", "fp32"),
        ("bf16", "fp8e4nv"),
        ("fp16", "fp8e4nv"),
        ("fp32", "fp8e4nv"),
    ],
)
def test_compiles_for_every_chip(kind: str, head_dim: int, value: str, page: str) -> None:
    for chip, generation in CHIPS.items():
        if page != "fp8e4nv" or generation.has_fp8:
            check(kind, head_dim, value, page, chip, window=head_dim == 64)


@pytest.mark.long
def test_joining_and_writing_compile_for_every_chip() -> None:
    from tunesmith.kernels import kv_cache_triton as cache
    from tunesmith.kernels.kv_cache_scale import EXPONENT, EXPONENT_OF_448, MANTISSA_ABOVE_448, SMALLEST_SCALE
    from tunesmith.kernels.launch import tile
    from tunesmith.kernels.paged_attention_operator import JOIN_WARPS, PARTS_AT_ONCE
    from tunesmith.kernels.paged_attention_parts_triton import join_kernel

    join = {"found": "*fp32", "statistics": "*fp32", "starts": "*i32", "contexts": "*i32", "out": "*bf16"}
    join |= dict.fromkeys(("window", "out_token_stride", "out_head_stride", "most_parts", "held_rows"), "i32")
    shape: dict[str, object] = {"NUM_HEADS": 4, "GROUP": GROUP, "WIDTH": 128, "COLUMNS": 128, "ROWS": 16, "KEYS": 64}
    shape |= {"AT_ONCE": PARTS_AT_ONCE, "FIXED": 0, "LEAST": tiles.LEAST_SPLIT, "WINDOW": False}
    new = {"key": "*bf16", "value": "*bf16", "slots": "*i64", "num_tokens": "i32"}
    new |= {"key_stride": "i32", "value_stride": "i32"}
    rows, columns, warps = tile(512)
    place: dict[str, object] = {"WIDTH": 512, "ROWS": rows, "COLUMNS": columns}
    scaled: dict[str, object] = {"NUM_HEADS": 4, "SLOTS": 16, "WIDTH": 128, "COLUMNS": 128, "SMALLEST": SMALLEST_SCALE}
    scaled |= {"EXPONENT": EXPONENT, "EXPONENT_OF_448": EXPONENT_OF_448, "MANTISSA_ABOVE_448": MANTISSA_ABOVE_448}
    codes = dict.fromkeys(("keys", "values"), "*fp8e4nv") | dict.fromkeys(("key_scales", "value_scales"), "*fp32")
    for chip, generation in CHIPS.items():
        compiled(join_kernel, join, shape, chip, JOIN_WARPS, 1)
        compiled(cache._write_kernel, {**new, "keys": "*bf16", "values": "*bf16"}, place, chip, warps, 1)
        if generation.has_fp8:
            compiled(cache._write_fp8_kernel, {**new, **codes}, scaled, chip, 1, 1)
