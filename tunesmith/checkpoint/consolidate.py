"""A training state as a model directory or an adapter, streamed: never more in memory than a slab of one tensor.

The model is built on the meta device, for its names and shapes alone. Frozen weights come from the base, one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.adapter import WEIGHTS, adapter_tensors, describe_adapter
from tunesmith.checkpoint.adapter_config import CONFIG
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.load import DTYPES, CheckpointWeights
from tunesmith.checkpoint.names import TensorName, tensor_names
from tunesmith.checkpoint.save import plan_shards, saved_config, shard_name, write_index
from tunesmith.checkpoint.shards import DTYPE_NAMES
from tunesmith.checkpoint.source import resolve_model, resolve_tokenizer
from tunesmith.checkpoint.state import TrainingState
from tunesmith.checkpoint.stored import StoredTensors
from tunesmith.checkpoint.tensor_files import Slot, raw_bytes, write_file
from tunesmith.errors import CheckpointError, UnsupportedModelError
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.io import atomic_directory, write_json_atomic
from tunesmith.text.tokenise import with_template
from tunesmith.text.tokenizer import load_tokenizer
from tunesmith.units import GB, MIB

MAX_SHARD_BYTES = 5 * GB
SLAB_BYTES = 16 * MIB
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Consolidated:
    """What was written."""

    output: str
    kind: str
    step: int
    tensors: int
    num_bytes: int


def can_stream(recipe: Recipe) -> bool:
    """Whether a state of this recipe can be consolidated here; else its model has to be built.

    Not on the transformers backend, whose names are another library's matter, nor where frozen weights were drawn at
    random: they are drawn in order, all of them.
    """
    if recipe.model.backend == "transformers":
        return False
    if recipe.method.kind == "freeze" and recipe.model.weights == "random":
        return False
    try:
        read_config(_base(recipe))
    except UnsupportedModelError:
        return False
    return True


def consolidate(
    recipe: Recipe,
    state: TrainingState,
    output: Path,
    *,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
    replace: bool = False,
    progress: Progress | None = None,
) -> Consolidated:
    """Write what `state` has learnt as `output`, whole or not at all: what the run's `final/` would be.

    Args: state: one that was loaded; dtype: of a model's weights (None: what training computed in; adapters are
    float32); progress: called with the tensors written, of how many.
    Raises: CheckpointError naming a tensor that the state lacks; RunDirError when `output` exists and is not replaced.
    """
    with atomic_directory(output, replace=replace) as temporary:
        if recipe.method.kind in ("full", "freeze"):
            kind, count = "model", _write_model(recipe, state.stored, temporary, dtype, max_shard_bytes, progress)
        else:
            kind, count = "adapter", _write_adapter(recipe, state.stored, temporary, progress)
        if recipe.data.format != "tokens":
            with_template(recipe.data, load_tokenizer(resolve_tokenizer(recipe))).save(temporary)
        num_bytes = sum(path.stat().st_size for path in temporary.iterdir())
    return Consolidated(str(output), kind, state.step, count, num_bytes)


def _base(recipe: Recipe) -> Path:
    return resolve_model(recipe.model.path, recipe.model.revision)


def _meta_decoder(config: ModelConfig, dtype: torch.dtype) -> Decoder:
    with torch.device("meta"):
        return Decoder(config).to(dtype)


def _write_model(
    recipe: Recipe,
    stored: StoredTensors,
    directory: Path,
    dtype: torch.dtype | None,
    max_shard_bytes: int,
    progress: Progress | None,
) -> int:
    dtype = dtype or _compute_dtype(recipe)
    decoder = _meta_decoder(read_config(_base(recipe)), dtype)
    items = {item.name: item for item in tensor_names(decoder)}
    slabs = _ModelSlabs(recipe, stored, decoder, dtype)
    plan = plan_shards(decoder, dtype, max_shard_bytes)
    written = 0

    def data(names: list[str]) -> Iterator[memoryview]:
        nonlocal written
        for name in names:
            yield from slabs.of(items[name])
            written += 1
            if progress is not None:
                progress(written, len(items))

    for index, names in enumerate(plan):
        slots = [Slot(name, DTYPE_NAMES[dtype], items[name].shape) for name in names]
        write_file(directory / shard_name(index, len(plan)), slots, data(names), {"format": "pt"})
    if len(plan) > 1:
        write_index(directory, decoder, plan, dtype)
    write_json_atomic(directory / "config.json", saved_config(decoder, dtype))
    return len(items)


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    """What weights are stored in when nobody asks: masters may lie outside float16's range."""
    dtype = DTYPES.get(recipe.train.precision, torch.float32)
    return torch.float32 if dtype is torch.float16 else dtype


class _ModelSlabs:
    """The bytes of Hugging Face's tensors, from the state or, where it has no such parameter, from the base."""

    def __init__(self, recipe: Recipe, stored: StoredTensors, decoder: Decoder, dtype: torch.dtype) -> None:
        self._stored, self._decoder, self._dtype = stored, decoder, dtype
        self._base: CheckpointWeights | None = None
        if recipe.method.kind == "freeze":
            self._base = CheckpointWeights(WeightFiles(_base(recipe)), decoder.config)

    def of(self, item: TensorName) -> Iterator[memoryview]:
        """One tensor, a slab of rows after the other."""
        name = f"model.{item.module}.{item.kind}"
        if name not in self._stored and self._base is not None:
            tensor = cast(Tensor, self._base.read(item))
            yield raw_bytes((tensor.t() if item.transposed else tensor).to(self._dtype))
            return
        self._check(name)
        module: Any = self._decoder.get_submodule(item.module)
        rows = slice(0, item.shape[0]) if item.part is None else module.rows(item.part)
        for start, stop in _slabs(item.shape, self._stored.entry(name).dtype):
            if item.transposed:
                yield self._bytes(self._stored.read(name, [[rows.start, rows.stop], [start, stop]]).t())
            else:
                others = [[0, size] for size in item.shape[1:]]
                yield self._bytes(self._stored.read(name, [[rows.start + start, rows.start + stop], *others]))

    def _bytes(self, slab: Tensor) -> memoryview:
        return raw_bytes(slab.to(self._dtype))

    def _check(self, name: str) -> None:
        here = tuple(self._decoder.get_parameter(name.removeprefix("model.")).shape)
        _check_shape(self._stored, name, here)


def _write_adapter(recipe: Recipe, stored: StoredTensors, directory: Path, progress: Progress | None) -> int:
    base = recipe.model
    folder = _base(recipe)
    model = _meta_decoder(read_config(folder), DTYPES.get(base.dtype, torch.float32))
    apply_method(model, recipe.method, seed=recipe.train.seed)
    seed = recipe.train.seed if base.weights == "random" else None
    config, metadata = describe_adapter(model, base.path, folder, base.revision, seed)
    names = {parameter: f"model.{name}" for name, parameter in model.named_parameters()}
    tensors = adapter_tensors(model)
    slots = [Slot(name, DTYPE_NAMES[torch.float32], tuple(tensor.shape)) for name, tensor in tensors.items()]

    def data() -> Iterator[memoryview]:
        for number, parameter in enumerate(tensors.values(), start=1):
            name = names[cast(torch.nn.Parameter, parameter)]
            _check_shape(stored, name, tuple(parameter.shape))
            others = [[0, size] for size in parameter.shape[1:]]
            for start, stop in _slabs(tuple(parameter.shape), torch.float32):
                yield raw_bytes(stored.read(name, [[start, stop], *others]).float())
            if progress is not None:
                progress(number, len(tensors))

    write_file(directory / WEIGHTS, slots, data(), metadata)
    write_json_atomic(directory / CONFIG, config)
    return len(tensors)


def _check_shape(stored: StoredTensors, name: str, here: tuple[int, ...]) -> None:
    there = stored.entry(name).global_shape
    if there != here:
        raise CheckpointError(
            f"the checkpoint in {stored.path} is of another model than the recipe's: {name} is {list(there)} there, "
            f"{list(here)} here"
        )


def _slabs(shape: tuple[int, ...], dtype: torch.dtype) -> Iterator[tuple[int, int]]:
    """Ranges of a tensor's rows of at most SLAB_BYTES, one row at least."""
    row_bytes = dtype.itemsize * max(1, int(torch.Size(shape[1:]).numel()))
    step = max(1, SLAB_BYTES // row_bytes)
    for start in range(0, shape[0], step):
        yield start, min(shape[0], start + step)
