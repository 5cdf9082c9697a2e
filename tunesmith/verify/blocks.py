"""The blocks as they are trained (written out, recorded as CUDA graphs) against the same, operator by operator."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.decoder import Decoder
from tunesmith.model.packed import pack_documents
from tunesmith.verify.check import Outcome
from tunesmith.verify.invariance import LENGTHS
from tunesmith.verify.subject import Subject, most_parameters

LIMIT = 1e-4


def blocks_written_out(subject: Subject, device: torch.device) -> Outcome:
    """The largest relative difference of the hidden states and of all gradients, in float32."""
    most = most_parameters(device)
    decoder = cast(Decoder, subject.make(device, most)).train()
    decoder.compute_dtype = torch.float32
    decoder.checkpointing = cast(Any, subject.recipe.train.checkpointing)
    reference = _results(decoder)
    decoder.is_fused = True
    ways = {"written out": _results(decoder)}
    if device.type == "cuda" and subject.recipe.train.graphs == "auto":
        decoder.captured = CapturedBlocks()
        ways["as CUDA graphs"] = _results(decoder)
    worst = max(_difference(found, reference) for found in ways.values())
    return Outcome(worst, LIMIT, f"{' and '.join(ways)} against operator by operator on {subject.describe(most)}")


def _results(decoder: Decoder) -> list[Tensor]:
    """The hidden states, then every gradient of a loss that weighs them unevenly."""
    decoder.zero_grad(set_to_none=True)
    vocab_size = decoder.config.vocab_size
    pack = pack_documents(
        [[(7 * i + j) % vocab_size for j in range(length)] for i, length in enumerate(LENGTHS)],
        decoder.embedding.weight.device,
    )
    hidden = decoder.hidden(pack)
    weights = torch.linspace(-1, 1, hidden.shape[1], device=hidden.device)
    (hidden.float() * weights).square().sum().backward()
    grads = [torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in decoder.parameters() if p.requires_grad]
    return [hidden.detach().clone(), *grads]


def _difference(found: list[Tensor], reference: list[Tensor]) -> float:
    pairs = list(zip(found, reference, strict=True))
    return max(_relative(pairs[:1]), _relative(pairs[1:]))


def _relative(pairs: list[tuple[Tensor, Tensor]]) -> float:
    error = torch.stack([(a.double() - b.double()).norm() for a, b in pairs]).norm()
    return float(error / torch.stack([b.double().norm() for _, b in pairs]).norm())
