"""What structured output costs the host: compiling, and a token's mask and acceptance, over a real vocabulary.

    python benchmarks/structured_output.py TOKENIZER_DIRECTORY...

Each directory holds a tokenizer; without one the packaged model's is taken. Grammars are walked by tokenised texts that
fit them. Prints JSON: seconds, milliseconds and microseconds as the keys say.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import tunesmith
from tunesmith.engine.grammar_compile import GrammarCompiler
from tunesmith.engine.request import StructuredSpec
from tunesmith.text.tokenizer import load_tokenizer

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer"},
        "tags": {"type": "array", "items": {"type": "string"}},
        "address": {"type": "object", "properties": {"city": {"type": "string"}, "zip": {"type": "string"}}},
    },
    "required": ["name", "age", "tags", "address"],
}
TEXT = (
    '{"name": "张伟 and a longer name, with commas", "age": 31, "tags": ["alpha", "你好", "😀 and so on"], '
    '"address": {"city": "Zürich", "zip": "8001"}}'
)
CASES = {
    "json_schema": (StructuredSpec("json_schema", json.dumps(PERSON)), TEXT),
    "json_object": (StructuredSpec("json_object"), TEXT),
    "regex": (StructuredSpec("regex", r"[\w .,]{1,200}@[a-z]{1,20}\.(com|org)"), "some.body and more@example.org"),
    "choice": (StructuredSpec("choice", tuple(f"choice {n}" for n in range(1000))), "choice 517"),
}


def measure(directory: Path) -> dict[str, object]:
    """The costs over one tokenizer."""
    tokenizer = load_tokenizer(directory)
    compiler = GrammarCompiler(tokenizer, tokenizer.vocab_size, tokenizer.stop_ids)
    began = time.perf_counter()
    compiler.compile(StructuredSpec("regex", "a"))
    found: dict[str, object] = {
        "tokenizer": directory.name, "vocab_size": tokenizer.vocab_size,
        "vocabulary_read_s": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    for name, (spec, text) in CASES.items():
        found[name] = walk(compiler, spec, tokenizer.encode(text))
    compiler.close()
    return found


def walk(compiler: GrammarCompiler, spec: StructuredSpec, ids: Sequence[int]) -> dict[str, float]:
    """Compile once, then follow the text: first while the automaton is being built, then again."""
    began = time.perf_counter()
    grammar = compiler.compile(spec)
    compile_ms = (time.perf_counter() - began) * 1e3
    row = np.zeros(compiler.num_mask_words, dtype=np.int32)
    masks_us: list[list[float]] = []
    accepts_us: list[float] = []
    for _ in range(5):
        state, taken = grammar.state(), []
        for token in ids:
            start = time.perf_counter()
            state.mask_into(row)
            middle = time.perf_counter()
            if not state.accept(token):
                raise SystemExit(
                    f"{spec.kind}: the text doesn't fit its grammar at {compiler.tokenizer.decode([token])!r}"
                )
            taken.append((middle - start) * 1e6)
            accepts_us.append((time.perf_counter() - middle) * 1e6)
        masks_us.append(taken)
    again = [value for taken in masks_us[1:] for value in taken]
    return {
        "num_tokens": len(ids),
        "compile_ms": round(compile_ms, 3),
        "mask_first_mean_us": round(statistics.fmean(masks_us[0]), 1),
        "mask_median_us": round(statistics.median(again), 1),
        "mask_max_us": round(max(again), 1),
        "accept_median_us": round(statistics.median(accepts_us), 1),
    }


def main() -> None:
    """The command line."""
    default = Path(tunesmith.__file__).parent / "models" / "tiny"
    for directory in [Path(name) for name in sys.argv[1:]] or [default]:
        print(json.dumps(measure(directory), indent=2))


if __name__ == "__main__":
    main()
