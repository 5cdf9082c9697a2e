"""`tunesmith.LLM`: generate, chat and stream with any model, run directory, or a model that is being trained."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import torch

from tunesmith.checkpoint.load import load_model
from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.engine import Engine
from tunesmith.engine.progress import GenerationProgress
from tunesmith.engine.request import Completion, SamplingParams
from tunesmith.engine.runner import NativeRunner, Runner, TransformersRunner
from tunesmith.engine.source import ModelSource, find_source
from tunesmith.errors import RequestError, TokenizerError
from tunesmith.hardware import pick_device
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.text.chat import encode_prompt
from tunesmith.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

Prompt = str | Sequence[int]
Messages = Sequence[Mapping[str, Any]]
Params = SamplingParams | Sequence[SamplingParams] | None
# Tokens of the prompt that are enough to know how the answer's first characters join on.
TEXT_CONTEXT_TOKENS = 16


class LLM:
    """A model with its tokenizer, ready to answer.

    Args:
        model: a model directory, a Hub id, `builtin:tiny`, a run directory of `tunesmith train`, or a loaded model
            (also one that is training: it is sampled as it stands, in evaluation mode, and left as it was).
        adapter: an adapter directory (or the run it came from), put on top of `model`.
        dtype: "auto" is the checkpoint's on a GPU, and float32 on a CPU, as training computes there.
        quantize: "nf4", "nf4-double", "fp8" or "fp8-inner"; None: as stored, or as the run was trained.
        max_model_len: tokens of context, prompt and answer together; None: what the model was made for.
        max_running: requests that share a forward pass.
        tokenizer: for a loaded model: its tokenizer, or the directory of one. Without it only token ids go in and out.
    Raises: ModelError, AdapterError, DeviceError, RunDirError.
    """

    def __init__(
        self,
        model: str | Path | LanguageModel,
        *,
        adapter: str | Path | None = None,
        quantize: str | None = None,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device = "auto",
        backend: str = "auto",
        revision: str | None = None,
        max_model_len: int | None = None,
        max_running: int = 1,
        tokenizer: Tokenizer | str | Path | None = None,
    ) -> None:
        self.source: ModelSource | None = None
        if isinstance(model, str | Path):
            self.source = find_source(str(model), adapter, quantize, revision)
            self.model = _load(self.source, dtype, device, backend)
            tokenizer = tokenizer or _load_tokenizer(self.source)
        else:
            if adapter is not None or quantize is not None:
                raise RequestError("adapter and quantize go with a model's path; a loaded model is taken as it stands")
            self.model = model
        self.tokenizer = load_tokenizer(Path(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer
        self.runner = make_runner(self.model, max_model_len, max_running)
        self.engine = Engine(
            self.runner,
            stop_ids=_stop_ids(self.model, self.tokenizer),
            make_decoder=None if self.tokenizer is None else self._make_decoder,
            max_running=max_running,
        )

    def _make_decoder(self, context: Sequence[int]) -> StreamDecoder:
        decoder = StreamDecoder(self._tokenizer())
        for token in context:
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
            return _encode_text(self._tokenizer(), prompt)
        vocab_size = _vocab_size(self.model)
        wrong = next((t for t in prompt if not isinstance(t, int) or not 0 <= t < vocab_size), None)
        if wrong is not None:
            raise RequestError(f"token ids must be integers from 0 to {vocab_size - 1}, got {wrong!r}")
        return list(prompt)

    def encode_messages(self, messages: Messages, **template_arguments: Any) -> list[int]:
        """The token ids of a conversation, up to where the assistant begins to speak."""
        own = {} if self.source is None else self.source.template_arguments or {}
        arguments = {**own, **template_arguments}
        return encode_prompt(self._tokenizer(), messages, **arguments)

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params = None,
        *,
        progress: bool | None = None,
        **options: Any,
    ) -> list[Completion]:
        """One completion per prompt, in order.

        Args:
            prompts: one text, or several texts or lists of token ids.
            params: for all prompts, or one for each.
            options: fields of SamplingParams (max_tokens=64, temperature=0.7, ...).
            progress: a bar on stderr; None: for several prompts when stderr is a terminal.
        Raises: RequestError, before anything runs, for a prompt or option that can't be served.
        """
        ids = [self.encode(prompt) for prompt in _as_list(prompts)]
        return self._generate(ids, _each(params, options, len(ids)), progress, continues=True)

    def _generate(
        self, ids: Sequence[list[int]], params: Sequence[SamplingParams], progress: bool | None, continues: bool
    ) -> list[Completion]:
        shown = len(ids) > 1 and sys.stderr.isatty() if progress is None else progress
        submitted: list[int] = []
        try:
            for prompt_ids, own in zip(ids, params, strict=True):
                submitted.append(self._submit(prompt_ids, own, continues))
            with GenerationProgress(len(ids), shown) as bar:
                done = self._run(submitted, bar)
        finally:
            for request_id in submitted:
                self.engine.abort(request_id)
        return [done[request_id] for request_id in submitted]

    def _submit(self, prompt_ids: list[int], params: SamplingParams, continues: bool) -> int:
        context = prompt_ids[-TEXT_CONTEXT_TOKENS:] if continues else []
        return self.engine.submit(prompt_ids, params, text_context=context)

    def _run(self, submitted: Sequence[int], bar: GenerationProgress) -> dict[int, Completion]:
        done: dict[int, Completion] = {}
        wanted = set(submitted)
        while len(done) < len(wanted):
            outputs = self.engine.collect(wanted)
            finished = {o.request_id: o.completion for o in outputs if o.completion is not None}
            done.update(finished)
            bar.advance(len(finished), len(outputs))
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
        **options: Any,
    ) -> list[Completion]:
        """The assistant's answers to several conversations, in order. Options as for `generate`."""
        ids = [self.encode_messages(messages) for messages in conversations]
        return self._generate(ids, _each(params, options, len(ids)), progress, continues=False)

    def stream(self, prompt: Prompt, params: SamplingParams | None = None, **options: Any) -> TextStream:
        """The answer's text, piece by piece; joined, the pieces are exactly the completion's text."""
        return TextStream(self.engine, self._submit(self.encode(prompt), _params(params, options), continues=True))

    def stream_chat(self, messages: Messages, params: SamplingParams | None = None, **options: Any) -> TextStream:
        """The assistant's answer, piece by piece."""
        ids = self.encode_messages(messages)
        return TextStream(self.engine, self._submit(ids, _params(params, options), continues=False))


class TextStream(Iterator[str]):
    """Pieces of whole characters. `completion` is there once the answer has ended; `close` ends it early."""

    def __init__(self, engine: Engine, request_id: int) -> None:
        self.engine = engine
        self.request_id = request_id
        self.completion: Completion | None = None
        self._closed = False

    def __next__(self) -> str:
        while not self._closed:
            try:
                outputs = self.engine.collect([self.request_id])
            except BaseException:
                self.close()
                raise
            if outputs and outputs[-1].completion is not None:
                self.completion, self._closed = outputs[-1].completion, True
            if piece := "".join(output.piece for output in outputs):
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the answer here. `completion` then holds what was said, with finish_reason "abort"."""
        if not self._closed:
            self._closed = True
            self.completion = self.engine.abort(self.request_id)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()


def make_runner(model: LanguageModel, max_model_len: int | None, max_running: int) -> Runner:
    """The runner for this model. Raises RequestError when `max_model_len` is more than the model has positions."""
    if isinstance(model, Decoder):
        limit = model.config.max_position_embeddings
        return NativeRunner(model, _context(max_model_len, limit), max_running)
    library_model = cast(Any, model).model
    limit = getattr(library_model.config.get_text_config(), "max_position_embeddings", None) or 2**20
    return TransformersRunner(model, library_model, _context(max_model_len, limit))


def _context(asked: int | None, limit: int) -> int:
    if asked is not None and not 2 <= asked <= limit:
        raise RequestError(f"max_model_len must be between 2 and the model's {limit} positions, got {asked}")
    return limit if asked is None else asked


def _load(source: ModelSource, dtype: str | torch.dtype, device: str | torch.device, backend: str) -> LanguageModel:
    chosen = pick_device(str(device))
    if dtype == "auto" and chosen.type == "cpu":
        dtype = torch.float32
    return load_model(
        source.path,
        adapter=source.adapter,
        quantize=source.quantize,
        dtype=dtype,
        device=chosen,
        backend=cast(Any, backend),
        revision=source.revision,
    )


def _load_tokenizer(source: ModelSource) -> Tokenizer:
    tokenizer = load_tokenizer(source.tokenizer or resolve_model(source.path, source.revision))
    if source.chat_template is None:
        return tokenizer
    try:
        return tokenizer.with_chat_template(source.chat_template.read_text(encoding="utf-8"))
    except OSError as error:
        raise TokenizerError(f"the chat template {source.chat_template} of the run can't be read: {error}") from None


def _encode_text(tokenizer: Tokenizer, text: str) -> list[int]:
    """A raw prompt: special tokens may be written out, and the beginning-of-text token is added once."""
    ids = tokenizer.encode(text, parse_special=True, add_special=True)
    twice = tokenizer.bos_id is not None and ids[:2] == [tokenizer.bos_id] * 2
    return ids[1:] if twice else ids


def _vocab_size(model: LanguageModel) -> int:
    if isinstance(model, Decoder):
        return model.config.vocab_size
    return int(cast(Any, model).model.config.get_text_config().vocab_size)


def _stop_ids(model: LanguageModel, tokenizer: Tokenizer | None) -> set[int]:
    """What ends an answer: the tokenizer's stop tokens and the model's own end tokens."""
    stop = set() if tokenizer is None else set(tokenizer.stop_ids)
    if isinstance(model, Decoder):
        return stop | set(model.config.eos_token_ids)
    eos = cast(Any, model).model.generation_config.eos_token_id
    return stop | set(eos if isinstance(eos, list) else [] if eos is None else [eos])


def _params(params: SamplingParams | None, options: Mapping[str, Any]) -> SamplingParams:
    known = SamplingParams.__dataclass_fields__
    for name in options:
        if name not in known:
            raise RequestError(f"{name!r} is not a sampling option; there are: {', '.join(known)}")
    return replace(params or SamplingParams(), **options)


def _each(params: Params, options: Mapping[str, Any], num_prompts: int) -> list[SamplingParams]:
    """Every prompt's own parameters."""
    if params is None or isinstance(params, SamplingParams):
        return [_params(params, options)] * num_prompts
    if len(params) != num_prompts:
        raise RequestError(
            f"give one SamplingParams for all prompts or one for each: got {len(params)}, {num_prompts} prompts"
        )
    return [_params(own, options) for own in params]


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and all(isinstance(item, int) for item in prompts):
        return [cast("Sequence[int]", prompts)]
    return list(cast("Sequence[Prompt]", prompts))
