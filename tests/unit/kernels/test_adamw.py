"""AdamW's update in one pass: its reference against torch.optim.AdamW, its Triton kernel against the reference."""

from __future__ import annotations

import re
from collections.abc import Callable

import pytest
import torch

from tunesmith.kernels.adamw import AdamWSettings, Updated, update, update_reference

SETTINGS = AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1)
GO, STOP = torch.zeros(()), torch.ones(())


def _started(weight: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return weight.clone(), torch.zeros_like(weight), torch.zeros_like(weight), torch.zeros(())


def _update(held: tuple[torch.Tensor, ...], grad: torch.Tensor, divisor: torch.Tensor, stopped: torch.Tensor) -> None:
    weight, mean, square, step = held
    step += 1 - stopped
    update(Updated([weight], [grad], [mean], [square], [step]), SETTINGS, divisor, stopped)


def _torchs(weight: torch.Tensor, **more: object) -> torch.optim.AdamW:
    given = {"lr": SETTINGS.learning_rate, "betas": SETTINGS.betas, "eps": SETTINGS.eps, "weight_decay": 0.1}
    return torch.optim.AdamW([torch.nn.Parameter(weight.clone())], **given, **more)  # type: ignore[arg-type]


def test_ten_steps_are_those_of_torch_in_float32() -> None:
    """With weight decay, gradients divided as clipping does, and a step that the guard skips."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(37, 48, generator=generator)
    held, optimizer = _started(weight), _torchs(weight, foreach=False)
    (parameter,) = optimizer.param_groups[0]["params"]
    for number in range(10):
        grad = torch.randn(37, 48, generator=generator) * 10.0 ** (-number % 4)
        divisor = (grad.norm() / 0.5).clamp(min=1.0)
        before = held[0].clone()
        _update(held, grad, divisor, STOP if number == 4 else GO)
        if number == 4:
            assert torch.equal(held[0], before)
            continue
        parameter.grad = grad / divisor
        optimizer.step()
    state = optimizer.state[parameter]
    assert held[3].item() == state["step"].item() == 9
    for ours, theirs in zip(held, (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=False):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-7)


def _apart(ours: torch.Tensor, theirs: torch.Tensor) -> int:
    """How many bfloat16 numbers lie between two tensors' values, at most; values of one sign."""
    return int((ours.view(torch.int16).int() - theirs.view(torch.int16).int()).abs().max())


def test_bfloat16_is_within_a_unit_in_the_last_place_of_torchs_fused_update() -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(4096, generator=generator).add(0.5).bfloat16()
    held, optimizer = _started(weight), _torchs(weight, fused=True)
    (parameter,) = optimizer.param_groups[0]["params"]
    optimizer.found_inf = GO  # type: ignore[attr-defined]
    for _ in range(10):
        state = optimizer.state[parameter]
        if state:  # one step at a time: what rounding made of the one before is not this one's error
            held = (parameter.detach().clone(), *(state[name].clone() for name in ("exp_avg", "exp_avg_sq", "step")))
        grad = (torch.rand(4096, generator=generator) + 0.1).bfloat16()
        divisor = torch.tensor(1.7)
        _update(held, grad, divisor, GO)
        parameter.grad, optimizer.grad_scale = grad.clone(), divisor  # type: ignore[attr-defined]
        optimizer.step()
        state = optimizer.state[parameter]
        for ours, theirs in zip(held, (parameter.detach(), state["exp_avg"], state["exp_avg_sq"]), strict=False):
            assert _apart(ours, theirs) <= 1


def test_the_arithmetic_is_float32_whatever_is_held() -> None:
    """A bfloat16 weight with float32 moments takes the step of the float32 weight of the same value, rounded once."""
    generator = torch.Generator().manual_seed(2)
    weight, grad = (torch.randn(500, generator=generator).bfloat16() for _ in range(2))
    zeros = torch.zeros(500)
    mixed, wide = (weight.clone(), zeros.clone(), zeros.clone(), torch.zeros(())), _started(weight.float())
    _update(mixed, grad, torch.tensor(3.0), GO)
    _update(wide, grad.float(), torch.tensor(3.0), GO)
    assert torch.equal(mixed[0], wide[0].bfloat16())
    assert torch.equal(mixed[1], wide[1])
    assert torch.equal(mixed[2], wide[2])


def test_nothing_to_update_is_no_mistake() -> None:
    update(Updated([], [], [], [], []), SETTINGS, torch.ones(()), GO)
    empty = _started(torch.empty(0))
    update_reference(Updated(*([t] for t in (empty[0], empty[0], *empty[1:]))), SETTINGS, torch.ones(()), GO)


KERNEL = """
import itertools
import math
import torch
import triton
import triton.language as tl
from tunesmith.kernels.adamw import AdamWSettings, Updated, update_by_kernel, update_reference
from tunesmith.kernels.adamw_triton import BLOCK, _correction, update_operator


@triton.jit
def corrections(steps, out, logarithm, SIZE: tl.constexpr):
    index = tl.arange(0, SIZE)
    tl.store(out + index, _correction(tl.load(steps + index), logarithm))


steps = torch.cat([torch.arange(1, 769), torch.logspace(3, 6, 256).round()]).float()
for beta in (0.5, 0.9, 0.95, 0.99, 0.999, 0.9999):
    out = torch.empty(1024)
    corrections[(1,)](steps, out, math.log(beta), SIZE=1024)
    torch.testing.assert_close(out, (1 - beta ** steps.double()).float(), rtol=5e-7, atol=0)

generator = torch.Generator().manual_seed(0)
go, stop = torch.zeros(()), torch.ones(())
settings = AdamWSettings(1e-2, (0.9, 0.999), 1e-8, 0.1)
wide, half, brain = torch.float32, torch.float16, torch.bfloat16
kinds = [*itertools.product((wide, brain), repeat=3), (half, half, half), (wide, half, wide)]
# The interpreter cuts bfloat16 off where a GPU rounds it: one unit in the last place.
places = {wide: 2e-6, brain: 2**-7, half: 2**-10}


def same(ours, theirs):
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other, rtol=places[mine.dtype], atol=1e-7)


for sizes, (of_weight, of_grad, of_moments) in itertools.product([(1, 200), (17 * 96, BLOCK + 1, 3 * 3584)], kinds):
    weights = [torch.randn(size, generator=generator).to(of_weight) for size in sizes]
    means, squares = ([torch.zeros(size, dtype=of_moments) for size in sizes] for _ in range(2))
    counts = [torch.tensor(10.0 * i) for i in range(len(sizes))]  # each weight has a count of its own
    for _ in range(3):
        for count in counts:
            count += 1
        grads = [torch.randn(size, generator=generator).to(of_grad) for size in sizes]
        kept = [grad.clone() for grad in grads]
        divisor = torch.tensor(2.5)
        mine = [[tensor.clone() for tensor in held] for held in (weights, means, squares)]
        ours = Updated(mine[0], grads, mine[1], mine[2], counts)
        update_by_kernel(ours, settings, divisor, stop)
        for now, before in zip(mine, (weights, means, squares), strict=True):
            assert all(torch.equal(a, b) for a, b in zip(now, before, strict=True))
        update_by_kernel(ours, settings, divisor, go)
        update_reference(Updated(weights, grads, means, squares, counts), settings, divisor, go)
        for now, reference in zip(mine, (weights, means, squares), strict=True):
            same(now, reference)
        assert all(torch.equal(a, b) for a, b in zip(grads, kept, strict=True))
        weights, means, squares = mine

# Parts of a weight, as `train.offload_optimizer` hands them over, get the bits of the whole.
held = [torch.randn(3 * BLOCK + 48, generator=generator).to(brain) for _ in range(2)]
held += [torch.zeros(3 * BLOCK + 48, dtype=brain) for _ in range(2)]
apart = [tensor.clone() for tensor in held]
for part in (slice(None),), (slice(0, BLOCK), slice(BLOCK, None)):
    weights, grads, means, squares = zip(*([t[s] for t in (held if len(part) == 1 else apart)] for s in part))
    update_by_kernel(Updated(weights, grads, means, squares, [torch.ones(())] * len(part)), settings, divisor, go)
assert all(torch.equal(a, b) for a, b in zip(held, apart, strict=True))

values = lambda: [torch.randn(300), torch.randn(7)]
moments = lambda: [torch.zeros(300), torch.zeros(7)]
arguments = (values(), values(), moments(), moments(), [torch.ones(()), torch.ones(())], torch.ones(()), go)
arguments = (*arguments, 1e-2, [0.9, 0.999], 1e-8, 0.1)
torch.library.opcheck(update_operator, arguments, test_utils=("test_schema", "test_faketensor"))
"""


def test_kernel_equals_the_reference_under_tritons_interpreter(check_interpreted: Callable[[str], None]) -> None:
    check_interpreted(KERNEL)


@pytest.mark.parametrize("capability", [80, 86, 89, 90, 100, 120])
def test_it_compiles_for_every_chip_to_16_byte_accesses(capability: int) -> None:
    """Without a GPU, for the mixes of dtypes that training holds. What is not 16 bytes: step, divisor and the guard."""
    triton = pytest.importorskip("triton")
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from tunesmith.kernels.adamw_triton import BLOCK, WARPS, _update_kernel

    if not hasattr(_update_kernel, "cache_key"):
        pytest.skip("Triton interprets here (TRITON_INTERPRET): nothing is compiled")
    names = list(_update_kernel.arg_names)
    scalars = dict.fromkeys(("step", "divisor", "stopped"), "*fp32")
    numbers = dict.fromkeys(names[names.index("learning_rate") : names.index("BLOCK")], "fp32")
    tensors = ("weights", "grads", "means", "squares")
    aligned = {(names.index(name),): [["tt.divisibility", 16]] for name in (*tensors, "count")}
    for weight, grad, moment in (
        ["*bf16"] * 3,
        ["*fp32"] * 3,
        ("*bf16", "*bf16", "*fp32"),
        ("*fp32", "*bf16", "*fp32"),
    ):
        kinds = dict(zip(tensors, (weight, grad, moment, moment), strict=True))
        signature = {**kinds, **scalars, "count": "i64", **numbers, "BLOCK": "constexpr"}
        source = ASTSource(_update_kernel, signature, {(names.index("BLOCK"),): BLOCK}, aligned)
        options = {"num_warps": WARPS, "enable_fp_fusion": True}
        compiled = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert compiled.metadata.shared <= 16 * 1024
        moves = re.findall(r"(?:ld|st)\.global\S*\.[bf]\d+", compiled.asm["ptx"])
        narrow = [move for move in moves if "v4.b32" not in move]
        assert len(narrow) <= 3
        assert all(move.startswith("ld") for move in narrow)
        assert len(moves) - len(narrow) >= 14  # two of each of the four tensors to read, and of three to write
