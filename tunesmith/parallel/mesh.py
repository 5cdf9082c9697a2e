"""The processes of a run as a mesh: pipeline stages x data-parallel x tensor-parallel, on torch.distributed.

A launcher (torchrun, mpirun, srun) starts the processes and says in the environment which one this is.

Processes that shared the tokens of one pack (context parallelism, which there is not yet) would be a fourth dimension,
"cp", between "dp" and "tp": pp x dp x cp x tp. They would hold the same weights, so that gradients and the strategies'
shares go over dp x cp as one dimension, while packs go by dp alone and attention's messages over cp.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Literal

import torch

from tunesmith.errors import ParallelError
from tunesmith.recipe.parallel import ParallelSection

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.distributed_c10d import Store

Dimension = Literal["pp", "dp", "tp"]
DIMENSIONS: tuple[Dimension, ...] = ("pp", "dp", "tp")
CPU_TIMEOUT_S, GPU_TIMEOUT_S = 10.0, 60.0
BACKSTOP = 40
"""How many times the limit a collective itself waits. The watchdog, which knows a slow process from one that hangs,
ends the processes long before; its patience (`hang.PATIENCE`) is shorter than this."""
NO_LIMIT = timedelta(days=365)
# (rank, processes, rank on this node): torchrun's, Open MPI's and SLURM's names.
_LAUNCHERS = (
    ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
    ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
)


@dataclass(frozen=True)
class Place:
    """Which process of a run this is. local_rank: among those of this machine."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0


@dataclass(frozen=True)
class Mesh:
    """A process's place, and the groups that it talks to. `devices` is None for a run of one process."""

    place: Place
    device: torch.device
    devices: DeviceMesh | None = None

    @property
    def rank(self) -> int:
        """This process, of `world_size`."""
        return self.place.rank

    @property
    def world_size(self) -> int:
        """All processes."""
        return self.place.world_size

    @property
    def is_first(self) -> bool:
        """Whether this process writes what is written once."""
        return self.rank == 0

    def size(self, dimension: Dimension) -> int:
        """Processes along a dimension."""
        return 1 if self.devices is None else self.devices[dimension].size()

    def index(self, dimension: Dimension) -> int:
        """This process's place along a dimension."""
        return 0 if self.devices is None else self.devices[dimension].get_local_rank()

    def group(self, dimension: Dimension) -> ProcessGroup:
        """The processes that differ from this one along `dimension` only. Only where there are several processes."""
        assert self.devices is not None
        return self.devices[dimension].get_group()

    def submesh(self, dimension: Dimension) -> DeviceMesh:
        """`group` as a mesh of one dimension, which torch's own strategies take."""
        assert self.devices is not None
        return self.devices[dimension]


def place_from(environment: Mapping[str, str]) -> Place:
    """Which process the launcher says this is; one of one where there was none.

    A job script of SLURM, which is no task that srun started, is a single process. Raises: ParallelError.
    """
    for rank, size, local in _LAUNCHERS:
        if rank not in environment or size not in environment:
            continue
        if rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in environment:
            continue
        try:
            place = Place(int(environment[rank]), int(environment[size]), int(environment.get(local, "0")))
        except ValueError as error:
            raise ParallelError(f"the launcher's {rank}, {size} and {local} must be numbers: {error}") from None
        if not 0 <= place.rank < place.world_size:
            raise ParallelError(f"the launcher says process {place.rank} of {place.world_size}")
        return place
    return Place()


def mesh_shape(settings: ParallelSection, world_size: int) -> tuple[int, int, int]:
    """(pipeline, data, tensor) sizes. Raises: ParallelError when the processes can't be divided so."""
    model = settings.pipeline * settings.tensor
    if world_size % model:
        raise ParallelError(
            f"{world_size} processes can't be divided into parallel.pipeline {settings.pipeline} x parallel.tensor "
            f"{settings.tensor}: start a multiple of {model} processes"
        )
    return settings.pipeline, world_size // model, settings.tensor


def timeout_of(settings: ParallelSection, device: torch.device) -> timedelta:
    """How long a collective may wait for the other processes, where no watchdog has ended them."""
    if settings.timeout_s == 0:
        return NO_LIMIT
    default = GPU_TIMEOUT_S if device.type == "cuda" else CPU_TIMEOUT_S
    return timedelta(seconds=BACKSTOP * (settings.timeout_s or default))


@contextmanager
def joined(settings: ParallelSection, device_type: str, place: Place | None = None) -> Iterator[Mesh]:
    """The mesh of this run while it lasts; alone, one process, and nothing of torch.distributed is loaded.

    Args: device_type: "cuda", where each process takes the GPU of its local rank, or "cpu".
    Raises: ParallelError.
    """
    place = place or place_from(os.environ)
    if place.world_size == 1:
        mesh_shape(settings, 1)
        yield Mesh(place, torch.device(device_type))
        return
    import torch.distributed as dist

    device = _own_device(device_type, place)
    shape = mesh_shape(settings, place.world_size)
    owns_group = not dist.is_initialized()
    if owns_group:
        _join_group(settings, device, place)
    try:
        devices = dist.device_mesh.init_device_mesh(device.type, shape, mesh_dim_names=DIMENSIONS)
        yield Mesh(place, device, devices)
    finally:
        if owns_group:
            dist.destroy_process_group()


def _own_device(device_type: str, place: Place) -> torch.device:
    if device_type != "cuda":
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if place.local_rank >= count:
        raise ParallelError(
            f"process {place.rank} is number {place.local_rank} on its machine, which has {count} GPUs: start one "
            f"process for each GPU"
        )
    torch.cuda.set_device(place.local_rank)
    return torch.device("cuda", place.local_rank)


def _join_group(settings: ParallelSection, device: torch.device, place: Place) -> None:
    import torch.distributed as dist

    # Objects and flags between hosts go through gloo, so that they never wait for a GPU's stream.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    os.environ.setdefault("MASTER_ADDR", "127.0.0.1")
    os.environ.setdefault("MASTER_PORT", "29500")
    timeout = timeout_of(settings, device)
    try:
        dist.init_process_group(
            backend,
            rank=place.rank,
            world_size=place.world_size,
            store=_meeting_place(place, timeout),
            timeout=timeout,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise ParallelError(f"process {place.rank} could not meet the others at {where}: {error}") from None


_stores: list[Store] = []
_meetings = count()


def _meeting_place(place: Place, timeout: timedelta) -> Store:
    """The launcher's store, under names of this meeting alone: those of an earlier run of this program are still in it,
    and who found them would wait for a group that is gone. The first process may serve it, so it stays."""
    from torch.distributed.distributed_c10d import PrefixStore
    from torch.distributed.rendezvous import rendezvous

    if not _stores:
        _stores.append(next(rendezvous("env://", place.rank, place.world_size, timeout=timeout))[0])
    store = _stores[0]
    store.set_timeout(timeout)
    return PrefixStore(f"tunesmith-{next(_meetings)}", store)
