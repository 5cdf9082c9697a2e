"""What an engine launches while it serves was foreseen, whatever number of requests comes together."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from tests.unit.engine.test_launches import CONFIG, H200, OF_GPUS
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine import batching
from tunesmith.engine.asked import Asked
from tunesmith.engine.engine import Engine
from tunesmith.engine.launches import launches_of
from tunesmith.engine.loading import make_config
from tunesmith.engine.request import SamplingParams
from tunesmith.engine.runner import NativeRunner
from tunesmith.kernels.chip import foreseeing
from tunesmith.kernels.nf4 import kernels_on
from tunesmith.kernels.warm_up import Launch

pytest.importorskip("triton")
LATER = ("fp8", "int4", "nf4")
WAVES = ((1, 5), (8, 200), (3, 900), (1, 1500), (2, 17), (20, 64), (40, 33))
"""Requests that come together, and the tokens of their prompts."""


@pytest.fixture(autouse=True)
def _compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    from triton.runtime.jit import JITFunction

    from tunesmith.kernels.rms_norm_triton import _normalise_kernel

    if not isinstance(_normalise_kernel, JITFunction):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    # A GPU's steps all come through one buffer, whose parts are aligned.
    move = batching.move
    monkeypatch.setattr(batching, "move", lambda arrays, device: [tensor.clone() for tensor in move(arrays, device)])
    monkeypatch.setattr(batching, "_is_plain_decode", lambda parts: False)


@contextmanager
def _drawing_sevens() -> Iterator[list[Launch]]:
    """As `taken_down`, but that every token that is drawn is 7: the engine goes on with it."""
    from triton.runtime.jit import JITFunction

    found: list[Launch] = []

    def take_down(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(Launch(kernel, args, options))
        if found[-1].name == "_reduce_kernel":
            for tokens in args[3:5]:
                tokens.fill_(7)

    run = JITFunction.run
    JITFunction.run = take_down
    try:
        yield found
    finally:
        JITFunction.run = run


def _served(asked: Asked) -> list[Launch]:
    """By an engine on the CPU, which stands for a GPU whose kernels do nothing: in waves, then one beside the other."""
    with foreseeing(H200, "cpu"), kernels_on("cpu"), _drawing_sevens() as launches:
        model: Any = load_for_inference(
            asked.model,
            quantize=asked.quantize,
            dtype=asked.dtype,
            device="cpu",
            weights="random",
            head=asked.head,  # type: ignore[arg-type]
            one_head=asked.batch_invariant,
        )
        config = make_config(model, max_model_len=asked.max_model_len, enforce_eager=asked.enforce_eager)
        runner = NativeRunner(model, config, num_pages=1000)
        runner.warm_up(0.0)
        engine = Engine(runner, config=config)
        params = SamplingParams(max_tokens=12, temperature=0.8, ignore_eos=True)
        for num, length in WAVES:
            for _ in range(num):
                engine.submit([7] * length, params)
            while engine.has_work:
                engine.step()
        for turn in range(10):
            for _ in range(turn % 4 + 1):
                engine.submit([turn] * (30 + 131 * turn), params)
            engine.step()
        while engine.has_work:
            engine.step()
    return launches


def _key(launch: Launch) -> tuple[Any, ...]:
    kept = {name: value for name, value in launch.options.items() if name not in OF_GPUS}
    return Launch(launch.kernel, launch.arguments, kept).key


@pytest.mark.parametrize("quantize", [None, "int8", *(pytest.param(name, marks=pytest.mark.long) for name in LATER)])
@pytest.mark.parametrize("enforce_eager", [True, pytest.param(False, marks=pytest.mark.long)])
def test_an_engine_that_serves_launches_what_was_foreseen(
    quantize: str | None, enforce_eager: bool, tmp_path: Path
) -> None:
    """In int8 without graphs one was not: a product of 33 to 64 tokens whose number is no multiple of 16."""
    widths = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_hidden_layers": 2}
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, **widths}), encoding="utf-8")
    asked = Asked(
        str(tmp_path),
        quantize=quantize,
        dtype="bfloat16",
        weights="random",
        max_model_len=2048,
        enforce_eager=enforce_eager,
    )
    launched = {_key(launch): launch for launch in _served(asked)}
    assert len(launched) > 10
    foreseen = {_key(launch) for launch in launches_of(asked, H200)}
    of_cpus = {"_forward_kernel"} if quantize == "fp8" else set()  # a CPU has no products in fp8
    missing = [launch.name for key, launch in launched.items() if key not in foreseen and launch.name not in of_cpus]
    assert missing == []
