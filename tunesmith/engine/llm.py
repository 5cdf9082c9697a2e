"""`tunesmith.LLM`: generate, chat and stream with any model, run directory, or a model that is being trained."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.asked import Asked
from tunesmith.engine.attention_backends import check_backend
from tunesmith.engine.compiling import start_compiling
from tunesmith.engine.engine import Engine
from tunesmith.engine.loading import (
    draft_page_bytes,
    load_draft,
    load_source,
    load_source_tokenizer,
    make_adapters,
    make_config,
    make_drafter,
    make_grammars,
    make_runner,
    share_source,
    stop_ids_of,
)
from tunesmith.engine.progress import GenerationProgress
from tunesmith.engine.prompts import Params, Prompt, as_list, checked, encode_text, params_of, params_of_each
from tunesmith.engine.request import Completion, Request, SamplingParams
from tunesmith.engine.source import ModelSource, find_source
from tunesmith.engine.speculate import Speculation
from tunesmith.engine.stream import TextStream
from tunesmith.engine.tensor_shared import SharedModel
from tunesmith.engine.text import TextDecoder, WholeDecoder
from tunesmith.errors import RequestError
from tunesmith.model.language_model import LanguageModel
from tunesmith.text.chat import encode_prompt
from tunesmith.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

Messages = Sequence[Mapping[str, Any]]
# Tokens of the prompt that are enough to know how the answer's first characters join on.
TEXT_CONTEXT_TOKENS = 16


class LLM:
    """A model with its tokenizer, ready to answer. Arguments are named as vLLM's where both have them.

    Args:
        model: a model directory, a Hub id, `builtin:tiny`, a run directory of `tunesmith train`, or a loaded model
            (also one that is training: it is sampled as it stands, in evaluation mode, and left as it was).
        adapter: an adapter directory (or the run it came from), put on top of `model`.
        dtype: "auto" is the checkpoint's on a GPU, and float32 on a CPU, as training computes there.
        quantize: a form of the weights (named in checkpoint/inference.py); None: as stored, or as the run was trained.
        head: of the output head: "stored", "int8", "copy" (both: steps of few requests on a GPU take int8), or "auto",
            by what the weights are quantised to (checkpoint/inference.py). Of a model loaded elsewhere: as it stands.
        max_model_len: tokens of context, prompt and answer together; None: what the model was made for.
        max_num_seqs: requests that run together; None: 256 on a GPU, else 16 (`max_running` is its older name).
        max_num_batched_tokens: tokens of one step; None: 8192 on a GPU, else 2048. Longer prompts take several steps.
        gpu_memory_utilization: the share of the GPU's memory that weights, activations, graphs and cache take together.
            The cache of a model that was loaded elsewhere takes at most half of what is free.
        enable_prefix_caching: whether equal beginnings are computed once; None: yes, but not for a model that was
            loaded elsewhere, whose weights may change.
        kv_cache_dtype: "auto" or "fp8".
        tensor_parallel_size: processes, each with a GPU of its own, that hold the model together; `close` ends them.
        enforce_eager: no CUDA graphs.
        attention_backend: over pages on a GPU: "triton" is ours, "flash-attn-3" and "flashinfer" are other libraries';
            "auto" takes one of those where it is installed and was measured faster.
        batch_invariant: greedy answers are bit for bit the same whatever else is in the batch and in the cache.
        enable_lora: make places for adapters on the model (`load_adapter`), `max_loras` of at most `max_lora_rank`.
        speculative: how tokens are guessed, e.g. {"method": "ngram", "num_tokens": 4} (speculate.Speculation).
        debug_pages: count all pages after every request.
        tokenizer: for a loaded model: its tokenizer, or the directory of one. Without it only token ids go in and out.
    Raises: ModelError, AdapterError, DeviceError, RunDirError, RequestError.
    """

    def __init__(
        self,
        model: str | Path | LanguageModel,
        *,
        adapter: str | Path | None = None,
        quantize: str | None = None,
        head: str = "auto",
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str = "auto",
        revision: str | None = None,
        max_model_len: int | None = None,
        max_num_seqs: int | None = None,
        max_num_batched_tokens: int | None = None,
        gpu_memory_utilization: float = 0.9,
        enable_prefix_caching: bool | None = None,
        kv_cache_dtype: str = "auto",
        tensor_parallel_size: int = 1,
        enforce_eager: bool = False,
        attention_backend: str = "auto",
        batch_invariant: bool = False,
        enable_lora: bool = False,
        max_loras: int = 8,
        max_lora_rank: int = 16,
        speculative: Mapping[str, Any] | Speculation | None = None,
        debug_pages: bool = False,
        max_running: int | None = None,
        tokenizer: Tokenizer | str | Path | None = None,
    ) -> None:
        self.source: ModelSource | None = None
        self.shared: SharedModel | None = None
        arguments, compiling = dict(locals()), None
        check_backend(attention_backend)
        with ExitStack() as undo:
            undo.callback(self.close)  # no process stays where an engine can't be made
            if isinstance(model, str | Path):
                compiling = start_compiling(Asked.of({**arguments, "max_num_seqs": max_num_seqs or max_running}))
                self.source = find_source(str(model), adapter, quantize, revision)
                if tensor_parallel_size > 1:
                    if head != "auto":
                        raise RequestError("processes that share a model choose its head: leave head at 'auto'")
                    self.shared = share_source(self.source, dtype, device, tensor_parallel_size)
                self.model = (
                    load_source(self.source, dtype, device, backend, head=head, one_head=batch_invariant)
                    if self.shared is None
                    else self.shared.decoder
                )
                tokenizer = tokenizer or load_source_tokenizer(self.source)
            else:
                if adapter is not None or quantize is not None or head != "auto":
                    raise RequestError(
                        "adapter, quantize and head go with a model's path; a loaded model is taken as it stands"
                    )
                if tensor_parallel_size > 1:
                    raise RequestError(
                        "tensor_parallel_size goes with a model's path: every process loads its own part"
                    )
                self.model = model
            self.tokenizer = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
            is_live = self.source is None
            config = make_config(
                self.model,
                is_live=is_live,
                max_model_len=max_model_len,
                max_num_seqs=max_num_seqs or max_running,
                max_num_batched_tokens=max_num_batched_tokens,
                enable_prefix_cache=not is_live if enable_prefix_caching is None else enable_prefix_caching,
                gpu_memory_utilization=gpu_memory_utilization,
                kv_dtype=kv_cache_dtype,
                enforce_eager=enforce_eager,
                attention_backend=attention_backend,
                batch_invariant=batch_invariant,
                debug_pages=debug_pages,
            )
            guessing = Speculation.of(speculative)
            draft = (
                None if guessing is None or guessing.model is None else load_draft(guessing, self.model, self.tokenizer)
            )
            self.adapters = (
                make_adapters(self.model, self.source, config, max_loras, max_lora_rank, self.shared)
                if enable_lora
                else None
            )
            self.runner = make_runner(
                self.model,
                config,
                is_live=is_live,
                adapters=self.adapters,
                beside_page_bytes=draft_page_bytes(draft),
                shared=self.shared,
                compiling=compiling,
            )
            stop_ids = stop_ids_of(self.model, self.tokenizer)
            self.engine = Engine(
                self.runner,
                config=config,
                stop_ids=stop_ids,
                make_decoder=None if self.tokenizer is None else self._make_decoder,
                grammars=None if self.tokenizer is None else make_grammars(self.tokenizer, self.runner, stop_ids),
                adapters=self.adapters,
                drafter=make_drafter(guessing, draft, self.runner, config),
            )
            undo.pop_all()

    def close(self) -> None:
        """End the processes that hold the model with this one; nothing else needs closing."""
        if self.shared is not None:
            self.shared.close()

    def _make_decoder(self, request: Request) -> TextDecoder:
        skip_special = request.params.skip_special_tokens
        if not request.streams and not request.params.stop:
            return WholeDecoder(partial(self._tokenizer().decode, skip_special=skip_special), request.text_context)
        decoder = StreamDecoder(self._tokenizer(), skip_special=skip_special)
        for token in request.text_context:
            decoder.put(token)
        return decoder

    def _tokenizer(self) -> Tokenizer:
        if self.tokenizer is None:
            raise RequestError("this model was given without a tokenizer: pass token ids, or LLM(model, tokenizer=...)")
        return self.tokenizer

    @property
    def max_model_len(self) -> int:
        """Tokens of context, prompt and answer together."""
        return self.runner.max_model_len

    @property
    def has_chat_template(self) -> bool:
        """Whether the model speaks in turns: its tokenizer brings a template, or it was trained with one.

        `chat` works with a family's usual template too, but a base model was never taught it.
        """
        if self.tokenizer is None or self.tokenizer.chat_template is None:
            return False
        return self.tokenizer.own_chat_template or (self.source is not None and self.source.is_tuned)

    @property
    def system(self) -> str | None:
        """The system message that the run's conversations were given."""
        return None if self.source is None else self.source.system

    def encode(self, prompt: Prompt) -> list[int]:
        """The token ids of a prompt: a text is tokenised, ids are checked against the vocabulary."""
        if isinstance(prompt, str):
            return encode_text(self._tokenizer(), prompt)
        vocab_size = self.runner.vocab_size
        wrong = next((t for t in prompt if not isinstance(t, int) or not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token ids must be integers from 0 to {vocab_size - 1}, got {wrong!r}")
        return list(prompt)

    def encode_messages(self, messages: Messages, **template_arguments: Any) -> list[int]:
        """The token ids of a conversation, up to where the assistant begins to speak.

        Raises: RequestError for what is no list of messages; DataError where the template can't render it.
        """
        if isinstance(messages, (str, Mapping)):
            raise RequestError(
                "a conversation is a list of messages, as [{'role': 'user', 'content': 'Hello!'}]; got "
                f"{'text' if isinstance(messages, str) else 'one message'}"
            )
        own = {} if self.source is None else self.source.template_arguments or {}
        arguments = {**own, **template_arguments}
        return encode_prompt(self._tokenizer(), messages, **arguments)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool | None = None,
        raise_errors: bool = True,
        adapter: str | None = None,
        **options: Any,
    ) -> list[Completion]:
        """One completion per prompt, in order.

        Args:
            prompts: one text, or several texts or lists of token ids.
            params: for all prompts, or one for each.
            options: fields of SamplingParams (max_tokens=64, temperature=0.7, ...).
            progress: a bar on stderr; None: for several prompts when stderr is a terminal.
            adapter: the name of a loaded one (`load_adapter`); None is the model itself.
            raise_errors: False: an answer that could not go on comes back with the others, its `error` saying why.
        Raises: RequestError, before anything runs, for a prompt or option that can't be served; afterwards where an
        answer could not go on.
        """
        ids = [self.encode(prompt) for prompt in as_list(prompts)]
        done = self._generate(ids, params_of_each(params, options, len(ids)), progress, True, adapter)
        return checked(done) if raise_errors else done

    def _generate(
        self,
        ids: Sequence[list[int]],
        params: Sequence[SamplingParams],
        progress: bool | None,
        continues: bool,
        adapter: str | None,
    ) -> list[Completion]:
        shown = len(ids) > 1 and sys.stderr.isatty() if progress is None else progress
        submitted: list[int] = []
        try:
            for prompt_ids, own in zip(ids, params, strict=True):
                submitted.append(self._submit(prompt_ids, own, continues, adapter, streams=False))
            with GenerationProgress(len(ids), shown) as bar:
                done = self._run(submitted, bar)
        finally:
            for request_id in submitted:
                self.engine.abort(request_id)
        return [done[request_id] for request_id in submitted]

    def _submit(
        self, prompt_ids: list[int], params: SamplingParams, continues: bool, adapter: str | None, streams: bool = True
    ) -> int:
        context = prompt_ids[-TEXT_CONTEXT_TOKENS:] if continues else []
        return self.engine.submit(prompt_ids, params, text_context=context, adapter=adapter, streams=streams)

    def _run(self, submitted: Sequence[int], bar: GenerationProgress) -> dict[int, Completion]:
        done: dict[int, Completion] = {}
        wanted = set(submitted)
        while len(done) < len(wanted):
            outputs = self.engine.collect(wanted)
            finished = {o.request_id: o.completion for o in outputs if o.completion is not None}
            done.update(finished)
            bar.advance(len(finished), sum(len(output.token_ids) for output in outputs))
        return done

    def chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> Completion:
        """The assistant's answer to a conversation. Options as for `generate`."""
        return self.chat_many([messages], params, progress=False, **options)[0]

    def chat_many(
        self,
        conversations: Sequence[Messages],
        params: Params = None,
        *,
        progress: bool | None = None,
        adapter: str | None = None,
        **options: Any,
    ) -> list[Completion]:
        """The assistant's answers to several conversations, in order. Options as for `generate`."""
        ids = [self.encode_messages(messages) for messages in conversations]
        return checked(self._generate(ids, params_of_each(params, options, len(ids)), progress, False, adapter))

    def stream(
        self, prompt: Prompt, params: SamplingParams | None = None, *, adapter: str | None = None, **options: Any
    ) -> TextStream:
        """The answer's text, piece by piece; joined, the pieces are exactly the completion's text."""
        ids = self.encode(prompt)
        return TextStream(self.engine, self._submit(ids, params_of(params, options), True, adapter))

    def stream_chat(
        self, messages: Messages, params: SamplingParams | None = None, *, adapter: str | None = None, **options: Any
    ) -> TextStream:
        """The assistant's answer, piece by piece."""
        ids = self.encode_messages(messages)
        return TextStream(self.engine, self._submit(ids, params_of(params, options), False, adapter))

    def load_adapter(self, name: str, directory: str | Path, *, follow: bool = False) -> None:
        """Make an adapter known under a name (`adapters.AdapterPool.load`). Raises: AdapterError, RequestError."""
        self._places().load(name, directory, follow=follow)

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter; requests that have begun with it end with it."""
        self._places().unload(name)

    def _places(self) -> AdapterPool:
        if self.adapters is None:
            raise RequestError("there are no places for adapters: LLM(..., enable_lora=True)")
        return self.adapters
