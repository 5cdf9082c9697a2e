"""One example with its mask, for eyes before the first step; and the refusal of a mask that teaches nothing."""

from __future__ import annotations

from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from tunesmith.errors import DataError
from tunesmith.text.dataset import Document, TrainingData
from tunesmith.text.tokenizer import Tokenizer

TRAINED_STYLE = "bold green"
_SHOWN_TOKENS = 400  # of a long example: its beginning, and its end


def mask_preview(document: Document, tokenizer: Tokenizer) -> Text:
    """The document's text: what is trained bold and green, what is only read dim."""
    text = Text(f"{document.row}  ({int(document.trained.sum())} of {len(document.tokens)} tokens are trained)\n")
    for piece in mask_pieces(document, tokenizer):
        text.append(piece["text"], style=TRAINED_STYLE if piece["trained"] else "dim")
    return text


def mask_pieces(document: Document, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    """The same as plain data: [{"text", "trained", "tokens"}], runs of tokens with one flag, in order.

    Joined, the texts are the document, its middle left out where it is long. A character whose tokens lie in two
    runs can't occur: an answer begins and ends with whole characters.
    """
    half = _SHOWN_TOKENS // 2
    if len(document.tokens) <= _SHOWN_TOKENS:
        return _pieces(document.tokens, document.trained, tokenizer)
    left_out = len(document.tokens) - 2 * half
    gap = {"text": f"\n[... {left_out} tokens ...]\n", "trained": False, "tokens": left_out}
    head = _pieces(document.tokens[:half], document.trained[:half], tokenizer)
    return [*head, gap, *_pieces(document.tokens[-half:], document.trained[-half:], tokenizer)]


def _pieces(tokens: np.ndarray, trained: np.ndarray, tokenizer: Tokenizer) -> list[dict[str, Any]]:
    pieces, shown, start = [], "", 0
    for flag, group in groupby(trained.tolist()):
        count = len(list(group))
        end = start + count
        # Decoded up to here, less what was shown: a decoder may treat the very first token differently.
        text = tokenizer.decode(tokens[:end].tolist())
        pieces.append({"text": text[len(shown) :], "trained": bool(flag), "tokens": count})
        shown, start = text, end
    return pieces


def example_document(data: TrainingData) -> Document:
    """The document to show: the first with a trained token, as training has it."""
    return next(document for document in data.train if document.trained.any())


def check_trainable(data: TrainingData) -> None:
    """Refuses data that would teach nothing, or would teach a chat model never to stop.

    Raises: DataError.
    """
    summary = data.summary
    if summary.trained_tokens == 0:
        raise DataError("no token of the data is trained; see data.train_on and the chat template's mask")
    if summary.conversations and summary.ends_trained == 0:
        end = data.tokenizer.end_of_turn_id
        name = "none is known" if end is None else f"the template's is {data.tokenizer.token_text(end)!r}"
        raise DataError(
            f"no end-of-turn token is trained ({name}): the model would never learn to stop; "
            f"raise data.max_length if answers are cut, or name another template with data.chat_template"
        )
