"""The JSON of one measured cell, version 1: `cells/<name>-<repeat>.json` ("+" written "-") of a bench's run directory.

    name, label, parent, gain       which cell of the matrix; what it stands on, and what it adds to that
    repeat, order                   which repeat, and when in the shuffled order it ran
    status, reason                  ok, failed, out_of_memory, timeout, killed; why
    command                         what reproduces this row
    overrides, recipe, recipe_hash  what the cell changed, and the whole resolved recipe
    times                           total_s, steps_s, warmup_steps_s, first_step_s, setup_s, evaluation_s,
                                    epoch_estimate_s
    throughput (median step)        tokens_per_s, trained_tokens_per_s, samples_per_s, model_flops_per_s, mfu_ratio
    memory                          allocated_peak_bytes and its source (cuda, live storages), reserved_peak_bytes,
                                    device_peak_bytes, resident_peak_bytes, resident_start_bytes,
                                    optimizer_host_bytes (states that train.offload_optimizer keeps on the host)
    owners                          weights_bytes, adapters_bytes, gradients_bytes, optimizer_bytes, activations_bytes
    losses                          training (every step), validation
    parameters                      trainable, total
    work                            steps, tokens, trained_tokens, samples of the timed steps
    environment                     the fingerprint

A value that was not measured is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from tunesmith.rundir.layout import Migration

CELL_VERSION = 1
CELL_MIGRATIONS: Mapping[int, Migration] = {}
SCALING_VERSION = 1
"""Of scaling.json: see bench/scale_curve.py."""
Status = Literal["ok", "failed", "out_of_memory", "timeout", "killed"]


def scaling_file(run: Path) -> Path:
    """The curves of a scaling run, below its directory."""
    return run / "scaling.json"


def blank_cell() -> dict[str, Any]:
    """A cell of which nothing was measured."""
    return {"schema": "tunesmith.bench.cell", "schema_version": CELL_VERSION, "status": "failed", "reason": None}
