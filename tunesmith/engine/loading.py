"""What `LLM` is made of: a model from where it lies, its tokenizer, the engine's configuration, the runner."""

from __future__ import annotations

import logging
from collections.abc import Collection
from dataclasses import replace
from typing import Any, cast

import torch

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.adapter_reader import Base
from tunesmith.engine.adapter_stacks import attach
from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.draft import DraftModel
from tunesmith.engine.grammar_compile import GrammarCompiler, RequestGrammars
from tunesmith.engine.interfaces import Drafter, Runner
from tunesmith.engine.pages import page_bytes
from tunesmith.engine.rehearsal import rehearse
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.source import ModelSource
from tunesmith.engine.speculate import NgramDrafter, Speculation
from tunesmith.engine.tensor_serving import SharedSource, tell_of_adapters
from tunesmith.engine.tensor_shared import SharedModel, load_shared
from tunesmith.engine.transformers_runner import TransformersRunner
from tunesmith.errors import RequestError, TokenizerError
from tunesmith.hardware import pick_device
from tunesmith.kernels.chip import is_gpu
from tunesmith.kernels.compiling import Compiling
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.text.tokenizer import Tokenizer, load_tokenizer

log = logging.getLogger(__name__)
GPU_SEQS, GPU_TOKENS = 256, 8192
"""Requests together, and tokens of a step, where nothing else is asked for."""
CPU_SEQS, CPU_TOKENS = 16, 2048
# A model that was loaded elsewhere shares the GPU with whoever holds it.
LIVE_SEQS, LIVE_SHARE = 16, 0.5
GRAPHS_S = 5.0
"""Seconds at start-up for recording graphs beyond the coarse sizes; the rest are recorded in idle moments."""


def load_source(
    source: ModelSource,
    dtype: str | torch.dtype,
    device: str | torch.device,
    backend: str,
    *,
    head: str = "auto",
    one_head: bool = False,
) -> LanguageModel:
    """The model of a source, in evaluation mode. On a CPU "auto" is float32.

    head, one_head: as `load_for_inference` has them.
    """
    chosen = pick_device(str(device))
    if dtype == "auto" and chosen.type == "cpu":
        dtype = torch.float32
    return load_for_inference(
        source.path,
        adapter=source.adapter,
        quantize=source.quantize,
        dtype=dtype,
        device=chosen,
        backend=cast(Any, backend),
        revision=source.revision,
        head=cast(Any, head),
        one_head=one_head,
    )


def share_source(source: ModelSource, dtype: str | torch.dtype, device: str | torch.device, size: int) -> SharedModel:
    """The model of a source, held by `size` processes together. Raises: ParallelError, RequestError."""
    return load_shared(
        SharedSource(
            path=source.path,
            quantize=source.quantize,
            dtype=str(dtype).removeprefix("torch."),
            device_type=pick_device(str(device)).type,
            revision=source.revision,
            adapter=None if source.adapter is None else str(source.adapter),
        ),
        size,
    )


def load_source_tokenizer(source: ModelSource) -> Tokenizer:
    """The tokenizer of a source, with the chat template it was trained with."""
    tokenizer = load_tokenizer(source.tokenizer or resolve_model(source.path, source.revision))
    if source.chat_template is None:
        return tokenizer
    try:
        return tokenizer.with_chat_template(source.chat_template.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"the chat template {source.chat_template} of the run can't be read: {error}") from None


def make_config(
    model: LanguageModel,
    *,
    is_live: bool = False,
    max_model_len: int | None = None,
    max_num_seqs: int | None = None,
    max_num_batched_tokens: int | None = None,
    gpu_memory_utilization: float = 0.9,
    **options: Any,
) -> EngineConfig:
    """The engine's configuration for a model: what is None takes the defaults of its device.

    is_live: the model was loaded elsewhere and may be training. options: other fields of EngineConfig.
    Raises: RequestError, also when `max_model_len` is more than the model has positions.
    """
    on_gpu = is_gpu(_device(model))
    seqs = max_num_seqs or (LIVE_SEQS if is_live else GPU_SEQS if on_gpu else CPU_SEQS)
    tokens = max_num_batched_tokens or max(GPU_TOKENS if on_gpu else CPU_TOKENS, seqs)
    config = EngineConfig(
        max_model_len=_context(max_model_len, _positions(model)),
        max_num_seqs=seqs,
        max_num_batched_tokens=tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        step_ahead=on_gpu,
        **options,
    )
    if isinstance(model, Decoder):
        return config
    # Not every cache of the library takes a prompt in pieces.
    return replace(config, max_num_batched_tokens=seqs * config.max_model_len, enable_prefix_cache=False)


def make_runner(
    model: LanguageModel,
    config: EngineConfig,
    *,
    is_live: bool = False,
    adapters: AdapterPool | None = None,
    beside_page_bytes: int = 0,
    shared: SharedModel | None = None,
    compiling: Compiling | None = None,
) -> Runner:
    """The runner for this model: ours where it is native, else transformers'.

    adapters: told of every pass. beside_page_bytes: what another cache takes for each page (a draft model's).
    shared: the processes that hold the model together. compiling: what the runner's kernels are waited for with.
    """
    if shared is not None:
        own = shared.runner(config, beside_page_bytes=beside_page_bytes)
        if adapters is not None:
            attach(adapters.stacks, own)
        return own
    if not isinstance(model, Decoder):
        if config.attention_backend != "auto":
            raise RequestError(
                f"attention_backend={config.attention_backend!r} is for the native decoder, and this model runs "
                f"through transformers: leave it out"
            )
        return TransformersRunner(model, cast(Any, model).model, config)
    if is_live and _device(model).type == "cuda":
        free, total = torch.cuda.mem_get_info(_device(model))
        share = min(config.gpu_memory_utilization, (total - free + LIVE_SHARE * free) / total)
        config = replace(config, gpu_memory_utilization=share)
    if compiling is not None:
        log.debug("%s", compiling.wait())
    runner = NativeRunner(model, config, owns_model=not is_live, beside_page_bytes=beside_page_bytes)
    if adapters is not None:
        attach(adapters.stacks, runner)
    runner.warm_up(GRAPHS_S)
    rehearse(runner)
    return runner


def make_adapters(
    model: LanguageModel,
    source: ModelSource | None,
    config: EngineConfig,
    max_loras: int,
    max_lora_rank: int,
    shared: SharedModel | None = None,
) -> AdapterPool:
    """Places for adapters on this model, in all its processes. Raises: RequestError, UnsupportedModelError."""
    base = Base()
    if source is not None and source.adapter is None:
        base = Base(resolve_model(source.path, source.revision))
    pool = AdapterPool(model, max_loras, max_lora_rank, base=base, invariant=config.batch_invariant)
    if shared is not None:
        tell_of_adapters(pool, shared.team.tell)
    return pool


def load_draft(speculation: Speculation, model: LanguageModel, tokenizer: Tokenizer | None) -> Decoder:
    """The smaller model that guesses, on the large one's device. Raises: ModelError, RequestError."""
    if tokenizer is not None:
        _check_vocabulary(speculation, tokenizer)
    source = ModelSource(str(speculation.model), quantize=cast(Any, speculation.quantize))
    draft = load_source(source, speculation.dtype or "auto", _device(model), "native")
    assert isinstance(draft, Decoder)
    return draft


def _check_vocabulary(speculation: Speculation, tokenizer: Tokenizer) -> None:
    """Token ids must mean the same to both models: looked at by a text of several kinds."""
    theirs = load_tokenizer(resolve_model(str(speculation.model)))
    text = "Guessed tokens must mean the same: 12 + 30 = 42, 你好。\n"
    if theirs.encode(text) != tokenizer.encode(text):
        raise RequestError(
            f"the draft model {speculation.model} has another vocabulary than the model: take a smaller one of the "
            f"same family, or speculative={{'method': 'ngram'}}"
        )


def draft_page_bytes(draft: Decoder | None) -> int:
    """What the smaller model's cache takes for each page of the large one's."""
    if draft is None:
        return 0
    return page_bytes(draft.config, draft.compute_dtype or draft.embedding.weight.dtype)


def make_drafter(
    speculation: Speculation | None, draft: Decoder | None, runner: Runner, config: EngineConfig
) -> Drafter | None:
    """What guesses tokens for this runner. Raises RequestError where wrong guesses can't be taken back."""
    if speculation is None:
        return None
    if isinstance(runner, TransformersRunner):
        raise RequestError(
            "speculation needs the native decoder, and this model runs through transformers: leave it out"
        )
    if draft is None:
        return NgramDrafter(speculation.num_tokens, speculation.min_ngram, speculation.max_ngram)
    limit = draft.config.max_position_embeddings
    own = replace(config, max_model_len=min(limit, config.max_model_len), kv_dtype="auto", batch_invariant=False)
    if own.attention_backend != "triton":  # what was asked for is the large model's
        own = replace(own, attention_backend="auto")
    small = NativeRunner(draft, own, runner.pages.num_pages)
    small.warm_up(GRAPHS_S)
    return DraftModel(
        small,
        speculation.num_tokens,
        runner.vocab_size,
        max_tokens=own.max_num_batched_tokens,
        computes_last=small.graphs is not None,
    )


def make_grammars(tokenizer: Tokenizer, runner: Runner, stop_ids: Collection[int]) -> RequestGrammars:
    """Grammars of structured answers; the library is imported with the first of them."""
    return RequestGrammars(GrammarCompiler(tokenizer, runner.vocab_size, stop_ids))


def stop_ids_of(model: LanguageModel, tokenizer: Tokenizer | None) -> set[int]:
    """What ends an answer: the tokenizer's stop tokens and the model's own end tokens."""
    stop = set() if tokenizer is None else set(tokenizer.stop_ids)
    if isinstance(model, Decoder):
        return stop | set(model.config.eos_token_ids)
    eos = cast(Any, model).model.generation_config.eos_token_id
    return stop | set(eos if isinstance(eos, list) else [] if eos is None else [eos])


def _device(model: LanguageModel) -> torch.device:
    return next(iter(model.parameters())).device


def _positions(model: LanguageModel) -> int:
    if isinstance(model, Decoder):
        return model.config.max_position_embeddings
    text = cast(Any, model).model.config.get_text_config()
    return getattr(text, "max_position_embeddings", None) or 2**20


def _context(asked: int | None, limit: int) -> int:
    if asked is not None and not 2 <= asked <= limit:
        raise RequestError(f"max_model_len must be between 2 and the model's {limit} positions, got {asked}")
    return limit if asked is None else asked
