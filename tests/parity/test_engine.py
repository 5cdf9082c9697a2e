"""The engine against transformers' generate, and against the decoder's own training forward."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine import runner as runner_module
from tunesmith.engine.engine import Engine
from tunesmith.engine.pages import PAGE_SLOTS, PagedCache
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import logits as training_logits

FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "gpt2", "mixtral", "qwen3_moe")
# Random weights of std 0.02 give nearly flat logits; a larger spread makes greedy choices clear of rounding.
SPREAD = 0.2
# Float32: the same sums in another order.
TOLERANCE = 1e-5


def prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def load(directory: Path) -> Decoder:
    return load_decoder(directory, device="cpu", dtype=torch.float32).eval()


def generate(engine: Engine, prompts: list[list[int]], max_tokens: int) -> list[list[int]]:
    ids = [engine.submit(p, SamplingParams(max_tokens=max_tokens, ignore_eos=True)) for p in prompts]
    done = {}
    while engine.has_work:
        done.update({o.request_id: o.completion.token_ids for o in engine.step() if o.completion})
    assert isinstance(engine.runner, NativeRunner)
    engine.runner.cache.check()
    assert engine.runner.cache.allocator.num_used == 0
    return [done[i] for i in ids]


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    """60 tokens: past the sliding window of mistral (16) and over several pages."""
    from transformers import AutoModelForCausalLM

    directory = tiny_model_dir(family, initializer_range=SPREAD)
    theirs = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    theirs.generation_config.eos_token_id = None
    ids = prompt(37)
    expected = theirs.generate(
        torch.tensor([ids]), attention_mask=torch.ones(1, 37), max_new_tokens=60, do_sample=False, pad_token_id=256
    )
    assert generate(Engine(NativeRunner(load(directory), 512)), [ids], 60) == [expected[0, 37:].tolist()]


def step_by_step(model: Decoder, ids: list[int], cuts: list[int]) -> torch.Tensor:
    """The logits after each cut, when ids[:cut] enter the cache piece by piece."""
    runner = NativeRunner(model, 512)
    table = runner.open(len(ids))
    assert table is not None
    rows = [runner.step([(table, ids[start:stop])]) for start, stop in zip([0, *cuts], cuts, strict=False)]
    return torch.cat(rows)


@pytest.mark.parametrize("family", FAMILIES)
def test_prefill_equals_decode_equals_training(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    ids = prompt(70)
    whole = training_logits(model, [ids])[0]
    scale = whole.abs().max()
    decoded = step_by_step(model, ids, list(range(1, 71)))
    assert (decoded - whole).abs().max() / scale < TOLERANCE
    prefilled = step_by_step(model, ids, [70])
    assert (prefilled[0] - whole[-1]).abs().max() / scale < TOLERANCE
    pieces = step_by_step(model, ids, [5, 21, 22, 58, 70])
    assert (pieces - whole[[4, 20, 21, 57, 69]]).abs().max() / scale < TOLERANCE


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_long_prompt_in_chunks_gives_the_same(
    family: str, tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    whole = generate(Engine(NativeRunner(model, 512)), [prompt(100)], 20)
    monkeypatch.setattr(runner_module, "PREFILL_TOKENS", 32)
    assert generate(Engine(NativeRunner(model, 512)), [prompt(100)], 20) == whole


@pytest.mark.parametrize("family", ["mistral", "qwen2", "mixtral"])
def test_requests_that_share_steps_say_what_they_say_alone(family: str, tiny_model_dir: Callable[..., Path]) -> None:
    """Requests of different lengths grow side by side, come and go."""
    model = load(tiny_model_dir(family, initializer_range=SPREAD))
    prompts = [prompt(n, seed=n) for n in (3, 20, 41, 17, 64)]
    alone = generate(Engine(NativeRunner(model, 512)), prompts, 40)
    together = generate(Engine(NativeRunner(model, 512, 3), max_running=3), prompts, 40)
    assert together == alone


def test_scattered_pages_give_the_logits_of_contiguous_ones(
    tiny_model_dir: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without homes, two requests that grow in turn take each other's next page."""
    monkeypatch.setattr(PagedCache, "_find_home", lambda self, num_pages: None)
    model = load(tiny_model_dir("qwen2", initializer_range=SPREAD))
    runner, ids = NativeRunner(model, 512), prompt(60)
    first, second = runner.open(200), runner.open(200)
    assert first is not None and second is not None
    for start in range(0, 60, PAGE_SLOTS - 1):
        chunk = ids[start : start + PAGE_SLOTS - 1]
        scattered = runner.step([(first, chunk)])
        runner.step([(second, chunk)])
    assert not first.contiguous
    whole = training_logits(model, [ids])[0][-1]
    assert (scattered[0] - whole).abs().max() / whole.abs().max() < TOLERANCE


def test_reference_attention_of_one_query(tiny_model_dir: Callable[..., Path]) -> None:
    from tunesmith.engine.attend import attend_last
    from tunesmith.model.attention import attend_one

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(shape, generator=generator) for shape in ((1, 8, 16), (33, 2, 16), (33, 2, 16)))
    torch.testing.assert_close(attend_last(query, key, value), attend_one(query, key, value, None))


def test_stories260k_tells_its_published_story(data_dir: Path) -> None:
    """The model's card shows its greedy text: 256 tokens from the beginning-of-text token alone."""
    from tunesmith.engine.llm import LLM

    folder = data_dir / "weights_stories260K"
    card = (folder / "published_card.md").read_text(encoding="utf-8")
    published = card.split("-t 0.0\n")[1].split("\n```")[0]
    llm = LLM(folder / "hf", device="cpu")
    assert llm.tokenizer is not None and llm.tokenizer.bos_id is not None
    (completion,) = llm.generate([[llm.tokenizer.bos_id]], max_tokens=256)
    assert completion.text.strip() == published.strip()
    for start in ("Once upon a time", "Once upon a time, there was a"):  # the second goes on with a space
        (from_text,) = llm.generate(start, max_tokens=20)
        assert published.startswith(start + from_text.text)
