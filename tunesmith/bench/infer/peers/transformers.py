"""transformers' `generate` on static batches: prompts padded on the left, each batch as long as its longest answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.bench.infer.protocol import NotApplicableError, require, serve

BATCH = 16
NEVER = -1
QUANTIZED: dict[str, dict[str, Any]] = {
    "int8": {"load_in_8bit": True},
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
}


class Transformers:
    """AutoModelForCausalLM on token ids; tokens past what a request asked for are not counted."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.model, self.torch = load(job)
        self._temperature = job["temperature"]

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """See Engine."""
        done: list[int] = []
        for start in range(0, len(prompts), BATCH):
            done += self._batch(prompts[start : start + BATCH], outputs[start : start + BATCH])
        return done

    def _batch(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        width, most = max(map(len, prompts)), max(outputs)
        ids = self.torch.zeros(len(prompts), width, dtype=self.torch.long)
        mask = self.torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            ids[row, width - len(prompt) :] = self.torch.tensor(prompt)
            mask[row, width - len(prompt) :] = 1
        device = self.model.device
        config = sampling(self.model, self._temperature, most)
        with self.torch.inference_mode():
            out = self.model.generate(ids.to(device), attention_mask=mask.to(device), generation_config=config)
        return [min(out.shape[1] - width, wanted) for wanted in outputs]

    def facts(self) -> dict[str, Any]:
        """See Engine."""
        return {**memory(self.model, self.torch), "how": f"generate, static batches of {BATCH} at most"}


def load(job: Mapping[str, Any]) -> tuple[Any, Any]:
    """The model on its device, and torch. Raises: NotApplicableError."""
    require("transformers", "transformers")
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, BitsAndBytesConfig

    name, device = job["format"], job["device"]
    if device == "cpu":
        torch.set_num_threads(job["threads"])
    dtype = {"float32": torch.float32, "fp16": torch.float16}.get(name, torch.bfloat16)
    if name in QUANTIZED:
        if device == "cpu" or job["weights"] == "random":
            raise NotApplicableError(f"bitsandbytes' {name} here needs a GPU and a checkpoint to load")
        require("bitsandbytes", "bitsandbytes")
        quantized = BitsAndBytesConfig(**QUANTIZED[name], bnb_4bit_compute_dtype=torch.bfloat16)
        return AutoModelForCausalLM.from_pretrained(
            job["model"], dtype=dtype, quantization_config=quantized, device_map=device
        ).eval(), torch
    if name not in ("bf16", "float32", "fp16"):
        raise NotApplicableError(f"transformers makes no {name} of a checkpoint without a further library")
    if job["weights"] == "random":
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(job["model"]), dtype=dtype)
        return model.eval(), torch
    return AutoModelForCausalLM.from_pretrained(job["model"], dtype=dtype).to(device).eval(), torch


def sampling(model: Any, temperature: float, tokens: int) -> Any:
    """A generation configuration that stops for nothing but the length."""
    from transformers import GenerationConfig

    model.generation_config.eos_token_id = None
    return GenerationConfig(
        max_new_tokens=tokens,
        min_new_tokens=tokens,
        do_sample=temperature > 0,
        temperature=temperature or 1.0,
        top_k=0,
        top_p=1.0,
        pad_token_id=0,
    )


def memory(model: Any, torch: Any) -> dict[str, Any]:
    """weights_bytes and device_peak_bytes."""
    tensors = {t.data_ptr(): t for t in [*model.parameters(), *model.buffers()]}
    return {
        "weights_bytes": sum(t.numel() * t.element_size() for t in tensors.values()),
        "device_peak_bytes": torch.cuda.max_memory_allocated() if model.device.type == "cuda" else None,
    }


if __name__ == "__main__":
    serve(Transformers)
