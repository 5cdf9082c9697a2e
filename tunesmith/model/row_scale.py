"""DoRA's scale of every row of a fused linear, kept from one step to the next.

    ratio = magnitude / |W + scale B A|            for each row; 1 for rows without a magnitude
    |W + s B A|^2 = |W|^2 + 2 s ((W A^T) * B) 1 + s^2 ((B (A A^T)) * B) 1

|W|^2 never changes, and the rest needs W once, in a product with the few columns of A^T: W + s B A is never made.
Source: arXiv 2402.09353, sections 4.1 and 4.3: the norm counts as a constant in the backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain

import torch
from torch import Tensor, nn

from tunesmith.kernels.column_dot import column_dot
from tunesmith.model.lora import AdaptedLinear, Adapter
from tunesmith.model.low_rank import wide_product
from tunesmith.model.quant import dense_weight


class RowScale:
    """The norms (float32 [F]) and ratios (compute dtype [F]) of one `AdaptedLinear` with DoRA."""

    def __init__(self, linear: AdaptedLinear, dtype: torch.dtype) -> None:
        self.linear = linear
        adapters = [(linear.rows(part), linear.adapter(part)) for part in linear.parts if part in linear.adapters]
        self.scaled = [
            (rows, adapter, adapter.magnitude) for rows, adapter in adapters if adapter.magnitude is not None
        ]
        with torch.no_grad():
            weight = dense_weight(linear.base, dtype)
            self.squares_F = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).square()
        self.norm_F = self.squares_F.sqrt()
        self.ratio_F = torch.ones_like(self.norm_F, dtype=dtype)

    @property
    def magnitudes(self) -> list[nn.Parameter]:
        """The parameters, in the order of the projections."""
        return [magnitude for _, _, magnitude in self.scaled]

    @torch.no_grad()
    def measure(self) -> None:
        """The norms of the rows as the masters are now: one pass over the base's weight."""
        weight = dense_weight(self.linear.base, self.ratio_F.dtype)
        for rows, adapter, _ in self.scaled:
            self.norm_F[rows] = self._squares(weight[rows], self.squares_F[rows], adapter).sqrt_()

    def _squares(self, weight_FD: Tensor, squares_F: Tensor, adapter: Adapter) -> Tensor:
        scale, down, up = adapter.options.scale, adapter.A.float(), adapter.B.float()
        cross = wide_product(weight_FD, down.to(weight_FD.dtype).t()).float()
        change = (2 * cross).addmm_(up, down @ down.t(), alpha=scale).mul_(up).sum(1)
        squares_F = squares_F + scale * change
        if self.linear.sum_squares is not None:
            self.linear.sum_squares(squares_F)
        # A row of nearly nothing: its norm must not be the root of a rounding below zero.
        return squares_F.clamp_(min=torch.finfo(torch.float32).tiny)

    def quotients(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """(where a ratio is written, the magnitude, the norm)."""
        for rows, _, magnitude in self.scaled:
            yield self.ratio_F[rows], magnitude, self.norm_F[rows]

    def magnitude_grads(self, g_TF: Tensor, free_TF: Tensor) -> list[Tensor]:
        """The gradients of the magnitudes: the sum over the tokens of g times what the ratio is multiplied by."""
        total = column_dot(g_TF, free_TF) / self.norm_F
        return [total[rows].to(magnitude.dtype) for rows, _, magnitude in self.scaled]


@torch.no_grad()
def refresh_ratios(scales: Sequence[RowScale]) -> None:
    """Ratios of the magnitudes as they are now and the norms as they were measured: a few launches for a model."""
    quotients = list(chain.from_iterable(scale.quotients() for scale in scales))
    if not quotients:
        return
    magnitudes, norms = [magnitude.detach() for _, magnitude, _ in quotients], [norm for _, _, norm in quotients]
    torch._foreach_copy_([target for target, _, _ in quotients], torch._foreach_div(magnitudes, norms))
