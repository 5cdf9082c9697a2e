"""Linears that add, to each token's row, the low-rank adapter that the token's request asked for.

The base is any linear of the blocks: dense, NF4, fp8, or of another format with the face of `Linear`. Which adapter a
token takes is a `Choice` that all linears of a model share, and that is set before each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tunesmith.kernels.multi_lora import TokenAdapters, add_multi_lora, empty_stack, token_adapters
from tunesmith.kernels.multi_lora_tiles import NO_ADAPTER
from tunesmith.model.layers import Linear
from tunesmith.model.methods import ROUTERS
from tunesmith.model.moe import Experts, sort_by_expert


@dataclass
class Choice:
    """What the tokens of the next pass take; None: no token has an adapter."""

    tokens: TokenAdapters | None = None


class MultiLoraLinear(Linear):
    """A linear with a stack of adapters beside it. The face of `Linear`, and of its base in a block's written form.

    It is a `Linear` so that whatever takes one takes it, but has no weight of its own. Nothing here is trained.
    """

    def __init__(self, base: nn.Module, choice: Choice, num_slots: int, max_rank: int, dtype: torch.dtype) -> None:
        nn.Module.__init__(self)
        known: Any = base
        self.in_features: int = known.in_features
        self.parts = dict(known.parts)
        self.out_features = sum(self.parts.values())
        self.base = base
        self.choice = choice
        # What a process's part of a whole remembers, see parallel/shard_linears.py.
        self.cut: Any = getattr(base, "cut", None)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.stack = empty_stack(num_slots, self.in_features, list(self.parts.values()), max_rank, dtype, device)

    @property
    def weight(self) -> Any:  # type: ignore[override]
        """The base's, where it holds one as such."""
        return getattr(self.base, "weight", None)

    @property
    def bias(self) -> Any:  # type: ignore[override]
        """The base's."""
        return getattr(self.base, "bias", None)

    def product(self, x_TD: Tensor) -> Tensor:
        """y_TF = base(x) + each row's adapter, without gradients."""
        y_TF: Tensor = getattr(self.base, "product", self.base)(x_TD)  # whatever stands there now
        if self.choice.tokens is not None:
            add_multi_lora(y_TF.flatten(0, -2), x_TD.flatten(0, -2), self.stack, self.choice.tokens)
        return y_TF

    def forward(self, x_TD: Tensor) -> Tensor:
        return self.product(x_TD)

    @torch.no_grad()
    def put(self, slot: int, adapters: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Put the adapters of some projections into a slot, the others' go: A [r, D] and scale * B [F, r] of each.

        Where a process holds a part of the linear, A and B are those of the whole, and its part is taken.
        """
        stack, ranks = self.stack, []
        for number, part in enumerate(self.parts):
            down, up = self._own(part, *adapters[part]) if part in adapters else (None, None)
            rank = 0 if down is None else down.shape[0]
            rows, first = self.rows(part), number * stack.max_rank
            stack.up_AFR[slot, rows].zero_()
            if down is not None and up is not None:
                stack.down_AQD[slot, first : first + rank].copy_(down)
                stack.up_AFR[slot, rows, :rank].copy_(up)
            ranks.append(rank)
        stack.ranks[slot] = ranks
        stack.ranks_AP[slot].copy_(torch.tensor(ranks, dtype=torch.int32))

    def _own(self, part: str, down_RD: Tensor, up_FR: Tensor) -> tuple[Tensor, Tensor]:
        """This process's part of an adapter, as parallel/shard_linears.py cuts one."""
        if self.cut is None:
            return down_RD, up_FR
        start, stop = self.cut.shard.columns
        rows = self.cut.shard.rows(part)
        return down_RD[:, start:stop], torch.cat([up_FR[first:last] for first, last in rows])

    def whole_shapes(self, part: str, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """The shapes of A and B of one projection of the whole linear."""
        whole = self if self.cut is None else self.cut
        return (rank, whole.in_features), (whole.parts[part], rank)

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.parts}, {len(self.stack.ranks)} slots of rank {self.stack.max_rank}"


class MultiLoraExperts(Experts):
    """`Experts` whose linears have stacks of adapters: each expert sees the adapters of the rows that it gets."""

    def __init__(self, experts: Experts, choice: Choice) -> None:
        nn.Module.__init__(self)
        self.num_experts_per_tok = experts.num_experts_per_tok
        self.norm_topk_prob = experts.norm_topk_prob
        self.experts = experts.experts
        self.router = experts.router
        self.choice = choice
        self.replaced = (experts,)  # in a tuple: it is no child

    def forward(self, x_TD: Tensor) -> Tensor:
        chosen = self.choice.tokens
        if chosen is None:
            return super().forward(x_TD)
        weights_TK, experts_TK = self.route(x_TD)
        order_N, inverse_N, counts = sort_by_expert(experts_TK, len(self.experts))
        rows_N = order_N // self.num_experts_per_tok
        slots = chosen.slots[rows_N.cpu().numpy()]
        out, first = [], 0
        for expert, part in zip(self.experts, x_TD.index_select(0, rows_N).split(counts), strict=True):
            with self._only(chosen, slots[first : first + len(part)]):
                out.append(expert(part))
            first += len(part)
        out_TKD = torch.cat(out).index_select(0, inverse_N).view(*experts_TK.shape, -1)
        return (out_TKD * weights_TK.to(x_TD.dtype)[:, :, None]).sum(1)

    @contextmanager
    def _only(self, whole: TokenAdapters, slots: Any) -> Iterator[None]:
        """The choice of an expert's rows."""
        own = None
        if (slots != NO_ADAPTER).any():
            own = token_adapters(slots, whole.num_slots, whole.device, invariant=whole.invariant)
        self.choice.tokens = own
        try:
            yield
        finally:
            self.choice.tokens = whole


def add_stacks(
    blocks: nn.ModuleList, num_slots: int, max_rank: int, dtype: torch.dtype
) -> tuple[Choice, dict[str, MultiLoraLinear]]:
    """Put a `MultiLoraLinear` in place of every linear of the blocks but routers.

    Returns: the choice that they share, and the linears by their path below the blocks.
    """
    choice = Choice()
    found = dict(_replaced(blocks, "", choice, num_slots, max_rank, dtype))
    return choice, found


def _replaced(
    module: nn.Module, path: str, choice: Choice, num_slots: int, max_rank: int, dtype: torch.dtype
) -> Iterator[tuple[str, MultiLoraLinear]]:
    for name, child in list(module.named_children()):
        inner = f"{path}.{name}" if path else name
        if name in ROUTERS:
            continue
        if hasattr(child, "parts") and hasattr(child, "in_features"):
            linear = MultiLoraLinear(child, choice, num_slots, max_rank, dtype)
            linear.train(child.training)
            setattr(module, name, linear)
            yield inner, linear
            continue
        yield from _replaced(child, inner, choice, num_slots, max_rank, dtype)
        if isinstance(child, Experts):
            setattr(module, name, MultiLoraExperts(child, choice))


def remove_stacks(blocks: nn.ModuleList) -> None:
    """Put the bases back."""
    for module in list(blocks.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, MultiLoraLinear):
                setattr(module, name, child.base)
            elif isinstance(child, MultiLoraExperts):
                setattr(module, name, child.replaced[0])
