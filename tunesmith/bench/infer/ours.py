"""tunesmith itself, in a process like any peer's: the engine of `tunesmith.LLM` on token ids.

As the peers' runners do, it imports its library once the job is read.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from tunesmith.bench.infer.protocol import serve
from tunesmith.engine.asked import Asked
from tunesmith.engine.compiling import start_ahead
from tunesmith.engine.request import SamplingParams
from tunesmith.errors import RequestError, TunesmithError

if TYPE_CHECKING:  # what imports torch is imported once the job is known
    from tunesmith.engine.tensor_shared import SharedModel
    from tunesmith.model.language_model import LanguageModel

DTYPES = {"float32": "float32", "fp16": "float16"}
ENGINE_NAMES = {"enable_prefix_caching": "enable_prefix_cache", "kv_cache_dtype": "kv_dtype"}
QUANTIZED = ("fp8", "int8", "w8a8", "int4", "nf4")


class Ours:
    """The engine of `tunesmith.LLM`, with the job's weights, format and options (by LLM's names of them)."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self._dtype = DTYPES.get(job["format"], "bfloat16")
        compiling = start_ahead(_asked(job, self._dtype))
        import torch

        from tunesmith.engine.engine import Engine
        from tunesmith.engine.loading import make_config, make_runner

        if job["device"] == "cpu":
            torch.set_num_threads(job["threads"])
        options = {ENGINE_NAMES.get(key, key): value for key, value in job["options"].items()}
        self._size = int(options.pop("tensor_parallel_size", 1))
        head = options.pop("head", "auto")
        if head != "auto" and self._size > 1:
            raise RequestError("processes that share a model choose its head: leave head out")
        shared = _shared(job, self._dtype, self._size) if self._size > 1 else None
        self._model = shared.decoder if shared is not None else _whole(job, self._dtype, head)
        self._weights_bytes = _bytes_of(self._model)
        config = make_config(self._model, max_model_len=job["max_model_len"], **options)
        runner = make_runner(self._model, config, shared=shared, compiling=compiling)
        self._engine = Engine(runner, config=config)
        self._temperature = job["temperature"]

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """See Engine in the protocol."""
        engine = self._engine
        names = [
            engine.submit(list(prompt), SamplingParams(max_tokens=n, temperature=self._temperature, ignore_eos=True))
            for prompt, n in zip(prompts, outputs, strict=True)
        ]
        given: dict[int, int] = {}
        while len(given) < len(names):
            for output in engine.step():
                if (done := output.completion) is not None:
                    if done.finish_reason != "length":
                        raise TunesmithError(f"a request ended with {done.finish_reason}: {done.error}")
                    given[output.request_id] = len(done.token_ids)
        return [given[name] for name in names]

    def facts(self) -> dict[str, Any]:
        """See Engine."""
        import torch

        from tunesmith.engine.attention_backends import attention_facts

        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {
            "weights_bytes": self._weights_bytes,
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "attention": attention_facts(self._engine.runner),
            "how": f"tunesmith.engine, {self._dtype} activations"
            + (f", one of {self._size} processes that share the model" if self._size > 1 else ""),
        }


def _asked(job: Mapping[str, Any], dtype: str) -> Asked:
    """What decides which kernels this job launches."""
    named = {"model": str(job["model"]), "quantize": _quantize(job), "weights": _weights(job), "dtype": dtype}
    return Asked.of({**job["options"], **named, "device": job["device"], "max_model_len": job["max_model_len"]})


def _whole(job: Mapping[str, Any], dtype: str, head: Any) -> LanguageModel:
    from tunesmith.checkpoint.inference import load_for_inference

    return load_for_inference(
        Path(job["model"]),
        quantize=_quantize(job),
        dtype=dtype,
        device=job["device"],
        weights=_weights(job),
        head=head,
        one_head=bool(job["options"].get("batch_invariant")),
    )


def _shared(job: Mapping[str, Any], dtype: str, size: int) -> SharedModel:
    """The model by `size` processes; what is counted afterwards is of the first one."""
    import torch

    from tunesmith.engine.tensor_serving import SharedSource
    from tunesmith.engine.tensor_shared import load_shared

    source = SharedSource(
        path=str(job["model"]),
        quantize=_quantize(job),
        dtype=dtype,
        device_type=torch.device(job["device"]).type,
        weights=_weights(job),
    )
    return load_shared(source, size)


def _quantize(job: Mapping[str, Any]) -> str | None:
    return job["format"] if job["format"] in QUANTIZED else None


def _weights(job: Mapping[str, Any]) -> Literal["checkpoint", "random"]:
    return "random" if job["weights"] == "random" else "checkpoint"


def _bytes_of(model: Any) -> int:
    """Bytes of all parameters and buffers, those that are shared once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


if __name__ == "__main__":
    serve(Ours)
