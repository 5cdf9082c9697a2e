"""How torch's GPU allocator takes memory; it reads that once, when CUDA starts."""

from __future__ import annotations

import os
import sys

import torch

from tunesmith.rundir.environment import ALLOCATOR_VARIABLES

SETTINGS = "expandable_segments:True"


def prepare_allocator(device: str) -> None:
    """Segments that grow instead of new ones beside them, so that blocks of varying sizes leave no holes.

    The user's own settings win, by either variable's name; a process whose CUDA has started keeps what it has. The
    environment's record in the run directory has what holds.

    Args:
        device: as a recipe names it; nothing is set for "cpu".
    """
    unset = not any(name in os.environ for name in ALLOCATOR_VARIABLES)
    if device != "cpu" and sys.platform == "linux" and unset and not torch.cuda.is_initialized():
        os.environ[ALLOCATOR_VARIABLES[0]] = SETTINGS
