"""What one station hands to the next is what it had: adapter to merged weights, state to the disk and back."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any, cast

import torch

from tunesmith.checkpoint.state import load_state, save_state
from tunesmith.compress.merge import merge_adapter
from tunesmith.model.language_model import logits
from tunesmith.model.methods import MethodSummary
from tunesmith.recipe.schema import Recipe
from tunesmith.train.batches import RandomTokens
from tunesmith.train.session import Session, SessionData
from tunesmith.verify.check import Outcome
from tunesmith.verify.invariance import LENGTHS
from tunesmith.verify.subject import TINY, Documents, Subject, vocab_size_of

MERGE_LIMIT = 1e-4
STEPS = 2


@torch.no_grad()
def merge_parity(subject: Subject, device: torch.device) -> Outcome:
    """The merged model's logits against base + adapter, on the base that is trained, in float32."""
    model = subject.make(device).eval()
    model.compute_dtype = torch.float32
    documents = Documents(LENGTHS, vocab_size_of(model))
    tokens = [documents.arrays(i)[0].tolist() for i in range(len(documents))]
    adapted = torch.cat(logits(model, tokens))
    merge_adapter(model, torch.float32)
    merged = torch.cat(logits(model, tokens))
    value = float((adapted - merged).abs().max() / adapted.abs().max())
    base = "the base" if subject.recipe.method.quantisation is None else "the dequantised base"
    return Outcome(value, MERGE_LIMIT, f"relative difference of logits, merged into {base}, on {subject.describe()}")


def resume_equality(subject: Subject) -> Outcome:
    """Losses and weights of 2 + 2 steps with a save and a load between, against 4 without: equal in every bit.

    On the CPU in float32, with the recipe's optimiser, method, dropout and accumulation.
    """
    recipe = resume_recipe(subject.recipe)
    straight = _session(subject, recipe)
    expected = _losses(straight, 2 * STEPS)
    first = _session(subject, recipe)
    losses = _losses(first, STEPS)
    with tempfile.TemporaryDirectory(prefix="tunesmith-verify-") as folder:
        path = save_state(Path(folder), first.state(), keep=1)
        second = _session(subject, recipe)
        second.restore(load_state(path))
    losses += _losses(second, STEPS)
    worst = max(abs(a - b) for a, b in zip(expected, losses, strict=True))
    pairs = zip(straight.trained_weights().values(), second.trained_weights().values(), strict=True)
    worst = max(worst, *(float((a.detach() - b.detach()).abs().max()) for a, b in pairs))
    for session in (straight, first, second):
        session.close()
    moved = _moved(straight, subject)
    detail = (
        f"losses and weights after {2 * STEPS} steps of {recipe.train.optimizer}, saved and loaded after {STEPS}, "
        f"on {subject.describe(TINY)}"
    )
    return Outcome(worst, 0.0, detail, passed=worst == 0.0 and moved)


def resume_recipe(recipe: Recipe) -> Recipe:
    """The recipe on few random tokens, on the CPU in float32."""
    train = recipe.train.model_copy(
        update={
            "precision": "float32",
            "master_weights": "float32",
            "offload_optimizer": False,
            "micro_batch_tokens": 64,
            "accumulation": min(recipe.train.accumulation, 2),
            "max_steps": 2 * STEPS,
            "learning_rate": max(recipe.train.learning_rate or 1e-3, 1e-5),
        }
    )
    data = recipe.data.model_copy(update={"format": "tokens", "max_length": 32, "max_rows": 64, "validation": []})
    model = recipe.model.model_copy(update={"device": "cpu", "dtype": "float32"})
    return recipe.model_copy(update={"train": train, "data": data, "model": model})


def _session(subject: Subject, recipe: Recipe) -> Session:
    torch.manual_seed(recipe.train.seed)
    model = subject.make(torch.device("cpu"), TINY, dropout=True)
    model.compute_dtype = torch.float32
    model.checkpointing = recipe.train.checkpointing
    model.noise_alpha = recipe.train.neftune_alpha
    data = SessionData(RandomTokens(64, 32, vocab_size_of(model), recipe.train.seed), None, None)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    summary = MethodSummary(trained, sum(p.numel() for p in model.parameters()))
    torch.manual_seed(recipe.train.seed)
    return Session(recipe, model, data, summary, subject.directory)


def _losses(session: Session, steps: int) -> list[float]:
    return [session.step().loss for _ in range(steps)]


def _moved(session: Session, subject: Subject) -> bool:
    """Whether training changed anything: else equality would prove nothing."""
    fresh = dict(cast(Any, subject.make(torch.device("cpu"), TINY, dropout=True)).named_parameters())
    return any(not torch.equal(fresh[name], weight) for name, weight in session.trained_weights().items())
