"""Low-rank adapters on a frozen linear: LoRA, rsLoRA and DoRA, one adapter for each projection, as PEFT has them.

    LoRA    y = W x + scale B A x                           A [R, D], B [F, R]
    DoRA    y = m / |W + scale B A| * (W x + scale B A x)   one norm and one magnitude m for each row, the norm held
                                                            constant in the backward pass

The projections of a fused linear run together: their A below each other, their B on the diagonal of one matrix, so
the base is one product and the adapters are two.
Sources: arXiv 2106.09685 section 4, arXiv 2312.03732 (rsLoRA), arXiv 2402.09353 sections 4.1 and 4.3 (DoRA).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.model.layers import part_rows
from tunesmith.model.quant import dense_weight


@dataclass(frozen=True)
class AdapterOptions:
    """What an adapter is made of."""

    rank: int
    alpha: float
    dropout: float = 0.0
    rslora: bool = False
    dora: bool = False

    @property
    def scale(self) -> float:
        """What B A is multiplied by: alpha / rank, or alpha / sqrt(rank) with rsLoRA."""
        return self.alpha / (self.rank**0.5 if self.rslora else self.rank)


class Adapter(nn.Module):
    """The adapter of one projection: float32 A [R, D], B [F, R], and DoRA's magnitude [F]."""

    def __init__(
        self, in_features: int, out_features: int, options: AdapterOptions, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.options = options
        self.A = nn.Parameter(torch.empty(options.rank, in_features, device=device))
        self.B = nn.Parameter(torch.zeros(out_features, options.rank, device=device))
        self.magnitude = nn.Parameter(torch.ones(out_features, device=device)) if options.dora else None

    @torch.no_grad()
    def reset(self, key: str, seed: int) -> None:
        """A uniform in ±1 / sqrt(D) (as PEFT), B zero. Depends on `key` and seed only, not on other modules."""
        digest = hashlib.sha256(f"{seed}:{key}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "little"))
        bound = self.A.shape[1] ** -0.5
        self.A.copy_(torch.empty(self.A.shape).uniform_(-bound, bound, generator=generator))
        self.B.zero_()


class AdaptedLinear(nn.Module):
    """A frozen linear with adapters on some of its projections. The face of `Linear`.

    `base` is a Linear, NF4Linear, Fp8Linear, or a linear of transformers (then `parts` names its one projection).
    """

    def __init__(
        self,
        base: nn.Module,
        parts: Mapping[str, int],
        options: Mapping[str, AdapterOptions],
        in_features: int | None = None,
    ) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.parts = dict(parts)
        self.out_features = sum(parts.values())
        self.in_features = in_features or int(cast(Any, base).in_features)
        device = next(iter([*base.parameters(), *base.buffers()])).device
        self.adapters = nn.ModuleDict(
            {part: Adapter(self.in_features, self.parts[part], o, device) for part, o in options.items()}
        )
        self.dropout = max(o.dropout for o in options.values())
        self.is_dora = any(o.dora for o in options.values())
        # Where other processes hold other columns: squares of norms summed over them, in place.
        self.sum_squares: Callable[[Tensor], None] | None = None
        if self.is_dora:
            self._init_magnitudes()

    @property
    def bias(self) -> Any:
        """The bias of the base."""
        return self.base.bias

    def rows(self, part: str) -> slice:
        """The rows of the fused weight that belong to one projection."""
        return part_rows(self.parts, part)

    def adapter(self, part: str) -> Adapter:
        """The adapter of one projection."""
        adapter = self.adapters[part]
        assert isinstance(adapter, Adapter)
        return adapter

    def forward(self, x: Tensor) -> Tensor:
        dropped = F.dropout(x, self.dropout) if self.dropout and self.training else x
        down, up = self._fused_adapters(x.dtype)
        out = self.base(x)
        if self.is_dora:
            return self._forward_dora(out, x, dropped, down, up)
        return _add_product(out, F.linear(dropped, down), up)

    def _forward_dora(self, out: Tensor, x: Tensor, dropped: Tensor, down: Tensor, up: Tensor) -> Tensor:
        """The rows rescaled to their magnitudes; the bias is not. With dropout only the plain product sees all of x."""
        ratio = self._ratio(down, up).to(out.dtype)
        bias = None if self.bias is None else self.bias.to(out.dtype)
        low = F.linear(dropped, down)
        if dropped is x:
            free = out if bias is None else out - bias
            scaled = ratio * _add_product(free, low, up)
            return scaled if bias is None else scaled + bias
        free = self.base(dropped)
        free = free if bias is None else free - bias
        return out + (ratio - 1) * free + ratio * F.linear(low, up)

    def _fused_adapters(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """All A below each other [sum of R, D], and all scale * B on a block diagonal [F, sum of R]."""
        downs, ups = [], []
        empty = next(self.adapters.parameters()).new_empty(0, dtype=dtype)
        for part, rows in self.parts.items():
            if part in self.adapters:
                adapter = self.adapter(part)
                downs.append(adapter.A.to(dtype))
                ups.append((adapter.B * adapter.options.scale).to(dtype))
            else:
                ups.append(empty.new_empty(rows, 0))
        if len(ups) == 1:
            return downs[0], ups[0]
        return torch.cat(downs), torch.block_diag(*ups)

    def _ratio(self, down: Tensor, up: Tensor) -> Tensor:
        """magnitude / |W + scale B A| for each row, float32 [F]; 1 for projections without an adapter."""
        norm = self.row_norms(down.detach(), up.detach())
        ratios = []
        for part in self.parts:
            part_norm = norm[self.rows(part)]
            magnitude = self.adapter(part).magnitude if part in self.adapters else None
            ratios.append(torch.ones_like(part_norm) if magnitude is None else magnitude / part_norm)
        return ratios[0] if len(ratios) == 1 else torch.cat(ratios)

    @torch.no_grad()
    def row_norms(self, down: Tensor, up: Tensor) -> Tensor:
        """|W + up down| of each whole row, float32 [F]."""
        weight = dense_weight(self.base, down.dtype)
        norm = torch.linalg.vector_norm(weight + up @ down, dim=1, dtype=torch.float32)
        if self.sum_squares is None:
            return norm
        squares = norm.square()
        self.sum_squares(squares)
        return squares.sqrt_()

    @torch.no_grad()
    def _init_magnitudes(self) -> None:
        """The norms of the base's own rows, so that an adapter whose B is zero changes nothing."""
        norm = torch.linalg.vector_norm(dense_weight(self.base, torch.float32), dim=1)
        cut = getattr(self.base, "cut", None)  # of a base that is a process's part; see parallel/shard_linears.py
        norm = norm if cut is None else cut.whole_norms(norm)
        for part, adapter in self.adapters.items():
            if isinstance(adapter, Adapter) and adapter.magnitude is not None:
                adapter.magnitude.copy_(norm[self.rows(part)])

    @torch.no_grad()
    def merged_part(self, part: str) -> Tensor:
        """The float32 weight_FD of one projection with its adapter in it."""
        weight = dense_weight(self.base, torch.float32)[self.rows(part)]
        if part not in self.adapters:
            return weight
        adapter = self.adapter(part)
        merged = weight + adapter.options.scale * (adapter.B @ adapter.A)
        if adapter.magnitude is None:
            return merged
        return merged * (adapter.magnitude / torch.linalg.vector_norm(merged, dim=1))[:, None]


def _add_product(out: Tensor, low: Tensor, up: Tensor) -> Tensor:
    """out + low @ up.T in one product."""
    flat = torch.addmm(out.flatten(0, -2), low.flatten(0, -2), up.t())
    return flat.view(out.shape)
