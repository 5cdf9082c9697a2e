"""One example or pair with its mask, for eyes before the first step; and the refusal of a mask that teaches nothing."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
from rich.text import Text

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text.dataset import Document, TokenisedDataset
from tunesmith.text.preferences import PreferencePair
from tunesmith.text.tokenizer import Tokenizer

TRAINED_STYLE = "bold green"
_SHOWN_TOKENS = 400  # of a long example: its beginning, and its end


@dataclass(frozen=True)
class MaskPreview:
    """text: for a terminal, trained tokens bold and green, the rest dim. data: the same, for the run directory."""

    text: Text
    data: dict[str, Any]


def mask_preview(document: Document, tokenizer: Tokenizer) -> MaskPreview:
    """The document as training sees it."""
    pieces, num_trained = mask_pieces(document, tokenizer), int(document.trained.sum())
    counts = f"{num_trained} of {len(document.tokens)} tokens are trained: what the model learns to write"
    text = Text(f"{document.row}  (")
    text.append(counts, style=TRAINED_STYLE)
    text.append(")\n")
    for piece in pieces:
        text.append(piece["text"], style=TRAINED_STYLE if piece["trained"] else "dim")
    data = {"row": document.row, "tokens": len(document.tokens), "trained_tokens": num_trained, "pieces": pieces}
    return MaskPreview(text, data)


def pair_preview(pair: PreferencePair, tokenizer: Tokenizer) -> MaskPreview:
    """Both documents of a pair, the chosen one first."""
    sides = {"chosen": mask_preview(pair.chosen, tokenizer), "rejected": mask_preview(pair.rejected, tokenizer)}
    text = Text("\n\n").join(Text(f"{name}: ").append_text(side.text) for name, side in sides.items())
    data = {"row": pair.chosen.row, "prompt_tokens": pair.prompt_tokens}
    return MaskPreview(text, {**data, **{name: side.data for name, side in sides.items()}})


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


def check_trainable(dataset: TokenisedDataset, tokenizer: Tokenizer, data: DataSection) -> None:
    """Refuses data that would teach nothing, or would teach a chat model never to stop.

    Raises: DataError.
    """
    if not any(dataset.arrays(index)[1].any() for index in range(len(dataset))):
        raise DataError(f"no token of the data is trained; data.train_on is {data.train_on!r}: see the template's mask")
    if dataset.conversations and not dataset.ends_trained:
        end = tokenizer.end_of_turn_id
        name = "the template writes none" if end is None else f"the template's is {tokenizer.token_text(end)!r}"
        raise DataError(
            f"no end-of-turn token is trained ({name}): the model would never learn to stop; raise data.max_length "
            f"({data.max_length}) if answers are cut, or name another template with data.chat_template"
        )
