"""What a run's model predicted in the form it was trained in: computed once, kept in the run directory."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import cast

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save
from torch import nn

from tunesmith.checkpoint.adapter import load_adapter, read_adapter_tensors
from tunesmith.checkpoint.load import DTYPES, Quantize, load_model
from tunesmith.checkpoint.source import resolve_model
from tunesmith.compress.divergence import prompt_logits
from tunesmith.compress.merge import merge_adapter
from tunesmith.engine.loading import load_source_tokenizer
from tunesmith.engine.source import ModelSource, find_source
from tunesmith.errors import is_out_of_memory
from tunesmith.hardware import pick_device
from tunesmith.model.language_model import LanguageModel
from tunesmith.model.quant import set_compute
from tunesmith.recipe.load import load_recipe
from tunesmith.rundir.io import write_bytes_atomic
from tunesmith.rundir.layout import RunDir, is_run, open_run
from tunesmith.text.tokenizer import Tokenizer
from tunesmith.verify.served_hops import Hop, Summary, compare, summarise
from tunesmith.verify.served_rows import QUESTIONS, TrainedRows, trained_rows

log = logging.getLogger(__name__)
SCHEMA_VERSION = 1
MAX_TOKENS, MAX_ROW_TOKENS = 1024, 256
REFERENCE_NAME = "served-reference.safetensors"


@dataclass(frozen=True)
class Reference:
    """The trained model's predictions on the run's rows, and its merged form's divergence from them.

    documents: their tokens. summary: of every position but the last of its document.
    """

    run: RunDir
    source: ModelSource
    rows: TrainedRows
    documents: tuple[tuple[int, ...], ...]
    summary: Summary
    merged: Hop | None


def trained_reference(
    model: str | Path, adapter: str | Path | None = None, *, device: str = "auto"
) -> Reference | None:
    """What the outcome of a run predicted in the form that it was trained in; None for what is no training run.

    The first call loads the model as it was trained (before an engine takes the memory: call it then), and keeps its
    predictions in the run directory; later ones read them. Out of the GPU's memory it computes on the CPU.
    Raises: what loading a model raises.
    """
    run = _run_of(model, adapter)
    if run is None:
        return None
    source = find_source(str(model), adapter, None, None)
    recipe = load_recipe(run.recipe)
    tokenizer = load_source_tokenizer(source)
    rows = trained_rows(recipe.data, tokenizer)
    documents = _documents(rows) or _built_in(tokenizer)
    key = _key(source, documents)
    kept = _read_kept(run, key)
    if kept is None:
        log.info("computing what the run's model predicts in the form it was trained in (once)")
        kept = _computed(source, documents, device)
        _keep(run, key, kept)
    return Reference(run, source, rows, documents, *kept)


_Kept = tuple[Summary, Hop | None]


def _run_of(model: str | Path, adapter: str | Path | None) -> RunDir | None:
    """The training run that something comes from."""
    name = str(model if adapter is None else adapter)
    if name.startswith("builtin:"):
        return None
    path = Path(name).expanduser()
    for folder in (path, path.resolve().parent):
        if is_run(folder):
            run = open_run(folder)
            return run if run.info().kind == "train" and run.recipe.is_file() else None
    return None


def _documents(rows: TrainedRows) -> tuple[tuple[int, ...], ...]:
    """The rows' tokens, cut so that the check stays short."""
    kept, room = [], MAX_TOKENS
    for row in rows.rows:
        tokens = tuple(row.encoded.tokens[: min(MAX_ROW_TOKENS, room)])
        if len(tokens) > 1:
            kept.append(tokens)
            room -= len(tokens)
    return tuple(kept)


def _built_in(tokenizer: Tokenizer) -> tuple[tuple[int, ...], ...]:
    """A text, where the run was not trained on conversations."""
    text = "\n".join(f"{asked}\n{said}" for asked, said in QUESTIONS)
    return (tuple(tokenizer.encode(text, add_special=True)),)


def _computed(source: ModelSource, documents: Sequence[Sequence[int]], device: str) -> _Kept:
    where = str(pick_device(device))
    try:
        return _computed_on(source, documents, where)
    except Exception as error:
        if where == "cpu" or not is_out_of_memory(error):
            raise
        torch.cuda.empty_cache()
        return _computed_on(source, documents, "cpu")


def _computed_on(source: ModelSource, documents: Sequence[Sequence[int]], device: str) -> _Kept:
    model = _trained_form(source, device)
    prompts = [list(document) for document in documents]
    before = prompt_logits(model, prompts)
    reference = summarise(before, prompts)
    merged = None
    if source.adapter is not None:
        dtype = _checkpoint_dtype(source)
        merge_adapter(model, dtype)
        merged = compare(
            f"merged in {str(dtype).removeprefix('torch.')}", reference, prompt_logits(model, prompts), prompts
        )
    del model
    if device != "cpu":
        torch.cuda.empty_cache()
    return reference, merged


def _trained_form(source: ModelSource, device: str) -> LanguageModel:
    """The model that training left: its base in the dtype or the codes that were trained on, products in float32."""
    if source.adapter is None:
        return load_model(source.path, dtype="auto", device=device, revision=source.revision)
    record = read_adapter_tensors(source.adapter)[1]
    quantize = None if record.quantisation in (None, "none") else cast(Quantize, record.quantisation)
    directory = resolve_model(source.path, source.revision)
    model = load_model(directory, quantize=quantize, dtype=DTYPES.get(record.dtype or "", "auto"), device=device)
    set_compute(cast(nn.Module, model), "weights")
    load_adapter(model, source.adapter)
    return model.eval()


def _checkpoint_dtype(source: ModelSource) -> torch.dtype:
    raw = json.loads((resolve_model(source.path, source.revision) / "config.json").read_text(encoding="utf-8"))
    return DTYPES.get(str(raw.get("dtype") or raw.get("torch_dtype")), torch.float32)


def _key(source: ModelSource, documents: Sequence[Sequence[int]]) -> str:
    """A hash of the outcome's files, its base and the documents."""
    outcome = source.adapter if source.adapter is not None else Path(source.path)
    files = sorted(outcome.glob("*.safetensors")) + sorted(outcome.glob("*config.json"))
    stats = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    content = json.dumps([SCHEMA_VERSION, str(source.path), source.revision, stats, documents])
    return hashlib.sha256(content.encode()).hexdigest()


def _keep(run: RunDir, key: str, kept: _Kept) -> None:
    """Write the reference beside the run's other files; a directory that can't be written costs the next start time."""
    (top_ids, top_logprobs, token_logprobs), merged = kept
    arrays = {
        "top_ids": top_ids.numpy(), "top_logprobs": top_logprobs.numpy().astype(np.float32),
        "token_logprobs": token_logprobs.numpy().astype(np.float32),
    }  # fmt: skip
    content = save(arrays, {"key": key, "merged": json.dumps(None if merged is None else asdict(merged))})
    try:
        write_bytes_atomic(run.path / REFERENCE_NAME, content)
    except OSError as error:
        log.warning("%s can't be kept in %s: %s", REFERENCE_NAME, run.path, error)


def _read_kept(run: RunDir, key: str) -> _Kept | None:
    file = run.path / REFERENCE_NAME
    if not file.is_file():
        return None
    try:
        with safe_open(file, "pt") as stored:
            metadata: Mapping[str, str] = stored.metadata() or {}
            if metadata.get("key") != key:
                return None
            merged = json.loads(metadata["merged"])
            names = ("top_ids", "top_logprobs", "token_logprobs")
            top_ids, top_logprobs, token_logprobs = (stored.get_tensor(name) for name in names)
    except (SafetensorError, OSError, ValueError, KeyError):
        return None
    return (top_ids, top_logprobs, token_logprobs), None if merged is None else Hop(**merged)
