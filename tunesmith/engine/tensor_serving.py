"""A model in several processes: how each loads its part, and what all but the first do from then on."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.adapter import load_adapter
from tunesmith.checkpoint.load import DTYPES, load_language_model
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
from tunesmith.errors import ParallelError, UnsupportedModelError
from tunesmith.kernels.fp8 import has_fp8
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import adapted_linears
from tunesmith.model.quant import set_compute
from tunesmith.parallel.mesh import DIMENSIONS, Mesh, Place
from tunesmith.parallel.tensor import shard_tensors
from tunesmith.recipe.schema import ModelSection

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


def join(size: int, rank: int, meeting: str, device_type: str) -> Mesh:
    """Meet the other processes; the mesh of the group, all of it tensor-parallel."""
    device = torch.device("cpu")
    if device_type == "cuda":
        torch.cuda.set_device(rank)
        device = torch.device("cuda", rank)
    torch.distributed.init_process_group(
        "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo",
        init_method=meeting,
        rank=rank,
        world_size=size,
        timeout=TIMEOUT,
        device_id=device if device_type == "cuda" else None,
    )
    shape = (1, 1, size)
    devices = torch.distributed.device_mesh.init_device_mesh(device_type, shape, mesh_dim_names=DIMENSIONS)
    return Mesh(Place(rank, size, rank), device, devices)


def load_share(source: SharedSource, mesh: Mesh) -> Decoder:
    """This process's part."""
    dtype = DTYPES.get(source.dtype, torch.float32 if source.device_type == "cpu" else None)
    section = ModelSection(path=source.path, backend="native", revision=source.revision)
    quantize: Any = source.quantize
    try:
        model = load_language_model(section, quantize=quantize, dtype=dtype, device=mesh.device, mesh=mesh)
    except ParallelError as error:
        raise for_serving(error) from None
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"tensor_parallel_size is for models of the native decoder: {error}") from None
    assert isinstance(model, Decoder)
    if quantize in ("fp8", "fp8-inner"):
        set_compute(model, "fp8" if has_fp8(mesh.device) else "weights")
    if source.adapter is not None:
        _put_adapter(model, source, mesh)
    return share_to_serve(model, mesh).eval()


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
    decoder = load_share(source, join(start["size"], rank, start["meeting"], source.device_type))
    say("loaded")
    follow_passes(decoder, receive, say)
    torch.distributed.destroy_process_group()


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
