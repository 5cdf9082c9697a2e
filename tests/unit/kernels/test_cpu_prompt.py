"""Steps with prompts by our own C++ are at least as near to float32 as torch's pass, on every mixture of requests."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.batch import StepBatch
from tunesmith.engine.cpu_pass import CpuPass
from tunesmith.kernels import cpu_library
from tunesmith.model.decoder import Decoder
from tunesmith.model.held import HeldLinear

_path = Path(__file__).parents[1] / "engine" / "test_cpu_pass.py"
_spec = importlib.util.spec_from_file_location("schedules_of_prompts", _path)
assert _spec is not None and _spec.loader is not None
schedules = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(schedules)

WIDE_FLAGS = {"avx512_bf16", "avx512vbmi", "avx512_vnni"}
ODD = {"hidden_size": 90, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 20, "intermediate_size": 150}
WIDE = {**ODD, "hidden_size": 128, "num_attention_heads": 4, "head_dim": 32, "intermediate_size": 320}
MIXTURES = (
    [(0, 0, 1), (1, 0, 16), (2, 0, 3), (3, 0, 77)],
    [(3, 77, 30), (0, 1, 1), (2, 3, 4)],
    [(4, 0, 110), (1, 16, 1), (2, 7, 1), (0, 2, 90), (3, 107, 2)],
)
"""Steps, each of requests: slot, tokens before, new tokens."""
PAGES_OF_SLOT = 8


@pytest.fixture(scope="module")
def library(compiled_library: Any) -> Any:
    file = Path("/proc/cpuinfo")
    if not file.exists() or not set(file.read_text(encoding="utf-8").split()) >= WIDE_FLAGS:
        pytest.skip("prompts are ours on processors with AVX-512 that has bfloat16")
    return compiled_library


def batches() -> list[StepBatch]:
    draw = random.Random(5)
    order = list(range(schedules.PAGES))
    draw.shuffle(order)
    pages = [order[slot * PAGES_OF_SLOT : (slot + 1) * PAGES_OF_SLOT] for slot in range(schedules.SLOTS)]
    return [schedules.step_of([(*part, pages[part[0]]) for part in parts], draw) for parts in MIXTURES]


def pass_of(decoder: Decoder, library: Any) -> CpuPass:
    return CpuPass(decoder, schedules.SLOTS, schedules.LONGEST, packs=True, library=library)


def hidden_of(run: Any, decoder: Decoder, dtype: torch.dtype) -> list[Tensor]:
    """What each of the steps gives, one after the other over the same pages."""
    cache = schedules.cache_of(decoder, dtype)
    with torch.inference_mode():
        return [run(b.tokens_T, b.positions_T, PagedAttention(cache, b)).float() for b in batches()]


def by_dense_products(decoder: Decoder) -> Decoder:
    """In float32, by the held weights' numbers."""
    truth = copy.deepcopy(decoder).float()
    truth.compute_dtype = None
    for module in (module for module in truth.modules() if isinstance(module, HeldLinear)):
        weight, bias = module.weight(torch.float32), module.bias
        module.product = lambda x, weight=weight, bias=bias: F.linear(x, weight, bias)  # type: ignore[method-assign]
    return truth


def check(library: Any, decoder: Decoder) -> None:
    truth = by_dense_products(decoder)
    run = pass_of(decoder, library)
    wanted, plain = hidden_of(truth, truth, torch.float32), hidden_of(decoder, decoder, torch.bfloat16)
    found = hidden_of(run, decoder, torch.bfloat16)
    assert run._step is not None and run._step.takes_prompts
    for right, torchs, ours in zip(wanted, plain, found, strict=True):
        assert ours.isfinite().all()
        assert (ours - right).pow(2).mean() <= (torchs - right).pow(2).mean()
        assert (ours - right).abs().max() <= 0.05


@pytest.mark.parametrize("changes", [{}, ODD, WIDE])
@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_it_is_as_near_to_the_truth_as_torchs(
    family: str, changes: dict[str, int], tiny_model_dir: Any, library: Any
) -> None:
    check(library, load_decoder(tiny_model_dir(family, **changes), device="cpu", dtype=torch.bfloat16).eval())


@pytest.mark.parametrize("changes", [{}, ODD, WIDE])
@pytest.mark.parametrize("quantize", ["int8", "int4", "int4-sym", "int4-g64", "int4-g32"])
def test_codes_are_as_near_to_the_truth_as_torchs(
    quantize: str, changes: dict[str, int], tiny_model_dir: Any, library: Any
) -> None:
    """Weights in codes went through torch, whose threads fought ours for the cores: ten times the time."""
    for family in ("llama", "qwen2"):
        source = tiny_model_dir(family, **changes)
        decoder: Any = load_for_inference(source, device="cpu", dtype=torch.bfloat16, quantize=quantize)
        assert any(isinstance(module, HeldLinear) for module in decoder.modules())
        for block in decoder.blocks if family == "qwen2" else ():
            torch.nn.init.normal_(block.attention.qkv.bias, std=0.5, generator=torch.Generator().manual_seed(7))
        check(library, decoder)


@pytest.mark.parametrize("changes", [{}, ODD])
@pytest.mark.parametrize("quantize", [None, "int8", "int4"])
def test_logits_of_any_number_of_tokens(
    quantize: str | None, changes: dict[str, int], tiny_model_dir: Any, library: Any
) -> None:
    source = tiny_model_dir("qwen2", **changes)
    decoder: Any = load_for_inference(source, device="cpu", dtype=torch.bfloat16, quantize=quantize)
    decoder.head = None if quantize is None else copy.deepcopy(decoder.blocks[0].mlp.up)
    run = pass_of(decoder, library)
    hidden_of(run, decoder, torch.bfloat16)
    held = decoder.embedding.weight if quantize is None else decoder.head.weight(torch.float32)
    weight_VD = held.detach().double()
    for tokens in (1, 8, 9, 16, 17, 40):
        x = torch.randn(tokens, weight_VD.shape[1], generator=torch.Generator().manual_seed(tokens)).bfloat16()
        with torch.inference_mode():
            found = run.logits(x)
        wrong = (found.double() - x.double() @ weight_VD.t()).abs()
        assert (wrong <= 2**-7 * (x.double().abs() @ weight_VD.t().abs())).all(), tokens
    assert run._head is None  # torch laid nothing out anew
    assert not run._layers


def test_threads_change_no_bit(tiny_model_dir: Any, library: Any) -> None:
    decoder = load_decoder(tiny_model_dir("qwen2", **WIDE), device="cpu", dtype=torch.bfloat16).eval()
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(hidden_of(pass_of(decoder, library), decoder, torch.bfloat16))
    finally:
        torch.set_num_threads(before)
    for others in found[1:]:
        assert all(map(torch.equal, found[0], others))


def test_a_wrong_token_is_an_error(tiny_model_dir: Any, library: Any) -> None:
    decoder = load_decoder(tiny_model_dir("llama"), device="cpu", dtype=torch.bfloat16).eval()
    cache, batch = schedules.cache_of(decoder, torch.bfloat16), batches()[0]
    tokens = batch.tokens_T.clone()
    tokens[3] = decoder.config.vocab_size
    with torch.inference_mode(), pytest.raises(IndexError, match="vocabulary"):
        pass_of(decoder, library)(tokens, batch.positions_T, PagedAttention(cache, batch))


def test_what_has_no_slot_is_written_nowhere(tiny_model_dir: Any, library: Any) -> None:
    decoder = load_decoder(tiny_model_dir("llama"), device="cpu", dtype=torch.bfloat16).eval()
    cache, batch = schedules.cache_of(decoder, torch.bfloat16), batches()[0]
    batch.slots_T.fill_(-1)
    with torch.inference_mode():
        pass_of(decoder, library)(batch.tokens_T, batch.positions_T, PagedAttention(cache, batch))
    assert all(bool(pages.isnan().all()) for pages in (*cache.keys, *cache.values))


@pytest.mark.long
@pytest.mark.parametrize("changes", [{}, ODD, WIDE])
def test_beside_a_matrix_unit(
    changes: dict[str, int], tiny_model_dir: Any, library: Any, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Products of widths that fill the unit's rows go through it, emulated here."""
    header = Path(__file__).with_name("emulated_tiles.hpp")
    version = hashlib.sha256(header.read_bytes()).hexdigest()[:8]
    parts = " ".join(f"-D__AMX_{part}__" for part in ("TILE", "BF16", "INT8"))
    monkeypatch.setenv("CXXFLAGS", f"-O1 {parts} -DEMULATION=0x{version} -include {header}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache))
    monkeypatch.setenv(cpu_library.SWITCH, "1")
    emulated = cpu_library.load.__wrapped__()
    assert emulated is not None and emulated.tunesmith_has_tiles()
    for family in ("mistral", "qwen3"):
        check(emulated, load_decoder(tiny_model_dir(family, **changes), device="cpu", dtype=torch.bfloat16).eval())
