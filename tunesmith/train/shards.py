"""From what the processes of a run hold to shards of a state, and back: whatever their number."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from tunesmith.checkpoint.shards import Shard, whole
from tunesmith.checkpoint.state import TrainingState
from tunesmith.checkpoint.stored import fill
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.spread import Piece
from tunesmith.train import randomness
from tunesmith.train.adam8bit import AdamW8bit
from tunesmith.train.deepspeed_update import DeepSpeedUpdater
from tunesmith.train.optimizers import check_states
from tunesmith.train.states import divided_otherwise
from tunesmith.train.update import Updater

_OWN_GENERATORS = ("torch", "cuda")
"""Those that draw different numbers in each data-parallel process: masks of dropout, noise."""


def capture_shards(updater: Updater | DeepSpeedUpdater, mesh: Mesh) -> tuple[list[Shard], dict[str, Any]]:
    """What this process holds of the state, and the facts about it (the first process's count).

    Names are those of a state of one process, so that any number of processes reads it.
    """
    if isinstance(updater, DeepSpeedUpdater):
        shards, scaler = updater.shards(), None if updater.scaler is None else updater.scaler.state()
        scalars: dict[str, dict[str, Any]] = {}
    else:
        shards = [shard for piece in updater.pieces for shard in _of_piece(piece, updater)]
        scalars, scaler = _scalars(updater), None if updater.scaler is None else vars(updater.scaler).copy()
    generators, generator_facts = randomness.capture(mesh.device)
    index = mesh.index("dp")
    for name, tensor in generators.items():
        if index == 0:
            shards.append(whole(f"rng.{name}", tensor))
        elif name in _OWN_GENERATORS:
            shards.append(whole(f"rng.{index}.{name}", tensor))
    return shards, {"optimizer": scalars, "rng": generator_facts, "scaler": scaler}


def restore_shards(state: TrainingState, updater: Updater | DeepSpeedUpdater, mesh: Mesh, seed: int) -> None:
    """Put this process's part of a state in place, whatever number of processes wrote it.

    seed: of the generators of processes that the state has none for. Raises: CheckpointError.
    """
    if isinstance(updater, DeepSpeedUpdater):
        updater.restore(state)
        _restore_generators(state, mesh, seed)
        return
    _make_states(state, updater)
    fill(state.stored, [shard for piece in updater.pieces for shard in _of_piece(piece, updater)])
    updater.forget_failure()
    if updater.scaler is not None and state.facts.get("scaler"):
        vars(updater.scaler).update(state.facts["scaler"])
    _restore_generators(state, mesh, seed)


def _of_piece(piece: Piece, updater: Updater) -> Iterator[Shard]:
    yield from _boxes(f"model.{piece.name}", piece.local.detach(), piece)
    for key, value in updater.optimizer.state.get(piece.local, {}).items():
        if not isinstance(value, Tensor):
            continue
        name = f"optimizer.{piece.name}.{key}"
        if value.shape == piece.local.shape and value.ndim:
            yield from _boxes(name, value, piece)
        elif value.ndim == 0 or _is_whole(piece):
            yield whole(name, value)
        else:  # blocks of 8-bit states: they belong to this part of the weight, and to no other
            yield whole(f"{name}.{_part(piece)}", value)


def _boxes(name: str, tensor: Tensor, piece: Piece) -> Iterator[Shard]:
    for local, there in piece.boxes:
        part = tensor[tuple(slice(start, stop) for start, stop in local)]
        yield Shard(name, part, piece.shape, there)


def _is_whole(piece: Piece) -> bool:
    return piece.chunks is None and tuple(piece.local.shape) == piece.shape


def _part(piece: Piece) -> str:
    return "part-" + "-".join(f"{start}.{stop}" for _, box in piece.boxes for start, stop in box)


def _scalars(updater: Updater) -> dict[str, dict[str, Any]]:
    """What the optimiser keeps on the host, the same for every part of a weight."""
    found: dict[str, dict[str, Any]] = {}
    for piece in updater.pieces:
        values = {k: v for k, v in updater.optimizer.state.get(piece.local, {}).items() if not isinstance(v, Tensor)}
        if values:
            found[piece.name] = values
    return found


def _make_states(state: TrainingState, updater: Updater) -> None:
    """Room for the optimiser's states, as the state on disk has them."""
    keys: dict[str, list[str]] = {}
    for name in state.stored:
        if name.startswith("optimizer."):
            parameter, _, key = name.removeprefix("optimizer.").partition(".part-")[0].rpartition(".")
            keys.setdefault(parameter, []).append(key)
    updater.optimizer.state.clear()
    scalars: Mapping[str, Mapping[str, Any]] = state.facts["optimizer"]
    for piece in updater.pieces:
        found = {key: _room(state, piece, key, updater.optimizer) for key in dict.fromkeys(keys.get(piece.name, []))}
        held: dict[str, Any] = {**found, **scalars.get(piece.name, {})}
        check_states(updater.optimizer, piece.name, piece.local, {key: key in found for key in held})
        if held:
            updater.optimizer.state[piece.local] = held


def _room(state: TrainingState, piece: Piece, key: str, optimizer: torch.optim.Optimizer) -> Tensor:
    name = f"optimizer.{piece.name}.{key}"
    if name not in state.stored:
        name = f"{name}.{_part(piece)}"
        if name not in state.stored:
            raise divided_otherwise(piece.name)
        return _empty(state.stored.entry(name).global_shape, state, name, piece)
    shape = state.stored.entry(name).global_shape
    if shape and isinstance(optimizer, AdamW8bit) and shape != piece.shape and not _is_whole(piece):
        raise divided_otherwise(piece.name)
    return _empty(piece.local.shape if shape == piece.shape and shape else shape, state, name, piece)


def _empty(shape: tuple[int, ...], state: TrainingState, name: str, piece: Piece) -> Tensor:
    return torch.empty(shape, dtype=state.stored.entry(name).dtype, device=piece.local.device)


def _restore_generators(state: TrainingState, mesh: Mesh, seed: int) -> None:
    index = mesh.index("dp")
    found = {name.removeprefix("rng."): name for name in state.stored if name.startswith("rng.")}
    own = {key: found[key] for key in found if "." not in key}
    if index:
        for key in [key for key in own if key in _OWN_GENERATORS]:
            del own[key]
        own.update({key.partition(".")[2]: found[key] for key in found if key.startswith(f"{index}.")})
    if "torch" not in own:
        randomness.seed_everything(seed + index + state.step * mesh.size("dp"))
        return
    randomness.restore({key: state.stored[name] for key, name in own.items()}, state.facts["rng"], mesh.device)
