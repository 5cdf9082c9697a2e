"""What is sent: requests by a rule and a seed, or of a public data set.

    synthetic   token ids, prompt and output lengths uniform from a to b
    sharegpt    prompts of real conversations as token ids, with arrival times; as many tokens out as the answer had
    azure       the lengths and arrival times of a production service; ids are drawn, since no text was published
    gsm8k       grade-school questions, sent as chat messages

Source: ShareGPT prompts with arrivals: github.com/casys-kaist/LLMServingSim, workloads/; the trace: Patel et al.,
"Splitwise", ISCA 2024 (Azure LLM inference trace 2023); questions: Cobbe et al., arXiv:2110.14168.
"""

from __future__ import annotations

import csv
import json
import lzma
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import datetime
from pathlib import Path
from typing import Any, Literal, TextIO

from tunesmith.errors import DataError, RecipeError

Kind = Literal["synthetic", "sharegpt", "azure", "gsm8k"]
KINDS: tuple[Kind, ...] = ("synthetic", "sharegpt", "azure", "gsm8k")
FIRST_ID, LAST_ID = 10, 9000
"""Where drawn token ids lie: past the special tokens of most vocabularies, and inside nearly all."""
QUESTION_TOKENS = 512
DEFAULT_TOKENS = (100, 1024)
QUICK_TOKENS, QUICK_OUTPUTS = (32, 256), (16, 64)
"""Lengths of a short look, of which a CPU answers some in a second."""


@dataclass(frozen=True)
class Item:
    """One request: token ids, or a text that is sent as a user's message.

    max_tokens: the tokens asked for. arrival_s: when it comes in a trace, from the first on; None: it has no time.
    """

    prompt: tuple[int, ...] | str
    max_tokens: int
    arrival_s: float | None = None

    @property
    def prompt_tokens(self) -> int | None:
        """Tokens of the prompt; None for a text, which only the server counts."""
        return None if isinstance(self.prompt, str) else len(self.prompt)

    def plain(self) -> dict[str, Any]:
        """The request as plain data."""
        return asdict(self)

    @classmethod
    def of(cls, mapping: dict[str, Any]) -> Item:
        """The request that plain data describes."""
        prompt = mapping["prompt"]
        ids = prompt if isinstance(prompt, str) else tuple(prompt)
        return cls(ids, mapping["max_tokens"], mapping["arrival_s"])


@dataclass(frozen=True)
class Workload:
    """Which requests. data: a file, or the folder it lies in; lengths are bounds, both included; count: None is all.

    num_ids: token ids are below it (None: not known, and drawn ids stay below LAST_ID).
    prompt_tokens: None: DEFAULT_TOKENS. output_tokens: None: as the data say, or as long as prompts; where is_quick,
    both are short unless they are given. max_model_len: longer requests are left out.
    """

    kind: Kind = "synthetic"
    data: Path | None = None
    count: int | None = 256
    prompt_tokens: tuple[int, int] | None = None
    output_tokens: tuple[int, int] | None = None
    seed: int = 0
    num_ids: int | None = None
    max_model_len: int | None = None
    is_quick: bool = False

    @property
    def prompts(self) -> tuple[int, int]:
        """Bounds of the prompt lengths of a synthetic workload."""
        return self.prompt_tokens or (QUICK_TOKENS if self.is_quick else DEFAULT_TOKENS)

    @property
    def outputs(self) -> tuple[int, int]:
        """Bounds of the output lengths of a synthetic workload."""
        return self.output_tokens or (QUICK_OUTPUTS if self.is_quick else self.prompts)


@dataclass(frozen=True)
class Requests:
    """What is sent, and what of it was changed to be served: a sentence each."""

    items: tuple[Item, ...]
    notes: tuple[str, ...] = ()


def make_requests(workload: Workload) -> Requests:
    """The requests of a workload, always the same for the same workload.

    Raises: RecipeError for a workload that lacks its data; DataError for data of another form, or none that fit.
    """
    makers: dict[str, Callable[[Workload], Iterator[Item]]] = {
        "synthetic": _synthetic,
        "sharegpt": _sharegpt,
        "azure": _azure,
        "gsm8k": _gsm8k,
    }
    items: list[Item] = []
    notes = []
    left_out = folded = 0
    for item in makers[workload.kind](workload):
        if workload.count is not None and len(items) == workload.count:
            break
        fitted = _with_known_ids(item, workload.num_ids)
        if _is_too_long(item, workload.max_model_len):
            left_out += 1
            continue
        folded += fitted is not item
        items.append(fitted)
    if left_out:
        notes.append(f"{left_out} requests longer than {workload.max_model_len} tokens were left out")
    if folded:
        notes.append(f"{folded} prompts have ids that this vocabulary lacks: folded into it, lengths kept")
    if not items:
        raise DataError(f"the workload {workload.kind} has no request that fits: raise --count or the model's length")
    return Requests(tuple(items), tuple(notes))


def fresh(items: Sequence[Item], salt: int) -> tuple[Item, ...]:
    """The same requests with another beginning, so that no cache of prefixes knows them from an earlier point.

    Lengths stay. What requests of one point share with each other stays shared, but for the first token.
    """
    return tuple(replace(item, prompt=_salted(item.prompt, salt)) for item in items)


def _salted(prompt: tuple[int, ...] | str, salt: int) -> tuple[int, ...] | str:
    if isinstance(prompt, str):
        return f"({salt}) {prompt}"
    first, second, *rest = (*prompt, 0)
    # Two tokens tell some 8,000 points apart within ids that the prompts have anyway.
    return tuple([_turned(first, salt), _turned(second, salt // 89), *rest][: len(prompt)])


def _turned(token: int, by: int) -> int:
    span = 90
    return FIRST_ID + (token - FIRST_ID + by) % span


def _is_too_long(item: Item, limit: int | None) -> bool:
    return limit is not None and (item.prompt_tokens or 0) + item.max_tokens > limit


def _with_known_ids(item: Item, num_ids: int | None) -> Item:
    if num_ids is None or isinstance(item.prompt, str) or max(item.prompt, default=0) < num_ids:
        return item
    low = min(FIRST_ID, num_ids - 1)
    return replace(item, prompt=tuple(low + token % (num_ids - low) for token in item.prompt))


def draw_ids(rng: random.Random, count: int, num_ids: int | None) -> tuple[int, ...]:
    """`count` token ids, uniform over the usual ones that the vocabulary has."""
    last = LAST_ID if num_ids is None else min(LAST_ID, num_ids - 1)
    return tuple(rng.randint(min(FIRST_ID, last), last) for _ in range(count))


def _synthetic(workload: Workload) -> Iterator[Item]:
    rng = random.Random(workload.seed)
    count = workload.count or 256
    lengths = [rng.randint(*workload.prompts) for _ in range(count)]
    outputs = [rng.randint(*workload.outputs) for _ in range(count)]
    for length, output in zip(lengths, outputs, strict=True):
        yield Item(draw_ids(rng, length, workload.num_ids), output)


def _sharegpt(workload: Workload) -> Iterator[Item]:
    path = _data_file(workload, "sharegpt*.jsonl*")
    outputs = _outputs(workload)
    for number, row in enumerate(_json_lines(path), 1):
        try:
            ids, wanted, at = row["input_tok_ids"], int(row["output_toks"]), int(row["arrival_time_ns"]) * 1e-9
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{path}:{number} lacks {error}: wanted input_tok_ids, output_toks, arrival_time_ns"
            ) from None
        yield Item(tuple(ids), outputs(wanted), at)


def _azure(workload: Workload) -> Iterator[Item]:
    path = _data_file(workload, "AzureLLMInferenceTrace_conv.csv*")
    rng, outputs = random.Random(workload.seed), _outputs(workload)
    began: datetime | None = None
    with _opened(path) as file:
        for number, row in enumerate(csv.DictReader(file), 2):
            try:
                moment = datetime.fromisoformat(row["TIMESTAMP"])
                prompt, output = int(row["ContextTokens"]), int(row["GeneratedTokens"])
            except (KeyError, TypeError, ValueError) as error:
                raise DataError(f"{path}:{number} is not a row of the Azure trace: {error}") from None
            began = began or moment
            at = (moment - began).total_seconds()
            yield Item(draw_ids(rng, max(1, prompt), workload.num_ids), outputs(max(1, output)), at)


def _gsm8k(workload: Workload) -> Iterator[Item]:
    path, outputs = _data_file(workload, "test.jsonl*"), _outputs(workload)
    for number, row in enumerate(_json_lines(path), 1):
        if not isinstance(row, dict) or not isinstance(row.get("question"), str):
            raise DataError(f"{path}:{number} has no question: wanted rows of GSM8K")
        yield Item(row["question"], outputs(QUESTION_TOKENS))


def _outputs(workload: Workload) -> Callable[[int], int]:
    """From the data's own output length to the one asked for."""
    if workload.output_tokens is None:
        return lambda own: own
    rng, (low, high) = random.Random(workload.seed + 1), workload.output_tokens
    return lambda own: rng.randint(low, high)


def _data_file(workload: Workload, pattern: str) -> Path:
    if workload.data is None:
        raise RecipeError(f"the workload {workload.kind} reads a file: name it, or its folder, with --data")
    if workload.data.is_file():
        return workload.data
    found = sorted(workload.data.glob(pattern)) if workload.data.is_dir() else []
    if not found:
        raise RecipeError(f"--data {workload.data} is no file, and no folder with {pattern}")
    return found[0]


def _json_lines(path: Path) -> Iterator[Any]:
    with _opened(path) as file:
        for number, line in enumerate(file, 1):
            try:
                yield json.loads(line)
            except ValueError:
                raise DataError(f"{path}:{number} is not a line of JSON") from None


def _opened(path: Path) -> TextIO:
    if path.suffix == ".xz":
        return lzma.open(path, "rt", encoding="utf-8")
    return path.open(encoding="utf-8")
