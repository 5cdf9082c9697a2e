"""The launches that are foreseen of an engine are those that it makes with real tensors, kernel by kernel."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.asked import Asked
from tunesmith.engine.batch import SampledRow
from tunesmith.engine.batching import HostBatch, to_device, worst_batches
from tunesmith.engine.launches import launches_of
from tunesmith.engine.loading import make_config
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.kernels.chip import Chip, foreseeing
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.warm_up import Launch, taken_down
from tunesmith.model.decoder import Decoder

pytest.importorskip("triton")
H200 = Chip((9, 0), 132)
LATER = ("nf4", "w8a8", "fp8-inner")
OF_GPUS = ("BY_HAND", "OVERLAP", "launch_pdl", "maxnreg")
CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 512,
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


@pytest.fixture(autouse=True)
def _compiled() -> None:
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels.rms_norm_triton import _normalise_kernel

    if not isinstance(_normalise_kernel, JITFunction):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")


@pytest.fixture
def model_dir(tmp_path: Path) -> Callable[..., str]:
    """A model without weights, of a family and widths for which most kernels are there."""

    def make(**changes: Any) -> str:
        (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
        return str(tmp_path)

    return make


def _asked(path: str, quantize: str | None, **more: Any) -> Asked:
    return Asked(
        path,
        quantize=quantize,
        dtype="bfloat16",
        weights="random",
        max_model_len=256,
        max_num_batched_tokens=1024,
        **more,
    )


def _really_launched(asked: Asked) -> list[Launch]:
    """By an engine's runner with storage, its tensors on the CPU, which stands for a GPU whose kernels do nothing."""
    with foreseeing(H200, "cpu"), kernels_on("cpu"), taken_down() as launches:
        model: Any = load_for_inference(
            asked.model,
            quantize=asked.quantize,
            dtype=asked.dtype,
            device="cpu",
            weights="random",
            head=asked.head,  # type: ignore[arg-type]
            one_head=asked.batch_invariant,
        )
        assert isinstance(model, Decoder)
        config = make_config(
            model,
            max_model_len=asked.max_model_len,
            max_num_batched_tokens=asked.max_num_batched_tokens,
            enforce_eager=asked.enforce_eager,
            kv_dtype=asked.kv_cache_dtype,
        )
        runner = NativeRunner(model, config, num_pages=40)
        runner.worst_pass()
        runner.warm_up(0.0)
        for num in (1, 8, 256):
            _step(runner, _decoding(num, 100))
            _step(runner, _decoding(num, 255))
        _step(runner, worst_batches(config)[0])
        while runner.sampling.warm_up(torch.bfloat16):
            pass
    return launches


def _decoding(num: int, context: int) -> HostBatch:
    """One new token of each request, in pages that it has."""
    slots = np.arange(num)
    one = np.ones(num, dtype=np.int64)
    none = np.zeros(0, dtype=np.int64)
    return HostBatch(
        tokens=one * 5,
        positions=one * context - 1,
        slots=slots % 32 * 16,
        starts=np.arange(num + 1),
        contexts=one * context,
        tables=np.zeros((num, 16), dtype=np.int32),
        sequence_slots=slots,
        sample_rows=slots,
        adapters=None,
        score_rows=none,
        score_targets=none,
        num_scored_top=0,
        is_decode=True,
    )


def _step(runner: NativeRunner, host: HostBatch) -> None:
    batch = to_device(host, runner.device)
    if not host.is_decode:
        batch = replace(batch, slots_T=torch.full_like(batch.slots_T, -1))
    params = SamplingParams(temperature=0.7)
    rows = [SampledRow(slot, params, 1, 3, (1, 2, 3), frozenset()) for slot in batch.sequence_slots]
    runner.forward(batch)
    runner.sample(batch, rows, None)


def _key(launch: Launch) -> tuple[Any, ...]:
    """Without what a launch on a CPU leaves out, whatever it stands for: assembler, and kernels that overlap."""
    kept = {name: value for name, value in launch.options.items() if name not in OF_GPUS}
    return replace(launch, options=kept).key


def _missing(asked: Asked) -> list[str]:
    launched = {_key(launch): launch for launch in _really_launched(asked)}
    assert len(launched) > 10
    foreseen = {_key(launch) for launch in launches_of(asked, H200)}
    # A CPU has no products in fp8, so it quantises after SwiGLU, which on a GPU is a kernel that does both.
    of_cpus = {"_forward_kernel"} if asked.quantize in ("fp8", "fp8-inner") else set()
    return [launch.name for key, launch in launched.items() if key not in foreseen and launch.name not in of_cpus]


@pytest.mark.parametrize(
    "quantize",
    [None, "fp8", "int4", "int8", *(pytest.param(name, marks=pytest.mark.long) for name in LATER)],
)
def test_they_are_those_of_real_tensors(quantize: str | None, model_dir: Callable[..., str]) -> None:
    assert _missing(_asked(model_dir(), quantize)) == []


@pytest.mark.parametrize("head", ["auto", "stored", "int8"])
def test_the_copy_of_a_head_is_among_them(head: str, model_dir: Callable[..., str]) -> None:
    """Its kernel's programs are cut by the vocabulary, which is no other weight's number of rows."""
    asked = _asked(model_dir(vocab_size=151_936), "fp8", head=head)
    of_stored = {_key(launch) for launch in launches_of(replace(asked, head="stored"), H200)}
    own = [launch.name for launch in launches_of(asked, H200) if _key(launch) not in of_stored]
    assert ("quad_kernel" in own) == (head != "stored"), own
    if head == "auto":
        assert _missing(asked) == []


@pytest.mark.parametrize("more", [{"enforce_eager": True}, {"kv_cache_dtype": "fp8"}])
def test_and_of_other_ways_to_run(more: dict[str, Any], model_dir: Callable[..., str]) -> None:
    assert _missing(_asked(model_dir(), None, **more)) == []


@pytest.mark.parametrize(
    "changes",
    [
        {"model_type": "qwen3", "head_dim": 128, "tie_word_embeddings": True},
        {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 2},
    ],
)
def test_and_of_other_decoders(changes: dict[str, Any], model_dir: Callable[..., str]) -> None:
    assert _missing(_asked(model_dir(**changes), None)) == []


def test_products_in_fp8_are_among_them(model_dir: Callable[..., str]) -> None:
    """Of more tokens than are widened: a CPU has no such product, so the comparison above does not see it."""
    path = model_dir(hidden_size=2048, intermediate_size=8192)
    names = {launch.name for launch in launches_of(_asked(path, "fp8"), H200)}
    assert {"_part_kernel", "_quantize_rows_kernel", "_rows_kernel"} <= names
    before = {launch.name for launch in launches_of(_asked(path, "fp8"), Chip((8, 0), 108))}
    assert not {"_part_kernel", "_quantize_rows_kernel", "_rows_kernel"} & before


def test_experts_leave_the_rest(model_dir: Callable[..., str]) -> None:
    path = model_dir(
        model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, architectures=["MixtralForCausalLM"]
    )
    names = {launch.name for launch in launches_of(_asked(path, None), H200)}
    assert {"attend_kernel", "_add_rms_norm_kernel", "_best_kernel"} <= names


def test_a_family_that_is_not_native_has_none(model_dir: Callable[..., str]) -> None:
    assert launches_of(_asked(model_dir(model_type="bloom"), None), H200) == []


def test_launches_around_attention_are_foreseen_as_ones_that_begin_early(model_dir: Callable[..., str]) -> None:
    """All of a pass but those of batch-invariant mode."""
    names = {"_heads_to_pages_kernel", "attend_kernel", "join_kernel"}
    wide = model_dir(num_attention_heads=16, head_dim=64)  # 8 query heads of a key head, which a kernel joins

    def kinds(chip: Chip, **more: Any) -> set[tuple[str, bool]]:
        launches = [launch for launch in launches_of(_asked(wide, None, **more), chip) if launch.name in names]
        for launch in launches:
            assert launch.options["OVERLAP"] == launch.options.get("launch_pdl", False)
        return {(launch.name, launch.options["OVERLAP"]) for launch in launches}

    found = kinds(H200)
    assert {(name, True) for name in names} <= found
    assert not any(overlaps for _, overlaps in kinds(Chip((8, 0), 108)))
