"""How far one model's predictions are from another's, where the other's are kept as their most likely tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

KL_LIMIT = 0.1
"""Nats: a hop that moves the predictions further has broken the model (the limit of merging too)."""
TOP = 64


@dataclass(frozen=True)
class Hop:
    """One step between the trained model and the served one, over the same tokens.

    max_dlogprob, mean_dlogprob: of the tokens that follow in the rows, nats. kl_mean: nats, over the 64 most likely
    tokens of the model before and all others as one; None where only the tokens' own log-probabilities are known.
    agreement_ratio: positions with the same most likely token.
    """

    name: str
    num_tokens: int
    max_dlogprob: float
    mean_dlogprob: float
    kl_mean: float | None
    agreement_ratio: float
    limit: float

    @property
    def value(self) -> float:
        """What the limit holds for."""
        return self.mean_dlogprob if self.kl_mean is None else self.kl_mean

    @property
    def passed(self) -> bool:
        """Whether the hop keeps the model; NaN never does."""
        return self.value <= self.limit


Summary = tuple[Tensor, Tensor, Tensor]
"""Per position: the most likely tokens [P, 64], their log-probabilities, and that of the token that follows [P]."""


def summarise(rows: Sequence[Tensor], prompts: Sequence[Sequence[int]]) -> Summary:
    """Per position: the most likely tokens and their log-probabilities, and that of the token that follows."""
    ids, tops, own = [], [], []
    for logits_TV, prompt in zip(rows, prompts, strict=True):
        logprobs_TV = logits_TV[:-1].float().log_softmax(-1)
        top = logprobs_TV.topk(min(TOP, logprobs_TV.shape[-1]), dim=-1)
        ids.append(top.indices.to(torch.int32))
        tops.append(top.values)
        own.append(logprobs_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
    return torch.cat(ids), torch.cat(tops), torch.cat(own)


def compare(
    name: str, reference: Summary, rows: Sequence[Tensor], prompts: Sequence[Sequence[int]],
    limit: float = KL_LIMIT,
) -> Hop:  # fmt: skip
    """Logits [T, V] of the same prompts against what was kept of a model before."""
    top_ids_PT, top_logprobs_PT, token_logprobs_P = reference
    best, own, seen = [], [], []
    at = 0
    for logits_TV, prompt in zip(rows, prompts, strict=True):
        logprobs_TV = logits_TV[:-1].float().cpu().log_softmax(-1)
        part = top_ids_PT[at : at + len(logprobs_TV)].long()
        at += len(logprobs_TV)
        best.append(logprobs_TV.argmax(-1))
        own.append(logprobs_TV.gather(1, torch.tensor(prompt[1:])[:, None])[:, 0])
        seen.append(logprobs_TV.gather(1, part))
    difference_P = (torch.cat(own) - token_logprobs_P).abs()
    return Hop(
        name=name,
        num_tokens=len(difference_P),
        max_dlogprob=float(difference_P.max()),
        mean_dlogprob=float(difference_P.mean()),
        kl_mean=float(_coarse_kl(top_logprobs_PT, torch.cat(seen)).mean()),
        agreement_ratio=float((torch.cat(best) == top_ids_PT[:, 0].long()).float().mean()),
        limit=limit,
    )


def _coarse_kl(before_PT: Tensor, after_PT: Tensor) -> Tensor:
    """KL(before || after) per position over the named tokens and the rest as one; never more than over all tokens."""
    p, q = before_PT.double().exp(), after_PT.double().exp()
    rest_p, rest_q = (1 - p.sum(-1)).clamp(min=0), (1 - q.sum(-1)).clamp(min=1e-12)
    named = (p * (before_PT.double() - after_PT.double())).sum(-1)
    rest = torch.where(rest_p > 1e-9, rest_p * (rest_p.clamp(min=1e-12) / rest_q).log(), 0.0)
    return (named + rest).clamp(min=0)
