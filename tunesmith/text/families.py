"""Chat templates for tokenizers that come without one, chosen by the special tokens they have."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

_TEMPLATES = Path(__file__).parent / "templates"


def family_template(token_id: Callable[[str], int | None], eos_id: int | None, model_type: object) -> str | None:
    """The template of the tokenizer's family, or None when it has no token that could end a turn.

    Args: `token_id`: looks a token up in the vocabulary; `model_type`: config.json's, where there is one.
    """
    name = _family(token_id, model_type)
    if name is None and eos_id is None:
        return None
    return read_template(name or "eos_separated")


def read_template(name: str) -> str:
    """One of the templates kept here: chatml, llama2, llama3, mistral, eos_separated."""
    return (_TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8")


def _family(token_id: Callable[[str], int | None], model_type: object) -> str | None:
    if token_id("<|im_start|>") is not None and token_id("<|im_end|>") is not None:
        return "chatml"
    if token_id("<|start_header_id|>") is not None and token_id("<|eot_id|>") is not None:
        return "llama3"
    if model_type in ("mistral", "mixtral") or token_id("[INST]") is not None:
        return "mistral"
    if model_type == "llama" and token_id("<0x0A>") is not None:
        return "llama2"
    return None
