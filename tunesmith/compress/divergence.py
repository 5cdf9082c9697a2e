"""How far one model's predictions are from another's, on the same prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from tunesmith.model.language_model import LanguageModel, logits


@dataclass(frozen=True)
class Divergence:
    """Over all positions of the prompts: |logit difference|, KL(before || after) in nats, equal best tokens."""

    max_difference: float
    mean_difference: float
    kl_mean: float
    argmax_agreement_ratio: float
    num_tokens: int


def random_prompts(vocab_size: int, *, seed: int = 0, num_prompts: int = 4, length: int = 32) -> list[list[int]]:
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocab_size, (num_prompts, length), generator=generator).tolist()


def prompt_logits(model: LanguageModel, prompts: Sequence[Sequence[int]]) -> list[Tensor]:
    """The float32 logits of each prompt on the CPU, computed in float32 whatever the weights are held in.

    (The transformers backend computes in the dtype that its weights have.)
    """
    compute_dtype = model.compute_dtype
    model.compute_dtype = torch.float32 if model.backend == "native" else compute_dtype
    was_training = model.training
    model.eval()
    try:
        # One prompt at a time: what is held is the logits of one.
        return [logits(model, [list(prompt)])[0].float().cpu() for prompt in prompts]
    finally:
        model.compute_dtype = compute_dtype
        model.train(was_training)


def divergence(before: Sequence[Tensor], after: Sequence[Tensor]) -> Divergence:
    """What `prompt_logits` of two models differ by."""
    left, right = torch.cat(list(before)), torch.cat(list(after))
    difference = (left - right).abs()
    kl = F.kl_div(F.log_softmax(right, -1), F.log_softmax(left, -1), reduction="sum", log_target=True) / len(left)
    return Divergence(
        max_difference=float(difference.max()),
        mean_difference=float(difference.mean()),
        kl_mean=float(kl.clamp(min=0)),
        argmax_agreement_ratio=float((left.argmax(-1) == right.argmax(-1)).float().mean()),
        num_tokens=len(left),
    )
