"""The pass with int4 products by bytes: norms and SwiGLU write them, and the states are the decoder's."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.asked import Asked
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import StepBatch
from tunesmith.engine.fused_pass import FusedPass
from tunesmith.engine.launches import launches_of
from tunesmith.engine.pages import PagedCache
from tunesmith.kernels.chip import Chip
from tunesmith.model import decode_int4
from tunesmith.model.decode_int4 import DecodeInt4Linear
from tunesmith.model.decode_linears import adopted
from tunesmith.model.decoder import Decoder
from tunesmith.model.int4 import Int4Linear

CONFIG: dict[str, Any] = {
    "model_type": "qwen2",
    "architectures": ["Qwen2ForCausalLM"],
    "vocab_size": 64,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
}


def made(path: Path, **changes: Any) -> Decoder:
    (path / "config.json").write_text(json.dumps({**CONFIG, **changes}), encoding="utf-8")
    decoder = cast(
        Decoder, load_for_inference(path, quantize="int4", dtype=torch.bfloat16, device="cpu", weights="random")
    )
    for parent in list(decoder.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is Int4Linear:
                setattr(parent, name, adopted(DecodeInt4Linear, child))
    return decoder.eval()


def steps() -> list[StepBatch]:
    """A prompt of five tokens and one of three, then a token each."""
    found = []
    for positions, starts in (([0, 1, 2, 3, 4, 0, 1, 2], [0, 5, 8]), ([5, 3], [0, 1, 2])):
        pages = torch.tensor([[1], [3]], dtype=torch.int32)
        owner = [r for r in range(2) for _ in range(starts[r + 1] - starts[r])]
        contexts = [positions[starts[r + 1] - 1] + 1 for r in range(2)]
        found.append(
            StepBatch(
                tokens_T=torch.arange(len(positions)) + 3,
                positions_T=torch.tensor(positions),
                slots_T=torch.tensor([int(pages[r, 0]) * 16 + p for r, p in zip(owner, positions, strict=True)]),
                query_starts_R1=torch.tensor(starts, dtype=torch.int32),
                context_R=torch.tensor(contexts, dtype=torch.int32),
                block_tables_RP=pages,
                max_query=max(b - a for a, b in pairwise(starts)),
                max_context=max(contexts),
                sample_rows_B=torch.tensor([starts[1] - 1, starts[2] - 1]),
                sample_slots_B=torch.tensor([0, 1]),
                sample_positions_B=torch.tensor(contexts),
                sequence_slots=[0, 1],
                is_decode=len(positions) == 2,
            )
        )
    return found


def counted(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often each of those that write bytes is asked."""
    counts: Counter[str] = Counter()

    def counting(name: str, given: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: (counts.update([name]), given(*args))[1]

    for name in ("quantize_x_bytes", "add_rms_norm_bytes_", "swiglu_bytes"):
        monkeypatch.setattr(decode_int4, name, counting(name, getattr(decode_int4, name)))
    return counts


def run(decoder: Decoder, use: Callable[[Decoder], Any]) -> list[torch.Tensor]:
    cache = PagedCache(decoder.config, 4, dtype=torch.bfloat16, device=torch.device("cpu"))
    with torch.inference_mode():
        return [use(decoder)(b.tokens_T, b.positions_T, PagedAttention(cache, b)).float() for b in steps()]


def test_norms_and_swiglu_write_the_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = made(tmp_path)
    plain, reference = run(decoder, FusedPass), run(decoder, lambda d: d)
    counts = counted(monkeypatch)
    monkeypatch.setattr(decode_int4, "takes_bytes", lambda weight, tokens, dtype: tokens <= 4)
    found = run(decoder, FusedPass)
    # Eight tokens are too many here. Of two: the first norm's and attention's, all other norms', all gates'.
    assert counts == {"quantize_x_bytes": 1 + 3, "add_rms_norm_bytes_": 2 * 3 - 1, "swiglu_bytes": 3}
    assert torch.equal(found[0], plain[0])
    for mine, other in ((found[1], plain[1]), (found[1], reference[1])):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)
    assert not torch.equal(found[1], plain[1])


def test_where_one_linear_does_not_want_them_it_has_sixteen_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A width that is no whole number of steps: down is multiplied as before."""
    decoder = made(tmp_path, intermediate_size=640)
    plain = run(decoder, FusedPass)
    counts = counted(monkeypatch)
    monkeypatch.setattr(decode_int4, "takes_bytes", lambda weight, *_: weight.shape[1] % 256 == 0)
    found = run(decoder, FusedPass)
    assert counts["swiglu_bytes"] == 0
    assert counts["add_rms_norm_bytes_"] == 2 * (2 * 3 - 1)
    for mine, other in zip(found, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=0.05, atol=0.05)


def test_what_writes_and_reads_them_is_foreseen(tmp_path: Path) -> None:
    """On a GPU that has the products; with groups of 128 for up to eight tokens."""
    pytest.importorskip("triton")
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels.int4_bytes_triton import bytes_kernel

    if not isinstance(bytes_kernel, JITFunction):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG), encoding="utf-8")
    limits = {"max_model_len": 64, "max_num_batched_tokens": 256}
    asked = Asked(str(tmp_path), quantize="int4", dtype="bfloat16", weights="random", **limits)
    launches = launches_of(asked, Chip((9, 0), 132))
    assert {"bytes_kernel", "_blocks_kernel", "_norm_kernel"} <= {launch.name for launch in launches}
    mine = [launch.options for launch in launches if launch.name == "bytes_kernel"]
    assert {options["TILES"] for options in mine} == {1, 2}
    assert all(options["OVERLAP"] and options["BY_HAND"] for options in mine)
