"""The untimed pass that counts live bytes on a CPU, where no allocator keeps a peak; and what a watched step is."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from tunesmith.bench.owners import optimizer_tensors
from tunesmith.train.session import Session, language_model_loss
from tunesmith.watch.memory import LiveStorages


def count_live_bytes(session: Session) -> int:
    """The peak of live tensor bytes over one optimiser step; see `watched_step`."""
    counter = LiveStorages(held_tensors(session), device_type=session.device.type)
    watched_step(session, counter, "the pass that counts memory")
    return counter.peak_bytes


def held_tensors(session: Session) -> list[Tensor]:
    """What lives on between two steps: parameters, buffers and the optimiser's state."""
    return [*session.module.parameters(), *session.module.buffers(), *optimizer_tensors(session.optimizer)]


def watched_step(session: Session, watch: LiveStorages, called: str) -> None:
    """One optimiser step under `watch`, which is `called` so in an error message.

    It trains on the session's last window once more, so it comes after everything that is measured.
    """
    window = session.host_window(session.total_steps - 1)
    session.model.train()
    with watch:
        session.updater.step(
            session.total_steps - 1,
            [batch.to(session.device) for batch in window.batches],
            partial(language_model_loss, chunk_tokens=session.recipe.train.loss_chunk_tokens),
            denominator=window.num_trained,
            describe=lambda batch: called,
        )
