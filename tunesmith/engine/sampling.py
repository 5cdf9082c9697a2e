"""From logits to a token: penalty, temperature, top-k, top-p, min-p, then a draw from the request's own generator."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tunesmith.engine.request import SamplingParams
from tunesmith.errors import RequestError


class Sampler:
    """The choice of one request's tokens. It keeps the request's random generator and the tokens seen so far."""

    def __init__(self, params: SamplingParams, prompt_ids: Sequence[int]) -> None:
        self.params = params
        self.penalised = params.repetition_penalty != 1
        self.seen = set(prompt_ids) if self.penalised else set()
        self.generator: torch.Generator | None = None

    @property
    def takes_maximum(self) -> bool:
        """Whether the token is simply the largest logit."""
        return self.params.is_greedy and not self.penalised

    def choose(self, logits_V: Tensor) -> int:
        """The next token. Raises RequestError when the logits are not numbers."""
        logits_V = logits_V.float()
        if self.penalised:
            logits_V = penalise(logits_V, sorted(self.seen), self.params.repetition_penalty)
        token = take_maximum(logits_V[None])[0] if self.params.is_greedy else self._draw(logits_V)
        if self.penalised:
            self.seen.add(token)
        return token

    def _draw(self, logits_V: Tensor) -> int:
        if self.generator is None:
            self.generator = torch.Generator(logits_V.device)
            seed = self.params.seed
            if seed is None:
                self.generator.seed()
            else:
                self.generator.manual_seed(seed)
        probabilities, tokens = candidates(logits_V, self.params)
        if not bool(torch.isfinite(probabilities).all()):
            raise _not_numbers()
        drawn = int(torch.multinomial(probabilities, 1, generator=self.generator))
        return drawn if tokens is None else int(tokens[drawn])


def choose_tokens(logits_BV: Tensor, samplers: Sequence[Sampler]) -> list[int]:
    """One token per row. Rows that take the maximum are read back together."""
    if all(sampler.takes_maximum for sampler in samplers):
        return take_maximum(logits_BV)
    return [sampler.choose(row) for sampler, row in zip(samplers, logits_BV, strict=True)]


def take_maximum(logits_BV: Tensor) -> list[int]:
    """The largest logit's index per row (the first one where several are equal)."""
    values, indices = logits_BV.max(-1)
    if not all(value == value for value in values.tolist()):
        raise _not_numbers()
    return indices.tolist()


def _not_numbers() -> RequestError:
    return RequestError(
        "the model's logits are NaN: its weights are broken, or its dtype overflows; try dtype='float32', "
        "or check the checkpoint with: tunesmith verify"
    )


def penalise(logits_V: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """Seen tokens' logits lowered: divided by the penalty, or multiplied where negative. Source: arXiv 1909.05858."""
    index = torch.tensor(seen, device=logits_V.device, dtype=torch.int64)
    values = logits_V[index]
    return logits_V.index_copy(0, index, torch.where(values > 0, values / penalty, values * penalty))


def candidates(logits_V: Tensor, params: SamplingParams) -> tuple[Tensor, Tensor | None]:
    """Probabilities of the tokens that may be drawn, not normalised, and those tokens (None: all, in order)."""
    logits, tokens = logits_V / params.temperature, None
    if params.top_k and params.top_k < len(logits):
        logits, tokens = logits.topk(params.top_k)
    elif params.top_p < 1:
        logits, tokens = logits.sort(descending=True, stable=True)
    probabilities = logits.softmax(-1)
    if params.top_p < 1:
        before = probabilities.cumsum(-1) - probabilities
        probabilities = probabilities.where(before < params.top_p, 0.0)
    if params.min_p > 0:
        probabilities = probabilities.where(probabilities >= params.min_p * probabilities.max(), 0.0)
    return probabilities, tokens
