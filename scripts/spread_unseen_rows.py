"""Gives the embedding rows that pre-training never met a direction of their own: the last step of making builtin:tiny.

A token that occurs in no text is only ever pushed away from what is right, always along the same direction: in
builtin:tiny 266 rows (bytes of rare characters, "@", "%", "种") ended up with cosines above 0.99 to each other, and no
adapter, whose embedding is frozen, could tell them apart. What they share, which keeps them unlikely, stays; each gets
a random direction of length 1 beside it, as long as a learnt row. All other rows stay bit for bit.

    python scripts/spread_unseen_rows.py tunesmith/models/tiny
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

EMBEDDING = "model.embed_tokens.weight"
ALIKE, MANY = 0.9, 100  # a row that is so near to so many others was never met


def unseen_rows(embedding_VD: Tensor) -> Tensor:
    """Which rows are all but the same as many others. Returns: bool [V]."""
    unit_VD = torch.nn.functional.normalize(embedding_VD.float(), dim=1)
    return (unit_VD @ unit_VD.t() > ALIKE).sum(1) > MANY


def spread(embedding_VD: Tensor, unseen_V: Tensor) -> Tensor:
    """The embedding with directions for its unseen rows, at right angles to what these share; drawn with seed 0."""
    rows = embedding_VD[unseen_V].float()
    shared_D = torch.nn.functional.normalize(torch.nn.functional.normalize(rows, dim=1).mean(0), dim=0)
    drawn = torch.randn(rows.shape, generator=torch.Generator().manual_seed(0))
    drawn -= (drawn @ shared_D)[:, None] * shared_D
    changed_VD = embedding_VD.clone()
    changed_VD[unseen_V] = (rows + torch.nn.functional.normalize(drawn, dim=1)).to(embedding_VD.dtype)
    return changed_VD


def main(directory: Path) -> None:
    """Change the model in `directory` in place."""
    file = directory / "model.safetensors"
    tensors = load_file(file)
    unseen_V = unseen_rows(tensors[EMBEDDING])
    if not unseen_V.any():
        sys.exit(f"{file} has no rows that are alike: nothing to do")
    tensors[EMBEDDING] = spread(tensors[EMBEDDING], unseen_V)
    save_file(tensors, file, metadata={"format": "pt"})
    print(f"{int(unseen_V.sum())} rows changed")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
