"""The kernels of passes that only answer compile for every chip, without a GPU, within little shared memory."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
CHIPS = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = 48 * 1024


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Every kernel with its arguments' types, its constants and its warps."""
    from tunesmith.kernels import add_rms_norm_triton, heads_to_pages_triton

    bf16, wide = "*bf16", "*fp32"
    columns, warps = add_rms_norm_triton.row_launch(3584)
    stream = {"stream": bf16, "delta": bf16, "weight": bf16, "y": bf16, "eps": "fp32"}
    pages = {"qkv": bf16, "query": bf16, "keys": bf16, "values": bf16, "slots": "*i64"}
    counts = {"num_tokens": "i32", "eps": "fp32"}
    norms, tables = {"query_weight": bf16, "key_weight": bf16}, {"cos": wide, "sin": wide}
    shape = {"NUM_HEADS": 28, "NUM_KV_HEADS": 4, "GIVEN_HEADS": 28, "HALF": 64, "COLUMNS": 64}
    heads = heads_to_pages_triton._heads_to_pages_kernel
    one = {**shape, "TOKENS": 1, "HAS_NORM": 0, "HAS_ROPE": 1, "query_weight": None, "key_weight": None}
    many = {**shape, "GIVEN_HEADS": 32, "TOKENS": 8, "HAS_NORM": 1, "HAS_ROPE": 1}
    return {
        "add_rms_norm": (
            add_rms_norm_triton._add_rms_norm_kernel,
            stream,
            {"WIDTH": 3584, "COLUMNS": columns},
            warps,
        ),
        "heads_of_one_token": (heads, {**pages, **counts, **tables}, one, 1),
        "normed_heads_of_many": (heads, {**pages, **counts, **norms, **tables}, many, 4),
    }


@pytest.mark.parametrize("name", ["add_rms_norm", "heads_of_one_token", "normed_heads_of_many"])
def test_compiles_for_every_chip(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    aligned = {(names.index(a),): [["tt.divisibility", 16]] for a, kind in types.items() if kind.startswith("*")}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    for chip in CHIPS:
        source = ASTSource(kernel, signature, fixed, aligned)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        assert f".target sm_{chip}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_BYTES
