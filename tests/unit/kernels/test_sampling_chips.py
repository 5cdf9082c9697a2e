"""The kernels of sampling compile for every chip, without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

triton = pytest.importorskip("triton")
CHIPS = (80, 86, 89, 90, 100, 120)
SHARED_BYTES = 48 * 1024


def kernels() -> dict[str, tuple[Any, dict[str, str], dict[str, Any], int]]:
    """Every kernel with its arguments' types, its constants and its warps, for a vocabulary of 151936."""
    from tunesmith.kernels import decode_inputs_triton, log_normaliser_triton, sampling_logits_triton, sampling_triton
    from tunesmith.kernels import sampling_thresholds_triton as thresholds
    from tunesmith.kernels.sampling_noise import BROKEN, SERIES_BELOW, SITE, quarter

    numbers, ids, short_ids = "*fp32", "*i64", "*i32"
    draw = {"temperatures": numbers, "seeds": ids, "slots": ids, "positions": ids, "thresholds": numbers}
    draw |= {"scores": numbers, "best": short_ids, "row_stride": "i32", "splits": "i32"}
    shape = {"VOCAB": 151_936, "QUARTER": quarter(151_936), "COLUMNS": sampling_triton._COLUMNS, "SITE": SITE}
    shape |= {"SERIES_BELOW": SERIES_BELOW, "ROUNDS": 7}
    reduce = {"scores": numbers, "best": short_ids, "slots": ids, "tokens": ids, "last_tokens": ids, "splits": "i32"}
    place = {"stride": "i32", "vocab_size": "i32", "chunks": "i32"}
    wanted = {"temperatures": numbers, "top_ks": ids, "top_ps": numbers, "log_min_ps": numbers}
    measured = {"maxima": numbers, "counts": short_ids, "masses": numbers}
    sizes = {"DISTANCES": thresholds.DISTANCES, "CHUNKS": 64, "CHUNK": thresholds.CHUNK}
    most = {"MOST": thresholds.MOST_CANDIDATES}
    inputs = ("tokens", "positions", "slots", "sample_slots", "sample_positions")
    load = {name: ids for stem in inputs for name in (stem, f"to_{stem}")} | {"last_tokens": ids}
    load |= {name: short_ids for stem in ("contexts", "adapters", "tables") for name in (stem, f"to_{stem}")}
    load |= dict.fromkeys(("num_rows", "padding_slot", "table_stride", "to_table_stride"), "i32")
    change = {"logits": "*bf16", "prompts": "*u8", "answers": "*i16", "penalties": numbers, "masks": short_ids}
    change |= {"slots": ids, "places": ids, "mask_rows": ids, "changed": numbers, "stride": "i32", "vocab_size": "i32"}
    change |= {"words": "i32", "penalty_stride": "i32"}
    best = sampling_triton._best_kernel
    return {
        "draw": (best, {"logits": "*bf16", **draw}, {**shape, "HAS_THRESHOLDS": True}, 4),
        "plain draw": (best, {"logits": "*bf16", **draw}, {**shape, "HAS_THRESHOLDS": False}, 4),
        "reduce": (sampling_triton._reduce_kernel, reduce, {"SPLITS": 64, "BROKEN": BROKEN}, 1),
        "maxima": (
            thresholds.maxima_kernel,
            {"logits": numbers, "maxima": numbers, **place},
            {"CHUNK": thresholds.CHUNK},
            8,
        ),
        "measure": (
            thresholds.measure_kernel,
            {"logits": numbers, "temperatures": numbers, **measured, **place},
            sizes,
            8,
        ),
        "gather": (
            thresholds.gather_kernel,
            {"logits": "*bf16", **wanted, **measured, "candidates": numbers, **place},
            {**sizes, **most},
            8,
        ),
        "search": (
            thresholds.search_kernel,
            {"logits": numbers, **wanted, **measured, "candidates": numbers, "found": numbers, **place},
            {**sizes, **most},
            8,
        ),
        "change": (sampling_logits_triton.change_kernel, change, {"HAS_MASKS": True, "COLUMNS": 2048}, 8),
        "normaliser": (
            log_normaliser_triton._normaliser_kernel,
            {"logits": "*bf16", "found": numbers},
            {"VOCAB": 151_936, "COLUMNS": 4096},
            8,
        ),
        "load": (decode_inputs_triton._load_kernel, load, {"PAGE": 16, "COLUMNS": 256}, 2),
    }


NAMES = ["draw", "plain draw", "reduce", "maxima", "measure", "gather", "search", "change", "normaliser", "load"]


# One chip always, all of them where there is time.
@pytest.mark.parametrize("chips", [(90,), pytest.param(CHIPS, marks=pytest.mark.long)], ids=["one", "all"])
@pytest.mark.parametrize("name", NAMES)
def test_compiles_for_every_chip(
    name: str, chips: tuple[int, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    kernel, types, constants, warps = kernels()[name]
    if not hasattr(kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(kernel.arg_names)
    assert set(types) | set(constants) == set(names)
    signature = {argument: types.get(argument, "constexpr") for argument in names}
    attributes = {(names.index(a),): [["tt.divisibility", 16]] for a, kind in types.items() if kind.startswith("*")}
    fixed = {(names.index(argument),): value for argument, value in constants.items()}
    for chip in chips:
        source = ASTSource(kernel, signature, fixed, attributes)
        options = {"num_warps": warps, "enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", chip, 32), options=options)
        assert f".target sm_{chip}" in compiled.asm["ptx"]
        assert compiled.metadata.shared <= SHARED_BYTES
