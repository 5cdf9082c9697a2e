"""Models in: from a Hugging Face directory, or random weights made on the device.

A decoder is built on the meta device, quantised there if asked, given storage, and filled one projection at a time:
there is never more than the weights and one projection.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch
from torch import Tensor, nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.arrival import Arrival, TakesBlocks
from tunesmith.checkpoint.bnb import BnbFiles, check_bnb_config
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.names import LAYOUTS, TensorName, tensor_names
from tunesmith.checkpoint.own_part import Boxes, boxes_of_own, load_own
from tunesmith.checkpoint.random_weights import RandomWeights as RandomWeights
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.hardware import pick_device
from tunesmith.kernels.fp8 import has_fp8, without_products
from tunesmith.kernels.nf4 import NF4Weight, dequantize_nf4
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.layers import Linear
from tunesmith.model.methods import quantise_model
from tunesmith.model.quant import NF4Linear, quantise_blocks, quantised, set_compute
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.model.uncompiled import import_kernels
from tunesmith.parallel.mesh import Mesh
from tunesmith.parallel.own_boxes import Rectangle
from tunesmith.parallel.shard_linears import is_cut, load_part
from tunesmith.parallel.stages import cut_decoder
from tunesmith.parallel.tensor import share_linears
from tunesmith.recipe.schema import ModelSection

Quantize = Literal["nf4", "nf4-double", "fp8", "fp8-inner"]
Progress = Callable[[int, int], None]
Backend = Literal["auto", "native", "transformers"]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_log = logging.getLogger(__name__)


def load_model(
    path_or_id: str | Path,
    adapter: str | Path | None = None,
    quantize: Quantize | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    backend: Backend = "auto",
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    revision: str | None = None,
) -> LanguageModel:
    """A language model in evaluation mode.

    Args:
        path_or_id: a model directory, `builtin:tiny`, or a Hub id.
        adapter: an adapter directory in PEFT's format, put on top; refused where it has another base on record.
        quantize: hold the linears of the blocks in NF4, the scales too with "nf4-double", or in fp8, all but the
            first and the last block with "fp8-inner" (a device without fp8 products dequantises for each product).
        dtype: "auto" is the checkpoint's.
        device: "auto" is the GPU where there is one.
    Raises: ModelError, AdapterError or DeviceError.
    """
    _check_choice("backend", backend, get_args(Backend))
    _check_choice("weights", weights, ("checkpoint", "random"))
    section = ModelSection(path=str(path_or_id), backend=backend, weights=weights, revision=revision)
    model = load_language_model(
        section, quantize=quantize, dtype=_dtype(dtype), device=torch.device(pick_device(str(device))), seed=seed
    )
    if quantize in ("fp8", "fp8-inner"):
        module = cast(nn.Module, model)
        held_on = next(module.parameters()).device
        set_compute(module, "fp8" if has_fp8(held_on) else "weights")
        if (note := without_products(held_on)) is not None:
            _log.warning("%s", note)
    if adapter is not None:
        from tunesmith.checkpoint.adapter import load_adapter

        base = resolve_model(section.path, revision)
        load_adapter(model, Path(adapter), base_directory=base, random_seed=seed if weights == "random" else None)
    return model.eval()


def _check_choice(what: str, given: str | None, allowed: Sequence[str | None]) -> None:
    if given not in allowed:
        raise ModelError(f"{what} must be one of {', '.join(filter(None, allowed))}, got {given!r}")


def load_language_model(
    model: ModelSection,
    *,
    quantize: Quantize | None = None,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
    seed: int = 0,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    taker: TakesBlocks | None = None,
) -> LanguageModel:
    """The model of a recipe, on the native decoder, or on transformers where the family is not known natively.

    The choice is announced by a warning, and recorded in the model's `backend`.
    mesh: where its processes share tensors, each loads its part (adapters are cut afterwards, by
    `parallel.tensor.shard_tensors`), and only the native decoder will do.
    taker: gets the blocks of a native decoder one by one, see `Arrival`.
    """
    _check_choice("quantize", quantize, (None, *get_args(Quantize)))
    directory = resolve_model(model.path, model.revision)
    try:
        if model.backend == "transformers":
            raise UnsupportedModelError("model.backend is 'transformers'")
        return load_decoder(
            directory,
            device=device,
            dtype=dtype,
            weights=model.weights,
            quantize=quantize,
            seed=seed,
            progress=progress,
            mesh=mesh,
            taker=taker,
        )
    except UnsupportedModelError as reason:
        if model.backend == "native":
            raise
        if mesh is not None and mesh.size("tp") * mesh.size("pp") > 1:
            raise UnsupportedModelError(
                f"parallel.tensor is for the native decoder, and so is parallel.pipeline: set both to 1 ({reason})"
            ) from None
        if model.backend == "auto":
            _log.warning("%s: running it through the transformers backend", reason)
    foreign = TransformersModel.load(directory, device=device, dtype=dtype, weights=model.weights, seed=seed)
    if quantize is not None:
        quantise_model(foreign, quantize)
    return foreign


def load_decoder(
    directory: Path,
    *,
    device: torch.device | str = "cpu",
    dtype: torch.dtype | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    quantize: Quantize | None = None,
    seed: int = 0,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    taker: TakesBlocks | None = None,
) -> Decoder:
    """The native decoder of a model directory, its weights in `dtype` (None: the checkpoint's) on `device`.

    Random weights are normal(0, initializer_range), drawn on the device. `progress(done, total)` counts tensors.
    mesh: its tensor-parallel processes hold a part each, its pipeline's stages some blocks each. taker: see `Arrival`.
    Raises: ModelError for tensors that are missing, unexpected or of another shape; UnsupportedModelError for a family
    or a quantisation that the decoder does not have.
    """
    config = read_config(directory)
    if weights == "random":
        source: Source = RandomWeights(config, dtype or config_dtype(config), device, seed)
    elif config.raw.get("quantization_config"):
        check_bnb_config(config.raw["quantization_config"], directory)
        source = BnbWeights(BnbFiles(directory, device), config)
    else:
        source = CheckpointWeights(WeightFiles(directory, device), config)
    return fill_decoder(config, source, dtype or source.dtype, device, quantize, progress, mesh, taker)


def fill_decoder(
    config: ModelConfig,
    source: Source,
    dtype: torch.dtype,
    device: torch.device | str,
    quantize: Quantize | None = None,
    progress: Progress | None = None,
    mesh: Mesh | None = None,
    taker: TakesBlocks | None = None,
) -> Decoder:
    """A decoder in `dtype` on `device`, filled from `source` one projection at a time; of those of a mesh whose
    processes share tensors or blocks, this process's part."""
    with torch.device("meta"):
        decoder = Decoder(config).to(dtype)
    wanted = list(tensor_names(decoder))
    source.check(wanted)
    if isinstance(source, BnbWeights):
        source.quantise(decoder, wanted, quantize)
    elif quantize is not None:
        quantise_blocks(decoder, quantize)
    doubles = {path for path, child in decoder.named_modules() if isinstance(child, NF4Linear) and child.is_double}
    if mesh is not None and mesh.size("tp") > 1:
        share_linears(decoder, mesh)
    if mesh is not None and mesh.size("pp") > 1:
        cut_decoder(decoder, mesh)
    held = {(item.module, item.part) for item in tensor_names(decoder)}
    if not isinstance(source, RandomWeights):  # these come in turn, whoever takes them
        wanted = [item for item in wanted if (item.module, item.part) in held]
    arrival = Arrival(decoder, device, taker)
    done = 0
    boxes = boxes_of_own(decoder, source, wanted, doubles)
    with source.reading_ahead(wanted, boxes):
        if torch.device(device).type == "cuda":
            import_kernels()  # while the first tensors come
        for (path, part), group in groupby(wanted, key=lambda item: (item.module, item.part)):
            items, is_here = list(group), (path, part) in held
            is_own = any(item.name in boxes for item in items)
            tensors: dict[Any, Any] = {} if is_own else {item.kind: source.read(item) for item in items}
            done += len(items)
            if not is_here:
                continue
            arrival.before(path)
            module = decoder.get_submodule(path)
            if is_own:
                load_own(module, source, items, path in doubles)
            elif part is not None and is_cut(module):
                load_part(module, part, tensors["weight"], tensors.get("bias"), path in doubles)
            else:
                _put(module, part, tensors)
            if progress is not None:
                progress(done, len(wanted))
        arrival.finish()
    return decoder


@torch.no_grad()
def _put(module: nn.Module, part: str | None, tensors: Mapping[Literal["weight", "bias"], Any]) -> None:
    if part is not None:
        weight, bias = tensors["weight"], tensors.get("bias")
        if isinstance(weight, NF4Weight) and isinstance(module, NF4Linear):
            module.load_quantised(part, weight, bias)
        else:
            dense = dequantize_nf4(weight) if isinstance(weight, NF4Weight) else weight
            cast(Any, module).load_part(part, dense, bias)
        return
    for kind, tensor in tensors.items():
        getattr(module, kind).copy_(tensor)


class CheckpointWeights:
    """The tensors of a Hugging Face directory, by our names."""

    def __init__(self, files: WeightFiles, config: ModelConfig) -> None:
        self.files = files
        self.config = config
        self.layout = LAYOUTS[config.family]
        self._stored = {self._canonical(name): name for name in self.files.names()}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the embedding."""
        embedding = f"{self.layout.top['embedding']}.weight"
        if embedding not in self._stored:
            _refuse(self.files.directory, "lacks tensors", [embedding])
        name = self._stored[embedding]
        dtype = self.files.dtype(name)
        if dtype is None:
            raise UnsupportedModelError(f"{name} of {self.files.directory} is not in a floating-point dtype")
        return dtype

    def check(self, wanted: list[TensorName]) -> None:
        """Refuse a checkpoint that does not fit, naming the tensors."""
        expected = {item.name: item for item in wanted}
        directory = self.files.directory
        _refuse(directory, "lacks tensors", sorted(set(expected) - set(self._stored)))
        _refuse(directory, "has unexpected tensors", sorted(self._unexpected(set(expected))))
        shapes = {name: self._shape(item) for name, item in expected.items()}
        wrong = [f"{n} {shapes[n]} instead of {item.shape}" for n, item in expected.items() if shapes[n] != item.shape]
        _refuse(directory, "has tensors whose shape does not fit config.json", wrong)

    def reading_ahead(self, wanted: Sequence[TensorName], boxes: Boxes | None = None) -> AbstractContextManager[None]:
        """While this context is open, the files are read in this order in the background where that is faster.

        boxes: of tensors that are not read whole, by our names.
        """
        parts = {
            self._stored[item.name]: [_in_file(item, box) for box in boxes[item.name]]
            for item in wanted
            if boxes is not None and item.name in boxes
        }
        return self.files.reading_ahead([self._stored[item.name] for item in wanted], parts)

    def reads_boxes(self, item: TensorName) -> bool:
        """Whether a part of this tensor can be read without the rest."""
        return True

    def read_box(self, item: TensorName, box: Rectangle) -> Tensor:
        """Some rows and columns of [out, in], on the device, in the file's dtype."""
        tensor = self.files.read_box(self._stored[item.name], _in_file(item, box))
        return tensor.t() if item.transposed else tensor

    def read(self, item: TensorName) -> Tensor | NF4Weight:
        """The tensor as [out, in], on the device, in the file's dtype."""
        tensor = self.files.read(self._stored[item.name])
        return tensor.t() if item.transposed else tensor

    def _shape(self, item: TensorName) -> tuple[int, ...]:
        return self.files.shape(self._stored[item.name])

    def _canonical(self, name: str) -> str:
        """The name with the prefix that a bare base model leaves out."""
        bare = not name.startswith(self.layout.prefix) and not name.startswith("lm_head.")
        return self.layout.prefix + name if bare else name

    def _unexpected(self, expected: set[str]) -> Iterator[str]:
        tied = {"lm_head.weight"} if self.config.tie_word_embeddings else set()
        for canonical, name in self._stored.items():
            if canonical not in expected | tied and not re.search(self.layout.ignored, canonical):
                yield name


class BnbWeights(CheckpointWeights):
    """The tensors of a checkpoint that bitsandbytes quantised."""

    files: BnbFiles

    def quantise(self, decoder: Decoder, wanted: list[TensorName], asked: Quantize | None) -> None:
        """Put NF4 linears where every projection is quantised; a linear that is so in part only stays dense.

        Raises: ModelError when other scales were asked for than the checkpoint has, or fp8.
        """
        if asked in ("fp8", "fp8-inner"):
            raise ModelError(
                f"{self.files.directory} is quantised to NF4 already: take the unquantised model for an fp8 base, or "
                f"set method.kind to qlora, with method.fp8_compute for products in fp8"
            )
        weights = [item for item in wanted if item.part is not None and item.kind == "weight"]
        for path, group in groupby(weights, key=lambda item: item.module):
            names = [self._stored[item.name] for item in group]
            if not all(self.files.is_nf4(name) for name in names):
                continue
            double = self.files.is_double(names[0])
            if asked is not None and double != (asked == "nf4-double"):
                raise ModelError(
                    f"{self.files.directory} holds NF4 with {'doubly quantised' if double else 'plain'} scales: "
                    f"set method.double_quantisation to {str(double).lower()}"
                )
            parent, _, name = path.rpartition(".")
            linear = cast(Linear, decoder.get_submodule(path))
            setattr(decoder.get_submodule(parent), name, quantised(linear, double))

    def reading_ahead(self, wanted: Sequence[TensorName], boxes: Boxes | None = None) -> AbstractContextManager[None]:
        """As above, of what is not quantised: that is a quarter of the bytes, and comes in parts."""
        return super().reading_ahead([item for item in wanted if self.reads_boxes(item)], boxes)

    def reads_boxes(self, item: TensorName) -> bool:
        """Codes are read whole."""
        return not self.files.is_nf4(self._stored[item.name])

    def read(self, item: TensorName) -> Tensor | NF4Weight:
        """The tensor as [out, in]; a quantised one as it is."""
        name = self._stored[item.name]
        return self.files.read_nf4(name) if self.files.is_nf4(name) else super().read(item)

    def _shape(self, item: TensorName) -> tuple[int, ...]:
        shape = super()._shape(item)
        quantised_here = self.files.is_nf4(self._stored[item.name])
        return shape[::-1] if item.transposed and quantised_here else shape


Source = CheckpointWeights | RandomWeights


def _in_file(item: TensorName, box: Rectangle) -> Rectangle:
    return (box[1], box[0]) if item.transposed else box


def _refuse(directory: Path, problem: str, names: list[str]) -> None:
    if names:
        shown = ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
        raise ModelError(f"the checkpoint in {directory} {problem}: {shown}")


def config_dtype(config: ModelConfig) -> torch.dtype:
    """The dtype that config.json names; float32 where it names none."""
    return DTYPES.get(str(config.raw.get("dtype") or config.raw.get("torch_dtype")), torch.float32)


def _dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    if isinstance(dtype, torch.dtype) or dtype == "auto":
        return None if isinstance(dtype, str) else dtype
    if dtype not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES[dtype]
