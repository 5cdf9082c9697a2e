"""The inputs of a decoding step, moved to where a recorded graph reads them, in one launch.

of a step of R sequences                         where the graph of B >= R rows reads
tokens   [ 17  -1-5  42 ]                        [ 17  last[5]  42   0  ...]   below zero: a slot's last token
slots    [ 80   33  129 ]                        [ 80   33     129  -1  ...]   -1: written nowhere
contexts [ 17   34    2 ]                        [ 17   34       2   1  ...]   rows of padding see one position
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel


@dataclass(frozen=True)
class DecodeInputs:
    """Tensors by row: one new token of each sequence.

    tokens, positions, slots (page * S + offset), sample_slots, sample_positions: int64 [B]. contexts, adapters: int32
    [B]. tables: int32 [B, P].
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    sample_slots: Tensor
    sample_positions: Tensor
    contexts: Tensor
    adapters: Tensor
    tables: Tensor

    @staticmethod
    def empty(num_rows: int, num_pages: int, padding_slot: int, device: torch.device) -> DecodeInputs:
        """Rows of padding only."""

        def rows(value: int, dtype: torch.dtype = torch.int64) -> Tensor:
            return torch.full((num_rows,), value, dtype=dtype, device=device)

        return DecodeInputs(
            tokens=rows(0),
            positions=rows(0),
            slots=rows(-1),
            sample_slots=rows(padding_slot),
            sample_positions=rows(1),
            contexts=rows(1, torch.int32),
            adapters=rows(-1, torch.int32),
            tables=torch.zeros(num_rows, num_pages, dtype=torch.int32, device=device),
        )

    def first(self, num_rows: int) -> DecodeInputs:
        """Views of the first rows."""
        return DecodeInputs(*(tensor[:num_rows] for tensor in self.tensors()))

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return (
            self.tokens,
            self.positions,
            self.slots,
            self.sample_slots,
            self.sample_positions,
            self.contexts,
            self.adapters,
            self.tables,
        )


def load_inputs(source: DecodeInputs, target: DecodeInputs, last_tokens_N: Tensor, slots_of_page: int) -> None:
    """Put a step's rows into the first rows of `target`, and padding into the others.

    Args: source: R rows, R at most target's; its tables may have fewer columns, of which those that its contexts use
    are copied. last_tokens_N: int64 by slot; its last slot is that of padding. slots_of_page: S.
    """
    if use_kernel(target.tokens.device):
        from tunesmith.kernels.decode_inputs_triton import load_inputs_operator

        launch = direct(load_inputs_operator, target.tokens)
        launch(*source.tensors(), *target.tensors(), last_tokens_N, slots_of_page)
        return
    load_inputs_reference(source, target, last_tokens_N, slots_of_page)


def load_inputs_reference(
    source: DecodeInputs, target: DecodeInputs, last_tokens_N: Tensor, slots_of_page: int
) -> None:
    """`load_inputs` by plain torch: the truth that the kernel must equal."""
    num = source.tokens.shape[0]
    padding_slot = last_tokens_N.shape[0] - 1
    on_device = source.tokens < 0
    last = last_tokens_N.index_select(0, torch.where(on_device, -1 - source.tokens, padding_slot))
    target.tokens[:num] = torch.where(on_device, last, source.tokens)
    for into, rows in zip(target.tensors()[1:-1], source.tensors()[1:-1], strict=True):
        into[:num] = rows
    paddings = (0, 0, -1, padding_slot, 1, 1, -1, 0)
    for into, value in zip(target.tensors(), paddings, strict=True):
        into[num:] = value
    columns = torch.arange(source.tables.shape[1], device=source.tables.device)
    is_used = columns[None] < (source.contexts[:, None] + slots_of_page - 1) // slots_of_page
    held = target.tables[:num, : source.tables.shape[1]]
    held.copy_(torch.where(is_used, source.tables, held))
