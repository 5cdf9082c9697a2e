"""The mesh: who this process is, and which groups it talks to."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist

from tunesmith.errors import ParallelError
from tunesmith.parallel import mesh as mesh_module
from tunesmith.parallel.mesh import Place, joined, mesh_shape, place_from
from tunesmith.recipe.parallel import ParallelSection


def test_each_launcher_says_who_this_is() -> None:
    assert place_from({}) == Place(0, 1, 0)
    assert place_from({"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}) == Place(3, 8, 1)
    mpi = {f"OMPI_COMM_WORLD_{key}": value for key, value in (("RANK", "1"), ("SIZE", "2"), ("LOCAL_RANK", "1"))}
    assert place_from(mpi) == Place(1, 2, 1)
    slurm = {"SLURM_PROCID": "2", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}
    assert place_from({**slurm, "SLURM_STEP_ID": "0"}) == Place(2, 4, 0)
    assert place_from(slurm) == Place(0, 1, 0)  # a job's script, before any srun


@pytest.mark.parametrize("environment", [{"RANK": "x", "WORLD_SIZE": "2"}, {"RANK": "2", "WORLD_SIZE": "2"}])
def test_what_a_launcher_can_not_mean_is_refused(environment: dict[str, str]) -> None:
    with pytest.raises(ParallelError, match="the launcher"):
        place_from(environment)


def test_processes_that_do_not_divide_are_refused() -> None:
    assert mesh_shape(ParallelSection(pipeline=2, tensor=2), 8) == (2, 2, 2)
    with pytest.raises(ParallelError, match="a multiple of 4 processes"):
        mesh_shape(ParallelSection(pipeline=2, tensor=2), 6)


def test_one_process_is_a_mesh_of_its_own() -> None:
    with joined(ParallelSection(), "cpu", Place()) as mesh:
        assert (mesh.size("dp"), mesh.index("tp"), mesh.is_first, mesh.devices) == (1, 0, True, None)


def _sums(pipeline: int, tensor: int) -> dict[str, tuple[int, int, float]]:
    with joined(ParallelSection(pipeline=pipeline, tensor=tensor), "cpu") as mesh:
        out = {}
        for name in ("pp", "dp", "tp"):
            value = torch.tensor(float(2**mesh.rank))
            torch.distributed.all_reduce(value, group=mesh.group(name))
            out[name] = (mesh.size(name), mesh.index(name), value.item())
        return out


def test_groups_are_the_mesh(ranks: Callable[..., list[Any]]) -> None:
    """Of four processes as 2 x 1 x 2, tensor-parallel ones are neighbours, stages are apart."""
    first, _, _, last = ranks(_sums, 4, 2, 2)
    assert first == {"pp": (2, 0, 1 + 4), "dp": (1, 0, 1), "tp": (2, 0, 1 + 2)}
    assert last == {"pp": (2, 1, 2 + 8), "dp": (1, 0, 8), "tp": (2, 1, 4 + 8)}


def test_a_second_run_of_a_program_meets_under_names_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second `fit` under torchrun, whose store outlives a run, waited for the first one's group."""
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr(mesh_module, "_stores", [])
    for _ in range(20):  # a port that was free may be somebody's by now
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
        with contextlib.suppress(dist.DistNetworkError):
            first = mesh_module._meeting_place(Place(), timedelta(seconds=30))
            break
    second = mesh_module._meeting_place(Place(), timedelta(seconds=30))
    first.set("address", "here")
    assert first.check(["address"])
    assert not second.check(["address"])
