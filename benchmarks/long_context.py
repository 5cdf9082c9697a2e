"""The longest sequence of one training step under a cap of device memory: found by a probe, then really taken.

    python benchmarks/long_context.py recipes/llama-3.1-8b-long-context.yaml --cap-gb 80 --out FILE.json

1. Probe: models with three and five blocks take a step on two lengths each. Peaks are linear in the tokens and in the
   blocks, so four of them say what is fixed, what a block adds, what a token adds, and what both together add. Then
   again with the longer length where that predicts the end.
2. Prediction: the most tokens whose peak stays under the cap, and whose offloaded inputs fit into the host's memory.
3. Step: the whole model on one document of that length, under `torch.cuda.set_per_process_memory_fraction`; where that
   does not fit, on 95 % of it, and so on, up to `--tries` times.

The answer says what stopped it: the device's memory, the host's, or `--most`. JSON on stdout and in --out.
On a CPU (`--set model.device=cpu`, a tiny model) peaks are those of live storages, and nothing is offloaded.
"""

from __future__ import annotations

import argparse
import gc
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from tunesmith.arch import read_config
from tunesmith.bench.counting import count_live_bytes
from tunesmith.checkpoint.source import resolve_model
from tunesmith.cost.memory import offloaded_bytes
from tunesmith.hardware import available_memory_bytes
from tunesmith.recipe.load import load_recipe, with_overrides
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.train.resolve import resolve_recipe
from tunesmith.train.session import build_session

GB = 10**9
BLOCKS = (3, 5)
SHRINK = 0.95
REFINEMENTS = 2
# Share of the cap that the prediction leaves: fragmentation, and what the driver and libraries take.
MARGIN = 0.03


@dataclass(frozen=True)
class Peaks:
    """peak = fixed + block * blocks + (token + token_and_block * blocks) * tokens, in bytes."""

    fixed: float
    block: float
    token: float
    token_and_block: float

    @classmethod
    def through(cls, lengths: Sequence[int], peaks: dict[tuple[int, int], int]) -> Peaks:
        """The surface through four peaks, by (blocks, tokens). Nothing gets smaller with more blocks or tokens."""
        (few, many), (short, long) = BLOCKS, lengths
        slopes = {n: (peaks[n, long] - peaks[n, short]) / (long - short) for n in BLOCKS}
        starts = {n: peaks[n, short] - slopes[n] * short for n in BLOCKS}
        both = max(0.0, (slopes[many] - slopes[few]) / (many - few))
        block = max(0.0, (starts[many] - starts[few]) / (many - few))
        return cls(starts[few] - block * few, block, max(1.0, slopes[few] - both * few), both)

    def bytes_for(self, blocks: int, tokens: int) -> float:
        """The peak of a step."""
        return self.fixed + self.block * blocks + (self.token + self.token_and_block * blocks) * tokens

    def most_tokens(self, blocks: int, cap_bytes: float) -> int:
        """The most tokens whose peak is at most the cap; 0 where not even the weights fit."""
        room = cap_bytes - self.bytes_for(blocks, 0)
        return max(0, int(room / (self.token + self.token_and_block * blocks)))


@dataclass(frozen=True)
class Step:
    """One step that was taken, or what kept it from being taken."""

    tokens: int
    peak_bytes: int | None = None
    host_bytes: int | None = None
    seconds: float | None = None
    loss: float | None = None
    error: str | None = None


def of_length(recipe: Recipe, tokens: int) -> Recipe:
    """The recipe on a document of so many tokens, one step."""
    changes = {"data.max_length": tokens, "train.micro_batch_tokens": tokens, "data.max_rows": 1, "train.max_steps": 1}
    return with_overrides(recipe, changes)


@contextmanager
def with_blocks(recipe: Recipe, blocks: int) -> Iterator[Recipe]:
    """The recipe with a model of so many blocks, random weights."""
    raw = dict(read_config(resolve_model(recipe.model.path, recipe.model.revision)).raw)
    with tempfile.TemporaryDirectory(prefix="tunesmith-probe-") as folder:
        Path(folder, "config.json").write_text(json.dumps({**raw, "num_hidden_layers": blocks}), encoding="utf-8")
        yield with_overrides(recipe, {"model.path": folder, "model.weights": "random"})


def take_step(recipe: Recipe) -> Step:
    """One step of a recipe whose length is set. Raises: what a step raises."""
    _forget()
    is_gpu = torch.device(recipe.model.device).type == "cuda"
    session = build_session(recipe)
    try:
        began = time.perf_counter()
        metrics = session.step()
        seconds = time.perf_counter() - began
        peak = torch.cuda.max_memory_allocated() if is_gpu else count_live_bytes(session)
        offloader = getattr(session.model, "offloader", None)
        host = 0 if offloader is None else int(offloader.host.total_bytes)
    finally:
        session.close()
    return Step(int(recipe.data.max_length), peak, host, seconds, metrics.loss)


def _forget() -> None:
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def probe(recipe: Recipe, lengths: Sequence[int]) -> Peaks:
    """The peaks of small models on both lengths."""
    peaks: dict[tuple[int, int], int] = {}
    for blocks in BLOCKS:
        with with_blocks(recipe, blocks) as small:
            for tokens in lengths:
                peak = take_step(of_length(small, tokens)).peak_bytes
                assert peak is not None
                peaks[blocks, tokens] = peak
    return Peaks.through(lengths, peaks)


def host_tokens(recipe: Recipe) -> int | None:
    """The most tokens whose offloaded activations fit into free host memory; None where nothing is offloaded."""
    kind = recipe.train.checkpointing
    if kind not in ("offload", "offload-block"):
        return None
    config = read_config(resolve_model(recipe.model.path, recipe.model.revision))
    precision: Any = recipe.train.precision
    each = offloaded_bytes(config, recipe.method, 2**20, precision, kind == "offload-block") / 2**20
    return int(0.95 * available_memory_bytes() / max(each, 1e-9))


def find(recipe: Recipe, cap_bytes: int, lengths: Sequence[int], most: int, tries: int) -> dict[str, Any]:
    """Probe, predict, take the step. Everything as plain data."""
    blocks = read_config(resolve_model(recipe.model.path, recipe.model.revision)).num_hidden_layers
    bounds = {"--most": most}
    on_host = host_tokens(recipe)
    if on_host is not None:
        bounds["host memory"] = on_host
    room = int(cap_bytes * (1 - MARGIN))
    peaks = _near_the_end(recipe, blocks, room, lengths, min(bounds.values()))
    bounds["device memory"] = peaks.most_tokens(blocks, room)
    stopped_by = min(bounds, key=lambda name: bounds[name])
    tokens = bounds[stopped_by] // 128 * 128
    steps: list[Step] = []
    while tokens > 0 and len(steps) < tries:
        steps.append(_tried(of_length(recipe, tokens), cap_bytes))
        if steps[-1].error is None:
            break
        stopped_by, tokens = steps[-1].error or stopped_by, int(tokens * SHRINK) // 128 * 128
    taken = next((step for step in steps if step.error is None), None)
    predicted = None if taken is None else peaks.bytes_for(blocks, taken.tokens)
    return {
        "cap_bytes": cap_bytes,
        "per_token_and_fixed": asdict(peaks),
        "bounds_tokens": bounds,
        "stopped_by": stopped_by,
        "steps": [asdict(step) for step in steps],
        "tokens": None if taken is None else taken.tokens,
        "predicted_peak_bytes": predicted,
    }


def _near_the_end(recipe: Recipe, blocks: int, room: int, lengths: Sequence[int], most: int) -> Peaks:
    """The peaks of the probe, the longer of its lengths moved to where it predicts the end.

    What sets the peak of a short sequence (the weights' own gradients, say) grows slower than what sets a long one's.
    """
    peaks = probe(recipe, lengths)
    for _ in range(REFINEMENTS):
        tokens = min(peaks.most_tokens(blocks, room), most) // 128 * 128
        if tokens <= lengths[1]:
            break
        try:
            peaks = probe(recipe, (lengths[1], tokens))
        except (torch.OutOfMemoryError, MemoryError):
            break
    return peaks


def _tried(recipe: Recipe, cap_bytes: int) -> Step:
    """A step under the cap; one that does not fit is an answer too."""
    try:
        step = take_step(recipe)
    except (torch.OutOfMemoryError, MemoryError):
        return Step(int(recipe.data.max_length), error="device memory")
    if step.peak_bytes is not None and step.peak_bytes > cap_bytes:
        return Step(step.tokens, step.peak_bytes, step.host_bytes, step.seconds, step.loss, "device memory")
    return step


def main() -> None:
    """Read the options, measure, write the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cap-gb", type=float, default=80.0, help="device memory, in units of 10^9 bytes")
    parser.add_argument("--lengths", default="16384,32768", help="the two lengths of the probe")
    parser.add_argument("--most", type=int, default=2**20)
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    short, long = sorted(int(part) for part in options.lengths.split(","))
    recipe = resolve_recipe(of_length(load_recipe(options.recipe, options.overrides), short))
    cap_bytes = int(options.cap_gb * GB)
    if torch.device(recipe.model.device).type == "cuda":
        total = torch.cuda.get_device_properties(recipe.model.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, cap_bytes / total))
    answer = find(recipe, cap_bytes, (short, long), options.most, options.tries)
    text = json.dumps({**answer, "environment": environment_fingerprint()}, indent=1, default=str)
    print(text)
    if options.out is not None:
        options.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
