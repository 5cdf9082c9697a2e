"""A model in several processes: how each loads its part, and what all but the first do from then on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tunesmith.checkpoint.adapter import load_adapter
from tunesmith.checkpoint.inference_share import Weights, load_share_for_inference
from tunesmith.checkpoint.load import DTYPES
from tunesmith.checkpoint.source import resolve_model
from tunesmith.engine.adapter_stacks import AdapterStacks, attach
from tunesmith.engine.adapters import AdapterPool
from tunesmith.engine.config import EngineConfig
from tunesmith.engine.tensor_messages import Message
from tunesmith.engine.tensor_parallel import (
    ShareRunner,
    for_serving,
    share_to_serve,
)
from tunesmith.engine.tensor_plain import plain_hidden
from tunesmith.errors import ParallelError, UnsupportedModelError
from tunesmith.model.decode_linears import use_decode_linears
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import adapted_linears
from tunesmith.parallel.held_linears import agree_on_rows
from tunesmith.parallel.mesh import Dimension, Mesh, Place
from tunesmith.parallel.tensor import shard_tensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

TIMEOUT = timedelta(minutes=5)
"""How long a collective waits: processes that end are noticed much sooner, by their socket."""


@dataclass(frozen=True)
class SharedSource:
    """What every process loads its part of."""

    path: str
    quantize: str | None = None
    dtype: str = "auto"
    device_type: str = "cpu"
    revision: str | None = None
    adapter: str | None = None
    weights: Weights = "checkpoint"
    seed: int = 0


@dataclass(frozen=True)
class ServingMesh(Mesh):
    """All processes of a group, which share the model: no other dimension, and no group beside the group."""

    def size(self, dimension: Dimension) -> int:
        """All along "tp", 1 along the others."""
        return self.world_size if dimension == "tp" else 1

    def index(self, dimension: Dimension) -> int:
        """This process's place along "tp"."""
        return self.rank if dimension == "tp" else 0

    def group(self, dimension: Dimension) -> ProcessGroup:
        """All of them."""
        found = torch.distributed.group.WORLD
        assert dimension == "tp" and found is not None
        return found


def take_device(rank: int, device_type: str) -> torch.device:
    """The device of this process, started. Raises what CUDA raises where it can't be."""
    if device_type != "cuda":
        return torch.device("cpu")
    torch.cuda.set_device(rank)
    torch.cuda.init()
    return torch.device("cuda", rank)


def join(size: int, rank: int, meeting: str, device_type: str) -> Mesh:
    """Meet the other processes; the mesh of the group, all of it tensor-parallel.

    Tensors go through NCCL between GPUs and gloo between CPUs; what hosts say to each other goes through sockets.
    """
    device = take_device(rank, device_type)
    torch.distributed.init_process_group(
        "nccl" if device_type == "cuda" else "gloo",
        init_method=meeting,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device_type == "cuda" else None,
    )
    return ServingMesh(Place(rank, size, rank), device)


def load_share(source: SharedSource, mesh: Mesh) -> Decoder:
    """This process's part, its linears in the form that is fastest to decode with."""
    dtype = DTYPES.get(source.dtype, torch.float32 if source.device_type == "cpu" else None)
    directory = resolve_model(source.path, source.revision)
    try:
        model = load_share_for_inference(
            directory, mesh, quantize=source.quantize, dtype=dtype, weights=source.weights, seed=source.seed
        )
        if source.adapter is not None:
            _put_adapter(model, source, mesh)
    except ParallelError as error:
        raise for_serving(error) from None
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"tensor_parallel_size is for models of the native decoder: {error}") from None
    share_to_serve(model, mesh)
    agree_on_rows(model)
    use_decode_linears(model)
    return model.eval()


def _put_adapter(model: Decoder, source: SharedSource, mesh: Mesh) -> None:
    """The adapter that all requests take: made whole, then cut as its base is."""
    load_adapter(model, Path(str(source.adapter)), base_directory=resolve_model(source.path, source.revision))
    for linear in adapted_linears(model).values():
        linear.dropout = 0.0  # of training
    shard_tensors(model, mesh)


def follow(rank: int, receive: Callable[[], Message], say: Callable[[str], None]) -> None:
    """What every process but the first does: load its part, then take part in every pass, until told to stop."""
    start = receive()
    if start["kind"] == "stop":
        return
    source = SharedSource(**start["source"])
    take_device(rank, source.device_type)
    say("here")  # the first process joins when all are: it would wait for minutes for one that can't
    decoder = load_share(source, join(start["size"], rank, start["meeting"], source.device_type))
    say("loaded")
    follow_passes(decoder, receive, say)


def follow_passes(decoder: Decoder, receive: Callable[[], Message], say: Callable[[str], None]) -> None:
    """Take part in every pass of a part that is loaded, until told to stop."""
    runner: ShareRunner | None = None
    stacks: AdapterStacks | None = None
    while (message := receive())["kind"] != "stop":
        match message["kind"]:
            case "stacks":
                stacks = AdapterStacks(
                    decoder, message["num_slots"], message["max_rank"], invariant=message["invariant"]
                )
            case "adapter":
                assert stacks is not None
                stacks.put(message["slot"], unpack_adapter(message["linears"]))
            case "runner":
                runner = ShareRunner(decoder, EngineConfig(**message["config"]), message["num_pages"])
                if stacks is not None:
                    attach(stacks, runner)
                say("ready")
            case "hidden":
                plain_hidden(decoder, [[0] * length for length in message["lengths"]])
            case "pass":
                assert runner is not None
                runner.follow(message)
            case "record":
                assert runner is not None
                runner.follow_recording(message)


def tell_of_adapters(pool: AdapterPool, tell: Callable[[Message], None]) -> None:
    """Let the other processes have the places of this pool, and what is put into them from now on."""
    stacks = pool.stacks
    sizes = {"num_slots": stacks.num_slots, "max_rank": stacks.max_rank, "invariant": stacks.invariant}
    tell({"kind": "stacks", **sizes})
    pool.on_put = lambda slot, files: tell({"kind": "adapter", "slot": slot, "linears": pack_adapter(files.linears)})


Packed = dict[str, dict[str, list[Any]]]


def pack_adapter(linears: Mapping[str, Mapping[str, tuple[Tensor, Tensor]]]) -> Packed:
    """An adapter as plain values: path -> projection -> [rank, bytes of A, bytes of B], float32."""
    return {
        path: {part: [down.shape[0], _bytes(down), _bytes(up)] for part, (down, up) in parts.items()}
        for path, parts in linears.items()
    }


def unpack_adapter(packed: Packed) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """The other way."""
    return {
        path: {part: (_matrix(down, rank, -1), _matrix(up, -1, rank)) for part, (rank, down, up) in parts.items()}
        for path, parts in packed.items()
    }


def _bytes(tensor: Tensor) -> bytes:
    return bytes(tensor.detach().to("cpu", torch.float32).contiguous().numpy().tobytes())


def _matrix(values: bytes, rows: int, columns: int) -> Tensor:
    return torch.frombuffer(bytearray(values), dtype=torch.float32).view(rows, columns)
