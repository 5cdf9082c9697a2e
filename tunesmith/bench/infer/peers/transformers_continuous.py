"""transformers' own continuous batching: paged cache, requests admitted as others end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from tunesmith.bench.infer.peers.transformers import load, memory, sampling
from tunesmith.bench.infer.protocol import serve

WAIT_S = 600.0


class Continuous:
    """`init_continuous_batching`, its manager kept for all measurements."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        self.model, self.torch = load(job)
        config = sampling(self.model, job["temperature"], 1)
        config.min_new_tokens = None
        config.eos_token_id = -1
        self._manager = self.model.init_continuous_batching(generation_config=config)
        self._manager.start()

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """See Engine."""
        names = [
            self._manager.add_request(list(prompt), max_new_tokens=wanted)
            for prompt, wanted in zip(prompts, outputs, strict=True)
        ]
        tokens: dict[str, int] = {}
        while len(tokens) < len(names):
            result = self._manager.get_result(timeout=WAIT_S)
            if result is None:
                raise RuntimeError("continuous batching gave no result: its thread has ended")
            if result.error:
                raise RuntimeError(result.error)
            if result.is_finished():
                tokens[result.request_id] = len(result.generated_tokens)
        return [tokens[name] for name in names]

    def facts(self) -> dict[str, Any]:
        """See Engine; the manager's thread ends here."""
        self._manager.stop(block=True, timeout=30)
        return {**memory(self.model, self.torch), "how": "continuous batching with its defaults"}


if __name__ == "__main__":
    serve(Continuous)
