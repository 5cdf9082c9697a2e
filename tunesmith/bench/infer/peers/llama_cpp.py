"""llama.cpp through llama-cpp-python's low-level interface: as many sequences in one batch as the job has.

The high-level `Llama` class answers one request after the other; llama.cpp itself decodes several together, and that
is what is measured. A sequence's cache is its own; what has ended makes room for the next.
"""

from __future__ import annotations

import importlib
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tunesmith.bench.infer.peers.gguf_file import write_gguf
from tunesmith.bench.infer.protocol import NotApplicableError, require, serve

SLOTS, BATCH_TOKENS = 16, 2048


@dataclass
class Slot:
    """A request in a slot: what is left of its prompt, where it stands, what it still has to say."""

    index: int
    slot: int
    pending: list[int]
    position: int
    wanted: int
    given: int = 0
    row: int = -1


class LlamaCpp:
    """A model, a context of SLOTS sequences, and one sampler."""

    def __init__(self, job: Mapping[str, Any]) -> None:
        require("llama_cpp", "llama-cpp-python")
        if job["device"] != "cpu":
            raise NotApplicableError("llama.cpp is measured on CPUs")
        if job["weights"] == "random":
            raise NotApplicableError("llama.cpp draws no weights: use --weights written")
        llama_cpp: Any = importlib.import_module("llama_cpp")
        self._api = llama_cpp
        began = time.perf_counter()
        path = Path(job["scratch"]) / f"{job['format']}.gguf"
        if not path.exists():
            write_gguf(Path(job["model"]), path, job["format"])
        self.prepare_s = time.perf_counter() - began
        self._weights_bytes = path.stat().st_size
        llama_cpp.llama_backend_init()
        params = llama_cpp.llama_model_default_params()
        params.n_gpu_layers = 0
        for name, value in job["options"].items():
            setattr(params, name, value)  # of llama_model_params, such as use_extra_bufts=false (no AMX, no repacking)
        self._model = llama_cpp.llama_model_load_from_file(str(path).encode(), params)
        self._context = llama_cpp.llama_init_from_model(self._model, self._context_params(job))
        if not self._model or not self._context:
            raise RuntimeError("llama.cpp could not load the file, or has no room for its context")
        self._batch = llama_cpp.llama_batch_init(BATCH_TOKENS, 0, 1)
        self._sampler = self._make_sampler(job["temperature"])

    def _context_params(self, job: Mapping[str, Any]) -> Any:
        params = self._api.llama_context_default_params()
        params.n_ctx = SLOTS * job["max_model_len"]
        params.n_batch = BATCH_TOKENS
        params.n_seq_max = SLOTS
        params.n_threads = params.n_threads_batch = job["threads"]
        return params

    def _make_sampler(self, temperature: float) -> Any:
        api = self._api
        chain = api.llama_sampler_chain_init(api.llama_sampler_chain_default_params())
        if temperature == 0:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_greedy())
        else:
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_temp(temperature))
            api.llama_sampler_chain_add(chain, api.llama_sampler_init_dist(0))
        return chain

    def generate(self, prompts: Sequence[Sequence[int]], outputs: Sequence[int]) -> list[int]:
        """See Engine."""
        self._api.llama_memory_clear(self._api.llama_get_memory(self._context), True)
        waiting = [(i, list(prompt), wanted) for i, (prompt, wanted) in enumerate(zip(prompts, outputs, strict=True))]
        waiting.reverse()
        free, given = list(range(SLOTS)), [0] * len(prompts)
        running: list[Slot] = []
        while waiting or running:
            while waiting and free:
                index, prompt, wanted = waiting.pop()
                running.append(Slot(index, free.pop(), prompt, 0, wanted))
            self._step(running)
            for one in [one for one in running if one.given >= one.wanted]:
                running.remove(one)
                free.append(one.slot)
                given[one.index] = one.given
                self._api.llama_memory_seq_rm(self._api.llama_get_memory(self._context), one.slot, -1, -1)
        return given

    def _step(self, running: Sequence[Slot]) -> None:
        """One decode: a token of every sequence that answers, and as much of prompts as fits beside them."""
        batch, count = self._batch, 0
        for one in sorted(running, key=lambda one: len(one.pending)):
            taken = one.pending[: BATCH_TOKENS - count]
            one.pending = one.pending[len(taken) :]
            one.row = -1
            for token in taken:
                batch.token[count], batch.pos[count] = token, one.position
                batch.n_seq_id[count], batch.seq_id[count][0] = 1, one.slot
                batch.logits[count] = 0
                one.position += 1
                count += 1
            if taken and not one.pending:
                batch.logits[count - 1] = 1
                one.row = count - 1
        batch.n_tokens = count
        if self._api.llama_decode(self._context, batch):
            raise RuntimeError("llama_decode failed")
        for one in running:
            if one.row >= 0:
                one.pending = [self._api.llama_sampler_sample(self._sampler, self._context, one.row)]
                one.given += 1

    def facts(self) -> dict[str, Any]:
        """See Engine."""
        how = f"llama.cpp, {SLOTS} sequences in a batch, flash attention by its own choice"
        return {"weights_bytes": self._weights_bytes, "device_peak_bytes": None, "how": how}


if __name__ == "__main__":
    serve(LlamaCpp)
