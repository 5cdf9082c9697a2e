"""Gradient checkpointing of one block: recompute its activations in the backward pass instead of holding them.

Source: arXiv 1604.06174, section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from tunesmith.model.uncompiled import spare_compiler

# What is dear to recompute: matrix products and attention. The rest (norms, activations, rope) is recomputed.
# By name, because the variable-length kernel is registered only where it is first used.
PRODUCTS = {"aten::mm": 0, "aten::addmm": 1}
"""Products, and which argument is their left factor."""
LOW_RANK = 16
"""An output so many times wider than the inner dimension is cheaper to compute again than to hold: an adapter's."""
DEAR = {
    "aten::_scaled_dot_product_flash_attention",
    "aten::_scaled_dot_product_flash_attention_for_cpu",
    "aten::_scaled_dot_product_efficient_attention",
    "aten::_scaled_dot_product_cudnn_attention",
    "aten::_flash_attention_forward",
    "torch_attn::_varlen_attn",
}

_by_operators: ContextVar[bool] = ContextVar("_by_operators", default=False)


def goes_by_operators() -> bool:
    """Whether selective checkpointing looks at every operator now: none may write over another one's output."""
    return _by_operators.get()


@contextmanager
def _looking(context: AbstractContextManager[Any]) -> Iterator[None]:
    token = _by_operators.set(True)
    try:
        with context:
            yield
    finally:
        _by_operators.reset(token)


def _selective_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Around the forward pass, and around its repetition."""
    first, again = create_selective_checkpoint_contexts(_keep_dear)
    return _looking(first), _looking(again)


def _keep_dear(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operator.name() if isinstance(operator, OpOverload) else ""
    dear = name in DEAR or (name in PRODUCTS and _is_wide(*args[PRODUCTS[name] :][:2]))
    return CheckpointPolicy.MUST_SAVE if dear else CheckpointPolicy.PREFER_RECOMPUTE


def _is_wide(left: Tensor, right: Tensor) -> bool:
    """Whether left @ right takes enough work for each value that is held."""
    inner, columns = right.shape
    return inner * LOW_RANK >= columns


def run_checkpointed(
    kind: str, block: Callable[..., Tensor], hidden_TD: Tensor, *args: Any, is_random: bool = True
) -> Tensor:
    """block(hidden, *args), holding everything ("none"), its input ("block"), or its products too ("selective").

    is_random: whether the block draws random numbers, which must then be the same ones the second time.
    """
    if kind == "none" or not torch.is_grad_enabled():
        return block(hidden_TD, *args)
    spare_compiler(checkpoint)
    if kind == "block":
        return checkpoint(block, hidden_TD, *args, use_reentrant=False, preserve_rng_state=is_random)
    return checkpoint(block, hidden_TD, *args, use_reentrant=False, context_fn=_selective_contexts)
