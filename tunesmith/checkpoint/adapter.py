"""Adapters in PEFT's format, both ways: adapter_config.json and adapter_model.safetensors. Pickle is never read."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from tunesmith.checkpoint.adapter_config import CONFIG, build_adapter_config, options_for, read_adapter_config
from tunesmith.checkpoint.fingerprint import base_fingerprint
from tunesmith.checkpoint.names import LAYOUTS, module_name
from tunesmith.errors import AdapterError, ModelError, nearest
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.methods import adapted_linears, add_adapters, block_linears
from tunesmith.model.quant import NF4Linear
from tunesmith.rundir.io import write_bytes_atomic, write_json_atomic

WEIGHTS = "adapter_model.safetensors"
_PREFIX = "base_model.model."
_RANDOM = "random weights"
_KINDS = {"A": "lora_A.weight", "B": "lora_B.weight", "magnitude": "lora_magnitude_vector"}


@dataclass(frozen=True)
class BaseRecord:
    """The base an adapter was trained on, as its file's metadata says; None where it doesn't.

    `quantisation` is none, nf4, nf4-double or fp8; `dtype` is what the base was held in before it was quantised.
    """

    fingerprint: str | None = None
    quantisation: str | None = None
    dtype: str | None = None


def save_adapter(
    model: LanguageModel,
    directory: Path,
    base_path: str | Path,
    base_directory: Path | None = None,
    revision: str | None = None,
    random_seed: int | None = None,
) -> None:
    """Write the adapters of `model` as PEFT would, with a record of the base in the weights' metadata.

    Args: base_path, revision: what adapter_config.json names; base_directory: the base's weights, where `base_path` is
    no folder; random_seed: the base's weights were drawn with this seed, so that no checkpoint is the base.
    Raises: AdapterError when the model has no adapter.
    """
    config, metadata = describe_adapter(model, base_path, base_directory, revision, random_seed)
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {name: t.detach().to("cpu", torch.float32).contiguous() for name, t in adapter_tensors(model).items()}
    write_bytes_atomic(directory / WEIGHTS, save(tensors, metadata=metadata))
    write_json_atomic(directory / CONFIG, config)


def describe_adapter(
    model: LanguageModel,
    base_path: str | Path,
    base_directory: Path | None = None,
    revision: str | None = None,
    random_seed: int | None = None,
) -> tuple[dict[str, Any], dict[str, str]]:
    """What `save_adapter` writes besides tensors: adapter_config.json, and the weights' metadata.

    Of a model on the meta device too. Raises: AdapterError when the model has no adapter.
    """
    linears = adapted_linears(model)
    if not linears:
        raise AdapterError("the model has no adapter to save: method.kind must be lora or qlora")
    options = {hf_name(model, path, part): a.options for path, part, a in _adapters(linears)}
    names = [*options, *(hf_name(model, t.path, part) for t in block_linears(model) for part in t.parts)]
    names += [hf_name(model, path, part) for path, linear in linears.items() for part in linear.parts]
    config = build_adapter_config(options, names, str(base_path), _is_transposed(model), revision)
    base = base_directory or Path(base_path)
    return config, _metadata(BaseRecord(_identity(base, random_seed), *_quantisation(linears)))


def load_adapter(
    model: LanguageModel,
    directory: str | Path,
    *,
    trainable: bool = False,
    base_directory: Path | None = None,
    random_seed: int | None = None,
) -> tuple[str, ...]:
    """Put the adapter of `directory` on `model`, or into the adapters it already has (they must fit exactly).

    Args: base_directory: where the model's weights came from: must be the base that the adapter has on record (None:
    not looked at); random_seed: they were drawn with this seed instead.
    Returns: the names of the adapted projections, "<module path>.<projection>".
    Raises: AdapterError when it does not fit the model, naming what, or was trained on another base.
    """
    directory = Path(directory)
    config = read_adapter_config(directory)
    tensors, record = read_adapter_tensors(directory)
    if base_directory is not None and is_same_base(record, base_directory, random_seed) is False:
        raise _other_base(record, directory, base_directory, config.get("base_model_name_or_path"))
    places = _places(model)
    wanted = _wanted(tensors, places, directory)
    options = {f"{path}.{part}": options_for(config, name) for name, (path, part) in places.items() if name in wanted}
    _check_ranks(tensors, {name: options[".".join(places[name])].rank for name in wanted}, directory)
    if adapted_linears(model):
        _check_same(model, options, directory)
        names = tuple(options)
    else:
        names = _add(model, [places[name] for name in wanted], options, trainable)
    _copy(model, tensors, directory)
    return names


def is_same_base(record: BaseRecord, base_directory: Path, random_seed: int | None = None) -> bool | None:
    """Whether these are the weights an adapter was trained on, wherever they lie; None where it has none on record."""
    return None if record.fingerprint is None else record.fingerprint == _identity(base_directory, random_seed)


def _other_base(record: BaseRecord, directory: Path, base: Path, named: object) -> AdapterError:
    trained_on = record.fingerprint if str(record.fingerprint).startswith(_RANDOM) else named or "another model"
    return AdapterError(
        f"the adapter in {directory} was trained on another base than {base} (their weights differ): name the one it "
        f"was trained on ({trained_on}), or fold it into this one with: tunesmith merge {directory} "
        f"--base {base} --force --output DIR"
    )


def adapter_tensors(model: LanguageModel) -> dict[str, Tensor]:
    """The adapters' parameters by PEFT's tensor names."""
    out = {}
    for path, part, adapter in _adapters(adapted_linears(model)):
        name = _PREFIX + hf_name(model, path, part)
        for attribute, suffix in _KINDS.items():
            parameter = getattr(adapter, attribute)
            if parameter is not None:
                out[f"{name}.{suffix}"] = parameter
    return out


def read_adapter_tensors(directory: Path) -> tuple[dict[str, Tensor], BaseRecord]:
    """The tensors of an adapter directory by PEFT's names, and what its metadata says about the base."""
    path = directory / WEIGHTS
    if not path.is_file():
        raise AdapterError(f"{directory} has no {WEIGHTS}{_pickle_hint(directory)}")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = file.metadata() or {}
    except SafetensorError as error:
        raise AdapterError(f"{path} is torn or no safetensors file ({error}): save the adapter again") from None
    named = {name.removeprefix(_PREFIX).replace(".default.", "."): tensor for name, tensor in tensors.items()}
    fields = {key: metadata.get(f"tunesmith.base_{key}") for key in ("fingerprint", "quantisation", "dtype")}
    return named, BaseRecord(**fields)


def hf_name(model: LanguageModel, path: str, part: str) -> str:
    """Hugging Face's name of the module that a projection of `model` is."""
    if model.backend == "transformers":
        return path.removeprefix("model.")
    return module_name(cast(Any, model).config.family, path, part)


def _pickle_hint(directory: Path) -> str:
    if (directory / "adapter_model.bin").exists():
        return ": adapter_model.bin is a pickle and never read; save the adapter again with safe_serialization=True"
    return ""


def _adapters(linears: Mapping[str, AdaptedLinear]) -> Iterator[tuple[str, str, Any]]:
    for path, linear in linears.items():
        for part in linear.adapters:
            yield path, part, linear.adapter(part)


def _is_transposed(model: LanguageModel) -> bool:
    """Whether the projections are Conv1D in transformers, which PEFT calls fan_in_fan_out."""
    if model.backend == "native":
        return LAYOUTS[cast(Any, model).config.family].transposed
    return any(type(linear.base).__name__ == "Conv1D" for linear in adapted_linears(model).values())


def _metadata(record: BaseRecord) -> dict[str, str]:
    known = {f"tunesmith.base_{key}": value for key, value in vars(record).items() if value is not None}
    return {"format": "pt", **known}


def _identity(base: Path, random_seed: int | None) -> str | None:
    """The seed of random weights, else the fingerprint of a base; None where only its configuration is there."""
    if random_seed is not None:
        return f"{_RANDOM} of seed {random_seed}"
    try:
        return base_fingerprint(base)
    except ModelError:
        return None


def _quantisation(linears: Mapping[str, AdaptedLinear]) -> tuple[str, str]:
    for linear in linears.values():
        if isinstance(linear.base, NF4Linear):
            kind = "nf4-double" if linear.base.is_double else "nf4"
            return kind, str(linear.base.dtype).removeprefix("torch.")
        if isinstance(linear.base, Fp8Linear):
            # Adapters are in every block: those that are not on fp8 are the outer blocks'.
            whole = all(isinstance(other.base, Fp8Linear) for other in linears.values())
            return "fp8" if whole else "fp8-inner", str(linear.base.dtype).removeprefix("torch.")
    weight = next(iter(linears.values())).base.weight
    return "none", str(cast(Tensor, weight).dtype).removeprefix("torch.")


def _places(model: LanguageModel) -> dict[str, tuple[str, str]]:
    """Hugging Face's module name -> (module path, projection) of everything that may carry an adapter."""
    linears: dict[str, Mapping[str, int]] = {target.path: target.parts for target in block_linears(model)}
    linears |= {path: linear.parts for path, linear in adapted_linears(model).items()}
    return {hf_name(model, path, part): (path, part) for path, parts in linears.items() for part in parts}


def _wanted(tensors: Mapping[str, Tensor], places: Mapping[str, tuple[str, str]], directory: Path) -> list[str]:
    """The modules the file has adapters for, in its order."""
    wanted: dict[str, None] = {}
    for name in tensors:
        suffix = next((suffix for suffix in _KINDS.values() if name.endswith("." + suffix)), None)
        if suffix is None:
            raise AdapterError(f"{directory / WEIGHTS} holds {name!r}, which is no part of a LoRA adapter")
        module = name.removesuffix("." + suffix)
        if module not in places:
            raise AdapterError(
                f"the adapter in {directory} is for {module!r}, which this model does not have{nearest(module, places)}"
            )
        wanted[module] = None
    if not wanted:
        raise AdapterError(f"{directory / WEIGHTS} holds no tensor")
    return list(wanted)


def _add(
    model: LanguageModel,
    chosen: list[tuple[str, str]],
    options: Mapping[str, AdapterOptions],
    trainable: bool,
) -> tuple[str, ...]:
    parts: dict[str, list[str]] = {}
    for path, part in chosen:
        parts.setdefault(path, []).append(part)
    names = add_adapters(model, parts, options.__getitem__, seed=0)
    for linear in adapted_linears(model).values():
        cast(nn.Module, linear.adapters).requires_grad_(trainable)
    return names


def _check_same(model: LanguageModel, options: Mapping[str, AdapterOptions], directory: Path) -> None:
    """The adapters already there must be what the file holds: the recipe says how they train."""
    held = {f"{path}.{part}": adapter.options for path, part, adapter in _adapters(adapted_linears(model))}
    for name in sorted(held.keys() ^ options.keys()):
        raise AdapterError(
            f"the adapter in {directory} {_has(name in options)} {name}, the model's {_has(name in held)}"
        )
    for name, mine in held.items():
        theirs = options[name]
        for field in ("rank", "alpha", "rslora", "dora"):
            if getattr(mine, field) != getattr(theirs, field):
                raise AdapterError(
                    f"the adapter in {directory} has {field} {getattr(theirs, field)} for {name}, the recipe asks for "
                    f"{getattr(mine, field)}: set method.{field} to {getattr(theirs, field)}"
                )


def _check_ranks(tensors: Mapping[str, Tensor], ranks: Mapping[str, int], directory: Path) -> None:
    """Before anything is built: a configuration may claim any rank, and memory would be taken for it."""
    for name, rank in ranks.items():
        down = tensors.get(f"{name}.{_KINDS['A']}")
        if down is not None and down.shape[:1] != (rank,):
            raise AdapterError(
                f"the adapter in {directory} has rank {rank} in {CONFIG}, but {name} has shape {tuple(down.shape)}"
            )


def _has(present: bool) -> str:
    return "has" if present else "lacks"


@torch.no_grad()
def _copy(model: LanguageModel, tensors: Mapping[str, Tensor], directory: Path) -> None:
    wanted = {name.removeprefix(_PREFIX): parameter for name, parameter in adapter_tensors(model).items()}
    for name, parameter in wanted.items():
        if name not in tensors:
            raise AdapterError(f"the adapter in {directory} lacks the tensor {name}")
        if tensors[name].shape != parameter.shape:
            raise AdapterError(
                f"the adapter's {name} has shape {tuple(tensors[name].shape)}, its rank and this model ask for "
                f"{tuple(parameter.shape)}"
            )
        parameter.copy_(tensors[name])
    extra = sorted(tensors.keys() - wanted.keys())
    if extra:
        raise AdapterError(
            f"the adapter in {directory} holds tensors that its configuration has no use for: {extra[0]}"
        )
