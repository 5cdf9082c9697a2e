"""Log-probabilities of drawn tokens and of prompts, from the model's own logits (before temperature and penalties).

logits_BV --chosen_and_top--> LogprobTensors (on the device) --to_host--> (with the tokens) --lists--> TokenLogprobs
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from tunesmith.engine.request import TokenLogprobs
from tunesmith.kernels.log_normaliser import log_normaliser

CHUNK_BYTES = 64 * 2**20
"""Float32 logits that exist at once while a prompt is scored."""


@dataclass(frozen=True)
class LogprobTensors:
    """Of M rows: the chosen token and its log-probability, and the n most likely tokens, the likeliest first.

    chosen_M: int64. logprobs_M: float32. top_ids_Mn: int64. top_logprobs_Mn: float32.
    """

    chosen_M: Tensor
    logprobs_M: Tensor
    top_ids_Mn: Tensor
    top_logprobs_Mn: Tensor

    def to_host(self) -> LogprobTensors:
        """Copies on the host, pinned where they come from a GPU: complete once the device has come so far."""
        return LogprobTensors(*(to_host(tensor) for tensor in self._tensors()))

    def lists(self, num_top: Sequence[int]) -> list[TokenLogprobs]:
        """Of tensors on the host, with the first `num_top[i]` most likely tokens of row i."""
        chosen, logprobs, ids, tops = (tensor.tolist() for tensor in self._tensors())
        return [
            TokenLogprobs(chosen[i], logprobs[i], tuple(zip(ids[i][:num], tops[i][:num], strict=True)))
            for i, num in enumerate(num_top)
        ]

    def _tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return self.chosen_M, self.logprobs_M, self.top_ids_Mn, self.top_logprobs_Mn


def to_host(tensor: Tensor) -> Tensor:
    """A copy on the host that nothing waits for: complete once the device has come so far."""
    if tensor.device.type != "cuda":
        return tensor.clone()
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


def chosen_and_top(logits_MV: Tensor, chosen_M: Tensor, num_top: int) -> LogprobTensors:
    """Log-probabilities in float32, of logits of any float dtype.

    Args: chosen_M: int64; what is below zero (no token) counts as token 0. num_top: 0 gives empty `top` tensors.
    """
    normaliser = log_normaliser(logits_MV)[:, None]
    chosen = chosen_M.clamp(min=0)
    own = logits_MV.gather(-1, chosen[:, None]).float() - normaliser
    values, ids = logits_MV.topk(min(num_top, logits_MV.shape[-1]), dim=-1)
    return LogprobTensors(chosen, own[:, 0], ids, values.float() - normaliser)


def score_prompt(
    hidden_MD: Tensor, targets_M: Tensor, project: Callable[[Tensor], Tensor], vocab_size: int, num_top: int
) -> LogprobTensors:
    """Log-probabilities of the tokens that follow prompt positions; never more than `CHUNK_BYTES` of logits at once.

    Args: hidden_MD: hidden states of the positions, after the final norm. targets_M: int64, the tokens that follow.
    project: hidden states to logits.
    """
    rows = max(1, CHUNK_BYTES // (4 * vocab_size))
    parts = [
        chosen_and_top(project(hidden), targets, num_top)._tensors()
        for hidden, targets in zip(hidden_MD.split(rows), targets_M.split(rows), strict=True)
    ]
    return LogprobTensors(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
