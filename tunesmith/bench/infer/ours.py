"""tunesmith itself, in a process like any peer's: `tunesmith.LLM` on token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from tunesmith.bench.infer.protocol import serve
from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams
from tunesmith.errors import TunesmithError

DTYPES = {"float32": torch.float32, "fp16": torch.float16}
QUANTIZED = ("fp8", "int8", "w8a8", "int4", "nf4")


class Ours:
    """`tunesmith.LLM` with the job's weights, format and options."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        if job["device"] == "cpu":
            torch.set_num_threads(job["threads"])
        name = job["format"]
        self._dtype = DTYPES.get(name, torch.bfloat16)
        model = load_for_inference(
            Path(job["model"]),
            quantize=name if name in QUANTIZED else None,
            dtype=self._dtype,
            device=job["device"],
            weights="random" if job["weights"] == "random" else "checkpoint",
        )
        self._llm = LLM(model, max_model_len=job["max_model_len"], **job["options"])
        self._temperature = job["temperature"]
        self._weights_bytes = _bytes_of(self._llm.model)

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """See Engine."""
        params = [SamplingParams(max_tokens=n, temperature=self._temperature, ignore_eos=True) for n in outputs]
        done = self._llm.generate([list(prompt) for prompt in prompts], params, progress=False)
        if failed := next((one for one in done if one.finish_reason == "error"), None):
            raise TunesmithError(f"a request failed: {getattr(failed, 'error', None)}")
        return [len(one.token_ids) for one in done]

    def facts(self) -> dict[str, Any]:
        """See Engine."""
        on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
        return {
            "weights_bytes": self._weights_bytes,
            "device_peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else None,
            "how": f"tunesmith.LLM, {str(self._dtype).removeprefix('torch.')} activations",
        }


def _bytes_of(model: Any) -> int:
    """Bytes of all parameters and buffers, those that are shared once."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return sum(t.numel() * t.element_size() for t in tensors.values())


if __name__ == "__main__":
    serve(Ours)
