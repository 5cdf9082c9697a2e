"""The gradient of a batch does not depend on how it is cut; a document does not depend on its neighbours."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from tunesmith.model.language_model import LanguageModel
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import DataSection, TrainSection
from tunesmith.train.batches import MicroBatch, build_micro_batch
from tunesmith.train.session import language_model_loss
from tunesmith.train.update import Updater
from tunesmith.verify.check import Outcome
from tunesmith.verify.subject import Documents, Subject, most_parameters, vocab_size_of

LENGTHS = (19, 5, 32, 12, 7, 25, 2)
LONGEST = 32
GRADIENT_LIMIT = 1e-5


@dataclass(frozen=True)
class Cut:
    """One way to cut the same documents into micro-batches."""

    name: str
    groups: tuple[tuple[int, ...], ...]
    tokens: int
    packing: bool


CUTS = (
    Cut("one micro-batch", ((0, 1, 2, 3, 4, 5, 6),), 128, True),
    Cut("two", ((2, 0, 4), (5, 3, 1, 6)), 64, True),
    Cut("one per document", ((0,), (1,), (2,), (3,), (4,), (5,), (6,)), 32, True),
    Cut("padded, the last one ragged", ((0, 1), (2, 3), (4, 5), (6,)), 64, False),
)


def accumulation_invariance(subject: Subject, device: torch.device) -> Outcome:
    """The largest relative difference between the gradients of the same documents, cut in several ways, in float32."""
    most = most_parameters(device)
    model = subject.make(device, most)
    model.compute_dtype = torch.float32
    model.checkpointing = subject.recipe.train.checkpointing
    plain = {"optimizer": "sgd", "optimizer_in_backward": False, "offload_optimizer": False}
    train = subject.recipe.train.model_copy(update={"max_grad_norm": 0.0, "precision": "float32", **plain})
    documents = Documents(LENGTHS, vocab_size_of(model))
    reference, *others = [_gradient(model, documents, cut, subject.recipe.data, train, device) for cut in CUTS]
    scale = float(_norm(reference))
    worst = max(float(_norm([a - b for a, b in zip(reference, other, strict=True)])) / scale for other in others)
    cuts = "; ".join(cut.name for cut in CUTS)
    return Outcome(
        worst, GRADIENT_LIMIT, f"gradients of the same documents in float32 ({cuts}) on {subject.describe(most)}"
    )


def _gradient(
    model: LanguageModel, documents: Documents, cut: Cut, data: DataSection, train: TrainSection, device: torch.device
) -> list[Tensor]:
    """What the trainer's own accumulation hands to the optimiser."""
    section = data.model_copy(update={"packing": cut.packing, "max_length": LONGEST})
    batches = [build_micro_batch(documents, group, cut.tokens, section, None).to(device) for group in cut.groups]
    updater = Updater(cast(nn.Module, model), train.model_copy(update={"learning_rate": 0.0}), 1)
    taken: list[Tensor] = []

    def take(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        for group in optimizer.param_groups:
            taken.extend(torch.zeros_like(p) if p.grad is None else p.grad.clone() for p in group["params"])

    handle = updater.optimizer.register_step_pre_hook(take)
    model.train()
    loss = partial(language_model_loss, chunk_tokens=train.loss_chunk_tokens)
    total = sum(batch.num_trained for batch in batches)
    updater.step(0, batches, loss, denominator=total, describe=_name)
    handle.remove()
    return taken


def _name(batch: MicroBatch) -> str:
    return f"documents {batch.documents}"


def _norm(tensors: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(t.double()) for t in tensors]))


@torch.no_grad()
def packing_isolation(subject: Subject, device: torch.device, dtype: torch.dtype) -> Outcome:
    """How far the hidden states of a document move when its neighbours are exchanged: not by one bit.

    Where experts gather their tokens, the neighbours change how many rows a product has, and with it its rounding:
    there it is float32 and 1e-5.
    """
    most = most_parameters(device)
    model = subject.make(device, most).eval()
    has_experts = _has_experts(model)
    dtype = torch.float32 if has_experts else dtype
    model.compute_dtype = dtype
    if model.backend == "transformers":
        cast(nn.Module, model).to(dtype)
    documents = Documents(LENGTHS, vocab_size_of(model))
    other = Documents(LENGTHS, vocab_size_of(model), seed=1)
    worst, moved = 0.0, 0.0
    for kept in (0, 3, len(LENGTHS) - 1):
        before = _states(model, [documents] * len(LENGTHS), device)
        after = _states(model, [documents if i == kept else other for i in range(len(LENGTHS))], device)
        worst = max(worst, _difference(before[kept], after[kept]))
        moved = max(moved, _difference(before[1], after[1]))
    limit = 1e-5 if has_experts else 0.0
    detail = f"hidden states in {_short(dtype)} when all neighbours are exchanged, on {subject.describe(most)}"
    return Outcome(worst, limit, detail, passed=worst <= limit and moved > 0)


def _states(model: LanguageModel, sources: list[Documents], device: torch.device) -> list[Tensor]:
    tokens = [source.arrays(i)[0].tolist() for i, source in enumerate(sources)]
    pack = pack_documents(tokens, device)
    return list(model.hidden(pack).split(list(pack.lengths)))


def _difference(before: Tensor, after: Tensor) -> float:
    """0 exactly when equal, else the largest difference relative to the largest value."""
    return float((before.double() - after.double()).abs().max() / before.double().abs().max().clamp(min=1e-30))


def _has_experts(model: LanguageModel) -> bool:
    return any("expert" in name.lower() for name, _ in model.named_modules())


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
