"""The compiled step has the decoder's own hidden states and logits, in every format it takes, on every schedule."""

from __future__ import annotations

import copy
import hashlib
import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine import cpu_step
from tunesmith.engine import runner as runner_module
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.cpu_int4 import Int4Table
from tunesmith.engine.cpu_pass import CpuPass
from tunesmith.engine.cpu_products import product_of
from tunesmith.engine.cpu_step import takes
from tunesmith.engine.engine import Engine
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.kernels import cpu_library
from tunesmith.model.decoder import Decoder
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.methods import add_adapters, block_linears
from tunesmith.recipe.schema import DataSection, MethodSection, ModelSection, Recipe
from tunesmith.rundir.layout import create_run


def _beside(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


schedules = _beside("test_cpu_pass")
SLOTS, LONGEST = schedules.SLOTS, schedules.LONGEST


@pytest.fixture(scope="module")
def library(compiled_library: Any) -> Any:
    return compiled_library


def check(library: Any, decoder: Decoder, truth: Decoder, limit: float, dtype: torch.dtype, seed: int) -> None:
    run = CpuPass(decoder, SLOTS, LONGEST, packs=True, library=library)
    one, other = schedules.cache_of(decoder, dtype), schedules.cache_of(decoder, dtype)
    last_ids = torch.zeros(SLOTS, dtype=torch.int64)
    num_compiled = 0
    with torch.inference_mode():
        for batch in schedules.history(seed, 16):
            wanted = truth.logits(truth(batch.tokens_T, batch.positions_T, PagedAttention(one, batch)))
            found = run.decode(batch, other, last_ids)
            num_compiled += found is not None
            if found is None:
                found = run.logits(run(batch.tokens_T, batch.positions_T, PagedAttention(other, batch)))
            torch.testing.assert_close(found, wanted, rtol=limit, atol=limit)
    assert num_compiled > 3


def by_dense_products(decoder: Decoder) -> Decoder:
    """The decoder once more, whose products are with dequantised weights."""
    truth: Any = copy.deepcopy(decoder)
    for module in truth.modules():
        if hasattr(module, "dense_product"):
            module.product = module.dense_product
    return truth


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_float32_is_the_decoders(family: str, tiny_model_dir: Any, library: Any) -> None:
    decoder = load_decoder(tiny_model_dir(family), device="cpu", dtype=torch.float32).eval()
    check(library, decoder, decoder, 1e-5, torch.float32, len(family))


@pytest.mark.parametrize("quantize", [None, "int8", "int4", "int4-g32", "int4-sym"])
def test_other_formats_are_within_their_rounding(quantize: str | None, tiny_model_dir: Any, library: Any) -> None:
    """The truth is float32 arithmetic with the same held weights; int4 prompts go through torch's bfloat16 kernel."""
    dtype = torch.bfloat16 if quantize is None else torch.float32
    decoder: Any = load_for_inference(tiny_model_dir("qwen2"), device="cpu", dtype=dtype, quantize=quantize)
    truth = by_dense_products(decoder)
    limit = 0.06 if quantize is None else 1e-3 if quantize == "int8" else 2e-2
    check(library, decoder, truth, limit, dtype, 3)


@pytest.mark.parametrize("width", [96, 704])
@pytest.mark.parametrize("quantize", [None, "float32", "int8", "int4", "int4-sym", "int4-g64", "int4-g32"])
def test_products_of_every_number_of_tokens(
    quantize: str | None, width: int, tiny_model_dir: Any, library: Any
) -> None:
    """Widths that are no whole blocks, one of more groups than a vector holds; rows that are no whole panels.

    Of int8 and int4 a value of x is off by half a step, 1 / 65534 of its row's largest, whatever else is in the row.
    """
    dtype = torch.bfloat16 if quantize is None else torch.float32
    source = tiny_model_dir("qwen2", hidden_size=width, intermediate_size=100, vocab_size=331)
    held = None if quantize == "float32" else quantize
    decoder: Any = load_for_inference(source, device="cpu", dtype=dtype, quantize=held)
    if held is None:
        decoder.head = None  # tied
    else:
        decoder.head = copy.deepcopy(decoder.blocks[0].mlp.up)
    assert takes(decoder, dtype)
    step = cpu_step.CpuStep(library, decoder, schedules.cache_of(decoder, dtype), dtype)
    head = (decoder.embedding.weight if held is None else decoder.head.weight(torch.float32)).double()
    for tokens in range(1, 17):
        x = torch.randn(tokens, width, generator=torch.Generator().manual_seed(tokens)).to(dtype)
        x[tokens // 2, 5] = 1000
        with torch.inference_mode():
            wrong = (step.logits(x).double() - x.double() @ head.t()).abs()
        sizes = x.double().abs() @ head.t().abs()
        if held is None:
            assert (wrong <= (2**-8 if quantize is None else 1e-6) * sizes).all()
        else:
            off = x.double().abs().amax(1, keepdim=True) / 65534
            assert (wrong <= 1.001 * off * head.abs().sum(1) + 1e-6 * sizes).all()


def test_what_is_no_number_stays_none(tiny_model_dir: Any, library: Any) -> None:
    for quantize in (None, "int8", "int4"):
        source = tiny_model_dir("llama")
        decoder: Any = load_for_inference(source, device="cpu", dtype=torch.float32, quantize=quantize)
        assert takes(decoder, torch.float32)
        step = cpu_step.CpuStep(library, decoder, schedules.cache_of(decoder, torch.float32), torch.float32)
        x = torch.ones(2, decoder.config.hidden_size)
        x[0, 3] = float("nan")
        found = step.logits(x)
        assert found[0].isnan().all() and found[1].isfinite().all()


@pytest.mark.parametrize("quantize", ["int8", "int4"])
def test_the_largest_numbers_are_numbers(quantize: str, tiny_model_dir: Any, library: Any) -> None:
    """A row with a finite value beyond 3e38 was taken for one that is no number, and its codes were zero."""
    decoder: Any = load_for_inference(tiny_model_dir("llama"), device="cpu", dtype=torch.float32, quantize=quantize)
    decoder.head = copy.deepcopy(decoder.blocks[0].mlp.up)
    step = cpu_step.CpuStep(library, decoder, schedules.cache_of(decoder, torch.float32), torch.float32)
    x = torch.zeros(2, decoder.config.hidden_size)
    x[0, 3], x[1, 3] = torch.finfo(torch.float32).max, 1.0
    found = step.logits(x)
    assert found[1].any()
    torch.testing.assert_close(found[0] / x[0, 3], found[1], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "qwen3"])
def test_an_engine_says_what_torch_says(
    family: str, tiny_model_dir: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Greedy and drawn, in float32, more requests than fit at once; the compiled step was really taken."""
    source = tiny_model_dir(family, initializer_range=0.2)
    config = EngineConfig(max_model_len=96, max_num_seqs=3, max_num_batched_tokens=32)
    said = []
    for used in (None, library):
        monkeypatch.setattr(runner_module, "load", lambda used=used: used)
        runner = NativeRunner(load_for_inference(source, device="cpu", dtype=torch.float32), config, 40)
        engine = Engine(runner, config=config)
        for number, options in enumerate([{}, {"temperature": 0.8}, {"temperature": 1.0, "top_p": 0.8}, {}]):
            params = SamplingParams(**{"temperature": 0.0, **options}, max_tokens=20, seed=number, ignore_eos=True)
            engine.submit([7 + number] * (1 + 9 * number), params)
        tokens: dict[int, list[int]] = {}
        while engine.has_work:
            for output in engine.step():
                tokens.setdefault(output.request_id, []).extend(output.token_ids)
        said.append(tokens)
        assert isinstance(runner._fused, CpuPass) and (runner._fused._step is not None) == (used is not None)
    assert said[0] == said[1]


def test_a_token_that_is_none_of_the_vocabularys_is_an_error(
    tiny_model_dir: Any, library: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner_module, "load", lambda: library)
    config = EngineConfig(max_model_len=64, max_num_seqs=2)
    engine = Engine(NativeRunner(load_decoder(tiny_model_dir("llama")).float().eval(), config, 8), config=config)
    engine.submit([10_000], SamplingParams(max_tokens=2))
    with pytest.raises(IndexError):
        engine.step()
    assert not engine.has_work and engine.runner.pages.num_used == 0


@pytest.mark.parametrize("quantize", ["int4", "int4-g32", "int4-sym"])
def test_int4_is_widened_to_the_same_bits(quantize: str, tiny_model_dir: Any, library: Any) -> None:
    source = tiny_model_dir("qwen2", hidden_size=96)
    decoder: Any = load_for_inference(source, device="cpu", dtype=torch.bfloat16, quantize=quantize)
    for linear in (decoder.blocks[0].mlp.up, decoder.blocks[1].attention.output):
        assert torch.equal(Int4Table(linear).widened(library), linear.weight(torch.bfloat16))
        x = torch.randn(70, linear.in_features)
        torch.testing.assert_close(product_of(linear, x.dtype, True, library).plain(x), linear(x), rtol=1e-6, atol=1e-6)


RANKS = {"q_proj": 1, "k_proj": 3, "v_proj": 64, "o_proj": 3, "gate_proj": 64, "up_proj": 1, "down_proj": 17}
ODD = {"hidden_size": 104, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 22, "intermediate_size": 117}
"""No width of an input and no number of rows is a multiple of 16."""


def adapted(decoder: Decoder, ranks: dict[str, int], dora: bool = False) -> Decoder:
    """Adapters of these ranks that change what a linear says by about as much as it says."""
    chosen = {t.path: [part for part in t.parts if part in ranks] for t in block_linears(decoder)}
    chosen = {path: parts for path, parts in chosen.items() if parts}
    add_adapters(decoder, chosen, lambda name: AdapterOptions(ranks[name.rsplit(".", 1)[1]], 2.0, dora=dora), seed=0)
    draw = torch.Generator().manual_seed(len(ranks))
    with torch.no_grad():
        for linear in (module for module in decoder.modules() if isinstance(module, AdaptedLinear)):
            for part in linear.adapters:
                adapter = linear.adapter(part)
                adapter.B.copy_(0.02 * torch.randn(adapter.B.shape, generator=draw))
                if adapter.magnitude is not None:
                    adapter.magnitude.mul_(1 + 0.2 * torch.randn(adapter.magnitude.shape, generator=draw))
    return decoder.eval()


@pytest.mark.parametrize("targets", [tuple(RANKS), ("q_proj", "v_proj"), ("up_proj",), ("gate_proj", "down_proj")])
@pytest.mark.parametrize(("family", "changes"), [("llama", {}), ("qwen2", ODD), ("qwen3", ODD)])
def test_an_adapter_is_the_decoders(
    family: str, changes: dict[str, int], targets: tuple[str, ...], tiny_model_dir: Any, library: Any
) -> None:
    """All projections of a linear or some, of ranks 1 to 64, with a bias and without, on widths of no whole vectors."""
    decoder = load_decoder(tiny_model_dir(family, **changes), device="cpu", dtype=torch.float32)
    plain = copy.deepcopy(decoder).eval()
    adapted(decoder, {part: RANKS[part] for part in targets})
    check(library, decoder, decoder, 1e-5, torch.float32, len(family))
    with pytest.raises(AssertionError):
        check(library, decoder, plain, 1e-3, torch.float32, len(family))


@pytest.mark.parametrize("changes", [{}, ODD, {"hidden_size": 96}])
@pytest.mark.parametrize("quantize", [None, "int8", "int4", "int4-g32"])
def test_an_adapter_on_other_formats_is_within_their_rounding(
    quantize: str | None, changes: dict[str, int], tiny_model_dir: Any, library: Any
) -> None:
    """By the limits of the formats alone."""
    dtype = torch.bfloat16 if quantize is None else torch.float32
    source = tiny_model_dir("qwen2", **changes)
    decoder: Any = load_for_inference(source, device="cpu", dtype=dtype, quantize=quantize)
    adapted(decoder, RANKS)
    truth = by_dense_products(decoder)
    limit = 0.06 if quantize is None else 1e-3 if quantize == "int8" else 2e-2
    check(library, decoder, truth, limit, dtype, 3)


@pytest.mark.parametrize("targets", [tuple(RANKS), ("q_proj", "v_proj", "up_proj")])
@pytest.mark.parametrize("changes", [{}, ODD])
@pytest.mark.parametrize("quantize", [None, "bfloat16", "int8", "int4-g32"])
def test_dora_is_the_decoders(
    quantize: str | None, changes: dict[str, int], targets: tuple[str, ...], tiny_model_dir: Any, library: Any
) -> None:
    """Rows rescaled to their magnitudes, biases not; projections without an adapter stay as they are."""
    dtype = torch.bfloat16 if quantize == "bfloat16" else torch.float32
    held = None if quantize == "bfloat16" else quantize
    source = tiny_model_dir("qwen2", **changes)
    decoder: Any = load_for_inference(source, device="cpu", dtype=dtype, quantize=held)
    for block in decoder.blocks:
        torch.nn.init.normal_(block.attention.qkv.bias, std=0.5, generator=torch.Generator().manual_seed(7))
    adapted(decoder, {part: RANKS[part] for part in targets}, dora=True)
    truth = by_dense_products(decoder)
    limit = {None: 1e-5, "bfloat16": 0.06, "int8": 1e-3}.get(quantize, 2e-2)
    check(library, decoder, truth, limit, dtype, 3)


@pytest.mark.long
@pytest.mark.parametrize("dora", [False, True])
@pytest.mark.parametrize("quantize", [None, "int8"])
def test_an_adapter_beside_a_matrix_unit(
    quantize: str | None, dora: bool, tiny_model_dir: Any, kernel_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of several tokens the weight's rows go through the unit, emulated here, and those of few ranks do not."""
    if "avx512_bf16" not in Path("/proc/cpuinfo").read_text(encoding="utf-8"):
        pytest.skip("a matrix unit comes with AVX-512 and bfloat16")
    header = Path(__file__).parents[1] / "kernels" / "emulated_tiles.hpp"
    version = hashlib.sha256(header.read_bytes()).hexdigest()[:8]
    parts = " ".join(f"-D__AMX_{part}__" for part in ("TILE", "BF16", "INT8"))
    monkeypatch.setenv("CXXFLAGS", f"-O1 {parts} -DEMULATION=0x{version} -include {header}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(kernel_cache))
    monkeypatch.setenv(cpu_library.SWITCH, "1")
    library = cpu_library.load.__wrapped__()
    assert library.tunesmith_has_tiles()
    dtype = torch.bfloat16 if quantize is None else torch.float32
    source = tiny_model_dir("qwen2", hidden_size=64, num_attention_heads=4, head_dim=16, intermediate_size=128)
    decoder: Any = load_for_inference(source, device="cpu", dtype=dtype, quantize=quantize)
    adapted(decoder, RANKS, dora)
    truth = by_dense_products(decoder)
    check(library, decoder, truth, 0.06 if quantize is None else 1e-3, dtype, 3)


def test_what_the_step_has_no_adapters_for_is_left_to_torch(tiny_model_dir: Any) -> None:
    source = tiny_model_dir("llama", hidden_size=64)
    for quantize, is_taken in ((None, True), ("int8", True), ("nf4", False), ("fp8", False)):
        decoder: Any = load_for_inference(source, device="cpu", dtype=torch.float32, quantize=quantize)
        assert takes(adapted(decoder, RANKS), torch.float32) == is_taken


def test_a_run_answers_by_the_compiled_step(
    tiny_model_dir: Any, make_adapter: Any, library: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """A run's own adapter took every token through torch: five times the time of the merged model."""
    base = tiny_model_dir("qwen2", initializer_range=0.3)
    recipe = Recipe(
        output=str(tmp_path / "runs"),
        model=ModelSection(path=str(base)),
        method=MethodSection(kind="lora"),
        data=DataSection(),
    )
    run = create_run(recipe)
    make_adapter(base).rename(run.final)

    def answers(llm: LLM) -> list[list[int]]:
        found = llm.generate([*"hello, what is red?"][:14], max_tokens=24, temperature=0.0, ignore_eos=True)
        return [answer.token_ids for answer in found]

    said = []
    for used in (None, library):
        monkeypatch.setattr(runner_module, "load", lambda used=used: used)
        llm = LLM(run.path, device="cpu")
        runner: Any = llm.runner
        assert any(isinstance(module, AdaptedLinear) for module in runner.model.modules())
        said.append(answers(llm))
        assert (runner._fused._step is not None) == (used is not None)
    assert said[0] == said[1] != answers(LLM(base, device="cpu"))
