"""Random weights of a shape, drawn once and written, so that engines that can only load have the same numbers.

`python -m tunesmith.bench.infer.checkpoint MODEL TARGET DTYPE [TOKENIZER]` is a process of its own: who measures holds
no weights. With the folder of a tokenizer the outcome can also be served, by any server.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import torch

from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder
from tunesmith.checkpoint.source import resolve_model
from tunesmith.errors import TunesmithError

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_random(model: Path, target: Path, dtype: str) -> Path:
    """Write a checkpoint of random weights in a process of its own. Raises: TunesmithError when that fails."""
    command = [sys.executable, "-m", "tunesmith.bench.infer.checkpoint", str(model), str(target), dtype]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise TunesmithError(f"random weights of {model} could not be written: {done.stdout.strip()[-300:]}")
    return target


def main(model: str, target: str, dtype: str, tokenizer: str | None = None) -> None:
    """Draw, save, and put whatever there is of a tokenizer beside it: some engines insist."""
    source, folder = resolve_model(model), Path(target)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    decoder = load_decoder(source, device=device, dtype=DTYPES[dtype], weights="random", seed=0)
    save_decoder(decoder, folder)
    words = source if tokenizer is None else Path(tokenizer)
    for pattern in ("token*", "special_tokens*", "vocab.json", "merges.txt", "*.jinja"):
        for file in sorted(words.glob(pattern)):
            shutil.copy(file, folder)


if __name__ == "__main__":
    main(*sys.argv[1:])
