"""Train a small network on digits that are drawn on the spot, by DeepSpeed's ZeRO or the native engine.

    python examples/digits_deepspeed.py                                                 one process
    torchrun --nproc-per-node 2 examples/digits_deepspeed.py                            two, by torchrun
    accelerate launch --cpu --num_processes 2 examples/digits_deepspeed.py              two, by accelerate
    deepspeed --no_local_rank --num_gpus 2 examples/digits_deepspeed.py --device cuda   two, by DeepSpeed's launcher

Any torch module goes this way: give it batches, and a loss that returns the sum of the losses and their number. With
`--engine native` it is the same gradient, so the same losses.
"""

from __future__ import annotations

import argparse
import json

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.parallel.mesh import Mesh, joined
from tunesmith.recipe.parallel import ParallelSection
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.deepspeed_update import DeepSpeedUpdater, deepspeed_config
from tunesmith.train.update import Updater

Batch = tuple[Tensor, Tensor]
STROKES = ("1110111", "0010010", "1011101", "1011011", "0111010", "1101011", "1101111", "1010010", "1111111", "1111011")
"""Which of a seven-segment display's strokes a digit has: top, upper left, upper right, middle, lower left ..."""
_UPPER, _LOWER, _WIDE = slice(2, 7), slice(7, 12), slice(4, 10)
SEGMENTS = ((2, _WIDE), (_UPPER, 3), (_UPPER, 10), (7, _WIDE), (_LOWER, 3), (_LOWER, 10), (12, _WIDE))
SIZE, BATCH_SIZE, SPREAD = 14, 32, 0.35


def draw(count: int, seed: int) -> Batch:
    """images float32 [B, SIZE * SIZE], of a seven-segment display with noise; labels int64 [B]."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(10, (count,), generator=generator)
    images = SPREAD * torch.randn(count, SIZE, SIZE, generator=generator)
    for image, label in zip(images, labels.tolist(), strict=True):
        for stroke, place in zip(STROKES[label], SEGMENTS, strict=True):
            image[place] += float(stroke)
    return images.flatten(1), labels


def network() -> nn.Sequential:
    """Two hidden layers; the same weights in every process."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(SIZE * SIZE, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 10))


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the losses and their number."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


def window(step: int, mesh: Mesh) -> list[Batch]:
    """This process's share of a step's four batches, which are the same for any number of processes."""
    batches = [draw(BATCH_SIZE, seed=1000 * step + number) for number in range(4)]
    return [tuple(part.to(mesh.device) for part in batch) for batch in batches[mesh.rank :: mesh.world_size]]  # type: ignore[misc]


def train(parallel: ParallelSection, device: str, steps: int) -> dict[str, float]:
    """The loss of the first and the last step, and how many of new digits are recognised."""
    settings = TrainSection(learning_rate=3e-3, precision="float32")
    with joined(parallel, device) as mesh:
        model = network().to(mesh.device)
        updater: Updater | DeepSpeedUpdater
        if parallel.engine == "deepspeed":
            batches = 4 // mesh.world_size
            config = deepspeed_config(parallel, settings, model, steps, mesh, micro_batches=batches)
            updater = DeepSpeedUpdater(model, settings, steps, config, mesh)
        elif mesh.world_size == 1:
            updater = Updater(model, settings, steps)
        else:
            from tunesmith.parallel.apply import spread_out

            updater = Updater(model, settings, steps, spread_out(model, mesh, parallel))
        losses = [
            updater.step(step, window(step, mesh), loss, denominator=None, describe=lambda _: "digits").loss
            for step in range(steps)
        ]
        right = _recognised(model, updater, mesh)
        if isinstance(updater, DeepSpeedUpdater):
            updater.close()
    return {"first_loss": losses[0], "last_loss": losses[-1], "accuracy": right, "rank": mesh.rank}


def _recognised(model: nn.Module, updater: Updater | DeepSpeedUpdater, mesh: Mesh) -> float:
    """The share of digits never seen that are named right. DeepSpeed has weights whole inside its forward pass only."""
    images, labels = (part.to(mesh.device) for part in draw(500, seed=1))

    def right(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
        return (model(batch[0]).argmax(1) == batch[1]).sum(), len(batch[1])

    with torch.no_grad():
        if isinstance(updater, DeepSpeedUpdater):
            count, total = updater.engine.loss(right, (images, labels))
        else:
            count, total = right(model, (images, labels))
    return int(count) / total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engine", choices=["deepspeed", "native"], default="deepspeed")
    parser.add_argument("--strategy", choices=["zero1", "zero2", "zero3"], default="zero3")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu")
    parser.add_argument("--steps", type=int, default=40)
    arguments = parser.parse_args()
    parallel = ParallelSection(engine=arguments.engine, strategy=arguments.strategy)
    found = train(parallel, arguments.device, arguments.steps)
    if found["rank"] == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
