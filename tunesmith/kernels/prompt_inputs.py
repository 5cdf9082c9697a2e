"""The inputs of a step with prompts, moved to where a recorded graph reads them, in one launch.

of a step of T tokens, R requests               where the graph of more tokens and requests reads
tokens   [ -1-5  17  42  8 ]                    [ last[5]  17  42  8   0  ...]   below zero: a slot's last token
slots    [  80   33  34 35 ]                    [  80      33  34 35  -1  ...]   -1: written nowhere
starts   [ 0  1  4 ]                            [ 0  1  4  4  4  ...]            requests of padding have no tokens
contexts [ 17  3 ]                              [ 17  3  1  1  ...]
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel


@dataclass(frozen=True)
class PromptInputs:
    """Tensors by token, and by request.

    tokens, positions, slots (page * S + offset): int64 [T]. starts: int32 [R + 1], the first of them 0. contexts: int32
    [R]. tables: int32 [R, P].
    """

    tokens: Tensor
    positions: Tensor
    slots: Tensor
    starts: Tensor
    contexts: Tensor
    tables: Tensor

    @staticmethod
    def empty(num_tokens: int, num_requests: int, num_pages: int, device: torch.device) -> PromptInputs:
        """Padding only."""
        return PromptInputs(
            tokens=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            positions=torch.zeros(num_tokens, dtype=torch.int64, device=device),
            slots=torch.full((num_tokens,), -1, dtype=torch.int64, device=device),
            starts=torch.zeros(num_requests + 1, dtype=torch.int32, device=device),
            contexts=torch.ones(num_requests, dtype=torch.int32, device=device),
            tables=torch.zeros(num_requests, num_pages, dtype=torch.int32, device=device),
        )

    def first(self, num_tokens: int, num_requests: int) -> PromptInputs:
        """Views of the first tokens and requests."""
        return PromptInputs(
            self.tokens[:num_tokens],
            self.positions[:num_tokens],
            self.slots[:num_tokens],
            self.starts[: num_requests + 1],
            self.contexts[:num_requests],
            self.tables[:num_requests],
        )

    def tensors(self) -> tuple[Tensor, ...]:
        """All of them, in the order of the fields."""
        return (self.tokens, self.positions, self.slots, self.starts, self.contexts, self.tables)


def load_prompt_inputs(source: PromptInputs, target: PromptInputs, last_tokens_N: Tensor, slots_of_page: int) -> None:
    """Put a step's tokens and requests into the first places of `target`, and padding into the others.

    Args: source: of no more tokens and requests than target; its tables may have fewer columns, of which those that its
    contexts use are copied. last_tokens_N: int64 by slot. slots_of_page: S.
    """
    if use_kernel(target.tokens.device):
        from tunesmith.kernels.prompt_inputs_triton import load_prompt_inputs_operator

        launch = direct(load_prompt_inputs_operator, target.tokens)
        launch(*source.tensors(), *target.tensors(), last_tokens_N, slots_of_page)
        return
    load_prompt_inputs_reference(source, target, last_tokens_N, slots_of_page)


def load_prompt_inputs_reference(
    source: PromptInputs, target: PromptInputs, last_tokens_N: Tensor, slots_of_page: int
) -> None:
    """`load_prompt_inputs` by plain torch: the truth that the kernel must equal."""
    num, requests = source.tokens.shape[0], source.contexts.shape[0]
    last = last_tokens_N.index_select(0, (-1 - source.tokens).clamp(min=0))
    target.tokens[:num] = torch.where(source.tokens < 0, last, source.tokens)
    target.positions[:num] = source.positions
    target.slots[:num] = source.slots
    target.contexts[:requests] = source.contexts
    target.starts[: requests + 1] = source.starts
    target.starts[requests + 1 :] = source.starts[-1]
    for into, value in ((target.tokens, 0), (target.positions, 0), (target.slots, -1)):
        into[num:] = value
    target.contexts[requests:] = 1
    columns = torch.arange(source.tables.shape[1], device=source.tables.device)
    is_used = columns[None] < (source.contexts[:, None] + slots_of_page - 1) // slots_of_page
    held = target.tables[:requests, : source.tables.shape[1]]
    held.copy_(torch.where(is_used, source.tables, held))
