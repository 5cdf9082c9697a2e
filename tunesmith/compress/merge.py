"""Adapters folded into their base: in place, or streamed into a model directory, with what each hop changed.

    base as trained + adapter  --merge-->  weights in the output's dtype  --quantise-->  NF4

An adapter trained on an NF4 or fp8 base is merged into the dequantised weights: those it has learnt to correct.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from tunesmith.checkpoint.adapter import BaseRecord, is_same_base, load_adapter, read_adapter_tensors
from tunesmith.checkpoint.adapter_config import read_adapter_config
from tunesmith.checkpoint.bnb import quantise_directory
from tunesmith.checkpoint.load import DTYPES, Quantize, load_model
from tunesmith.checkpoint.save import save_decoder
from tunesmith.checkpoint.source import resolve_model
from tunesmith.compress.divergence import Divergence, divergence, prompt_logits, random_prompts
from tunesmith.errors import AdapterError, VerificationError
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear
from tunesmith.model.methods import adapted_linears
from tunesmith.model.quant import NF4Linear, set_compute
from tunesmith.model.transformers_backend import TransformersModel
from tunesmith.rundir.io import atomic_directory
from tunesmith.rundir.model_notes import read_notes, write_notes

# A hop that moves the predictions by more than so many nats breaks the model.
KL_LIMIT = 0.1
# What makes a model directory besides its weights.
_COMPANIONS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")


@dataclass(frozen=True)
class Hop:
    """One step from the adapter to what is stored, against the model before it."""

    name: str
    divergence: Divergence
    kl_limit: float

    @property
    def passed(self) -> bool:
        """Whether the model is still the same."""
        return self.divergence.kl_mean <= self.kl_limit


@dataclass(frozen=True)
class MergeReport:
    """What was merged and what it changed. `base_checked` is None where the adapter doesn't say what its base was."""

    output: str
    base: str
    adapter: str
    dtype: str
    quantisation: str
    base_quantisation: str
    base_checked: bool | None
    hops: tuple[Hop, ...]


def merge_adapter(model: LanguageModel, dtype: torch.dtype | None = None) -> LanguageModel:
    """Fold the adapters into their linears, in place: plain linears in `dtype` (None: the base's) take their place.

    A base in NF4 or fp8 becomes its dequantised weights; what is computed is in float32.
    """
    for path, linear in adapted_linears(model).items():
        parent, _, name = path.rpartition(".")
        setattr(cast(nn.Module, model).get_submodule(parent), name, _merged(linear, dtype))
    return model


def merge_to_directory(
    base_path: str | Path | None,
    adapter_dir: Path,
    out_dir: Path,
    dtype: torch.dtype | None = None,
    quantize: Literal["nf4", "nf4-double"] | None = None,
    *,
    prompts: Sequence[Sequence[int]] | None = None,
    kl_limit: float = KL_LIMIT,
    device: str = "auto",
    force: bool = False,
    replace: bool = False,
) -> MergeReport:
    """Write the merged model as a Hugging Face directory, one projection at a time.

    Args: base_path: None takes the base that the adapter names; dtype: of the stored weights, None the base's;
    quantize: store NF4 (bitsandbytes' format); prompts: what the divergence is measured on (None: random tokens);
    force: merge into another base than the one trained, and keep a result whose divergence is over the limit.
    Raises: AdapterError for another base; VerificationError when a hop's KL is above `kl_limit` (nothing is written).
    """
    base, revision = (str(base_path), None) if base_path else named_base(adapter_dir)
    directory = resolve_model(base, revision)
    record = read_adapter_tensors(adapter_dir)[1]
    checked = _check_base(record, directory, adapter_dir, force)
    model = _trained_model(directory, adapter_dir, record, device)
    prompts = prompts or random_prompts(int(cast(Any, model).config.vocab_size))
    before = prompt_logits(model, prompts)
    stored = dtype or _stored_dtype(directory)
    with atomic_directory(out_dir, replace=replace) as temporary:
        dense = temporary / "dense" if quantize else temporary
        save_merged(model, dense, stored)
        _copy_companions([directory, adapter_dir], temporary)
        write_notes(temporary, read_notes(adapter_dir))
        del model
        hops = [_hop(f"merge in {_name(stored)}", dense, before, prompts, device, kl_limit)]
        if quantize is not None:
            merged = _logits_of(dense, prompts, device)
            quantise_directory(dense, temporary, double=quantize == "nf4-double")
            shutil.rmtree(dense)
            hops.append(_hop(f"quantise to {quantize}", temporary, merged, prompts, device, kl_limit))
        _refuse_broken(hops, force)
    quantisation = quantize or "none"
    base_quantisation = record.quantisation or "none"
    return MergeReport(
        str(out_dir), base, str(adapter_dir), _name(stored), quantisation, base_quantisation, checked, tuple(hops)
    )


def save_merged(model: LanguageModel, directory: Path, dtype: torch.dtype) -> None:
    """Write `model` with its adapters folded in; on the native decoder one projection at a time."""
    if isinstance(model, Decoder):
        for path, linear in adapted_linears(model).items():
            parent, _, name = path.rpartition(".")
            setattr(model.get_submodule(parent), name, _MergedWhenRead(linear))
        save_decoder(model, directory, dtype=dtype)
        return
    foreign = cast(TransformersModel, merge_adapter(model, dtype))
    _dequantise_foreign(foreign, dtype)
    foreign.model.to(dtype)
    foreign.save(directory)


class _MergedWhenRead(nn.Module):
    """An adapted linear that gives each projection merged, when it is asked for: what saving reads."""

    def __init__(self, linear: AdaptedLinear) -> None:
        super().__init__()
        self.linear = linear
        self.parts = linear.parts
        self.in_features = linear.in_features
        self.bias = linear.bias

    def rows(self, part: str) -> slice:
        """The rows of the fused weight that belong to one projection."""
        return self.linear.rows(part)

    def part_weight(self, part: str) -> Tensor:
        """weight_FD of one projection, merged, float32."""
        return self.linear.merged_part(part)


@torch.no_grad()
def _merged(linear: AdaptedLinear, dtype: torch.dtype | None) -> nn.Module:
    """A plain linear in place of an adapted one; a linear of transformers keeps its class."""
    base: Any = linear.base
    if not isinstance(base, Linear | NF4Linear | Fp8Linear):
        weight = linear.merged_part(next(iter(linear.parts)))
        base.weight.copy_(weight.t() if type(base).__name__ == "Conv1D" else weight)
        return base
    stored = dtype or (base.dtype if isinstance(base, NF4Linear | Fp8Linear) else base.weight.dtype)
    return _dense(base, {part: linear.merged_part(part) for part in linear.parts}, stored)


def _dense(base: Linear | NF4Linear | Fp8Linear, weights: dict[str, Tensor], dtype: torch.dtype) -> nn.Module:
    """A linear in `dtype` with these weights and the base's bias; one of another library keeps its class."""
    device = next(iter(weights.values())).device
    shell = getattr(base, "shell", None)
    if shell is not None:
        (foreign,) = shell
        weight = next(iter(weights.values())).to(dtype)
        foreign.weight = nn.Parameter(weight.t().contiguous() if type(foreign).__name__ == "Conv1D" else weight)
        return cast(nn.Module, foreign)
    with torch.device(device):
        dense = Linear(base.in_features, base.parts, base.bias is not None).to(dtype)
    for part, weight in weights.items():
        bias = None if base.bias is None else base.bias[base.rows(part)]
        dense.load_part(part, weight, bias)
    return dense.requires_grad_(False)


def _dequantise_foreign(model: TransformersModel, dtype: torch.dtype) -> None:
    """Quantised linears without an adapter were part of the base that was trained: they are stored dequantised."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, NF4Linear | Fp8Linear):
                setattr(parent, name, _dense(child, {part: child.part_weight(part) for part in child.parts}, dtype))


def named_base(adapter_dir: Path) -> tuple[str, str | None]:
    """The base that an adapter names, and its revision. Raises: AdapterError when it names none."""
    config = read_adapter_config(adapter_dir)
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    if not base:
        raise AdapterError(f"the adapter in {adapter_dir} does not name its base: say which with --base MODEL")
    return str(base), str(revision) if revision else None


def _check_base(record: BaseRecord, directory: Path, adapter_dir: Path, force: bool) -> bool | None:
    same = is_same_base(record, directory)
    if same is False and not force:
        raise AdapterError(
            f"the adapter in {adapter_dir} was trained on another base than {directory} (their weights differ): "
            f"name the right one with --base, or merge anyway with --force"
        )
    return same


def _trained_model(base: Path, adapter_dir: Path, record: BaseRecord, device: str) -> LanguageModel:
    """The base as it was trained on, with the adapter."""
    quantize = None if record.quantisation in (None, "none") else cast(Quantize, record.quantisation)
    # The weights trained on were those of this dtype, rounded or quantised from it, not the checkpoint's.
    dtype = DTYPES.get(record.dtype or "", "auto")
    model = load_model(base, quantize=quantize, dtype=dtype, device=device)
    set_compute(cast(nn.Module, model), "weights")
    load_adapter(model, adapter_dir)
    return model


def _stored_dtype(directory: Path) -> torch.dtype:
    """The dtype that a model's configuration names; float32 where it names none."""
    raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.float32)


def _hop(
    name: str,
    directory: Path,
    before: list[Tensor],
    prompts: Sequence[Sequence[int]],
    device: str,
    kl_limit: float,
) -> Hop:
    return Hop(name, divergence(before, _logits_of(directory, prompts, device)), kl_limit)


def _logits_of(directory: Path, prompts: Sequence[Sequence[int]], device: str) -> list[Tensor]:
    return prompt_logits(load_model(directory, device=device), prompts)


def _refuse_broken(hops: list[Hop], force: bool) -> None:
    broken = [hop for hop in hops if not hop.passed]
    if broken and not force:
        hop = broken[0]
        raise VerificationError(
            f"'{hop.name}' breaks the model: KL {hop.divergence.kl_mean:.3g} nats a token, the limit is "
            f"{hop.kl_limit:.3g}; choose a wider dtype, raise --kl-limit, or keep it with --force"
        )


def _copy_companions(sources: list[Path], target: Path) -> None:
    """Tokenizer, chat template and generation settings; those beside the adapter win."""
    for path in _companions(sources):
        shutil.copyfile(path, target / path.name)


def _companions(sources: list[Path]) -> Iterator[Path]:
    for source in sources:
        for path in sorted(source.iterdir()):
            if path.is_file() and path.name.startswith(_COMPANIONS):
                yield path


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
