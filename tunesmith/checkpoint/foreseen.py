"""The decoder that `load_for_inference` would give, foreseen: on the meta device, of few layers, for no bytes are read.

What it launches, it launches alike: for taking down which kernels an engine will want (engine/launches.py).
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from tunesmith.arch import ModelConfig, read_config
from tunesmith.checkpoint.bnb import BnbFiles
from tunesmith.checkpoint.files import WeightFiles
from tunesmith.checkpoint.head import Head, place_head
from tunesmith.checkpoint.held_files import HeldFiles, HeldWeights, held_method
from tunesmith.checkpoint.load import BnbWeights, CheckpointWeights, Quantize, config_dtype
from tunesmith.checkpoint.names import tensor_names
from tunesmith.kernels.fp8 import has_fp8
from tunesmith.model.decode_linears import hold_head_in_int8, use_decode_linears
from tunesmith.model.decoder import Decoder
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.quant import NF4Linear, quantise_blocks, set_compute
from tunesmith.model.weight_formats import hold_linears, parse_format

META = torch.device("meta")
LAYERS = 3
"""A first and a last one may be held otherwise than the rest."""


def foreseen_for_inference(
    directory: Path,
    *,
    quantize: str | None = None,
    dtype: torch.dtype | None = None,
    weights: Literal["checkpoint", "random"] = "checkpoint",
    head: Head = "auto",
    one_head: bool = False,
) -> Decoder:
    """A decoder of the real widths, its linears in the forms of `load_for_inference`, without an adapter.

    Of a mixture of experts: one dense MLP in place of the experts, whose launches depend on what tokens say. What is
    quantised as it arrives is quantised here, so that those launches are made too. Call it where kernels run on the
    meta device (`nf4.kernels_on`), for a chip that is foreseen (`chip.foreseeing`).
    dtype: None: the checkpoint's. head, one_head: as there.
    Raises: ModelError, UnsupportedModelError for what `load_for_inference` refuses or does not run natively.
    """
    config = read_config(directory)
    stored = config.raw.get("quantization_config") if weights == "checkpoint" else None
    source: Any = None
    if stored and held_method(config) is not None:
        source = HeldWeights(HeldFiles(directory, "cpu", stored), config)
    elif stored:
        source = BnbWeights(BnbFiles(directory, "cpu"), config)
    elif weights == "checkpoint":
        source = CheckpointWeights(WeightFiles(directory, "cpu"), config)
    kind = dtype or (config_dtype(config) if source is None else source.dtype)
    with META:
        decoder = Decoder(few_layers(config)).to(kind)
    if isinstance(source, HeldWeights):
        source.replace_linears(decoder)
        if source.files.has_head_beside(decoder):
            hold_head_in_int8(decoder)
    elif isinstance(source, BnbWeights):
        source.quantise(decoder, list(tensor_names(decoder)), cast(Any, quantize))
    elif quantize is not None:
        _quantise(decoder, quantize)
    is_integer = isinstance(source, HeldWeights) or (quantize is not None and parse_format(quantize) is not None)
    place_head(
        decoder,
        head,
        is_quantised=bool(stored) or quantize is not None,
        is_integer=is_integer,
        num_layers=config.num_hidden_layers,
        one_head=one_head,
    )
    use_decode_linears(decoder)
    return decoder.requires_grad_(False).eval()


def few_layers(config: ModelConfig) -> ModelConfig:
    """A model of three layers at most, of which one has a window where there are such layers; without experts."""
    kept = min(LAYERS, config.num_hidden_layers)
    slides = {config.window(layer) is not None for layer in range(config.num_hidden_layers)}
    sliding = tuple(range(kept)) if slides == {True} else (0,) if True in slides else ()
    return replace(config, num_hidden_layers=kept, sliding_layers=sliding, moe=None)


def _quantise(decoder: Decoder, quantize: str) -> None:
    """Linears in this format, quantised one projection after the other, as they arrive."""
    held = parse_format(quantize)
    if held is not None:
        hold_linears(decoder, held)
    else:
        quantise_blocks(decoder, cast(Quantize, quantize))
    _load_parts(decoder)
    if quantize in ("fp8", "fp8-inner"):
        set_compute(decoder, "fp8" if has_fp8(META) else "weights")


def _load_parts(decoder: nn.Module) -> None:
    """Quantise one projection of every size and kind."""
    done: set[tuple[type, int, int]] = set()
    for module in decoder.modules():
        if not isinstance(module, Fp8Linear | NF4Linear):
            continue
        for part, rows in module.parts.items():
            size = type(module), rows, module.in_features
            if size not in done:
                done.add(size)
                module.load_part(part, torch.empty(rows, module.in_features, dtype=module.dtype, device=META))
