"""Training methods put into place: full, frozen layers, LoRA and QLoRA are one model with other linears or other
parameters trained.

Works on the native decoder and on the transformers backend alike.
"""

from __future__ import annotations

import inspect
import logging
import re
from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

from torch import nn

from tunesmith.errors import RecipeError, UnsupportedModelError, nearest
from tunesmith.model.fp8 import Fp8Linear, inner_blocks
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.quant import NF4Linear, Quantisation, quantise_blocks, quantised_as, set_compute
from tunesmith.model.trained_fp8 import train_in_fp8
from tunesmith.recipe.schema import MethodSection

_log = logging.getLogger(__name__)
# Linears inside the blocks that choose among experts rather than project.
ROUTERS = frozenset({"router", "gate", "shared_expert_gate"})
_FOREIGN = ("Linear", "Conv1D", "FalconLinear")


@dataclass(frozen=True)
class MethodSummary:
    """What a method made of a model. `adapted` names each projection with an adapter: "<module path>.<projection>"."""

    trainable_parameters: int
    total_parameters: int
    adapted: tuple[str, ...] = ()
    trained: tuple[str, ...] = ()


@dataclass(frozen=True)
class Target:
    """A linear of the blocks, whose projections may get adapters."""

    path: str
    parent: nn.Module
    name: str
    module: nn.Module
    parts: Mapping[str, int]
    in_features: int

    def replace(self, module: nn.Module) -> None:
        """Put another linear in its place."""
        setattr(self.parent, self.name, module)


def apply_method(model: LanguageModel, method: MethodSection, *, seed: int) -> MethodSummary:
    """Make `model` train as `method` says, in place.

    The linears of the blocks are quantised where they are not already, if the method says so.
    Raises: RecipeError for names that the model does not have; UnsupportedModelError where it can't be done.
    """
    module = _module(model)
    adapted: tuple[str, ...] = ()
    if method.kind == "full":
        _refuse_quantised(module)
        module.requires_grad_(True)
        if method.fp8_compute:
            _train_in_fp8(model)
    elif method.kind == "freeze":
        _refuse_quantised(module)
        _freeze(module, method.trainable)
    else:
        if method.quantisation is not None:
            quantise_model(model, method.quantisation)
            set_compute(module, "fp8" if method.uses_fp8 else "weights")
        options = _adapter_options(method)
        adapted = add_adapters(model, choose_targets(model, method.targets), lambda _: options, seed=seed)
    return summarise(model, adapted)


class GradualMethod:
    """`apply_method`, for a native decoder whose blocks get their weights one after the other.

    Made while the decoder is on the meta device, its linears quantised there; raises what `apply_method` raises.
    """

    def __init__(self, model: LanguageModel, method: MethodSection, *, seed: int) -> None:
        self._model, self._method, self._seed = model, method, seed
        self._chosen: dict[str, list[str]] = {}
        self._adapted: tuple[str, ...] = ()
        if method.kind in ("full", "freeze"):
            self._base = apply_method(model, method, seed=seed)
            return
        _module(model).requires_grad_(False)
        self._base = summarise(model)
        self._chosen = choose_targets(model, method.targets)

    def block(self, layer: int) -> None:
        """What the method does to a block whose weights are there now."""
        if not self._chosen:
            return
        method, block = self._method, _blocks(_module(self._model))[layer]
        if method.quantisation is not None and not method.quantisation.startswith("fp8"):
            quantise_blocks(block, method.quantisation)  # what a checkpoint holds quantised in part only
        if method.quantisation is not None:
            set_compute(block, "fp8" if method.uses_fp8 else "weights")
        targets = list(_linears_below(block, f"blocks.{layer}", None))
        options = _adapter_options(method)
        self._adapted += _put_adapters(targets, self._chosen, lambda _: options, self._seed)

    def summary(self) -> MethodSummary:
        """As `apply_method` returns it, once all blocks were there."""
        if not self._chosen:
            return self._base
        trained = {name: p.numel() for name, p in _module(self._model).named_parameters() if p.requires_grad}
        count = sum(trained.values())
        return MethodSummary(count, self._base.total_parameters + count, self._adapted, tuple(trained))


def _adapter_options(method: MethodSection) -> AdapterOptions:
    return AdapterOptions(method.rank, method.alpha, method.dropout, method.rslora, method.dora)


def summarise(model: LanguageModel, adapted: tuple[str, ...] = ()) -> MethodSummary:
    """Counts of parameters; a weight held in NF4 or fp8 counts as many as it stands for, a process's part as the whole
    of a linear."""
    module = _module(model)
    parameters = dict(module.named_parameters())
    quantised_values = sum(
        child.in_features * child.out_features for child in module.modules() if isinstance(child, NF4Linear | Fp8Linear)
    )
    trained = tuple(name for name, parameter in parameters.items() if parameter.requires_grad)
    return MethodSummary(
        trainable_parameters=sum(parameters[name].numel() for name in trained)
        + _values_elsewhere(module, trained=True),
        total_parameters=sum(parameter.numel() for parameter in parameters.values())
        + quantised_values
        + _values_elsewhere(module, trained=False),
        adapted=adapted,
        trained=trained,
    )


def _values_elsewhere(module: nn.Module, *, trained: bool) -> int:
    """Weights and biases of linears of which this process holds a part, that other processes hold (see
    parallel/shard_linears.py); with `trained` only those that are."""
    total = 0
    for child in module.modules():
        whole: Any = getattr(child, "cut", None)
        if whole is not None:
            linear: Any = child
            rows, held = sum(whole.parts.values()), linear.out_features
            if not trained or getattr(getattr(linear, "weight", None), "requires_grad", False):
                total += rows * whole.in_features - held * linear.in_features
            if linear.bias is not None and (not trained or linear.bias.requires_grad):
                total += rows - held
    return total


def block_linears(model: LanguageModel) -> list[Target]:
    """Every linear of the blocks, in the order of the model's modules, but routers, linears whose weight their
    module reads directly, and those that are adapted already."""
    return list(_linears_below(_module(model), "", _output_head(model)))


def choose_targets(model: LanguageModel, targets: list[str] | str) -> dict[str, list[str]]:
    """Module path -> its projections that get adapters. Raises: RecipeError naming the nearest projection."""
    linears = block_linears(model)
    if targets == "all":
        _refuse_fused_experts(model)
        return {target.path: list(target.parts) for target in linears}
    known = {part for target in linears for part in target.parts}
    for name in targets:
        if name not in known:
            raise RecipeError(
                f"method.targets names {name!r}, which no linear of this model is called"
                f"{nearest(name, known)} (there are: {', '.join(sorted(known))})"
            )
    if not targets:
        raise RecipeError(f"method.targets is empty: name at least one of {', '.join(sorted(known))}, or say 'all'")
    chosen = {target.path: [part for part in target.parts if part in targets] for target in linears}
    return {path: parts for path, parts in chosen.items() if parts}


def add_adapters(
    model: LanguageModel,
    chosen: Mapping[str, list[str]],
    options: Callable[[str], AdapterOptions],
    *,
    seed: int,
) -> tuple[str, ...]:
    """Freeze the model and put adapters on the chosen projections; `options` gets "<module path>.<projection>".

    Returns: the names of the projections.
    """
    _module(model).requires_grad_(False)
    return _put_adapters(block_linears(model), chosen, options, seed)


def _put_adapters(
    targets: list[Target], chosen: Mapping[str, list[str]], options: Callable[[str], AdapterOptions], seed: int
) -> tuple[str, ...]:
    names = []
    for target in targets:
        parts = chosen.get(target.path, [])
        if not parts:
            continue
        wanted = {part: options(f"{target.path}.{part}") for part in parts}
        adapted = AdaptedLinear(target.module, target.parts, wanted, target.in_features)
        for part in parts:
            adapted.adapter(part).reset(f"{target.path}.{part}", seed)
        adapted.train(target.module.training)
        target.replace(adapted)
        names += [f"{target.path}.{part}" for part in parts]
    return tuple(names)


def adapted_linears(model: LanguageModel) -> dict[str, AdaptedLinear]:
    """Module path -> linear with adapters."""
    return {name: child for name, child in _module(model).named_modules() if isinstance(child, AdaptedLinear)}


def quantise_model(model: LanguageModel, quantisation: Quantisation) -> None:
    """Hold the linears of the blocks in NF4 or fp8; those that are quantised already stay as they are."""
    module = _module(model)
    if model.backend == "native":
        quantise_blocks(module, quantisation)
        return
    _refuse_fused_experts(model)
    wide = _outer_modules(module) if quantisation == "fp8-inner" else set()
    for target in block_linears(model):
        if target.module not in wide and not isinstance(target.module, NF4Linear | Fp8Linear):
            held = quantised_as(_as_linear(target), quantisation)
            held.keep_shell(target.module)
            target.replace(held)


def _outer_modules(module: nn.Module) -> set[nn.Module]:
    """What is in the first and the last block, where those are not all."""
    blocks = _blocks(module)
    inner = inner_blocks(blocks)
    return {child for block in blocks if block not in inner for child in block.modules()}


def _module(model: LanguageModel) -> nn.Module:
    return cast(nn.Module, model)


def _output_head(model: LanguageModel) -> nn.Module | None:
    """The head's linear: never a target."""
    inner: Any = getattr(model, "model", None)
    if model.backend == "native" or inner is None:
        return cast(Any, model).head
    return inner.get_output_embeddings()


def _linears_below(module: nn.Module, path: str, head: nn.Module | None) -> Iterator[Target]:
    for name, child in module.named_children():
        inner = f"{path}.{name}" if path else name
        if child is head or name in ROUTERS or isinstance(child, AdaptedLinear):
            continue
        if isinstance(child, Linear | NF4Linear | Fp8Linear):
            whole = getattr(child, "cut", None) or child  # adapters are made whole, and cut as their base is
            yield Target(inner, module, name, child, whole.parts, whole.in_features)
        elif type(child).__name__ in _FOREIGN and getattr(child, "weight", None) is not None:
            if name not in _read_directly(type(module)):  # type: ignore[arg-type]  # a class is hashable
                yield _foreign(inner, module, name, child)
        else:
            yield from _linears_below(child, inner, head)


@cache
def _read_directly(parent: Hashable) -> frozenset[str]:
    """Names of children whose weight this class of module multiplies by itself, past their forward (Mamba's dt_proj,
    for speed): they can't be replaced."""
    try:
        source = inspect.getsource(cast(type, parent))
    except (OSError, TypeError):
        return frozenset()
    names = frozenset(re.findall(r"\bself\.(\w+)\.weight\b", source))
    if names:
        _log.debug("%s reads the weights of %s itself", parent, ", ".join(sorted(names)))
    return names


def _foreign(path: str, parent: nn.Module, name: str, child: nn.Module) -> Target:
    """A linear of torch (weight [F, D]), or transformers' Conv1D (weight [D, F])."""
    first, second = cast(Any, child).weight.shape
    rows, columns = (second, first) if type(child).__name__ == "Conv1D" else (first, second)
    return Target(path, parent, name, child, {name: rows}, columns)


def _as_linear(target: Target) -> Linear:
    """A foreign linear as ours, sharing its storage."""
    child: Any = target.module
    linear = Linear.__new__(Linear)
    nn.Module.__init__(linear)
    linear.in_features, linear.parts = target.in_features, dict(target.parts)
    linear.out_features = sum(target.parts.values())
    weight = child.weight.detach()
    linear.weight = nn.Parameter(weight.t() if type(child).__name__ == "Conv1D" else weight)
    linear.bias = None if child.bias is None else nn.Parameter(child.bias.detach())
    return linear


def _refuse_fused_experts(model: LanguageModel) -> None:
    """Experts that transformers holds as one tensor are no linears: adapters and quantisation would leave them out."""
    if model.backend == "native":
        return
    fused = [name for name, parameter in _module(model).named_parameters() if parameter.ndim > 2]
    fused = [name for name in fused if "expert" in name]
    if fused:
        raise UnsupportedModelError(
            f"the transformers backend holds experts as fused tensors ({fused[0]}), which get neither adapters nor "
            f"NF4 or fp8: name linears in method.targets, or use method.kind full or freeze"
        )


def _refuse_quantised(module: nn.Module) -> None:
    if any(isinstance(child, NF4Linear | Fp8Linear) for child in module.modules()):
        raise UnsupportedModelError(
            "NF4 and fp8 weights can't be trained: use method.kind qlora or lora, or load without quantisation"
        )


def _train_in_fp8(model: LanguageModel) -> None:
    if model.backend != "native":
        raise UnsupportedModelError(
            "full fine-tuning with products in fp8 is for the native decoder, not for the transformers backend: set "
            "method.fp8_compute to false"
        )
    count = train_in_fp8(_blocks(_module(model)))
    _log.debug("%d linears are trained with products in fp8; the others, and the head, are not", count)


def _freeze(module: nn.Module, trainable: list[str]) -> None:
    """Train only what is named: last:N, first:N, head, embedding, norms."""
    module.requires_grad_(False)
    for name in trainable:
        for child in _named_parts(module, name):
            child.requires_grad_(True)


def _named_parts(module: nn.Module, name: str) -> list[nn.Module]:
    blocks = _blocks(module)
    count = re.fullmatch(r"(first|last):(\d+)", name)
    if count is not None:
        number = int(count[2])
        if not 1 <= number <= len(blocks):
            raise RecipeError(f"method.trainable {name!r} asks for {number} blocks, the model has {len(blocks)}")
        return list(blocks[:number] if count[1] == "first" else blocks[-number:])
    parts = {"head": _head_of, "embedding": _embeddings_of, "norms": _norms_of}
    if name not in parts:
        allowed = ["last:N", "first:N", *parts]
        raise RecipeError(
            f"method.trainable names {name!r}{nearest(name, allowed)} "
            f"(allowed: {', '.join(allowed)}; N up to {len(blocks)})"
        )
    return parts[name](module)


def _blocks(module: nn.Module) -> nn.ModuleList:
    """The list of blocks: the longest list of modules that is in no other."""
    lists = [child for child in module.modules() if isinstance(child, nn.ModuleList)]
    inner = {id(nested) for outer in lists for nested in outer.modules() if nested is not outer}
    outermost = [child for child in lists if id(child) not in inner]
    if not outermost:
        raise UnsupportedModelError(f"{type(module).__name__} has no list of blocks: method.trainable can't name any")
    return max(outermost, key=len)


def _head_of(module: nn.Module) -> list[nn.Module]:
    """The head; where it is tied, the embedding that serves as one."""
    if not hasattr(module, "get_output_embeddings") and hasattr(module, "model"):
        return [cast(Any, module).model.get_output_embeddings()]
    head = cast(Any, module).head
    return [head if head is not None else cast(Any, module).embedding]


def _embeddings_of(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if isinstance(child, nn.Embedding)]


def _norms_of(module: nn.Module) -> list[nn.Module]:
    return [child for child in module.modules() if type(child).__name__.endswith("Norm")]
