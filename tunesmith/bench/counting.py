"""The untimed pass that counts live bytes on a CPU, where no allocator keeps a peak."""

from __future__ import annotations

from functools import partial

from tunesmith.bench.owners import optimizer_tensors
from tunesmith.train.session import Session, language_model_loss
from tunesmith.watch.memory import LiveStorages


def count_live_bytes(session: Session) -> int:
    """The peak of live tensor bytes over one optimiser step.

    The step trains on the session's last window once more, so it comes after everything that is measured.
    """
    window = session.host_window(session.total_steps - 1)
    existing = [*session.module.parameters(), *session.module.buffers(), *optimizer_tensors(session.optimizer)]
    session.model.train()
    with LiveStorages(existing, device_type=session.device.type) as counter:
        session.updater.step(
            session.total_steps - 1,
            [batch.to(session.device) for batch in window.batches],
            partial(language_model_loss, chunk_tokens=session.recipe.train.loss_chunk_tokens),
            denominator=window.num_trained,
            describe=lambda batch: "the pass that counts memory",
        )
    return counter.peak_bytes
