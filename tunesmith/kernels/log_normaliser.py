"""log sum exp of every row of logits, in an order of summation that depends on nothing but the width.

Torch's own sums on a GPU cut a row differently for different numbers of rows: a token's log-probability would have
other bits alone than among others.
"""

from __future__ import annotations

from torch import Tensor

from tunesmith.kernels.direct import direct
from tunesmith.kernels.nf4 import use_kernel


def log_normaliser(logits_MV: Tensor) -> Tensor:
    """log(sum(exp(logits))) of each row, float32 [M], of logits of any float dtype; computed in float32."""
    if use_kernel(logits_MV.device):
        from tunesmith.kernels.log_normaliser_triton import log_normaliser_operator

        found_M: Tensor = direct(log_normaliser_operator, logits_MV)(logits_MV)
        return found_M
    return log_normaliser_reference(logits_MV)


def log_normaliser_reference(logits_MV: Tensor) -> Tensor:
    """`log_normaliser` by plain torch: the truth that the kernel must equal but for the order of the sum."""
    return logits_MV.float().logsumexp(-1)
