"""A copy of a decoder's head in int8, for steps of few requests: beside the stored one, which all others take.

At decode a head in 16 bits reads 2 V D bytes, as much as several quantised blocks, and in int8 half of it. Many rows
are cuBLAS's, with the stored head: codes widened at every step would cost more than they save. The price is V D bytes.

Which head a step takes goes by its requests, not by its rows: a step that verifies guesses takes the head that the
step without guesses takes. Log-probabilities of prompts are always the stored head's.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from tunesmith.kernels.gemv import MOST_TOKENS
from tunesmith.kernels.int8 import quantize_int8
from tunesmith.kernels.nf4 import use_kernel
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear
from tunesmith.model.quant import NF4Linear

MOST_REQUESTS = 16
"""Of a step that takes the copy. Measured on an H200, [37888, 3584], us, int8 and cuBLAS in bfloat16: 1 row 39 and 74,
16 rows 46 and 75, 64 rows 78 and 74."""
MOST_SHARE = 0.4
"""Of its bytes in 16 bits, what a model in 4 bits is to hold at most: a copy never takes one across that."""
_COLUMNS = 16
"""A row's columns are a multiple of this: what the kernel reads at once."""


def lacks_for_copy(decoder: Decoder) -> str | None:
    """Why a copy of this head can't be used, in words; None where it can."""
    head = decoder.head
    if head is not None and type(head) is not Linear:
        return "the head is quantised already, or has an adapter"
    weight_VD = decoder.embedding.weight if head is None else head.weight
    if not use_kernel(weight_VD.device):
        return "its kernel wants a GPU and Triton"
    if weight_VD.dtype.itemsize != 2 or weight_VD.shape[1] % _COLUMNS:
        said = f"{str(weight_VD.dtype).removeprefix('torch.')} {list(weight_VD.shape)}"
        return f"its kernel reads {_COLUMNS} columns at once, of inputs in 16 bits: the head is {said}"
    return None


def copy_head(decoder: Decoder) -> None:
    """Put `decoder.head_copy` beside its head, or beside the embedding that it is tied to."""
    weight_VD = (decoder.embedding.weight if decoder.head is None else decoder.head.weight).detach()
    vocab_size, width = weight_VD.shape
    copy = Int8Linear(width, {"lm_head": vocab_size}, False, dtype=weight_VD.dtype, device="meta")
    held = quantize_int8(weight_VD)
    copy.codes, copy.scale = held.codes, held.scale
    decoder.head_copy = copy.requires_grad_(False)


@torch.no_grad()
def copied_logits(copy: nn.Module, hidden_TD: Tensor) -> Tensor:
    """logits_TV by a copy, of any number of rows: as many at a time as the kernel takes, so nothing is widened."""
    most = MOST_TOKENS["int8"]
    if len(hidden_TD) <= most:
        return cast(Tensor, copy(hidden_TD))
    return torch.cat([copy(part) for part in hidden_TD.split(most)])


def keeps_share(decoder: Decoder, num_layers: int) -> bool:
    """Whether what is held stays below `MOST_SHARE` with a copy, where it is below that without.

    num_layers: of the whole model, whose blocks are as those that are here.
    """
    held, wide = _bytes(decoder.blocks)
    times = num_layers / len(decoder.blocks)
    outside = sum(tensor.nbytes for tensor in decoder.parameters()) - sum(t.nbytes for t in decoder.blocks.parameters())
    without = (held * times + outside) / (wide * times + outside)
    vocab_size, width = decoder.embedding.weight.shape
    return without > MOST_SHARE or without + vocab_size * (width + 4) / (wide * times + outside) <= MOST_SHARE


def _bytes(module: nn.Module) -> tuple[int, int]:
    """Bytes that a module holds, and those that it would hold with its quantised weights as they were."""
    held = sum(tensor.nbytes for tensor in [*module.parameters(), *module.buffers()])
    quantised = [child for child in module.modules() if isinstance(child, Fp8Linear | NF4Linear)]
    dense = sum(linear.in_features * linear.out_features * linear.dtype.itemsize for linear in quantised)
    return held, held - sum(linear.weight_bytes for linear in quantised) + dense
