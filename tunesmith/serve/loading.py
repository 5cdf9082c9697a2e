"""The engine process's model: loaded by `LLM`, described for the HTTP side, and its hidden states as embeddings."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from tunesmith.checkpoint.held_files import held_method
from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.attention_backends import attention_facts
from tunesmith.engine.grammar_compile import RequestGrammars
from tunesmith.engine.llm import LLM, TEXT_CONTEXT_TOKENS
from tunesmith.engine.runner import evaluating
from tunesmith.engine.source import ModelSource, find_source
from tunesmith.errors import RequestError
from tunesmith.kernels.fp8 import without_products
from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import pack_documents
from tunesmith.serve import messages
from tunesmith.serve.messages import Message
from tunesmith.serve.options import EngineOptions
from tunesmith.units import format_bytes, format_seconds

if TYPE_CHECKING:  # what compares with a run is imported for runs only
    from tunesmith.verify.served import Reference

# Tokens of one portion of embedding work: other requests' steps go on between portions.
EMBED_TOKENS = 2048


def load_model(options: EngineOptions, send: Callable[[Message], None]) -> LoadedModel:
    """Load what the options say; the HTTP side hears of the tokenizer's place before the weights are read.

    Raises: TunesmithError, as `LLM` does.
    """
    began_s = time.perf_counter()
    source = find_source(options.model, options.adapter, options.quantization, options.revision)
    send(messages.Source(_describe_source(source)))
    reference = _reference(options) if source.is_tuned else None
    check_s = time.perf_counter() - began_s
    llm = LLM(options.model, **_arguments(options))
    model = LoadedModel(llm, options, time.perf_counter() - began_s)
    if reference is not None:
        checked_s = time.perf_counter()
        from tunesmith.verify.served import check_served

        report = check_served(
            llm, reference, refuse=options.served_check == "refuse", chat_template=options.chat_template
        )
        check_s += time.perf_counter() - checked_s
        model.facts["served"] = f"{report.line()}; checked in {format_seconds(check_s)}"
    if isinstance(grammars := llm.engine.grammars, RequestGrammars):
        grammars.compiler.warm_up()
    return model


def _reference(options: EngineOptions) -> Reference | None:
    """What the run predicted that the model comes from: computed before the engine takes the memory."""
    if options.served_check == "off":
        return None
    from tunesmith.verify.served import trained_reference

    return trained_reference(options.model, options.adapter, device=options.device)


def _describe_source(source: ModelSource) -> dict[str, Any]:
    base = resolve_model(source.path, source.revision)
    return {
        "path": source.path,
        "adapter": None if source.adapter is None else str(source.adapter),
        "model": str(base),
        "tokenizer": str(source.tokenizer or base),
        "chat_template": None if source.chat_template is None else str(source.chat_template),
        "template_arguments": source.template_arguments or {},
        "system": source.system,
    }


def _arguments(options: EngineOptions) -> dict[str, Any]:
    """LLM's arguments. Raises: RequestError for an option that this engine doesn't have."""
    asked = {
        "adapter": options.adapter,
        "quantize": options.quantization,
        "head": options.head,
        "dtype": options.dtype,
        "device": options.device,
        "backend": options.backend,
        "revision": options.revision,
        "max_model_len": options.max_model_len,
        "max_num_seqs": options.max_num_seqs,
        "max_num_batched_tokens": options.max_num_batched_tokens,
        "gpu_memory_utilization": options.gpu_memory_utilization,
        "enable_prefix_caching": options.enable_prefix_caching,
        "kv_cache_dtype": options.kv_cache_dtype,
        "enforce_eager": options.enforce_eager,
        "attention_backend": options.attention_backend,
        "batch_invariant": options.batch_invariant,
        "debug_pages": options.debug,
    }
    if options.tensor_parallel_size != 1:
        asked["tensor_parallel_size"] = options.tensor_parallel_size
    asked |= options.more
    known = inspect.signature(LLM).parameters
    for name in asked:
        if name not in known:
            raise RequestError(f"--{name.replace('_', '-')} is not supported by this engine: leave it out")
    return asked


class LoadedModel:
    """A model with its engine, as the worker's loop uses it."""

    def __init__(self, llm: LLM, options: EngineOptions, load_s: float) -> None:
        self.llm = llm
        self.engine = llm.engine
        self.options = options
        self.facts = self._describe(load_s)

    def _describe(self, load_s: float) -> dict[str, Any]:
        llm, config = self.llm, self.llm.engine.config
        model = llm.model
        modules = cast(torch.nn.Module, model)
        weights = sum(tensor.numel() * tensor.element_size() for tensor in modules.state_dict(keep_vars=True).values())
        device = llm.runner.device
        return {
            "max_model_len": llm.max_model_len,
            "vocab_size": llm.runner.vocab_size,
            "embedding_size": self._embedding_size(),
            "max_num_seqs": config.max_num_seqs,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "num_pages": llm.runner.pages.num_pages,
            "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
            "dtype": str(next(iter(model.parameters())).dtype).removeprefix("torch."),
            "weights": format_bytes(weights),
            "quantization": (quantization := self._held_in()),
            "fp8": without_products(device) if str(quantization).startswith("fp8") else None,
            "has_own_adapter": llm.source is not None and llm.source.adapter is not None,
            "is_native": isinstance(model, Decoder),
            "has_chat_template": llm.has_chat_template,
            "single_turns": llm.source is not None and llm.source.single_turns,
            "attention": attention_facts(llm.runner),
            "load_s": load_s,
        }

    def _held_in(self) -> str | None:
        """The format that the blocks' weights are held in: as was asked, or as they are stored; None: not quantised."""
        source, model = self.llm.source, self.llm.model
        if source is not None and source.quantize is not None:
            return source.quantize
        if not isinstance(model, Decoder) or (method := held_method(model.config)) is None:
            return None
        stored = model.config.raw["quantization_config"].get("format")
        return str(stored["kind"]) if isinstance(stored, dict) and "kind" in stored else method

    def _embedding_size(self) -> int | None:
        """None unless the model runs in our own code."""
        model = self.llm.model
        return model.config.hidden_size if isinstance(model, Decoder) else None

    def text_context(self, prompt_ids: list[int]) -> list[int]:
        """The prompt's last tokens: enough to know how the answer's first characters join on."""
        return prompt_ids[-TEXT_CONTEXT_TOKENS:]

    def embed(self, inputs: list[list[int]], pooling: str) -> Iterator[list[bytes]]:
        """Pooled hidden states after the final norm, scaled to length 1, float32; a portion of the inputs at a time.

        Args: `pooling`: "mean" of all tokens, or the "last" one.
        """
        for portion in _portions(inputs, EMBED_TOKENS):
            with torch.inference_mode(), evaluating(self.llm.model):
                yield [bytes(row.numpy().tobytes()) for row in self._vectors(portion, pooling)]

    def _vectors(self, documents: Sequence[Sequence[int]], pooling: str) -> Tensor:
        """vectors_BD on the CPU."""
        model = self.llm.model
        if not isinstance(model, Decoder):
            raise RequestError("this model runs by transformers' own code, which gives no embeddings here")
        shared, device = self.llm.shared, self.llm.runner.device
        hidden_TD = (
            model.hidden(pack_documents(documents, device)) if shared is None else shared.hidden(documents)
        ).float()
        parts = hidden_TD.split([len(document) for document in documents])
        vectors_BD = torch.stack([part.mean(dim=0) if pooling == "mean" else part[-1] for part in parts])
        return torch.nn.functional.normalize(vectors_BD, dim=1).cpu()

    def close(self) -> None:
        """End the processes that hold the model with this one."""
        self.llm.close()

    def load_adapter(self, name: str, path: str, follow: bool) -> Callable[[], bool]:
        """Begin to read a LoRA adapter, in the pool's thread; an older one of that name serves until it is there.

        Raises: RequestError, AdapterError; what is returned raises them too.
        """
        pool = self._pool()
        before = self._version(name)
        pool.load(name, path, follow=follow, wait=False)

        def is_loaded() -> bool:
            pool.poll()
            try:
                pool.check(name)
            except RequestError:
                pool.unload(name)
                raise
            return follow or self._version(name) != before

        return is_loaded

    def _version(self, name: str) -> int | None:
        return next((info.version for info in self._pool().list() if info.name == name), None)

    def unload_adapter(self, name: str) -> None:
        """Forget a LoRA adapter; requests that have begun with it end with it."""
        self._pool().unload(name)

    def _pool(self) -> AdapterPool:
        if self.llm.adapters is None:
            raise RequestError("the server was started without places for adapters: --enable-lora")
        return self.llm.adapters


def _portions(inputs: Sequence[list[int]], max_tokens: int) -> Iterator[list[list[int]]]:
    """The inputs in order, grouped so that a group has at most so many tokens, or one input."""
    group: list[list[int]] = []
    size = 0
    for ids in inputs:
        if group and size + len(ids) > max_tokens:
            yield group
            group, size = [], 0
        group.append(ids)
        size += len(ids)
    if group:
        yield group
