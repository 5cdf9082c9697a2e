"""Train a small CNN on MNIST's idx files with the loop that trains language models, evaluate it, draw a prediction.

    python examples/mnist_cnn.py FOLDER [--out runs/mnist] [--steps 300]            one process
    torchrun --nproc-per-node 2 examples/mnist_cnn.py FOLDER [--strategy zero3]     two, by torchrun
    tunesmith launch --cpu --nproc 2 examples/mnist_cnn.py FOLDER                   two, started again if one dies

FOLDER holds MNIST's idx files, gzipped or not; the 10,000 test images alone are enough: they are split. Any number of
processes makes the same steps, of two batches each.
Run it again on the same --out after a kill, and it goes on where it stopped.
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tunesmith.parallel.mesh import place_from
from tunesmith.recipe.parallel import ParallelSection, Strategy
from tunesmith.recipe.schema import CheckpointSection, TrainSection
from tunesmith.rundir.io import write_json_atomic
from tunesmith.train.module_session import fit

Batch = tuple[Tensor, Tensor]
HELD_OUT = 2000
BATCH_SIZE, BATCHES_OF_A_STEP = 50, 2


class Cnn(nn.Module):
    """Two convolutions and two linears: image_BCHW in [0, 1] -> logits over ten digits."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
            nn.Conv2d(16, 32, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(2),
        )
        self.head = nn.Sequential(
            nn.Flatten(), nn.Dropout(0.2), nn.Linear(32 * 7 * 7, 64), nn.ReLU(), nn.Linear(64, 10)
        )

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))


@dataclass(frozen=True)
class Result:
    """What a run came to."""

    steps: int
    accuracy: float
    weights: Path
    picture: Path


def read_idx(path: Path) -> np.ndarray:
    """An idx file, gzipped or not. Source: the format's description on MNIST's page."""
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    num_dimensions = content[3]
    shape = np.frombuffer(content, ">u4", num_dimensions, offset=4)
    return np.frombuffer(content, np.uint8, offset=4 + 4 * num_dimensions).reshape(shape)


def load_mnist(folder: Path) -> tuple[Tensor, Tensor]:
    """images float32 [B, 1, 28, 28] in [0, 1], labels int64 [B], of every pair of files in the folder."""
    pairs = []
    for images in sorted(folder.glob("*images-idx3-ubyte*")):
        labels = images.with_name(images.name.replace("images-idx3", "labels-idx1"))
        pairs.append((read_idx(images), read_idx(labels)))
    if not pairs:
        raise SystemExit(f"{folder} holds no *-images-idx3-ubyte file: download MNIST into it")
    images = torch.from_numpy(np.concatenate([pair[0] for pair in pairs])).float().div_(255).unsqueeze(1)
    return images, torch.from_numpy(np.concatenate([pair[1] for pair in pairs]).astype(np.int64))


def cut(images: Tensor, labels: Tensor) -> list[Batch]:
    """Batches in order."""
    return list(zip(images.split(BATCH_SIZE), labels.split(BATCH_SIZE), strict=True))


def loss(model: nn.Module, batch: Batch) -> tuple[Tensor, int]:
    """The sum of the losses and their number, as `fit` asks."""
    images, labels = batch
    return F.cross_entropy(model(images), labels, reduction="sum"), len(labels)


def accuracy(model: nn.Module, batches: list[Batch]) -> float:
    """The share of images whose digit is the likeliest."""
    model.eval()
    with torch.no_grad():
        right = sum(int((model(images).argmax(1) == labels).sum()) for images, labels in batches)
    return right / sum(len(labels) for _, labels in batches)


def draw(model: nn.Module, image: Tensor, label: int, path: Path) -> None:
    """The image beside the model's probability for each digit, as a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with torch.no_grad():
        probability = model(image[None]).softmax(1)[0].numpy()
    figure = Figure(figsize=(7, 3), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2)
    left.imshow(image[0].numpy(), cmap="gray_r")
    left.set_title(f"label {label}")
    left.axis("off")
    right.bar(range(10), probability, color=["tab:blue" if digit == label else "tab:gray" for digit in range(10)])
    right.set(title=f"prediction {probability.argmax()} ({probability.max():.0%})", xticks=range(10), ylim=(0, 1))
    figure.savefig(path, dpi=100)


def run(folder: Path, out: Path, steps: int, strategy: Strategy = "ddp") -> Result | None:
    """Train, save, load, evaluate, draw; of several processes the first does all but training, and has the result."""
    images, labels = load_mnist(folder)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order], labels[order]
    held_out = cut(images[:HELD_OUT], labels[:HELD_OUT])
    images, labels = images[HELD_OUT:], labels[HELD_OUT:]

    def epoch_batches(epoch: int) -> list[Batch]:
        shuffled = torch.randperm(len(images), generator=torch.Generator().manual_seed(epoch))
        return cut(images[shuffled], labels[shuffled])

    torch.manual_seed(0)
    model = Cnn()
    parallel = ParallelSection(strategy=strategy, micro_batches=BATCHES_OF_A_STEP)
    settings = TrainSection(max_steps=steps, learning_rate=5e-3, weight_decay=0.01)
    done = fit(
        model,
        epoch_batches,
        loss,
        run_dir=out,
        settings=settings,
        validation=held_out,
        checkpoint=CheckpointSection(every_steps=100),
        parallel=parallel,
    )
    if place_from(os.environ).rank:
        return None
    return evaluate_saved(out, model, done.steps, held_out)


def evaluate_saved(out: Path, trained: nn.Module, steps: int, held_out: list[Batch]) -> Result:
    """Save the weights, and evaluate what was saved in a fresh model."""
    weights, picture = out / "model.safetensors", out / "prediction.png"
    save_file(trained.state_dict(), weights)
    model = Cnn()
    model.load_state_dict(load_file(weights))
    share = accuracy(model, held_out)
    images, labels = held_out[0]
    draw(model, images[0], int(labels[0]), picture)
    write_json_atomic(out / "result.json", {"steps": steps, "test_accuracy": share, "held_out": HELD_OUT})
    return Result(steps, share, weights, picture)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--out", type=Path, default=Path("runs/mnist"))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--strategy", choices=["ddp", "zero2", "zero3"], default="ddp")
    arguments = parser.parse_args()
    result = run(arguments.folder, arguments.out, arguments.steps, arguments.strategy)
    if result is not None:
        print(json.dumps({"steps": result.steps, "test_accuracy": result.accuracy, "picture": str(result.picture)}))


if __name__ == "__main__":
    main()
