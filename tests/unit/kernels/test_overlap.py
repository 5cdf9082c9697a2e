"""Kernels around attention that begin early: what they read, ask for and return from, before and behind the wait.

The order of the machine's instructions is the assembler's; the one handed to it is checked.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from tunesmith.kernels import paged_attention_tiles as tiles

triton = pytest.importorskip("triton")
CHIPS = (90, *(pytest.param(chip, marks=pytest.mark.long) for chip in (100, 120)))
GROUP = 7


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


def ptx_of(kernel: Any, types: dict[str, str], constants: dict[str, Any], chip: int, warps: int, stages: int) -> str:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {name: types.get(name, "constexpr") for name in names}
    of_16 = [name for name, kind in types.items() if kind[0] == "*" or name.endswith("stride")]
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in of_16}
    fixed = {(names.index(name),): value for name, value in constants.items()}
    options = {"num_warps": warps, "num_stages": stages, "launch_pdl": True, "enable_fp_fusion": True}
    source = ASTSource(kernel, signature, fixed, aligned)
    return str(triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options).asm["ptx"])


def halves(ptx: str) -> tuple[str, str]:
    """Before and behind the wait, which every program comes to; the next kernel was let begin before."""
    code = "\n".join(line for line in ptx.splitlines() if not line.lstrip().startswith("//"))
    assert code.count("griddepcontrol.wait") == code.count("griddepcontrol.launch_dependents") == 1
    before, behind = code.split("griddepcontrol.wait")
    assert "griddepcontrol.launch_dependents" in before
    assert not re.search(r"\bret;|\bst\.global|\bcp\.async|\batom\.|\bred\.", before)
    assert re.search(r"\bret;", behind)
    return before, behind


def loads(code: str) -> int:
    """Loads from global memory; not those of a vector of words, which only what other kernels write has."""
    assert not re.search(r"ld\.global\S*\.v\d", code)
    return len(re.findall(r"\bld\.global", code))


def attend(kind: str, page: str, chip: int) -> str:
    from tunesmith.kernels.paged_attention_triton import attend_kernel

    sizes, shared, is_decode = (128, 2, 1 if page == "fp8e4nv" else 2), 2**18, kind != "prefill"
    tile = tiles.decode_tile(*sizes, GROUP, shared) if is_decode else tiles.prefill_tile(*sizes, shared)
    types = {"query": "*bf16", "keys": f"*{page}", "values": f"*{page}", "out": "*bf16", "scale": "fp32"}
    types |= dict.fromkeys(("key_scales", "value_scales", "found", "statistics"), "*fp32")
    types |= dict.fromkeys(("tables", "starts", "contexts", "arrivals"), "*i32")
    types |= dict.fromkeys(("num_requests", "window", "most_parts", "held_rows", "table_stride"), "i32")
    types |= dict.fromkeys(("token_stride", "head_stride", "out_token_stride", "out_head_stride"), "i32")
    joined = tiles.JOINED_ROWS if kind == "joining" else 0
    constants = {"NUM_HEADS": 4, "GROUP": GROUP, "SLOTS": 16, "WIDTH": 128, "COLUMNS": 128, "ROWS": tile.rows}
    constants |= {"KEYS": tile.keys, "DECODE": is_decode, "SMALL": 0 if is_decode else 16, "SPLIT": is_decode}
    constants |= {"JOIN_ROWS": joined, "JOIN_AT_ONCE": tiles.parts_at_once(joined, 128), "FIXED": 0}
    constants |= {"LEAST": tiles.LEAST_SPLIT, "WINDOW": False, "FP8": page == "fp8e4nv", "OVERLAP": True}
    constants |= {"PHASES": 1 if is_decode else 2}
    return ptx_of(attend_kernel, types, constants, chip, tile.warps, tile.stages)


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("kind", ["apart", "joining"])
def test_attention_waits_for_queries_and_keys(kind: str, chip: int) -> None:
    """Before the wait: two starts and a context."""
    before, behind = halves(attend(kind, "bf16", chip))
    assert loads(before) == 3
    assert re.search(r"cp\.async", behind)
    assert re.search(r"ld\.global\S*\.v4", behind)


def test_attention_over_pages_of_fp8_waits_too() -> None:
    before, _ = halves(attend("apart", "fp8e4nv", 90))
    assert loads(before) == 3


@pytest.mark.parametrize("chip", CHIPS)
def test_attention_of_prompts_waits_for_queries(chip: int) -> None:
    before, _ = halves(attend("prefill", "bf16", chip))
    assert loads(before) == 4  # one of them in the loop that finds the request


@pytest.mark.parametrize("chip", CHIPS)
def test_joining_waits_for_what_was_found(chip: int) -> None:
    from tunesmith.kernels.paged_attention_operator import JOIN_WARPS, PARTS_AT_ONCE
    from tunesmith.kernels.paged_attention_parts_triton import join_kernel

    types = {"found": "*fp32", "statistics": "*fp32", "starts": "*i32", "contexts": "*i32", "out": "*bf16"}
    types |= dict.fromkeys(("window", "out_token_stride", "out_head_stride", "most_parts", "held_rows"), "i32")
    constants = {"NUM_HEADS": 4, "GROUP": GROUP, "WIDTH": 128, "COLUMNS": 128, "ROWS": 16, "KEYS": 128}
    constants |= {"AT_ONCE": PARTS_AT_ONCE, "FIXED": 0, "LEAST": 128, "WINDOW": False, "OVERLAP": True}
    before, behind = halves(ptx_of(join_kernel, types, constants, chip, JOIN_WARPS, 3))
    assert loads(before) == 3
    # How many parts there are is worked out before: that takes two divisions.
    assert len(re.findall(r"\bdiv\.s32", before)) >= 2
    assert "div.s32" not in behind


@pytest.mark.parametrize("chip", CHIPS)
@pytest.mark.parametrize("is_normed", [False, True])
def test_heads_wait_for_the_product(is_normed: bool, chip: int) -> None:
    """Before the wait: a slot, angles and a norm's weights; a thread has two columns of each half."""
    from tunesmith.kernels.heads_to_pages_triton import _heads_to_pages_kernel

    types = {"qkv": "*bf16", "query": "*bf16", "keys": "*bf16", "values": "*bf16", "slots": "*i64", "num_tokens": "i32"}
    types |= {"eps": "fp32", "cos": "*fp32", "sin": "*fp32"}
    constants: dict[str, Any] = {"NUM_HEADS": 28, "NUM_KV_HEADS": 4, "GIVEN_HEADS": 28, "HALF": 64, "COLUMNS": 64}
    constants |= {"TOKENS": 1, "HAS_NORM": is_normed, "HAS_ROPE": True, "OVERLAP": True}
    weights = ("query_weight", "key_weight")
    types |= dict.fromkeys(weights, "*bf16") if is_normed else {}
    constants |= {} if is_normed else dict.fromkeys(weights)
    before, behind = halves(ptx_of(_heads_to_pages_kernel, types, constants, chip, 1, 3))
    assert len(re.findall(r"\bld\.global", before)) == 3 + 2 * is_normed
    assert len(re.findall(r"\bld\.global", behind)) == 2
