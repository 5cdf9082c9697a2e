"""Perplexity of a model in every weight format, on text it has not seen, beside its own weights.

    python benchmarks/format_quality.py --model builtin:tiny --text builtin > format_quality.jsonl
    python benchmarks/format_quality.py --model MODEL --text TEXT.txt[.xz]
    python benchmarks/format_quality.py --calibrate GPTQ_TEXT.txt ...      also int4 by GPTQ and AWQ on another text
    python benchmarks/format_quality.py --kv ...          also keys and values in fp8: by the engine, through its pages

A line of JSON for each format: perplexity, its change, KL from the unquantised model and agreement on the best token,
bytes of the weights, seconds to load. The text is cut into pieces of `--length` tokens; the first token of each is
given. Only a model that has really learnt says something: with random weights every format is equally bad.

    python benchmarks/format_quality.py ... --copies float32,bfloat16,fp8,int4

Formats with a copy of the head in int8 beside the stored one (model/head_copy.py): a line of logits by the stored head
and one by the copy, from the same hidden states, the copy widened to their dtype. The second says too how far it is
from the first: what the copy alone changes.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.checkpoint.source import resolve_model
from tunesmith.compress.calibrate import calibrate_awq, calibrate_gptq
from tunesmith.compress.divergence import divergence
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams
from tunesmith.hardware import pick_device
from tunesmith.model.decoder import Decoder
from tunesmith.model.head_copy import copy_head
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.language_model import LanguageModel, logits
from tunesmith.model.packed import pack_documents
from tunesmith.model.weight_formats import check_format
from tunesmith.text.builtin.pretrain import rows
from tunesmith.text.tokenizer import load_tokenizer

FORMATS = ("bfloat16", "int8", "w8a8", "fp8", "int4-g32", "int4-g64", "int4", "int4-sym", "nf4", "nf4-double")
KV_STEP = 16
"""Tokens of a step where keys and values are measured: what is read is nearly always in the pages, not new."""
HEADS = ("int8", "int4")
"""Formats measured with the head in int8 too."""


def read_text(path: Path) -> str:
    """A text file, packed by xz or not; "builtin" is made here."""
    if str(path) == "builtin":
        return held_out_rows()
    data = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    return data.decode("utf-8")


def held_out_rows(count: int = 3000) -> str:
    """Texts of the kind that builtin:tiny learnt, of the part of the vocabulary that it never saw."""
    return "\n".join(row["text"] for row in rows(seed=1, count=count, split="heldout") if "text" in row)


def pieces_of(path: Path, model: str, length: int, tokens: int) -> list[list[int]]:
    """Token ids in pieces of `length`, at most `tokens` in all."""
    ids = load_tokenizer(resolve_model(model)).encode(read_text(path)[: tokens * 12])[:tokens]
    return [ids[start : start + length] for start in range(0, len(ids) - 1, length)]


@torch.inference_mode()
def predictions(model: LanguageModel, pieces: list[list[int]]) -> list[Tensor]:
    """float32 logits of each piece, on the CPU."""
    return [logits(model, [piece])[0].float().cpu() for piece in pieces]


def perplexity(found: list[Tensor], pieces: list[list[int]]) -> float:
    """exp of the mean negative log likelihood of every token but the first of a piece."""
    loss = sum(
        float(F.cross_entropy(logits_TV[:-1], torch.tensor(piece[1:]), reduction="sum"))
        for logits_TV, piece in zip(found, pieces, strict=True)
    )
    return math.exp(loss / sum(len(piece) - 1 for piece in pieces))


def paged_perplexity(model: str, kv_dtype: str, dtype: str, device: str, pieces: list[list[int]]) -> float:
    """The same by the engine: a piece goes through in steps of `KV_STEP` tokens, which read all before from pages."""
    llm = LLM(
        model,
        dtype=dtype,
        device=device,
        kv_cache_dtype=kv_dtype,
        max_num_seqs=1,
        max_num_batched_tokens=KV_STEP,
        enable_prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
    total, count = 0.0, 0
    for piece in pieces:
        known = llm.generate([piece], params, progress=False)[0].prompt_logprobs or []
        chosen = [entry.logprob for entry in known if entry is not None]
        total, count = total - sum(chosen), count + len(chosen)
    return math.exp(total / count)


def weight_bytes(model: LanguageModel) -> int:
    """Bytes of parameters and of what quantised linears hold, the embedding and the head included."""
    module = cast(nn.Module, model)
    return sum(t.nbytes for t in [*module.parameters(), *module.buffers()])


@torch.inference_mode()
def copied_predictions(decoder: Decoder, pieces: list[list[int]]) -> list[Tensor]:
    """`predictions` by a copy of the head in int8, its product that of the weight that it stands for."""
    copy_head(decoder)
    head = cast(Int8Linear, decoder.head_copy)
    device = head.codes.device
    return [head.dense_product(decoder.hidden(pack_documents([piece], device))).float().cpu() for piece in pieces]


def copies(arguments: argparse.Namespace, pieces: list[list[int]], before: list[Tensor]) -> Iterator[dict[str, Any]]:
    """Two rows for each of the formats that are to have a copy: by the stored head, and by the copy."""
    for name in filter(None, arguments.copies.split(",")):
        is_dense = name in ("float32", "bfloat16")
        model = load_for_inference(
            arguments.model,
            quantize=None if is_dense else name,
            dtype=name if is_dense else arguments.dtype,
            device=arguments.device,
            head="stored",
        )
        stored = predictions(model, pieces)
        yield {"format": name, **distance(before, stored, pieces)}
        copied = copied_predictions(cast(Decoder, model), pieces)
        alone = divergence(stored, copied)
        yield {
            "format": f"{name}, head by the copy in int8",
            **distance(before, copied, pieces),
            "change_by_copy_percent": round(100 * (perplexity(copied, pieces) / perplexity(stored, pieces) - 1), 4),
            "kl_by_copy_nats": float(f"{alone.kl_mean:.3g}"),
            "same_best_token_by_copy_ratio": round(alone.argmax_agreement_ratio, 5),
            "weight_bytes": weight_bytes(model),
        }


def distance(before: list[Tensor], found: list[Tensor], pieces: list[list[int]]) -> dict[str, Any]:
    """Perplexity of predictions, and how far they are from the unquantised model's."""
    own, value = perplexity(before, pieces), perplexity(found, pieces)
    far = divergence(before, found)
    return {
        "perplexity": round(value, 4),
        "change_percent": round(100 * (value / own - 1), 3),
        "kl_nats": round(far.kl_mean, 6),
        "same_best_token_ratio": round(far.argmax_agreement_ratio, 4),
    }


def models(arguments: argparse.Namespace) -> Iterator[tuple[str, Any, float]]:
    """Name, model and seconds to load, one after the other."""
    wanted = [(name, "stored") for name in arguments.formats.split(",")]
    wanted += [(name, "int8") for name in HEADS if name in arguments.formats.split(",")]
    for name, head in wanted:
        begin = time.monotonic()
        quantize = None if name == "bfloat16" else name
        dtype = "bfloat16" if name == "bfloat16" else arguments.dtype
        model = load_for_inference(
            arguments.model, quantize=quantize, dtype=dtype, device=arguments.device, head=cast(Any, head)
        )
        yield name + (", head int8" if head == "int8" else ""), model, time.monotonic() - begin
    if arguments.calibrate is None:
        return
    texts = pieces_of(arguments.calibrate, arguments.model, 512, arguments.calibration_tokens)
    for name, method in (("gptq", calibrate_gptq), ("awq", calibrate_awq)):
        for held in ("int4", "int4-g32"):
            begin = time.monotonic()
            model = load_for_inference(arguments.model, dtype=arguments.dtype, device=arguments.device)
            method(cast(Any, model), check_format(held), texts)
            yield f"{held} by {name}", model, time.monotonic() - begin


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="builtin:tiny")
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--copies", default="", help="formats with a copy of the head; in place of --formats")
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--calibrate", type=Path, help="a text to calibrate int4 on, other than --text")
    parser.add_argument("--calibration-tokens", type=int, default=32768)
    parser.add_argument("--kv", action="store_true", help="keys and values in fp8 too")
    parser.add_argument("--dtype", default="float32", help="of what is not quantised")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args()
    if arguments.calibrate is not None and arguments.calibrate.resolve() == arguments.text.resolve():
        sys.exit("--calibrate must be another text than --text: what was calibrated on is not held out")
    arguments.device = str(pick_device(arguments.device))
    pieces = pieces_of(arguments.text, arguments.model, arguments.length, arguments.tokens)
    reference = load_for_inference(arguments.model, dtype=arguments.dtype, device=arguments.device, head="stored")
    before = predictions(reference, pieces)
    own = perplexity(before, pieces)
    tokens = sum(map(len, pieces))
    first = {"model": arguments.model, "text": arguments.text.name, "tokens": tokens, "format": arguments.dtype}
    print(json.dumps({**first, "perplexity": round(own, 4), "weight_bytes": weight_bytes(reference)}), flush=True)
    del reference
    for row in copies(arguments, pieces, before):
        print(json.dumps({**first, **row}), flush=True)
    for name, model, seconds in () if arguments.copies else models(arguments):
        row = {
            **first,
            "format": name,
            **distance(before, predictions(model, pieces), pieces),
            "weight_bytes": weight_bytes(model),
            "load_s": round(seconds, 2),
        }
        print(json.dumps(row), flush=True)
        del model
    if arguments.kv:
        given = arguments.model, arguments.dtype, arguments.device
        plain = paged_perplexity(given[0], "auto", *given[1:], pieces)
        for kv_dtype, value in (("auto", plain), ("fp8", paged_perplexity(given[0], "fp8", *given[1:], pieces))):
            row = {**first, "kv": kv_dtype, "step_tokens": KV_STEP, "perplexity": round(value, 4)}
            print(json.dumps({**row, "change_percent": round(100 * (value / plain - 1), 3)}), flush=True)


if __name__ == "__main__":
    main()
