"""A fingerprint of the weights in a model directory: cheap, and the same however the files are cut into shards."""

from __future__ import annotations

import hashlib
from pathlib import Path

from tunesmith.checkpoint.files import WeightFiles

# Values taken from every tensor, spread over its length.
SAMPLES = 256


def base_fingerprint(directory: Path) -> str:
    """A hexadecimal digest of every tensor's name, dtype, shape and of values spread over it.

    Fine-tuning moves nearly every weight, so a sample of each tensor tells two models apart without reading
    gigabytes. Raises: ModelError when the directory holds no readable weights.
    """
    files = WeightFiles(directory)
    digest = hashlib.sha256()
    for name in files.names():
        tensor = files.read(name)
        flat = tensor.reshape(-1)
        step = max(1, flat.numel() // SAMPLES)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(flat[::step].float().numpy().tobytes())
    return digest.hexdigest()
