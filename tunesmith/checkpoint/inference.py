"""Models in for inference: every weight format there is, by one name."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal, cast, get_args

import torch

from tunesmith.arch import FAMILIES, config_from_dict, read_raw_config
from tunesmith.checkpoint.adapter import load_adapter
from tunesmith.checkpoint.head import Head, check_head, place_head
from tunesmith.checkpoint.held_files import held_method, load_held
from tunesmith.checkpoint.huge_pages import use_huge_pages
from tunesmith.checkpoint.load import DTYPES, Backend, Quantize, load_model
from tunesmith.checkpoint.quantized_load import load_quantized
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import ModelError, UnsupportedModelError, nearest
from tunesmith.hardware import pick_device
from tunesmith.model.decode_linears import use_decode_linears
from tunesmith.model.decoder import Decoder
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.weight_formats import FORMAT_NAMES, WeightFormat, parse_format

TRAINED = get_args(Quantize)
"""Formats that training knows too."""


def load_for_inference(
    path: str | Path,
    *,
    quantize: str | None = None,
    adapter: str | Path | None = None,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    revision: str | None = None,
    backend: Backend = "auto",
    weights: Literal["checkpoint", "random"] = "checkpoint",
    seed: int = 0,
    head: Head = "auto",
    one_head: bool = False,
) -> LanguageModel:
    """A language model in evaluation mode, its linears in the form that is fastest to decode with.

    Args:
        quantize: None as stored (also what AWQ, GPTQ, bitsandbytes or `tunesmith compress` quantised); int8, w8a8,
            int4, int4-g64, int4-g32 (and -sym), nf4, nf4-double, fp8, fp8-inner: quantised as the weights arrive.
        adapter: an adapter directory in PEFT's format, put on top of the base in any of these formats.
        head: what the output head is held in: "stored"; "int8"; "copy": as stored, and once more in int8, which steps
            of few requests take on a GPU (model/head_copy.py); or "auto": where the blocks are quantised a copy on a
            GPU (int8 alone where that takes the model across 40 % of its bytes in 16 bits and the head is not the
            embedding), and int8 on a CPU, for blocks in int8 or int4, since there its bytes would be half of what a
            token costs; "stored" elsewhere.
        one_head: "auto" makes no copy, since every row is to go through the same head (batch-invariant mode).
        Others as `load_model`.
    Raises: ModelError, AdapterError, DeviceError or UnsupportedModelError.
    """
    if quantize is not None and quantize not in (*FORMAT_NAMES, *TRAINED):
        known = [*FORMAT_NAMES, *TRAINED]
        raise ModelError(
            f"there is no weight format {quantize!r}{nearest(quantize, known)}; there are: {', '.join(known)}"
        )
    check_head(head)
    directory = resolve_model(str(path), revision)
    where = torch.device(pick_device(str(device)))
    if where.type == "cpu":
        use_huge_pages()
    held = None if quantize is None else parse_format(quantize)
    stored = _stored_method(directory) if weights == "checkpoint" else None
    if stored is not None:
        if quantize is not None:
            raise ModelError(
                f"{directory} is quantised already ({stored}): leave quantize out, or take the unquantised model"
            )
        model: Any = load_held(directory, device=where, dtype=inference_dtype(dtype))
        model = _adapted(model, adapter, directory, None)
    elif held is None:
        model = load_model(
            directory,
            adapter=adapter,
            quantize=cast(Any, quantize),
            dtype=dtype,
            device=where,
            backend=backend,
            weights=weights,
            seed=seed,
        )
    elif backend == "transformers":
        raise UnsupportedModelError(_only_native(held))
    else:
        model = load_quantized(directory, held, device=where, dtype=inference_dtype(dtype), weights=weights, seed=seed)
        model = _adapted(model, adapter, directory, seed if weights == "random" else None)
    if isinstance(model, Decoder):
        is_integer = held is not None or stored is not None
        was_quantised = weights == "checkpoint" and bool(model.config.raw.get("quantization_config"))
        place_head(
            model,
            head,
            is_quantised=was_quantised or quantize is not None,
            is_integer=is_integer,
            num_layers=model.config.num_hidden_layers,
            one_head=one_head,
        )
        use_decode_linears(model)
    elif head in ("int8", "copy"):
        raise UnsupportedModelError("a head in int8 is for the native decoder: leave head at 'stored'")
    return model.eval()


def _stored_method(directory: Path) -> str | None:
    """What the weights are quantised by as they lie; None also for a family that only transformers knows."""
    config = read_raw_config(directory)
    return held_method(config_from_dict(config)) if config.get("model_type") in FAMILIES else None


def _adapted(model: Decoder, adapter: str | Path | None, base: Path, random_seed: int | None) -> Decoder:
    if adapter is not None:
        load_adapter(model, Path(adapter), base_directory=base, random_seed=random_seed)
    return model


def _only_native(held: WeightFormat) -> str:
    return (
        f"{held.name} is for the native decoder: take quantize='nf4' or 'fp8', which the transformers backend has too, "
        f"or backend='auto'"
    )


def inference_dtype(dtype: str | torch.dtype) -> torch.dtype | None:
    """The dtype of this name; None: the checkpoint's ("auto"). Raises: ModelError for a name that there is not."""
    if isinstance(dtype, torch.dtype):
        return dtype
    if dtype != "auto" and dtype not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}, got {dtype!r}")
    return DTYPES.get(dtype)
