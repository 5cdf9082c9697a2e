"""How good a model is: perplexity on text, exact-answer accuracy on questions. Greedy, through the engine."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import chain, count
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from tunesmith.bench.answers import BASE_STOP, Comparison, Question, choose_comparison, is_right, read_questions
from tunesmith.bench.answers import wilson_interval as wilson
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import Completion, SamplingParams
from tunesmith.engine.runner import evaluating
from tunesmith.errors import DataError, RequestError
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.packed import packed
from tunesmith.recipe.schema import DataSection
from tunesmith.rundir.io import write_json_atomic
from tunesmith.rundir.layout import is_run, open_run
from tunesmith.text.dataset import TokenisedDataset, load_data
from tunesmith.train.losses import IGNORED, cross_entropy_sum, head_of, trained_positions

SCHEMA = "tunesmith.quality"
SCHEMA_VERSION = 1
WINDOW_TOKENS = 1024
CHUNK_TOKENS = 2048
ANSWERS_TOGETHER = 8
KEPT_EXAMPLES = 50
Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much is done, and how much there is."""


@dataclass(frozen=True)
class Perplexity:
    """exp(sum of losses / trained tokens), natural logarithm; documents longer than the window are cut."""

    data: str
    loss: float
    perplexity: float
    num_tokens: int
    num_documents: int
    window_tokens: int
    duration_s: float


@dataclass(frozen=True)
class Example:
    """One question as it was answered."""

    row: str
    question: str
    expected: tuple[str, ...]
    said: str
    right: bool
    finish_reason: str


@dataclass(frozen=True)
class Accuracy:
    """Shares are 0 to 1; `low` and `high` bound the 95 % interval (Wilson). Cut answers hit the token limit.

    examples: the first questions, and after them the first that were answered wrongly.
    """

    questions: str
    accuracy: float
    low: float
    high: float
    num_right: int
    num_questions: int
    num_cut: int
    comparison: Comparison
    max_new_tokens: int
    mean_new_tokens: float
    new_tokens_per_s: float
    duration_s: float
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class QualityResult:
    """What `evaluate` measured. `path` is the JSON in the run directory, None when there was none to write to."""

    name: str
    model: str
    adapter: str | None
    backend: str
    perplexity: Perplexity | None
    accuracy: Accuracy | None
    path: Path | None = None

    def to_json(self) -> dict[str, Any]:
        """The content of the JSON file."""
        content = {key: value for key, value in asdict(self).items() if key != "path"}
        return {"schema": SCHEMA, "schema_version": SCHEMA_VERSION, **content}


def evaluate(
    model: str | Path | LLM | LanguageModel,
    *,
    data: str | Sequence[str] | TokenisedDataset | None = None,
    questions: str | Sequence[Question] | None = None,
    adapter: str | Path | None = None,
    limit: int | None = None,
    max_new_tokens: int = 256,
    max_length: int | None = None,
    train_on: Literal["answers", "all"] = "answers",
    comparison: Comparison | None = None,
    run_dir: str | Path | None = None,
    name: str = "quality",
    progress: Progress | None = None,
    **loading: Any,
) -> QualityResult:
    """Perplexity on `data` and accuracy on `questions`, whichever is given.

    Args:
        model: whatever `LLM` takes, or an `LLM`.
        data: files as `data.train` of a recipe, or a tokenised dataset.
        limit: so many rows and questions at most.
        max_length: tokens of a window of text; None: 1024, or the model's context when that is shorter.
        comparison: "exact" (NFKC, space collapsed) or "number" (the last number, or the one after ####); None: number
            where all answers are GSM8K's, else exact.
        run_dir: where evaluations/<name>.json goes (<name>-2.json where that is there already, and so on); None: into
            `model` when that is a run directory.
        loading: passed on to `LLM`: tokenizer, quantize, dtype, device, backend, max_model_len.
    Raises: DataError, RequestError, and what LLM raises.
    """
    if data is None and questions is None:
        raise DataError(
            "nothing to evaluate on: give data (--data FILE: text, for perplexity), questions (--questions FILE: with "
            "answers), or both"
        )
    target = _target(run_dir, model, name)
    llm = _llm(model, adapter, loading)
    result = QualityResult(
        name=name,
        model=_name_of(model, llm),
        adapter=None if adapter is None else str(adapter),
        backend=llm.model.backend,
        perplexity=None if data is None else _perplexity(llm, data, limit, max_length, train_on, progress),
        accuracy=None if questions is None else _accuracy(llm, questions, limit, max_new_tokens, comparison, progress),
        path=target,
    )
    if target is not None:
        target.parent.mkdir(exist_ok=True)
        target = _unused(target)
        result = replace(result, path=target)
        write_json_atomic(target, result.to_json())
    return result


def _target(run_dir: str | Path | None, model: object, name: str) -> Path | None:
    if not re.fullmatch(r"[^/\\\x00-\x1f]{1,80}", name) or name.startswith("."):
        raise DataError(f"the name of an evaluation becomes a file name: at most 80 characters, no slash, got {name!r}")
    if run_dir is not None:
        return open_run(run_dir).path / "evaluations" / f"{name}.json"
    if isinstance(model, str | Path) and is_run(Path(model)):
        return Path(model) / "evaluations" / f"{name}.json"
    return None


def _unused(target: Path) -> Path:
    """`target`, or where an earlier evaluation is there the same name with the first free number from 2 on."""
    numbered = (target.with_name(f"{target.stem}-{number}{target.suffix}") for number in count(2))
    return next(path for path in chain([target], numbered) if not path.exists())


def _llm(model: str | Path | LLM | LanguageModel, adapter: str | Path | None, loading: dict[str, Any]) -> LLM:
    if not isinstance(model, LLM):
        return LLM(model, adapter=adapter, **{"max_running": ANSWERS_TOGETHER, **loading})
    if adapter is not None or loading:
        raise RequestError("adapter and loading options go with a model's path, not with an LLM that is loaded")
    return model


def _name_of(model: object, llm: LLM) -> str:
    if isinstance(model, str | Path):
        return str(model)
    return type(llm.model).__name__ if llm.source is None else llm.source.path


def _perplexity(
    llm: LLM,
    data: str | Sequence[str] | TokenisedDataset,
    limit: int | None,
    max_length: int | None,
    train_on: Literal["answers", "all"],
    progress: Progress | None,
) -> Perplexity:
    window = min(max_length or WINDOW_TOKENS, llm.max_model_len)
    if isinstance(data, TokenisedDataset):
        dataset, named = data, "dataset"
    else:
        files = [data] if isinstance(data, str) else list(data)
        dataset, named = _read(llm, files, window, train_on, limit), ", ".join(files)
    began = time.perf_counter()
    total, num_tokens = dataset_loss(llm.model, dataset, window, progress)
    loss = total / num_tokens
    return Perplexity(
        data=named,
        loss=loss,
        perplexity=math.exp(min(loss, 700.0)),
        num_tokens=num_tokens,
        num_documents=len(dataset),
        window_tokens=window,
        duration_s=time.perf_counter() - began,
    )


def _read(
    llm: LLM, files: list[str], window: int, train_on: Literal["answers", "all"], limit: int | None
) -> TokenisedDataset:
    if llm.tokenizer is None:
        raise RequestError("perplexity of files needs a tokenizer: LLM(model, tokenizer=...)")
    section = DataSection(
        train=files,
        validation_fraction=0.0,
        max_length=window,
        train_on=train_on,
        max_rows=limit,
        system=llm.system,
        template_arguments=dict((llm.source and llm.source.template_arguments) or {}),
    )
    return load_data(section, llm.tokenizer, seed=0).train


def dataset_loss(
    model: LanguageModel, dataset: TokenisedDataset, window: int, progress: Progress | None = None
) -> tuple[float, int]:
    """The sum of the losses over the trained tokens of all documents, and their number.

    Raises: DataError when no token is trained.
    """
    device = next(iter(model.parameters())).device
    total, num_trained = 0.0, 0
    with torch.inference_mode(), evaluating(model):
        for done, documents in _packs(dataset, max(window, CHUNK_TOKENS)):
            tokens, targets, lengths = _lay_out(dataset, documents)
            index, chosen = trained_positions(targets)
            hidden = model.hidden(packed(tokens.to(device), lengths))
            loss = cross_entropy_sum(hidden, index.to(device), chosen.to(device), head_of(model), CHUNK_TOKENS)
            total, num_trained = total + float(loss), num_trained + len(index)
            if progress is not None:
                progress("perplexity", done, len(dataset))
    if not num_trained:
        raise DataError("no token of this data is in the loss: it has no answer, or only documents of one token")
    return total, num_trained


def _packs(dataset: TokenisedDataset, capacity: int) -> Iterator[tuple[int, list[int]]]:
    """Documents in order, as many together as fit; with how many are done after them."""
    held: list[int] = []
    size = 0
    for index, length in enumerate(dataset.lengths.tolist()):
        if held and size + length > capacity:
            yield index, held
            held, size = [], 0
        held.append(index)
        size += length
    if held:
        yield len(dataset), held


def _lay_out(dataset: TokenisedDataset, documents: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor, list[int]]:
    """Tokens end to end, and for each the next token of its document where that one is trained."""
    tokens, targets, lengths = [], [], []
    for index in documents:
        document_tokens, document_trained = dataset.arrays(index)
        ids = torch.from_numpy(document_tokens.astype(np.int64))
        trained = torch.from_numpy(document_trained.copy())
        following = torch.full_like(ids, IGNORED)
        following[:-1] = ids[1:].where(trained[1:], IGNORED)
        tokens.append(ids)
        targets.append(following)
        lengths.append(len(ids))
    return torch.cat(tokens), torch.cat(targets), lengths


def _accuracy(
    llm: LLM,
    questions: str | Sequence[Question],
    limit: int | None,
    max_new_tokens: int,
    comparison: Comparison | None,
    progress: Progress | None,
) -> Accuracy:
    asked = read_questions(questions, limit) if isinstance(questions, str) else list(questions)[:limit]
    if not asked:
        raise DataError("there is no question to ask")
    comparison = comparison or choose_comparison(asked)
    began = time.perf_counter()
    completions = _ask(llm, asked, max_new_tokens, progress)
    duration_s = time.perf_counter() - began
    examples = [_example(q, c, comparison) for q, c in zip(asked, completions, strict=True)]
    num_right = sum(example.right for example in examples)
    num_new = sum(len(completion.token_ids) for completion in completions)
    low, high = wilson(num_right, len(asked))
    return Accuracy(
        questions=questions if isinstance(questions, str) else "questions",
        accuracy=num_right / len(asked),
        low=low,
        high=high,
        num_right=num_right,
        num_questions=len(asked),
        num_cut=sum(completion.finish_reason == "length" for completion in completions),
        comparison=comparison,
        max_new_tokens=max_new_tokens,
        mean_new_tokens=num_new / len(asked),
        new_tokens_per_s=num_new / duration_s,
        duration_s=duration_s,
        examples=tuple(kept_examples(examples)),
    )


def kept_examples(examples: Sequence[Example]) -> list[Example]:
    """The first KEPT_EXAMPLES, and as many wrong ones after them as fill up so many wrong ones; in the order asked."""
    first, later = examples[:KEPT_EXAMPLES], [one for one in examples[KEPT_EXAMPLES:] if not one.right]
    return [*first, *later[: KEPT_EXAMPLES - sum(not one.right for one in first)]]


def _ask(llm: LLM, asked: Sequence[Question], max_new_tokens: int, progress: Progress | None) -> list[Completion]:
    """Greedy answers, a few questions at a time so that progress shows."""
    completions: list[Completion] = []
    for start in range(0, len(asked), 4 * ANSWERS_TOGETHER):
        part = asked[start : start + 4 * ANSWERS_TOGETHER]
        completions += _ask_part(llm, part, max_new_tokens)
        if progress is not None:
            progress("questions", len(completions), len(asked))
    return completions


def _ask_part(llm: LLM, part: Sequence[Question], max_new_tokens: int) -> list[Completion]:
    """Answers in order: by the chat template where question and model have one, else as a text to be continued."""
    in_turns = [bool(question.messages) and llm.has_chat_template for question in part]
    chats = [_messages(llm, q) for q, turns in zip(part, in_turns, strict=True) if turns]
    texts = [q for q, turns in zip(part, in_turns, strict=True) if not turns]
    chat_params = [_room(llm, llm.encode_messages(messages), max_new_tokens, ()) for messages in chats]
    text_params = [
        _room(llm, llm.encode(q.plain_prompt()), max_new_tokens, () if q.prompt is not None else BASE_STOP)
        for q in texts
    ]
    said = iter(llm.chat_many(chats, chat_params, progress=False))
    continued = iter(llm.generate([q.plain_prompt() for q in texts], text_params, progress=False))
    return [next(said) if turns else next(continued) for turns in in_turns]


def _messages(llm: LLM, question: Question) -> list[Mapping[str, Any]]:
    """The question with the system message that the run trained with, where it has none of its own."""
    messages = list(question.messages)
    if llm.system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": llm.system})
    return messages


def _room(llm: LLM, ids: list[int], max_new_tokens: int, stop: tuple[str, ...]) -> SamplingParams:
    """Greedy, up to `max_new_tokens`, or what the context has left (such answers count as cut)."""
    room = max(1, llm.max_model_len - len(ids))
    return SamplingParams(max_tokens=min(max_new_tokens, room), stop=stop)


def _example(question: Question, completion: Completion, comparison: Comparison) -> Example:
    right = is_right(completion.text, question, comparison)
    return Example(question.row, question.text, question.answers, completion.text, right, completion.finish_reason)
