"""Whether each operator of batch-invariant mode gives a row the same bits in any batch.

    python benchmarks/row_invariance.py                    on a CUDA GPU, some 15 s; a CPU's operators with --device cpu

    CONFIG_DIR            a folder with config.json (default: Qwen2.5-7B's); two of its layers, with random weights
    --formats int8 fp8    weight formats of `tunesmith.LLM(quantize=...)`, beside --dtype

An operator is run over all rows, and over some of them: one, a few, those at the end, more than a group. One JSON line
for each operator: how many of these runs gave a row other bits, and the first of them. What is not right in the engine
is a line with `differing` above 0. Lines that begin with "control" are what the mode does not use, and may differ.
Attention is looked at on a GPU only: on a CPU the mode runs the whole model over few rows at a time.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from tunesmith.checkpoint.inference import load_for_inference
from tunesmith.engine.fixed_rows import FixedRows, in_groups
from tunesmith.engine.fused_pass import _swiglu
from tunesmith.engine.logprobs import chosen_and_top
from tunesmith.engine.pages import PAGE_SLOTS
from tunesmith.engine.runner import GROUP_ROWS
from tunesmith.kernels.add_rms_norm import add_rms_norm_
from tunesmith.kernels.heads_to_pages import HeadsLayout, heads_to_pages
from tunesmith.kernels.paged_attention import paged_attention
from tunesmith.kernels.rms_norm import rms_norm
from tunesmith.kernels.rope import rope_tables_half
from tunesmith.kernels.sampling import choose, find_thresholds
from tunesmith.model.block import Block
from tunesmith.model.decoder import Decoder
from tunesmith.units import ceil_div

ROOT = Path(__file__).parents[1]
OfRows = Callable[..., Tensor]
"""Some rows of the inputs -> those rows of the output."""
COUNTS = (1, 2, 3, 17, 64, 255, 256, 257, 511, 600)
LAYERS = 2
CONTEXTS = (5, 70, 513, 1100, 1700)
NEW_TOKENS = (1, 64, 200, 1, 700)


def slices(num_rows: int) -> list[slice]:
    """The rows that are run by themselves: from the first on, and up to the last."""
    counts = [count for count in COUNTS if count < num_rows]
    return [piece for n in counts for piece in (slice(0, n), slice(num_rows - n, num_rows))]


def differing(run: OfRows, *inputs: Tensor) -> list[str]:
    """The runs whose rows have other bits than the same rows among all."""
    whole = run(*inputs)
    found = []
    for piece in slices(len(inputs[0])):
        part = run(*(tensor[piece] for tensor in inputs))
        if not torch.equal(part, whole[piece]):
            found.append(f"{piece.stop - piece.start} rows from {piece.start} on")
    return found


class Operators:
    """The operators of a pass over one model, with random inputs of `num_rows` rows."""

    def __init__(self, model: Decoder, num_rows: int) -> None:
        self.model, self.num_rows = model, num_rows
        self.block = cast(Block, model.blocks[0])
        self.device = model.embedding.weight.device
        self.dtype = model.embedding.weight.dtype
        self.generator = torch.Generator(self.device).manual_seed(0)
        width = model.config.head_dim
        self.head_norms = (1 + self.random(width), 1 + self.random(width))

    def random(self, *shape: int) -> Tensor:
        """Normal numbers in the model's dtype."""
        return torch.randn(shape, device=self.device, generator=self.generator).to(self.dtype)

    def of_the_stream(self) -> Iterator[tuple[str, list[str]]]:
        """What is not a product: run once, whatever the weights' format."""
        config, rows = self.model.config, self.num_rows
        x, delta = self.random(rows, config.hidden_size), self.random(rows, config.hidden_size)
        weight = 1 + self.random(config.hidden_size)
        yield "rms_norm", differing(lambda x: rms_norm(x, weight, 1e-6)[0], x)
        yield "add_rms_norm", differing(lambda x, d: add_rms_norm_(x.clone(), d.clone(), weight, 1e-6), x, delta)
        positions = torch.arange(rows, device=self.device) * 3 + 1
        qkv = self.random(rows, (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim)
        slots = torch.arange(rows, device=self.device)
        yield "heads_to_pages", differing(lambda *given: self._heads(*given, invariant=True), qkv, positions, slots)
        yield "control: heads_to_pages", differing(lambda *given: self._heads(*given), qkv, positions, slots)
        yield "swiglu", differing(_swiglu, self.random(rows, 2 * config.intermediate_size))

    def _heads(self, qkv_TF: Tensor, positions_T: Tensor, slots_T: Tensor, *, invariant: bool = False) -> Tensor:
        config = self.model.config
        tables = rope_tables_half(self.model._inverse(self.device), positions_T)
        layout = HeadsLayout(
            config.num_attention_heads, config.num_key_value_heads, *self.head_norms, 1e-6, *tables, invariant
        )
        shape = (ceil_div(self.num_rows, PAGE_SLOTS), PAGE_SLOTS, config.num_key_value_heads, config.head_dim)
        keys, values = (qkv_TF.new_zeros(shape) for _ in range(2))
        query = heads_to_pages(qkv_TF.contiguous(), layout, keys, values, slots_T)
        held = [pages.flatten(0, 1)[slots_T].flatten(1) for pages in (keys, values)]
        return torch.cat([query.flatten(1), *held], dim=1)

    def of_attention(self) -> Iterator[tuple[str, list[str]]]:
        """Requests beside each other, each alone, and the last token of each when the others are in the cache."""
        if self.device.type != "cuda":
            return
        config = self.model.config
        starts = torch.tensor([0, *NEW_TOKENS]).cumsum(0)
        pages = [ceil_div(context, PAGE_SLOTS) for context in CONTEXTS]
        tables = torch.zeros(len(pages), max(pages), dtype=torch.int32)
        for request, number in enumerate(pages):
            tables[request, :number] = torch.arange(number) + sum(pages[:request])
        held = [self.random(sum(pages), PAGE_SLOTS, config.num_key_value_heads, config.head_dim) for _ in range(2)]
        query = self.random(int(starts[-1]), config.num_attention_heads, config.head_dim)

        def run(query: Tensor, requests: slice, counts: list[int], slack: int = 0) -> Tensor:
            begins = torch.tensor([0, *counts]).cumsum(0).int().to(self.device)
            contexts = torch.tensor(CONTEXTS[requests], dtype=torch.int32, device=self.device)
            most = (max(counts), int(contexts.max()) + slack)
            table = tables[requests].to(self.device)
            keys, values = held
            given = (query, keys, values, table, begins, contexts)
            return paged_attention(*given, max_query=most[0], max_context=most[1], window=None, invariant=True)

        together = run(query, slice(None), list(NEW_TOKENS))
        found = []
        for request, count in enumerate(NEW_TOKENS):
            one, rows = slice(request, request + 1), slice(int(starts[request]), int(starts[request + 1]))
            if not torch.equal(run(query[rows], one, [count], 5000), together[rows]):
                found.append(f"request {request} alone")
            last = slice(rows.stop - 1, rows.stop)
            if not torch.equal(run(query[last], one, [1]), together[last]):
                found.append(f"the last token of request {request} alone")
        lasts = torch.tensor([int(start) - 1 for start in starts[1:]], device=self.device)
        if not torch.equal(run(query[lasts], slice(None), [1] * len(CONTEXTS), 900), together[lasts]):
            found.append("the last tokens of all")
        yield "attention", found

    def of_logits(self) -> Iterator[tuple[str, list[str]]]:
        """From the last hidden states to tokens and their log-probabilities."""
        hidden = self.random(self.num_rows, self.model.config.hidden_size)
        yield "logits", differing(lambda x: in_groups(self.model.logits, x, GROUP_ROWS), hidden)
        logits = in_groups(self.model.logits, hidden, GROUP_ROWS)
        chosen = logits.argmax(-1)
        for name in ("logprobs_M", "top_ids_Mn", "top_logprobs_Mn"):
            yield name, differing(_of_logprobs(name), logits, chosen)
        yield "control: logsumexp", differing(lambda x: x.float().logsumexp(-1), logits)
        rows = torch.arange(self.num_rows, device=self.device)
        numbers = torch.full((self.num_rows,), 0.8, device=self.device)
        yield "thresholds", differing(find_thresholds, logits, numbers, rows % 9 * 5, numbers, numbers * 0)
        yield "draws", differing(lambda x, r: choose(x, numbers, rows, r, r + 7, rows.clone()), logits, rows)

    def of_products(self, has_controls: bool) -> Iterator[tuple[str, list[str]]]:
        """The linears of a block in groups of rows; by themselves too where a control is wanted."""
        attention = self.block.attention
        linears: dict[str, Any] = {"qkv": attention.qkv, "output": attention.output}
        linears |= {name: part for name, part in self.block.mlp.named_children() if hasattr(part, "in_features")}
        for name, linear in linears.items():
            x = self.random(self.num_rows, linear.in_features)
            yield name, differing(FixedRows(linear, GROUP_ROWS), x)
            if has_controls:
                yield f"control: {name}", differing(linear, x)


def _of_logprobs(name: str) -> OfRows:
    """One of the tensors of log-probabilities."""

    def run(logits: Tensor, chosen: Tensor) -> Tensor:
        found: Tensor = getattr(chosen_and_top(logits, chosen, 3), name)
        return found

    return run


def two_layers(directory: Path, into: Path) -> Path:
    """The same configuration with few layers."""
    config = json.loads((directory / "config.json").read_text())
    config["num_hidden_layers"] = min(LAYERS, config["num_hidden_layers"])
    for name in ("layer_types", "max_window_layers"):
        config.pop(name, None)
    (into / "config.json").write_text(json.dumps(config))
    return into


def report(form: str, found: Iterator[tuple[str, list[str]]]) -> int:
    """Print a line for each operator; how many differ that must not."""
    wrong = 0
    for name, runs in found:
        line = {"format": form, "operator": name, "differing": len(runs), "first": runs[0] if runs else None}
        print(json.dumps(line), flush=True)
        wrong += bool(runs) and not name.startswith("control")
    return wrong


def main(words: list[str] | None = None) -> int:
    """Check every operator; 1 where one gives a row other bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", type=Path, default=ROOT / "recipes" / "configs" / "qwen2.5-7b")
    parser.add_argument("--formats", nargs="*", default=["int8", "int4", "fp8"])
    parser.add_argument("--rows", type=int, default=1100)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--device", default="auto")
    arguments = parser.parse_args(sys.argv[1:] if words is None else words)
    began_s, wrong = time.perf_counter(), 0
    with tempfile.TemporaryDirectory() as folder, torch.inference_mode():
        directory = two_layers(arguments.config, Path(folder))
        for form in (None, *arguments.formats):
            model = load_for_inference(
                directory, quantize=form, dtype=arguments.dtype, device=arguments.device, weights="random"
            )
            assert isinstance(model, Decoder)
            operators, name = Operators(model, arguments.rows), form or arguments.dtype
            wrong += report(name, operators.of_products(form is None))
            if form is None:
                for found in (operators.of_the_stream(), operators.of_attention(), operators.of_logits()):
                    wrong += report(name, found)
    print(json.dumps({"wrong": wrong, "seconds": round(time.perf_counter() - began_s, 1)}))
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
