"""The pass with joined kernels has the decoder's own hidden states, for every family that it takes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import FreshTail, StepBatch
from tunesmith.engine.batching import _worst, to_device
from tunesmith.engine.fused_pass import FusedPass, has_fused_pass
from tunesmith.engine.pages import PAGE_SLOTS, PagedCache
from tunesmith.kernels import paged_attention_fresh
from tunesmith.model.block import Mlp
from tunesmith.model.decode_linears import DecodeFp8Linear, adopted
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import quantise_linears_fp8


def steps() -> list[StepBatch]:
    """Two requests' prompts of 5 and 3 tokens, then a token each."""

    def step(tokens: list[int], positions: list[int], starts: list[int], context: list[int]) -> StepBatch:
        pages = torch.tensor([[1], [3]], dtype=torch.int32)
        owner = [r for r in range(2) for _ in range(starts[r + 1] - starts[r])]
        slots = [int(pages[r, 0]) * 16 + p for r, p in zip(owner, positions, strict=True)]
        return StepBatch(
            tokens_T=torch.tensor(tokens),
            positions_T=torch.tensor(positions),
            slots_T=torch.tensor(slots),
            query_starts_R1=torch.tensor(starts, dtype=torch.int32),
            context_R=torch.tensor(context, dtype=torch.int32),
            block_tables_RP=pages,
            max_query=max(b - a for a, b in pairwise(starts)),
            max_context=max(context),
            sample_rows_B=torch.tensor([starts[1] - 1, starts[2] - 1]),
            sample_slots_B=torch.tensor([0, 1]),
            sample_positions_B=torch.tensor(context),
            sequence_slots=[0, 1],
            is_decode=len(tokens) == 2,
        )

    return [
        step([3, 9, 4, 7, 5, 8, 2, 6], [0, 1, 2, 3, 4, 0, 1, 2], [0, 5, 8], [5, 3]),
        step([11, 12], [5, 3], [0, 1, 2], [6, 4]),
    ]


def cache_of(decoder: Decoder, dtype: torch.dtype) -> PagedCache:
    return PagedCache(decoder.config, 4, dtype=dtype, device=torch.device("cpu"))


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "mixtral"])
def test_equals_the_decoder(family: str, tiny_model_dir) -> None:
    decoder = load_decoder(tiny_model_dir(family), device="cpu", dtype=torch.float32).eval()
    assert has_fused_pass(decoder)
    fused = FusedPass(decoder)
    one, other = cache_of(decoder, torch.float32), cache_of(decoder, torch.float32)
    with torch.inference_mode():
        for batch in steps():
            wanted = decoder(batch.tokens_T, batch.positions_T, PagedAttention(one, batch))
            found = fused(batch.tokens_T, batch.positions_T, PagedAttention(other, batch))
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.keys[0][1, :6], one.keys[0][1, :6])


def test_what_a_product_in_fp8_takes_is_quantised_by_swiglu(tiny_model_dir, monkeypatch: pytest.MonkeyPatch) -> None:
    """On this machine no kernel runs: the same bits either way, and the linear itself is not asked."""
    decoder = load_decoder(tiny_model_dir("llama"), device="cpu", dtype=torch.float32).eval()
    quantise_linears_fp8(decoder)
    for module in list(decoder.modules()):
        if isinstance(module, Mlp):
            module.down = adopted(DecodeFp8Linear, module.down)
    fused, found, seen = FusedPass(decoder), [], []
    product = DecodeFp8Linear.product_of_codes
    monkeypatch.setattr(DecodeFp8Linear, "product_of_codes", lambda *args: (seen.append(1), product(*args))[1])
    for wants in (False, True):
        monkeypatch.setattr(DecodeFp8Linear, "wants_codes", lambda *_, wants=wants: wants)
        batch, cache = steps()[0], cache_of(decoder, torch.float32)
        with torch.inference_mode():
            found.append(fused(batch.tokens_T, batch.positions_T, PagedAttention(cache, batch)))
        assert len(seen) == wants * len(decoder.blocks)
    assert torch.equal(*found)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "mistral"])
def test_prompts_with_nothing_in_the_cache_go_over_their_own_keys(
    family: str, tiny_model_dir, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of one length and one of another, behind a piece that goes on with what is in the cache."""
    monkeypatch.setattr(paged_attention_fresh, "_fits", lambda *_: True)
    monkeypatch.setattr(paged_attention_fresh, "LEAST_TOKENS", 1)
    decoder = load_decoder(tiny_model_dir(family), device="cpu", dtype=torch.float32).eval()
    first, second = mixed([4], [4]), mixed([3, 6, 6, 2], [7, 6, 6, 2])
    assert second.fresh == FreshTail((6, 6, 2), num_before=1, max_query=3, max_context=7)
    plain = replace(second, fresh=None)
    one, other = (PagedCache(decoder.config, 8, dtype=torch.float32, device=torch.device("cpu")) for _ in range(2))
    fused = FusedPass(decoder)
    with torch.inference_mode():
        for cache in (one, other):
            fused(first.tokens_T, first.positions_T, PagedAttention(cache, replace(first, fresh=None)))
        wanted = fused(plain.tokens_T, plain.positions_T, PagedAttention(one, plain))
        attend = PagedAttention(other, second)
        assert attend.has_fresh(0)
        torch.testing.assert_close(fused(second.tokens_T, second.positions_T, attend), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(other.keys[1][1:3, :6], one.keys[1][1:3, :6])
    assert not PagedAttention(other, second, invariant=True).has_fresh(0)


def mixed(counts: list[int], contexts: list[int]) -> StepBatch:
    """Requests with so many new tokens of so many in the cache, each on a page of its own."""
    lengths, ends = np.array(counts), np.array(contexts)
    host = _worst(lengths, ends)
    owner = np.repeat(np.arange(len(counts)), counts)
    tables = np.arange(len(counts), dtype=np.int32)[:, None]
    tokens = np.arange(len(host.tokens)) % 50 + 3
    slots = owner * PAGE_SLOTS + host.positions
    return to_device(replace(host, tokens=tokens, slots=slots, tables=tables), torch.device("cpu"))


def test_pages_of_fp8_have_their_own_way_in(tiny_model_dir) -> None:
    decoder = load_decoder(tiny_model_dir("qwen3"), device="cpu", dtype=torch.float32).eval()
    one, other = (cache_of(decoder, torch.float8_e4m3fn) for _ in range(2))
    with torch.inference_mode():
        for batch in steps():
            wanted = decoder(batch.tokens_T, batch.positions_T, PagedAttention(one, batch))
            found = FusedPass(decoder)(batch.tokens_T, batch.positions_T, PagedAttention(other, batch))
            torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-3)


def test_other_norms_run_as_the_decoder_has_them(tiny_model_dir) -> None:
    assert not has_fused_pass(load_decoder(tiny_model_dir("gpt2"), device="cpu", dtype=torch.float32))
