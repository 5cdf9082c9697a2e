"""A model in, the same model with its linears in int8 or int4 out: rounded to the nearest, or calibrated on a text."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast

import torch

from tunesmith.arch import read_config
from tunesmith.checkpoint.held_files import held_method
from tunesmith.checkpoint.held_save import save_held
from tunesmith.checkpoint.load import DTYPES, load_model
from tunesmith.checkpoint.source import resolve_model
from tunesmith.compress.calibrate import calibrate_awq, calibrate_gptq
from tunesmith.compress.divergence import divergence, prompt_logits, random_prompts
from tunesmith.errors import ModelError, UnsupportedModelError
from tunesmith.model.decode_linears import hold_head_in_int8
from tunesmith.model.decoder import Decoder
from tunesmith.model.weight_formats import WeightFormat, check_format, hold_linears
from tunesmith.rundir.io import atomic_directory
from tunesmith.rundir.model_notes import read_notes, write_notes

Calibration = Literal["none", "gptq", "awq"]
# What makes a model directory besides its weights and config.json.
_COMPANIONS = ("tokenizer", "vocab", "merges", "special_tokens", "added_tokens", "chat_template", "generation_config")
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class CompressReport:
    """What was made of a model. kl: mean nats a token between the predictions of before and after, on `kl_text`."""

    output: str
    model: str
    format: str
    calibration: Calibration
    calibration_tokens: int
    head: str
    bytes_before: int
    bytes_after: int
    kl: float
    same_best_token_ratio: float
    kl_text: str
    time_s: float


def compress_to_directory(
    model: str | Path,
    output: Path,
    format_name: str,
    *,
    calibration: Calibration = "none",
    documents: Sequence[Sequence[int]] | None = None,
    held_out: Sequence[Sequence[int]] | None = None,
    head: Literal["stored", "int8"] = "stored",
    dtype: str = "auto",
    device: str = "auto",
    revision: str | None = None,
    replace: bool = False,
) -> CompressReport:
    """Write `model` with its linears in a format, in a directory that `LLM` loads.

    Args:
        calibration: "gptq" and "awq" are for int4 and want `documents`: token ids of text like what will be asked.
        held_out: what the divergence is measured on; None: random tokens.
        dtype: of what is not quantised; "auto": the checkpoint's.
    Raises: ModelError, UnsupportedModelError, RunDirError where the folder exists. Nothing half-written is left.
    """
    begin = time.monotonic()
    held = check_format(format_name)
    _check_calibration(held, calibration, documents)
    directory = resolve_model(str(model), revision)
    _refuse_quantised(directory)
    with atomic_directory(output, replace=replace) as temporary:
        decoder = load_model(directory, dtype=_dtype(dtype), device=device)
        if not isinstance(decoder, Decoder):
            raise UnsupportedModelError(f"{model} runs on the transformers backend: {held.name} is for native models")
        before, size = prompt_logits(decoder, prompts := held_out or _random(decoder)), _num_bytes(decoder)
        _quantise(decoder, held, calibration, documents or [])
        if head == "int8":
            hold_head_in_int8(decoder)
        after = divergence(before, prompt_logits(decoder, prompts))
        notes = {} if calibration == "none" else {"calibration": calibration}
        total = save_held(decoder, temporary, held, notes=notes)
        for path in sorted(directory.iterdir()):
            if path.is_file() and path.name.startswith(_COMPANIONS):
                shutil.copyfile(path, temporary / path.name)
        write_notes(temporary, read_notes(directory))
    return CompressReport(
        output=str(output),
        model=str(model),
        format=held.name,
        calibration=calibration,
        calibration_tokens=sum(map(len, documents or ())) if calibration != "none" else 0,
        head=head,
        bytes_before=size,
        bytes_after=total,
        kl=after.kl_mean,
        same_best_token_ratio=after.argmax_agreement_ratio,
        kl_text="held-out text" if held_out else "random tokens",
        time_s=time.monotonic() - begin,
    )


@torch.no_grad()
def _quantise(
    decoder: Decoder, held: WeightFormat, calibration: Calibration, documents: Sequence[Sequence[int]]
) -> None:
    if calibration == "gptq":
        calibrate_gptq(decoder, held, documents)
    elif calibration == "awq":
        calibrate_awq(decoder, held, documents)
    else:
        hold_linears(decoder, held)


def _check_calibration(held: WeightFormat, calibration: Calibration, documents: Sequence[Sequence[int]] | None) -> None:
    if calibration == "none":
        return
    if held.kind != "int4":
        raise ModelError(f"{calibration} calibrates int4; {held.name} needs none: leave --calibration out")
    if not documents:
        raise ModelError(f"{calibration} wants text to calibrate on: name a file with --calibration-text")


def _refuse_quantised(directory: Path) -> None:
    raw = read_config(directory).raw
    section: dict[str, Any] = raw.get("quantization_config") or {}
    if section:
        method = held_method(read_config(directory)) or section.get("quant_method", "unknown")
        raise ModelError(f"{directory} is quantised already ({method}): compress the model it was made from")


def _random(decoder: Decoder) -> list[list[int]]:
    return [list(prompt) for prompt in random_prompts(decoder.config.vocab_size)]


def _num_bytes(decoder: Decoder) -> int:
    return sum(parameter.nbytes for parameter in decoder.parameters())


def _dtype(name: str) -> Any:
    if name != "auto" and name not in DTYPES:
        raise ModelError(f"dtype must be auto, {', '.join(DTYPES)}, got {name!r}")
    return cast(Any, name)
