"""On a GPU: AdamW against its reference and torch's fused update, the gradients' norm, no waits, CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import pytest
import torch
from torch import nn

from tunesmith.kernels.adamw import AdamWSettings, Updated, update, update_reference
from tunesmith.kernels.grad_norm import PART, global_norm, part_norms, part_norms_reference
from tunesmith.recipe.schema import TrainSection
from tunesmith.train.adamw import AdamW
from tunesmith.train.optimizers import guarded_step
from tunesmith.train.update import Updater

pytestmark = pytest.mark.gpu
Guard = Callable[[], AbstractContextManager[None]]

SETTINGS = AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1)
WIDE, BRAIN = torch.float32, torch.bfloat16
MIXES = [(WIDE, WIDE, WIDE), (BRAIN, BRAIN, BRAIN), (BRAIN, BRAIN, WIDE), (WIDE, BRAIN, WIDE), (BRAIN, WIDE, BRAIN)]
# A unit in the last place; float32: a few of them, of another order of operations.
PLACES = {WIDE: 2e-6, BRAIN: 2**-7, torch.float16: 2**-10}


def _random(size: int, dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(size, device="cuda").to(dtype)


@pytest.mark.parametrize("sizes", [(1, 200), (3584 * 17 + 48, 5_000_001), (2**22,)])
@pytest.mark.parametrize("dtypes", [*MIXES, (torch.float16,) * 3])
def test_kernel_equals_the_reference(
    sizes: tuple[int, ...], dtypes: tuple[torch.dtype, ...], no_waiting: Guard
) -> None:
    torch.manual_seed(0)
    of_weight, of_grad, of_moments = dtypes
    held = [[_random(size, of_weight) for size in sizes]]
    held += [[torch.zeros(size, device="cuda", dtype=of_moments) for size in sizes] for _ in range(2)]
    steps = [torch.full((), 20.0 * i, device="cuda") for i in range(len(sizes))]
    go, divisor = torch.zeros((), device="cuda"), torch.tensor(2.5, device="cuda")
    for _ in range(3):
        torch._foreach_add_(steps, 1)
        grads = [_random(size, of_grad) for size in sizes]
        kept, mine = [grad.clone() for grad in grads], [[tensor.clone() for tensor in row] for row in held]
        updated = Updated(mine[0], grads, mine[1], mine[2], steps)
        update(updated, SETTINGS, divisor, torch.ones_like(go))
        assert all(
            torch.equal(a, b) for row, old in zip(mine, held, strict=True) for a, b in zip(row, old, strict=True)
        )
        with no_waiting():
            update(updated, SETTINGS, divisor, go)
        update_reference(Updated(held[0], grads, held[1], held[2], steps), SETTINGS, divisor, go)
        for row, old in zip(mine, held, strict=True):
            for ours, reference in zip(row, old, strict=True):
                torch.testing.assert_close(ours, reference, rtol=PLACES[ours.dtype], atol=1e-6)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
        held = mine


def test_offsets_beyond_32_bits() -> None:
    """A weight of more than 2^31 values: its end is updated as its beginning is."""
    count = 2**31 + 4096
    if torch.cuda.mem_get_info()[0] < 9 * count:
        pytest.skip("needs 19 GB of free GPU memory")
    weight, grad = (torch.ones(count, device="cuda", dtype=BRAIN) for _ in range(2))
    mean, square = (torch.zeros(count, device="cuda", dtype=BRAIN) for _ in range(2))
    one, go = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    update(Updated([weight], [grad], [mean], [square], [one]), SETTINGS, one, go)
    assert torch.equal(weight[-8192:], weight[:8192])
    assert weight[-1] < 1
    assert part_norms([grad])[-1].item() == 4096**0.5
    assert global_norm([grad]).item() == pytest.approx(count**0.5, rel=1e-6)


def _optimised(make: Any, dtype: torch.dtype) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    torch.manual_seed(1)
    sizes = [(2048, 2048), (1024, 2049), (96,), (48, 200)]  # two of them in 4 MiB or less in bfloat16
    weights = [nn.Parameter(torch.rand(size, device="cuda").add(0.5).to(dtype)) for size in sizes]
    groups = [{"params": weights[:2], "weight_decay": 0.1}, {"params": weights[2:], "weight_decay": 0.0}]
    return weights, make(groups, lr=1e-2, betas=(0.9, 0.999), eps=1e-8)


def _torchs(*arguments: Any, **more: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(*arguments, **more, fused=True)


@pytest.mark.parametrize("dtype", [WIDE, BRAIN])
def test_the_optimiser_is_torchs_to_a_unit_in_the_last_place(dtype: torch.dtype) -> None:
    """Every step begins at torch's state: what rounding made of the ones before is not this one's error."""
    (mine, ours), (others, theirs) = _optimised(AdamW, dtype), _optimised(_torchs, dtype)
    for number in range(10):
        for a, b in zip(mine, others, strict=True):
            a.grad = torch.rand_like(a) + 0.1
            b.grad = a.grad.clone()
        divisor = torch.full((), 1.0 + number, device="cuda")
        stopped = torch.full((), float(number == 4), device="cuda")
        guarded_step(ours, divisor, stopped)
        guarded_step(theirs, divisor, stopped)
        for a, b in zip(mine, others, strict=True):
            assert ours.state[a].keys() == theirs.state[b].keys()
            for left, right in [(a, b), *((ours.state[a][key], theirs.state[b][key]) for key in ours.state[a])]:
                torch.testing.assert_close(left, right, rtol=PLACES[left.dtype], atol=1e-7)
                left.data.copy_(right.data)
    assert ours.state[mine[0]]["step"].item() == 9


def test_the_host_does_not_wait_and_a_graph_counts_its_steps(no_waiting: Guard) -> None:
    weights, optimizer = _optimised(AdamW, BRAIN)
    again, eager = _optimised(AdamW, BRAIN)
    for one, other in zip(weights, again, strict=True):
        one.grad = torch.rand_like(one)
        other.grad = one.grad.clone()
    divisor, stopped = torch.ones((), device="cuda"), torch.zeros((), device="cuda")
    guarded_step(optimizer, divisor, stopped)
    with no_waiting():
        for _ in range(3):
            guarded_step(eager, divisor, stopped)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        guarded_step(optimizer, divisor, stopped)
    for _ in range(2):
        graph.replay()
    for one, other in zip(weights, again, strict=True):
        assert optimizer.state[one]["step"].item() == 3
        assert torch.equal(one, other)


@pytest.mark.parametrize("dtype", [WIDE, BRAIN, torch.float16])
def test_norms_of_parts(dtype: torch.dtype, no_waiting: Guard) -> None:
    torch.manual_seed(0)
    gradients = [_random(size, dtype) for size in (1, 200, PART, 3 * PART + 48, 5_000_001)]
    with no_waiting():
        norms = part_norms(gradients)
    torch.testing.assert_close(norms, part_norms_reference(gradients), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [WIDE, BRAIN])
def test_the_norm_is_right_and_repeats_its_bits(dtype: torch.dtype, no_waiting: Guard) -> None:
    torch.manual_seed(0)
    gradients = [_random(size, dtype) * 3**i for i, size in enumerate((5_000_001, 200, 2**22 + 48, 17))]
    with no_waiting():
        norm = global_norm(gradients)
    exact = torch.stack([gradient.double().norm() for gradient in gradients]).norm()
    assert norm.item() == pytest.approx(exact.item(), rel=1e-6)
    assert all(torch.equal(norm, global_norm(gradients)) for _ in range(20))
    gradients[2][-1] = float("nan")
    assert global_norm(gradients).isnan()


def _loss(module: nn.Module, batch: torch.Tensor) -> tuple[torch.Tensor, int]:
    return (module(batch) - batch).square().sum(), len(batch)


def test_large_weights_are_updated_in_the_backward_pass_to_the_same_bits() -> None:
    outcomes = []
    for within in (False, True):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(1536, 1536), nn.ReLU(), nn.Linear(1536, 1536)).cuda()
        settings = TrainSection(learning_rate=1e-3, max_grad_norm=0.0, optimizer_in_backward=within)
        updater = Updater(module, settings, 5)
        assert isinstance(updater.optimizer, AdamW)
        batch = torch.randn(32, 1536, device="cuda")
        queued = [updater.submit(i, [batch], _loss, denominator=32, describe=str) for i in range(5)]
        losses = [pending.read().loss for pending in queued]
        assert losses[-1] < losses[0]
        outcomes.append((losses, [parameter.detach().clone() for parameter in module.parameters()]))
    (after, expected), (inside, got) = outcomes
    assert after == inside
    assert all(torch.equal(a, b) for a, b in zip(expected, got, strict=True))
