"""The adapters of a fused linear as two matrices in the compute dtype, kept from one step to the next.

    y = W x + up (down x)      down [R, D]: every scale * A, below each other;  up [F, R]: every B, on a block diagonal

The float32 masters A and B stay the parameters; the copies are made again before every forward pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from tunesmith.kernels import cpu_train
from tunesmith.model.lora import AdaptedLinear


class LowRank:
    """The two matrices of one `AdaptedLinear`, and the way back from their gradients to those of the masters."""

    def __init__(self, linear: AdaptedLinear, dtype: torch.dtype) -> None:
        self.masters: list[nn.Parameter] = []
        self.scales: list[float] = []
        self.blocks: list[tuple[slice, slice]] = []
        start = 0
        for part in linear.parts:
            if part not in linear.adapters:
                continue
            adapter = linear.adapter(part)
            self.masters += [adapter.A, adapter.B]
            self.scales.append(adapter.options.scale)
            self.blocks.append((linear.rows(part), slice(start, start + adapter.options.rank)))
            start += adapter.options.rank
        device = self.masters[0].device
        self.down_RD = torch.zeros(start, linear.in_features, dtype=dtype, device=device)
        self.up_FR = torch.zeros(linear.out_features, start, dtype=dtype, device=device)

    def copies(self) -> Iterable[tuple[Tensor, Tensor, float]]:
        """(where a master is copied to, the master, what it is multiplied by)."""
        for (rows, columns), scale, down, up in self._parts():
            yield self.down_RD[columns], down, scale
            yield self.up_FR[rows, columns], up, 1.0

    def added_to(self, weight_FD: Tensor) -> Tensor:
        """weight + up @ down, without the products of the diagonal's zeros."""
        adapted = sum(rows.stop - rows.start for rows, _ in self.blocks)
        total = torch.empty_like(weight_FD) if adapted == len(weight_FD) else weight_FD.clone()
        for rows, columns in self.blocks:
            torch.addmm(weight_FD[rows], self.up_FR[rows, columns], self.down_RD[columns], out=total[rows])
        return total

    def inner_grad(self, g_TF: Tensor) -> Tensor:
        """g @ up [T, R]: on a CPU without the products of the diagonal's zeros, elsewhere in one launch."""
        if g_TF.is_cuda or len(self.blocks) == 1:
            return g_TF @ self.up_FR
        dlow = g_TF.new_empty(g_TF.shape[0], self.up_FR.shape[1])
        for rows, columns in self.blocks:
            torch.mm(g_TF[:, rows], self.up_FR[rows, columns], out=dlow[:, columns])
        return dlow

    def grads_by_part(self, g_TF: Tensor, x_TD: Tensor, low_TR: Tensor, dlow_TR: Tensor) -> list[Tensor]:
        """The gradients of A, B, A, B ..., one projection after the other: what a CPU has the least work with.

        Args: as `Projection.parameter_grads`.
        """
        jobs = []
        for (rows, columns), scale, _, _ in self._parts():
            jobs.append(cpu_train.Outer(dlow_TR[:, columns], x_TD, scale))
            jobs.append(cpu_train.Outer(low_TR[:, columns], g_TF[:, rows], turned=True))
        if cpu_train.takes_outer(*jobs) and all(master.dtype == torch.float32 for master in self.masters):
            return cpu_train.outer(*jobs)
        grad_down = dlow_TR.t() @ x_TD
        grads = []
        for (rows, columns), scale, down, up in self._parts():
            grads.append(grad_down[columns].to(down.dtype) * scale)
            grads.append((low_TR[:, columns].t() @ g_TF[:, rows]).t().to(up.dtype).contiguous())
        return grads

    def master_grads(self, grad_down_RD: Tensor, grad_up_FR: Tensor) -> list[Tensor]:
        """The gradients of A, B, A, B ... from those of `down` (not yet scaled) and `up`."""
        grads = []
        for (rows, columns), scale, down, up in self._parts():
            grads.append(grad_down_RD[columns].to(down.dtype) * scale)
            grads.append(grad_up_FR[rows, columns].to(up.dtype, memory_format=torch.contiguous_format))
        return grads

    def _parts(self) -> Iterable[tuple[tuple[slice, slice], float, nn.Parameter, nn.Parameter]]:
        """Of every adapted projection: its rows and inner columns, the scale, A, B."""
        return zip(self.blocks, self.scales, self.masters[::2], self.masters[1::2], strict=True)


@torch.no_grad()
def refresh(matrices: Sequence[LowRank]) -> None:
    """Copy the masters: a few launches for a whole model, before every forward pass.

    Always, because torch's fused optimisers write parameters without counting up their version.
    """
    copies = [copy for matrix in matrices for copy in matrix.copies()]
    if not copies:
        return
    torch._foreach_copy_([target for target, _, _ in copies], [source.detach() for _, source, _ in copies])
    scaled = [(target, scale) for target, _, scale in copies if scale != 1.0]
    if scaled:
        torch._foreach_mul_([target for target, _ in scaled], [scale for _, scale in scaled])


def wide_product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right, in float32 where the device has that: gradients of float32 masters are not rounded on the way."""
    if left.is_cuda and left.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left @ right
