"""What a decoder's output head is held in, once its weights are there: as stored, in int8, or both."""

from __future__ import annotations

from typing import Literal, get_args

from tunesmith.errors import ModelError, UnsupportedModelError, nearest
from tunesmith.kernels.chip import is_gpu
from tunesmith.model.decode_linears import hold_head_in_int8
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import copy_head, keeps_share, lacks_for_copy
from tunesmith.model.held import HeldLinear

Head = Literal["auto", "stored", "int8", "copy"]


def check_head(head: str) -> None:
    """Raises: ModelError for a form that there is not."""
    known = get_args(Head)
    if head not in known:
        raise ModelError(f"there is no head {head!r}{nearest(head, known)}; there are: {', '.join(known)}")


def place_head(
    decoder: Decoder, head: str, *, is_quantised: bool, is_integer: bool, num_layers: int, one_head: bool = False
) -> None:
    """Hold the head in int8, or put a copy in int8 beside it, where that was asked for or is the faster way to answer.

    Args:
        head: see `load_for_inference`.
        is_quantised: whether the blocks are; is_integer: in int8 or int4, not in fp8 or NF4.
        num_layers: of the whole model, whose blocks are as those that are here.
        one_head: every row is to go through the same head, whatever it is.
    Raises: ModelError for a copy where all rows are to have one head; UnsupportedModelError for one that can't be had.
    """
    if one_head and head == "copy":
        raise ModelError("head='copy' has two heads, and batch_invariant wants one: take head='stored' or 'int8'")
    device, is_held = decoder.embedding.weight.device, isinstance(decoder.head, HeldLinear)
    if head == "copy":
        _copy(decoder)
    elif head == "auto" and is_gpu(device):
        if is_quantised and not one_head and lacks_for_copy(decoder) is None:
            _place_on_gpu(decoder, num_layers)
    elif (head == "int8" or (head == "auto" and is_integer and device.type == "cpu")) and not is_held:
        hold_head_in_int8(decoder)


def _place_on_gpu(decoder: Decoder, num_layers: int) -> None:
    """A copy; where that would be too much for a model in 4 bits, int8 alone, which is less than what is stored."""
    if keeps_share(decoder, num_layers):
        copy_head(decoder)
    elif decoder.head is not None:
        hold_head_in_int8(decoder)


def _copy(decoder: Decoder) -> None:
    lacking = lacks_for_copy(decoder)
    if lacking is not None:
        raise UnsupportedModelError(f"head='copy' can't be had here: {lacking}; take head='stored' or 'int8'")
    copy_head(decoder)
