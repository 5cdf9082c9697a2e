"""What DeepSpeed keeps in a process from one engine to the next: process groups, and the numbers of what it shards.

ZeRO-3 numbers modules and weights by counters of the process, and compares the numbers of all processes while it takes
down a first step. Where one of them had an engine before that another had not, a process that finds other numbers than
the first one's fails, and the others wait for it.
"""

from __future__ import annotations

import torch

from tunesmith.errors import ParallelError


def forget_process_group() -> None:
    """Let go of the groups that DeepSpeed keeps for the process: torch's may be another one the next time."""
    from deepspeed.comm import comm
    from deepspeed.utils import groups

    groups._release_process_group_references()
    comm.cdb = None


def number_alike(device: torch.device) -> None:
    """Have the next ZeRO-3 engine's modules and weights numbered alike in all processes, which must all call this.

    Counting goes on from the highest number that any process gave, so that numbers of engines still in use stay theirs.
    Raises: ParallelError, in all, where numbers differ and this version of DeepSpeed keeps them elsewhere.
    """
    from deepspeed.runtime.zero.partition_parameters import Init

    counter = _module_counter()
    held = torch.tensor([-1 if counter is None else counter[0], Init.param_id], device=device)
    lowest, highest = held.clone(), held.clone()
    torch.distributed.all_reduce(lowest, torch.distributed.ReduceOp.MIN)
    torch.distributed.all_reduce(highest, torch.distributed.ReduceOp.MAX)
    if bool((lowest == highest).all()):
        return
    if counter is None:
        raise ParallelError(
            "some of these processes had a DeepSpeed engine before that others had not, and ZeRO-3 would wait forever: "
            "train in new processes"
        )
    counter[0], Init.param_id = map(int, highest)


def _module_counter() -> list[int] | None:
    """DeepSpeed's counter of modules: a list of one number, which is a default argument; None: it is not there."""
    from deepspeed.runtime.zero.parameter_offload import DeepSpeedZeRoOffload

    numbering = getattr(DeepSpeedZeRoOffload, "_register_deepspeed_module", None)
    found = (getattr(numbering, "__defaults__", None) or (None,))[0]
    return found if isinstance(found, list) and len(found) == 1 and isinstance(found[0], int) else None
