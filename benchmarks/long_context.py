"""The longest sequence of one training step under a cap of device memory: found by a probe, then really taken.

    python benchmarks/long_context.py recipes/llama-3.1-8b-long-context.yaml --cap-gb 80 --out FILE.json

1. Warm-up: a small model takes a step, so that kernels are compiled and attention's kernel is chosen. Meanwhile
   `--fill-host` takes that much host memory and gives it back: a machine whose memory grows as it is used has it then.
2. Probe: models with two and four blocks take a step on two lengths each. Peaks are linear in the tokens and in the
   blocks, so four of them say what is fixed, what a block adds, what a token adds, and what both together add.
   (Of one block alone nothing is offloaded, so two and four.) With `--refinements` again near the predicted end.
3. Prediction: the most tokens whose peak stays under the cap, and whose offloaded inputs fit into the host's memory.
4. Check, at that length: attention beside the formula (a kernel that fails is left out from then on), and a step of one
   block and the head. Its peak and its time correct the prediction; where it fails, on 95 % of the length, and so on,
   up to `--tries` times.
5. Step: the whole model on one document of that length, under `torch.cuda.set_per_process_memory_fraction`; where that
   does not fit, on 95 % of it, and so on, up to `--tries` times.

The answer says what stopped it: the device's memory, the host's, `--most`, or `--seconds` for the whole of it. JSON on
stdout; in --out it is written after every phase, so that a command that is killed leaves what it has found.
On a CPU (`--set model.device=cpu`, a tiny model) peaks are those of live storages, and nothing is offloaded.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from tunesmith.bench.host_fill import HostFill
from tunesmith.bench.long_attention import AttentionCheck, check_attention
from tunesmith.bench.long_step import (
    BLOCKS,
    GB,
    Peaks,
    Step,
    config_of,
    forget,
    of_length,
    take_step,
    tried,
    with_blocks,
)
from tunesmith.cost.memory import offloaded_bytes
from tunesmith.errors import DeviceError
from tunesmith.hardware import available_memory_bytes
from tunesmith.model.attention_choice import choices, leave_out
from tunesmith.recipe.load import load_recipe
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic
from tunesmith.train.allocator import prepare_allocator
from tunesmith.train.resolve import DTYPES, resolve_recipe

SHRINK = 0.95
WHOLE = 128
"""Lengths are multiples of this."""
MARGIN = 0.03
"""Share of the cap that the prediction leaves: fragmentation, and what the driver and libraries take."""
HOST_SHARE = 0.8
"""Share of free host memory that may be pinned. Such pages are neither swapped nor reclaimed, and what is free counts
file pages that programs still run from: with less left, the machine stands still or ends a process."""
BUILD = 4
"""How many times longer than one block and the head the whole model takes to be made, with its embedding."""
SLOWER = 1.05
"""How much longer than the check's block the blocks of a step may take: copies, pinning, a warm chip."""


@dataclass
class Answer:
    """What is known so far: written down and said as it comes."""

    out: Path | None = None
    began: float = field(default_factory=time.perf_counter)
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def elapsed_s(self) -> float:
        """Seconds since the start."""
        return time.perf_counter() - self.began

    def say(self, text: str) -> None:
        """A line of progress, on stderr."""
        print(f"[{self.elapsed_s:6.1f} s] {text}", file=sys.stderr, flush=True)

    def note(self, text: str, **facts: Any) -> None:
        """Take over what was found, say so, and write all of it down."""
        self.facts |= {**facts, "reached": text, "elapsed_s": self.elapsed_s}
        self.say(text)
        if self.out is not None:
            write_json_atomic(self.out, self.facts)


@dataclass(frozen=True)
class Limits:
    """What a step may take. seconds: for everything, since the start; None: any."""

    cap_bytes: int
    most: int
    host_share: float = HOST_SHARE
    seconds: float | None = None

    @property
    def room_bytes(self) -> int:
        """The device's memory that a prediction may fill."""
        return int(self.cap_bytes * (1 - MARGIN))


def probe(recipe: Recipe, lengths: Sequence[int], answer: Answer) -> tuple[Peaks, dict[tuple[int, int], Step]]:
    """The peaks of small models on both lengths, and their steps by (blocks, tokens)."""
    steps: dict[tuple[int, int], Step] = {}
    for blocks in BLOCKS:
        with with_blocks(recipe, blocks) as small:
            for tokens in lengths:
                steps[blocks, tokens] = take_step(of_length(small, tokens))
                said = [{"blocks": n, **asdict(step)} for (n, _), step in steps.items()]
                answer.note(f"probe: {blocks} blocks, {tokens} tokens: {_described(steps[blocks, tokens])}", probe=said)
    return Peaks.through(lengths, {key: int(step.peak_bytes or 0) for key, step in steps.items()}), steps


def _described(step: Step) -> str:
    if step.error is not None or step.peak_bytes is None or step.seconds is None:
        return f"failed: {step.error}"
    return f"peak {step.peak_bytes / GB:.2f} GB, step {step.seconds:.1f} s, loss {step.loss:.3f}"


def host_bytes_per_token(recipe: Recipe) -> float | None:
    """Bytes on the host of a token's offloaded activations; None where nothing is offloaded."""
    kind = recipe.train.checkpointing
    if kind not in ("offload", "offload-block"):
        return None
    precision: Any = recipe.train.precision
    spared, inputs_only = recipe.train.checkpointing_skip_last, kind == "offload-block"
    return offloaded_bytes(config_of(recipe), recipe.method, 2**20, precision, inputs_only, spared) / 2**20


def host_tokens(recipe: Recipe, share: float = HOST_SHARE) -> int | None:
    """The most tokens whose offloaded activations fit into free host memory; None where nothing is offloaded."""
    each = host_bytes_per_token(recipe)
    return None if each is None else int(share * available_memory_bytes() / max(each, 1e-9))


def find(
    recipe: Recipe,
    limits: Limits,
    lengths: Sequence[int],
    tries: int,
    refinements: int = 0,
    answer: Answer | None = None,
    fill: HostFill | None = None,
) -> dict[str, Any]:
    """Warm up, probe, predict, check, take the step. Everything as plain data."""
    answer = Answer() if answer is None else answer
    answer.facts["cap_bytes"] = limits.cap_bytes
    with with_blocks(recipe, BLOCKS[0]) as small:
        warm = take_step(of_length(small, lengths[0]))
    answer.note(f"warm-up: built in {warm.build_s:.1f} s, {_described(warm)}", warm_up=asdict(warm))
    if fill is not None:
        filled = fill.wait()
        said = f"{filled.held_bytes / GB:.0f} GB taken in {filled.seconds:.1f} s, {filled.after_bytes / GB:.0f} GB free"
        answer.note(f"host memory: {said}, {filled.before_bytes / GB:.0f} GB before", host_fill=asdict(filled))
    blocks = config_of(recipe).num_hidden_layers
    bounds = {"--most": limits.most}
    on_host = host_tokens(recipe, limits.host_share)
    if on_host is not None:
        bounds["host memory"] = on_host
        answer.facts |= {
            "host_available_bytes": available_memory_bytes(),
            "host_share": limits.host_share,
            "host_bytes_per_token": host_bytes_per_token(recipe),
        }
    peaks, probed = _probed(recipe, blocks, limits, lengths, min(bounds.values()), refinements, answer)
    bounds["device memory"] = peaks.most_tokens(blocks, limits.room_bytes)
    stopped_by = min(bounds, key=lambda name: bounds[name])
    tokens = bounds[stopped_by] // WHOLE * WHOLE
    answer.note(
        f"prediction: {tokens} tokens, stopped by {stopped_by}",
        per_token_and_fixed=asdict(peaks),
        bounds_tokens=bounds,
        stopped_by=stopped_by,
    )
    head_s = _head_seconds(probed, lengths[1])
    tokens, stopped_by = _checked(recipe, limits, peaks, head_s, (tokens, stopped_by), tries, answer)
    steps: list[Step] = []
    while tokens > 0 and len(steps) < tries:
        answer.note(f"step: {tokens} tokens, {blocks} blocks, begins", stopped_by=stopped_by)
        steps.append(tried(of_length(recipe, tokens), limits.cap_bytes))
        answer.note(f"step: {_described(steps[-1])}", steps=[asdict(step) for step in steps])
        if steps[-1].error is None:
            break
        stopped_by, tokens = steps[-1].error or stopped_by, _shrunk(tokens)
    taken = next((step for step in steps if step.error is None), None)
    answer.note(
        "nothing was taken" if taken is None else f"{taken.tokens} tokens, stopped by {stopped_by}",
        stopped_by=stopped_by,
        steps=[asdict(step) for step in steps],
        attention_kernels=choices(),
        tokens=None if taken is None else taken.tokens,
        predicted_peak_bytes=None if taken is None else peaks.bytes_for(blocks, taken.tokens),
    )
    return answer.facts


def _shrunk(tokens: int) -> int:
    return int(tokens * SHRINK) // WHOLE * WHOLE


def _probed(
    recipe: Recipe, blocks: int, limits: Limits, lengths: Sequence[int], most: int, refinements: int, answer: Answer
) -> tuple[Peaks, dict[tuple[int, int], Step]]:
    """The probe and, where asked for, again with the longer of its lengths moved to where it predicts the end.

    What sets the peak of a short sequence (the weights' own gradients, say) grows slower than what sets a long one's.
    """
    peaks, steps = probe(recipe, lengths, answer)
    for _ in range(refinements):
        tokens = min(peaks.most_tokens(blocks, limits.room_bytes), most) // WHOLE * WHOLE
        if tokens <= lengths[1]:
            break
        try:
            peaks, _ = probe(recipe, (lengths[1], tokens), answer)
        except (torch.OutOfMemoryError, MemoryError, DeviceError):
            break
    return peaks, steps


def _head_seconds(probed: dict[tuple[int, int], Step], tokens: int) -> float:
    """Seconds a token of a step that are not the blocks', from two models on one length."""
    few, many = (float(probed[blocks, tokens].seconds or 0.0) for blocks in BLOCKS)
    return max(0.0, few - (many - few) / (BLOCKS[1] - BLOCKS[0]) * BLOCKS[0]) / tokens


def _checked(
    recipe: Recipe, limits: Limits, peaks: Peaks, head_s: float, first: tuple[int, str], tries: int, answer: Answer
) -> tuple[int, str]:
    """The tokens that one block and the head allow, and what stops it: `first`, or less. 0: every check failed."""
    tokens, stopped_by = first
    blocks = config_of(recipe).num_hidden_layers
    for _ in range(tries):
        wrong = _wrong_attention(recipe, tokens, answer)
        if wrong is not None:
            tokens, stopped_by = _shrunk(tokens), wrong
            continue
        with with_blocks(recipe, 1) as small:
            step = tried(of_length(small, tokens), limits.cap_bytes)
        predicted = peaks.bytes_for(1, tokens)
        said = f"check: one block, {tokens} tokens: {_described(step)}, predicted {predicted / GB:.2f} GB"
        answer.note(said, check=asdict(step), check_predicted_bytes=predicted)
        if step.error is not None or step.peak_bytes is None or step.seconds is None:
            tokens, stopped_by = _shrunk(tokens), step.error or stopped_by
            continue
        more = max(0.0, step.peak_bytes - predicted) / tokens
        room = (limits.room_bytes - peaks.bytes_for(blocks, 0)) / (peaks.token + peaks.token_and_block * blocks + more)
        if room < tokens:
            tokens, stopped_by = int(room) // WHOLE * WHOLE, "device memory"
        return _within_time(limits, answer, step, head_s, blocks, (tokens, stopped_by))
    return 0, stopped_by


def _within_time(
    limits: Limits, answer: Answer, check: Step, head_s: float, blocks: int, first: tuple[int, str]
) -> tuple[int, str]:
    """As many tokens of `first` as the time that is left allows; a block's seconds grow with their square, at most."""
    tokens, _ = first
    assert check.seconds is not None
    head = head_s * check.tokens
    whole = (max(0.0, check.seconds - head) * blocks * SLOWER + head) * (tokens / check.tokens) ** 2
    answer.note(f"prediction: the step takes {whole:.0f} s", predicted_step_s=whole)
    if limits.seconds is None:
        return first
    left = limits.seconds - answer.elapsed_s - BUILD * float(check.build_s or 0.0)
    if whole <= left:
        return first
    fewer = int(tokens * math.sqrt(max(0.0, left) / whole)) // WHOLE * WHOLE
    answer.note(f"prediction: {left:.0f} s are left, so {fewer} of {tokens} tokens", stopped_by="--seconds")
    return fewer, "--seconds"


def _wrong_attention(recipe: Recipe, tokens: int, answer: Answer) -> str | None:
    """What is wrong with every kernel of attention that was tried; None: one is right, and the step will take it."""
    checks: list[AttentionCheck] = []
    while True:
        try:
            checks.append(_attention(recipe, tokens))
        except (torch.OutOfMemoryError, MemoryError):
            return "device memory"
        last = checks[-1]
        said = f"check: attention of {tokens} tokens ({last.kernel}) is off by {last.worst:.1e} at most"
        said = said if last.error is None else f"check: attention ({last.kernel}) failed: {last.error}"
        answer.note(f"{said}, {last.seconds:.1f} s", attention_checks=[asdict(check) for check in checks])
        if last.is_right:
            return None
        if last.kernel is None or not leave_out(last.kernel):
            return "attention is wrong"


def _attention(recipe: Recipe, tokens: int) -> AttentionCheck:
    forget()
    precision: Any = recipe.train.precision
    return check_attention(config_of(recipe), tokens, torch.device(recipe.model.device), DTYPES[precision])


def main() -> None:
    """Read the options, measure, write the answer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--cap-gb", type=float, default=80.0, help="device memory, in units of 10^9 bytes")
    parser.add_argument("--lengths", default="65536,131072", help="the two lengths of the probe")
    parser.add_argument("--refinements", type=int, default=0, help="probes near the predicted end")
    parser.add_argument("--most", type=int, default=2**20, help="tokens that are never exceeded")
    parser.add_argument("--tries", type=int, default=3)
    parser.add_argument("--seconds", type=float, help="for everything: the step gets as many tokens as fit into it")
    parser.add_argument("--fill-host", type=float, metavar="GB", help="host memory to take and give back at first")
    parser.add_argument("--host-share", type=float, default=HOST_SHARE, help="of free host memory, to be pinned")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    lengths = sorted({int(part) for part in options.lengths.split(",") if part.strip().isdigit()})
    if len(lengths) != 2 or lengths[0] < 1:
        parser.error(f"--lengths are two different numbers of tokens, such as 65536,131072, not {options.lengths}")
    short, long = lengths
    # Importing counts, too: whoever waits has waited since the process began.
    answer = Answer(options.out, time.perf_counter() - (time.time() - psutil.Process().create_time()))
    fill = None if options.fill_host is None else HostFill(int(options.fill_host * GB))
    given = load_recipe(options.recipe, options.overrides)
    prepare_allocator(given.model.device)  # before CUDA starts
    recipe = resolve_recipe(of_length(given, short))
    limits = Limits(int(options.cap_gb * GB), options.most, options.host_share, options.seconds)
    if torch.device(recipe.model.device).type == "cuda":
        total = torch.cuda.get_device_properties(recipe.model.device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, limits.cap_bytes / total))
    answer.note("started", environment=environment_fingerprint())
    try:
        find(recipe, limits, (short, long), options.tries, options.refinements, answer, fill)
    except BaseException as error:
        answer.note(f"broken off: {type(error).__name__}: {error}")
        raise
    print(json.dumps(answer.facts, indent=1, default=str))


if __name__ == "__main__":
    main()
