"""What each kind of gradient checkpointing runs again in the backward pass."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from tunesmith.checkpoint.load import load_decoder
from tunesmith.model.methods import apply_method
from tunesmith.model.packed import pack_documents
from tunesmith.recipe.schema import MethodSection

ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


class _Count(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.calls[func.name()] += 1
        return func(*args, **(kwargs or {}))


def _step(directory: Path, kind: Any, method: MethodSection) -> tuple[Counter[str], list[Tensor]]:
    decoder = load_decoder(directory)
    apply_method(decoder, method, seed=0)
    decoder.train()
    decoder.checkpointing = kind
    with _Count() as count:
        decoder.logits(decoder.hidden(pack_documents([[1, 2, 3], [4, 5, 6, 7]]))).square().mean().backward()
    return count.calls, [p.grad for p in decoder.parameters() if p.grad is not None]


def test_an_adapters_wide_product_is_not_held() -> None:
    """It was held beside the base's product, so that selective checkpointing of LoRA saved no memory at all."""
    from torch.utils.checkpoint import CheckpointPolicy

    from tunesmith.model.checkpointing import _keep_dear

    def is_held(operator: Any, *shapes: tuple[int, ...]) -> bool:
        tensors = [torch.empty(shape, device="meta") for shape in shapes]
        return _keep_dear(None, operator, *tensors) == CheckpointPolicy.MUST_SAVE

    mm, addmm = torch.ops.aten.mm.default, torch.ops.aten.addmm.default
    assert is_held(mm, (64, 3584), (3584, 37888))
    assert is_held(mm, (64, 3584), (3584, 32))
    assert is_held(addmm, (4608,), (64, 3584), (3584, 4608))
    assert not is_held(addmm, (64, 37888), (64, 32), (32, 37888))
    assert not is_held(addmm, (64, 3584), (64, 16), (16, 3584))
    assert not is_held(torch.ops.aten.mul.Tensor, (64, 64), (64, 64))


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
def test_what_is_computed_twice(kind: Any, tiny_model_dir: Callable[..., Path]) -> None:
    """2 layers and 2 documents are 4 attentions; selective runs norms again, but neither products nor attention."""
    directory = tiny_model_dir("llama", hidden_size=64)
    method = MethodSection(kind=kind, rank=4)
    none, expected = _step(directory, "none", method)
    block, of_block = _step(directory, "block", method)
    selective, of_selective = _step(directory, "selective", method)
    assert (none[ATTENTION], block[ATTENTION], selective[ATTENTION]) == (4, 8, 4)
    products = [calls["aten::mm"] + calls["aten::addmm"] for calls in (none, block, selective)]
    assert products[0] == products[2] < products[1]
    assert none["aten::rsqrt"] < selective["aten::rsqrt"] == block["aten::rsqrt"]
    for a, b, c in zip(expected, of_block, of_selective, strict=True):
        assert torch.equal(a, b)
        assert torch.equal(a, c)
