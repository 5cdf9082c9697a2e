"""vLLM's offline engine, with its defaults: graphs, compilation, its own attention and cache of prefixes."""

from __future__ import annotations

import importlib
import os
from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.bench.infer.protocol import NotApplicableError, require, serve

DTYPES = {"float32": "float32", "fp16": "float16"}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
UTILIZATION = 0.9


class Vllm:
    """`vllm.LLM` on token ids."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        require("vllm", "vllm")
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
        vllm: Any = importlib.import_module("vllm")
        self._params = vllm.SamplingParams
        self._temperature = job["temperature"]
        self._llm = vllm.LLM(model=job["model"], **arguments(job))

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """See Engine."""
        params = [
            self._params(temperature=self._temperature, ignore_eos=True, max_tokens=n, detokenize=False)
            for n in outputs
        ]
        asked = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
        done = self._llm.generate(asked, params, use_tqdm=False)
        return [len(one.outputs[0].token_ids) for one in done]

    def facts(self) -> dict[str, Any]:
        """See Engine. Its weights live in another process, and it takes what memory it is given: neither is asked."""
        return {
            "weights_bytes": None,
            "device_peak_bytes": None,
            "how": f"vllm.LLM, gpu_memory_utilization {UTILIZATION}",
        }


def arguments(job: Mapping[str, Any]) -> dict[str, Any]:
    """The keywords of vllm.LLM for a job. Raises: NotApplicableError."""
    name, in_place = job["format"], job["weights"] == "random"
    common: dict[str, Any] = {
        "load_format": "dummy" if in_place else "auto",
        "skip_tokenizer_init": True,
        "max_model_len": job["max_model_len"],
        "dtype": DTYPES.get(name, "bfloat16"),
        "seed": 0,
        "disable_log_stats": True,
        **({} if job["device"] == "cpu" else {"gpu_memory_utilization": UTILIZATION}),
        **job["options"],
    }
    if name in ("bf16", "float32", "fp16"):
        return common
    if name == "fp8" and job["device"] != "cpu":
        return {**common, "quantization": "fp8"}
    if name == "int4" and in_place:
        return {**common, "dtype": "float16", "hf_overrides": {"quantization_config": AWQ}}
    if name == "nf4" and not in_place and job["device"] != "cpu":
        return {**common, "quantization": "bitsandbytes"}
    raise NotApplicableError(f"vLLM makes no {name} of these weights as it loads them: it reads checkpoints made so")


if __name__ == "__main__":
    serve(Vllm)
