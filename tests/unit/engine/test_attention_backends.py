"""Which kernel attends over pages: refusals, the choice and where it is kept, and steps that run by it."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
from attention_packages import FakeFlashAttention3, FakeFlashInfer, install

from tunesmith.engine import attention_backends, runner
from tunesmith.engine.attend import PagedAttention
from tunesmith.engine.attention_backends import (
    AttentionKernels,
    attention_facts,
    check_backend,
    find_kernels,
    heads_of,
    ranking,
)
from tunesmith.engine.batch import StepBatch
from tunesmith.engine.batching import _worst, to_device
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.llm import LLM
from tunesmith.engine.pages import PagedCache
from tunesmith.engine.request import SamplingParams
from tunesmith.errors import RequestError
from tunesmith.kernels import flashinfer_attention, paged_attention_fresh
from tunesmith.kernels.paged_step import PagedHeads

CPU = torch.device("cpu")
HEADS = PagedHeads(4, 2, 16, torch.bfloat16, torch.bfloat16, 16, (None, 8), (9, 0))
CONFIG = EngineConfig(max_model_len=64, max_num_seqs=4, max_num_batched_tokens=64)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(flashinfer_attention, "WORKSPACE_BYTES", 64)
    return tmp_path / "tunesmith" / "attention"


@pytest.fixture
def fa3(monkeypatch: pytest.MonkeyPatch) -> FakeFlashAttention3:
    return install(monkeypatch, FakeFlashAttention3())


class Clock:
    """Milliseconds by whose turn it is: the packages in the order of their names in `takes`, then ours."""

    def __init__(self, **takes: float) -> None:
        self.takes = {"flash_attn_interface": 1.0, "flashinfer": 1.0, "ours": 1.0, **takes}
        self.calls = 0

    def __call__(self, work: Callable[[], object], is_recorded: bool) -> float:
        self.calls += 1
        found: list[str] = []

        def see(frame: Any, event: str, arg: object) -> None:
            name = frame.f_code.co_filename.rsplit("/", 1)[-1]
            found.extend({"flash_attention_3.py": ["flash_attn_interface"]}.get(name, []))
            found.extend({"flashinfer_attention.py": ["flashinfer"]}.get(name, []))

        before = sys.getprofile()
        sys.setprofile(see)
        try:
            work()
        finally:
            sys.setprofile(before)
        return self.takes[found[0] if found else "ours"]


def find(timer: Clock | None = None, heads: PagedHeads | None = HEADS, **options: Any) -> AttentionKernels | None:
    return find_kernels(replace(CONFIG, **options), heads, CPU, timer=timer or Clock())


@pytest.mark.parametrize("asked", ["auto", "triton"])
def test_without_a_package_nothing_is_imported_and_nothing_measured(asked: Any) -> None:
    timer = Clock()
    assert find(timer, attention_backend=asked) is None
    assert timer.calls == 0 and not {"flash_attn_interface", "flashinfer"} & set(sys.modules)


def test_a_faster_one_is_taken_and_said(fa3: FakeFlashAttention3, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        kernels = find(Clock(flash_attn_interface=0.5))
    assert kernels is not None
    facts = kernels.facts()
    assert set(facts["chosen"].values()) == {"flash-attn-3"} == set(facts["recorded"].values())
    assert facts["packages"] == {"flash-attn-3": "3.0.0"}
    assert facts["milliseconds"]["decode 1 over 64"] == {"flash-attn-3": 1.0, "triton": 2.0}
    assert "attention over pages: flash-attn-3: decode 1 over 64" in caplog.text
    assert attention_facts(SimpleNamespace(attention=kernels)) == facts
    assert attention_facts(SimpleNamespace(attention=None)) is attention_facts(object()) is None


def test_what_is_not_clearly_faster_is_not_taken(fa3: FakeFlashAttention3) -> None:
    kernels = find(Clock(flash_attn_interface=0.99))
    assert kernels is not None and set(kernels.facts()["chosen"].values()) == {"triton"}
    assert ranking({"a": 0.9, "triton": 1.0, "b": 0.5, "c": 1.5}) == ["b", "a"]
    assert ranking({"a": 0.9}) == []


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        ({"wrong": 0.3}, "its results are wrong: up to 0.3"),
        ({"error": RuntimeError("no image")}, "RuntimeError: no image"),
    ],
)
def test_a_wrong_or_failing_one_is_dropped(
    spoil: dict[str, Any], said: str, fa3: FakeFlashAttention3, caplog: pytest.LogCaptureFixture
) -> None:
    vars(fa3).update(spoil)
    kernels = find(Clock(flash_attn_interface=0.1))
    assert kernels is not None and set(kernels.facts()["chosen"].values()) == {"triton"}
    assert said in kernels.facts()["dropped"]["flash-attn-3"]
    assert "flash-attn-3 is not used for attention" in caplog.text
    with pytest.raises(RequestError, match=r"^attention_backend='flash-attn-3' can't be had here: .*'auto'$"):
        find(attention_backend="flash-attn-3")


def test_the_choice_is_stored_and_used_again(fa3: FakeFlashAttention3, own_cache: Path) -> None:
    first = find(Clock(flash_attn_interface=0.5))
    again = Clock()
    second = find(again)
    assert again.calls == 0 and first is not None and second is not None and first.facts() == second.facts()
    (stored,) = own_cache.iterdir()
    assert str(stored) == second.facts()["stored"]
    key = json.loads(stored.read_text())["key"]
    assert key["packages"] == {"flash-attn-3": "3.0.0"} and key["heads"] == [4, 2, 16] and key["page_slots"] == 16
    stored.write_text("{")
    damaged = Clock()
    assert find(damaged) is not None and damaged.calls
    fa3.__version__ = "3.0.1"
    newer = Clock()
    assert find(newer) is not None and newer.calls and len(list(own_cache.iterdir())) == 2


def test_a_folder_that_cant_be_written_is_no_reason_to_stop(
    fa3: FakeFlashAttention3, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    kernels = find(Clock(flash_attn_interface=0.5))
    assert kernels is not None and set(kernels.facts()["chosen"].values()) == {"flash-attn-3"}


def test_the_faster_of_two_and_ours_where_a_step_is_recorded(
    fa3: FakeFlashAttention3, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(monkeypatch, FakeFlashInfer())
    both = find(Clock(flash_attn_interface=0.7, flashinfer=0.5))
    assert both is not None
    assert set(both.facts()["chosen"].values()) == {"flashinfer"}
    assert set(both.facts()["recorded"].values()) == {"flash-attn-3"}
    alone = find(Clock(flash_attn_interface=2.0, flashinfer=0.4), heads=replace(HEADS, num_heads=8))
    assert alone is not None and set(alone.facts()["recorded"].values()) == {"triton"}
    assert "flashinfer (triton where recorded): decode" in alone.line()


@pytest.fixture(autouse=True)
def narrow_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(flashinfer_attention, "_HEAD_DIMS", (8, 16, 64, 128, 256))


@pytest.mark.parametrize(
    "options",
    [
        {"heads": None},
        {"heads": replace(HEADS, capability=(8, 9))},
        {"heads": replace(HEADS, page_dtype=torch.float8_e4m3fn)},
        {"batch_invariant": True},
    ],
    ids=["cpu", "ada", "fp8", "invariant"],
)
def test_what_it_is_not_for_is_ours_unless_asked_for(options: dict[str, Any], fa3: FakeFlashAttention3) -> None:
    timer = Clock()
    assert find(timer, **options) is None and timer.calls == 0
    with pytest.raises(RequestError, match=r"^attention_backend='flash-attn-3' .*[^\n]$"):
        find(**options, attention_backend="flash-attn-3")


def test_nothing_is_measured_for_a_model_that_trains_or_where_runs_must_repeat(fa3: FakeFlashAttention3) -> None:
    assert find_kernels(CONFIG, HEADS, CPU, measures=False, timer=Clock()) is None
    torch.use_deterministic_algorithms(True)
    try:
        assert find() is None
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("name", ["flash-attn-3", "flashinfer"])
def test_what_is_not_installed_is_refused_in_one_line(name: Any) -> None:
    for ask in (lambda: check_backend(name), lambda: LLM("builtin:tiny", attention_backend=name)):
        with pytest.raises(RequestError, match=rf"^attention_backend='{name}' wants .* is not installed: .*'auto'$"):
            ask()
    with pytest.raises(RequestError, match="attention_backend must be one of 'auto', 'triton', 'flash-attn-3'"):
        EngineConfig(max_model_len=8, attention_backend="fa2")  # type: ignore[arg-type]


def test_a_package_that_cant_be_imported(monkeypatch: pytest.MonkeyPatch, fa3: FakeFlashAttention3) -> None:
    def broken() -> Any:
        raise OSError("undefined symbol: _ZN2at\nmore")

    packages = dict(attention_backends._PACKAGES)
    packages["flash-attn-3"] = (packages["flash-attn-3"][0], broken, "")
    monkeypatch.setattr(attention_backends, "_PACKAGES", packages)
    assert find() is None
    with pytest.raises(RequestError, match="can't be imported: OSError: undefined symbol: _ZN2at; take"):
        find(attention_backend="flash-attn-3")


def mixed(counts: list[int], contexts: list[int], device: torch.device = CPU) -> StepBatch:
    """Requests on pages of their own, backwards."""
    host = _worst(np.array(counts), np.array(contexts))
    owner = np.repeat(np.arange(len(counts)), counts)
    width = host.tables.shape[1]
    tables = np.arange(len(counts) * width, dtype=np.int32)[::-1].reshape(len(counts), width)
    slots = tables[owner, host.positions // 16].astype(np.int64) * 16 + host.positions % 16
    return to_device(replace(host, tables=tables, slots=slots), device)


@pytest.mark.parametrize("name", ["flash-attn-3", "flashinfer"])
@pytest.mark.parametrize("counts", [[1, 1, 1], [1, 9, 4], [30]], ids=str)
def test_a_layer_of_a_step(name: Any, counts: list[int], monkeypatch: pytest.MonkeyPatch, tiny_config: Any) -> None:
    """Windowed layers too; ours is what it must equal."""
    install(monkeypatch, FakeFlashAttention3() if name == "flash-attn-3" else FakeFlashInfer())
    batch = mixed(counts, [33, 20, 4][: len(counts)] if len(counts) > 1 else [30])
    generator = torch.Generator().manual_seed(0)
    cache = PagedCache(tiny_config, 16, dtype=torch.bfloat16, device=CPU)
    for pages in (*cache.keys, *cache.values):
        pages.copy_(torch.randn(pages.shape, generator=generator))
    windows = tuple(tiny_config.window(layer) for layer in range(tiny_config.num_hidden_layers))
    shape = (tiny_config.num_attention_heads, tiny_config.num_key_value_heads, tiny_config.head_dim)
    heads = PagedHeads(*shape, torch.bfloat16, torch.bfloat16, 16, windows, (9, 0))
    kernels = find(heads=heads, attention_backend=name)
    query = torch.randn(batch.num_tokens, *(shape[0], shape[2]), generator=generator).bfloat16()
    for layer in range(len(windows)):
        theirs = PagedAttention(cache, batch, kernels=kernels).over_pages(layer, query)
        ours = PagedAttention(cache, batch).over_pages(layer, query)
        torch.testing.assert_close(theirs, ours, rtol=2e-2, atol=2e-2)


@pytest.fixture(params=["llama", "mistral"])
def tiny_config(request: pytest.FixtureRequest, tiny_model_dir: Callable[..., Path]) -> Any:
    from tunesmith.checkpoint.load import load_decoder

    return load_decoder(tiny_model_dir(request.param), device="cpu").config


def test_prompts_over_their_own_keys_leave_the_rest_to_it(
    fa3: FakeFlashAttention3, monkeypatch: pytest.MonkeyPatch, tiny_config: Any
) -> None:
    """Only the rows before them are its."""
    monkeypatch.setattr(paged_attention_fresh, "_fits", lambda *_: True)
    monkeypatch.setattr(paged_attention_fresh, "LEAST_TOKENS", 1)
    cache = PagedCache(tiny_config, 16, dtype=torch.bfloat16, device=CPU)
    for pages in (*cache.keys, *cache.values):
        pages.zero_()
    kernels = find(attention_backend="flash-attn-3")
    batch = mixed([1, 6, 6], [20, 6, 6])
    attend = PagedAttention(cache, batch, kernels=kernels)
    assert attend.has_fresh(0)
    num_heads, head_dim = tiny_config.num_attention_heads, tiny_config.head_dim
    query = torch.ones(13, num_heads, head_dim).bfloat16()
    key = torch.ones(13, tiny_config.num_key_value_heads, head_dim).bfloat16()
    fa3.calls.clear()
    out = attend.over_new(0, query, key, key)
    (call,) = fa3.calls
    assert len(call["q"]) == 1 and call["cache_seqlens"].tolist() == [20]
    assert torch.equal(out[0], torch.zeros_like(out[0])) and torch.equal(out[1:], query[1:])


def test_one_that_fails_later_is_left_out(fa3: FakeFlashAttention3, caplog: pytest.LogCaptureFixture) -> None:
    kernels = find(Clock(flash_attn_interface=0.5))
    asked = find(attention_backend="flash-attn-3")
    assert kernels is not None and asked is not None
    fa3.error = RuntimeError("a shape it does not know")
    batch = mixed([1, 1], [20, 4])
    pages = torch.zeros(16, 16, 2, 16).bfloat16()
    query = torch.ones(2, 4, 16).bfloat16()
    config = SimpleNamespace(window=lambda layer: None)
    cache: Any = SimpleNamespace(config=config, keys=[pages], values=[pages], key_scales=None, device=CPU)
    cache.value_scales = cache.arrivals = None
    out = PagedAttention(cache, batch, kernels=kernels).over_pages(0, query)
    assert torch.equal(out, torch.zeros_like(query))
    assert "flash-attn-3 is left out, since it failed" in caplog.text
    assert set(kernels.facts()["chosen"].values()) == {"triton"}
    with pytest.raises(RuntimeError, match="a shape it does not know"):
        PagedAttention(cache, batch, kernels=asked).over_pages(0, query)


def test_heads_of_a_model_are_asked_for_on_a_gpu_only(tiny_config: Any) -> None:
    assert heads_of(tiny_config, torch.bfloat16, torch.bfloat16, CPU, False) is None
    assert heads_of(tiny_config, torch.bfloat16, torch.bfloat16, torch.device("meta"), False) is None


def test_an_engine_answers_by_it(fa3: FakeFlashAttention3, monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole way: what was asked of LLM reaches every layer of every step."""
    monkeypatch.setattr(
        runner,
        "heads_of",
        lambda model, dtype, page_dtype, device, is_shared: PagedHeads(
            model.num_attention_heads,
            model.num_key_value_heads,
            model.head_dim,
            dtype,
            page_dtype,
            16,
            tuple(model.window(layer) for layer in range(model.num_hidden_layers)),
            (9, 0),
            is_shared,
        ),
    )
    monkeypatch.setattr(runner, "has_fused_pass", lambda model: False)  # a CPU's own pass attends by itself
    prompts = [list(range(5, 40)), [7, 8]]
    params = SamplingParams(max_tokens=4, temperature=0.0, ignore_eos=True)
    options = {"dtype": "bfloat16", "max_num_seqs": 2, "max_model_len": 64}
    plain = LLM("builtin:tiny", **options, attention_backend="triton").generate(prompts, params)
    assert not fa3.calls
    llm = LLM("builtin:tiny", **options, attention_backend="flash-attn-3")
    checked = len(fa3.calls)
    answers = llm.generate(prompts, params)
    assert [a.token_ids for a in answers] == [p.token_ids for p in plain]
    calls = fa3.calls[checked:]
    steps = {len(call["q"]) for call in calls}
    assert steps == {37, 2} and len(calls) == 4 * llm.model.config.num_hidden_layers
    facts = attention_facts(llm.runner)
    assert facts is not None and facts["asked"] == "flash-attn-3"
