"""The application with a real engine behind it, in a thread of this process: options that reach what answers."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from serve_fakes import FakeEngine, ThreadLink, error_of

from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.source import resolve_model
from tunesmith.checkpoint.state import TrainingState, save_state
from tunesmith.cli.serve import _announce
from tunesmith.engine.adapters import AdapterPool
from tunesmith.model.lora import AdapterOptions
from tunesmith.model.methods import add_adapters, block_linears
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.rundir.layout import RunDir, create_run
from tunesmith.serve.app import build_app
from tunesmith.serve.client import AsyncEngine, EngineStartError
from tunesmith.serve.loading import load_model
from tunesmith.serve.options import EngineOptions, ServerOptions
from tunesmith.serve.state import Server, load_adapters, load_text, make_server

Ask = Callable[..., Awaitable[Any]]
REPEATS = "One two three. One two three. One two three. One two"


class RealLink(ThreadLink):
    """The worker with the engine that the options name."""

    def __init__(self) -> None:
        super().__init__(FakeEngine())

    def _load(self, options: EngineOptions, send: Any) -> Any:
        return load_model(options, send)


@contextlib.asynccontextmanager
async def serving(options: EngineOptions, **more: Any) -> AsyncIterator[tuple[Server, httpx.AsyncClient]]:
    engine = AsyncEngine(RealLink, options, stall_s=60.0)
    server = make_server(ServerOptions(("tiny",), metrics_prefix="vllm", **more), engine)
    engine.start()
    try:
        await engine.loaded()
        await load_text(server)
        await load_adapters(server)
        transport = httpx.ASGITransport(app=build_app(server), raise_app_exceptions=False)
        async with httpx.AsyncClient(transport=transport, base_url="http://test", timeout=60) as client:
            yield server, client
    finally:
        await engine.stop()


def options_of(model: str = "builtin:tiny", **changes: Any) -> EngineOptions:
    return EngineOptions(model, **{"device": "cpu", "dtype": "float32", "max_model_len": 128, **changes})


async def say(client: httpx.AsyncClient, prompt: str = REPEATS, model: str = "tiny", tokens: int = 24) -> str:
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "ignore_eos": True}
    response = await client.post("/v1/completions", json=body)
    assert response.status_code == 200, response.text
    return str(response.json()["choices"][0]["text"])


def value(server: Server, name: str) -> float:
    found = re.search(rf"^vllm:{name}{{.*}} (\S+)$", server.metrics.render().decode(), re.MULTILINE)
    assert found is not None, name
    return float(found[1])


def test_guesses_change_no_greedy_answer_and_are_counted() -> None:
    async def answers(**more: Any) -> tuple[list[str], dict[str, float]]:
        async with serving(options_of(more=more)) as (server, client):
            texts = [await say(client, prompt) for prompt in (REPEATS, "Hello!")]
            server.metrics.engine.take(await server.engine.ask_stats())
            names = ("num_drafts_total", "num_draft_tokens_total", "num_accepted_tokens_total")
            return texts, {name: value(server, f"spec_decode_{name}") for name in names}

    plain, none = asyncio.run(answers())
    guessed, counted = asyncio.run(answers(speculative={"method": "ngram", "num_tokens": 4}))
    assert guessed == plain and set(none.values()) == {0.0}
    drafts, tokens, accepted = counted.values()
    assert 0 < accepted <= tokens <= 4 * drafts


def test_a_speculation_that_there_is_not_is_one_line() -> None:
    async def main() -> None:
        async with serving(options_of(more={"speculative": {"method": "ngrams"}})):
            raise AssertionError("it was taken")

    with pytest.raises(EngineStartError, match="ngram") as told:
        asyncio.run(main())
    assert "\n" not in str(told.value) and told.value.exit_code == 2


def test_a_family_that_only_transformers_knows_is_served_and_announced(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], tiny_model_dir: Callable[..., Path]
) -> None:
    from transformers import AutoTokenizer, GPTNeoXConfig, GPTNeoXForCausalLM

    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    ids = {"vocab_size": 259, "bos_token_id": None, "eos_token_id": 258, "pad_token_id": 256}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        GPTNeoXForCausalLM(GPTNeoXConfig(**sizes, **ids, max_position_embeddings=128)).save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_model_dir("qwen2")).save_pretrained(tmp_path)

    async def main() -> dict[str, Any]:
        async with serving(options_of(str(tmp_path))) as (server, client):
            body = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 4, "ignore_eos": True}
            whole = (await client.post("/v1/chat/completions", json=body)).json()
            assert whole["usage"]["completion_tokens"] == 4
            stream = await client.post("/v1/chat/completions", json={**body, "stream": True})
            assert stream.text.rstrip().endswith("[DONE]")
            refused = error_of(await client.post("/v1/embeddings", json={"input": "a"}), 400)
            assert "transformers" in refused["message"]
            return server.engine.facts

    facts = asyncio.run(main())
    assert facts["is_native"] is False
    _announce(ServerOptions(("tiny",)), {"facts": facts, "address": ("127.0.0.1", 1), "start_s": 1.0})
    said = " ".join(capsys.readouterr().err.split())
    assert "runs by transformers' own code: slower" in said


def state_of(run: RunDir, step: int) -> None:
    """A checkpoint of a run that trains o_proj, as the training writes it; each has other values."""
    model = load_decoder(resolve_model("builtin:tiny"), device="cpu", dtype=torch.float32)
    chosen = {target.path: ["o_proj"] for target in block_linears(model) if "o_proj" in target.parts}
    add_adapters(model, chosen, lambda _: AdapterOptions(2, 4.0), seed=0)
    generator = torch.Generator().manual_seed(step)
    tensors = {}
    for name, parameter in model.named_parameters():
        if ".adapters." in name:
            tensors[f"model.{name}"] = 0.3 * torch.randn(parameter.shape, generator=generator)
    save_state(
        run.checkpoints, TrainingState(step, {**tensors, "rng.torch": torch.zeros(4, dtype=torch.uint8)}, {}), keep=2
    )


def test_a_run_that_is_followed_answers_by_its_newest_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a restart, and without --allow-adapter-loading."""
    often = {**(AdapterPool.__init__.__kwdefaults__ or {}), "follow_s": 0.05}
    monkeypatch.setattr(AdapterPool.__init__, "__kwdefaults__", often)
    method = {"kind": "lora", "rank": 2, "alpha": 4, "targets": ["o_proj"]}
    data = {"format": "tokens"}
    recipe = recipe_from_mapping({"model": {"path": "builtin:tiny"}, "method": method, "data": data})
    run = create_run(recipe, path=tmp_path / "run")
    state_of(run, 1)

    async def main() -> None:
        options = options_of(more={"enable_lora": True, "max_loras": 2, "max_lora_rank": 4})
        async with serving(options, followed=(("live", str(run.path)),)) as (_, client):
            base, first = await say(client), await say(client, model="live")
            assert first != base
            state_of(run, 2)
            async with asyncio.timeout(30):
                while (second := await say(client, model="live")) == first:
                    await asyncio.sleep(0.05)
            assert second != base and await say(client) == base
            assert await say(client, model="live") == second

    asyncio.run(main())
