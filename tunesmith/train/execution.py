"""How a run's blocks were executed: written out or not, as graphs or not, through which attention kernels."""

from __future__ import annotations

from typing import Any

from tunesmith.kernels import cpu_train
from tunesmith.model.attention_choice import choices
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.parallel.stages import own_blocks


def execution_facts(model: LanguageModel) -> dict[str, Any]:
    """What run.json keeps under `execution`: plain data.

    fused_blocks of blocks, those of this process's pipeline stage; graphs: pairs recorded; graphs_refused: why none
    are; attention: the kernel chosen for each shape, with the milliseconds of every candidate; checkpointing: blocks by
    what was had of train.checkpointing; cpu: whether a CPU's operations were our own C++, and products split for its
    matrix unit.
    """
    cpu = cpu_train.facts()
    if not isinstance(model, Decoder):
        none: dict[str, Any] = {"blocks": None, "fused_blocks": 0, "graphs": 0, "graphs_refused": None, "attention": []}
        return {**none, "checkpointing": None, "cpu": cpu}
    captured = model.captured
    return {
        "cpu": cpu,
        "blocks": len(own_blocks(model)),
        "fused_blocks": model.num_fused_blocks,
        "graphs": 0 if captured is None else captured.num_graphs,
        "graphs_refused": None if captured is None else captured.refused,
        "attention": choices(),
        "checkpointing": dict(model.checkpointing_by_block()),
    }


def ran_as_asked(facts: dict[str, Any]) -> bool:
    """Whether every block had its own passes, and was recorded where that was tried: nothing a person must know."""
    return facts["fused_blocks"] == facts["blocks"] and not facts["graphs_refused"]


def execution_line(facts: dict[str, Any]) -> str | None:
    """The facts in one line for people; None where there is nothing to say."""
    if facts["blocks"] is None or not facts["fused_blocks"]:
        return None
    parts = [f"{facts['fused_blocks']} of the model's {facts['blocks']} blocks ran on tunesmith's own faster passes"]
    if facts["graphs"]:
        parts.append(f"recorded as {facts['graphs']} CUDA graph pair{'s' if facts['graphs'] > 1 else ''}")
    if facts["graphs_refused"]:
        parts.append(f"slower than they could: not recorded as CUDA graphs: {facts['graphs_refused']}")
    kernels = sorted({str(choice["kernel"]) for choice in facts["attention"]})
    if kernels:
        parts.append(f"attention by {' and '.join(kernels)}")
    return "; ".join(parts)
