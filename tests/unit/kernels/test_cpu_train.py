"""Our own C++ for training on a CPU: its products, its threads, and what happens where there is none.

Its other operations are compared with the references in test_in_float32.py and model/test_cpu_attention.py.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tunesmith.kernels import cpu_compile, cpu_train
from tunesmith.kernels.cpu_train import Adapted, Outer, outer, product, takes_outer
from tunesmith.kernels.cross_entropy import cross_entropy_and_grad_, cross_entropy_and_grad_reference_
from tunesmith.kernels.rms_norm import rms_norm, rms_norm_reference
from tunesmith.kernels.rope import rope_, rope_reference_
from tunesmith.kernels.swiglu import swiglu, swiglu_reference


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def splits(cpu_operations: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are split: by the matrix unit, or by one that is emulated where the processor has all but that."""
    if cpu_train.facts()["split_products"]:
        return
    flags = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    if "avx512_bf16" not in flags:
        pytest.skip("products are split only where the CPU has bfloat16")
    header = Path(__file__).with_name("emulated_tiles.hpp")
    version = hashlib.sha256(header.read_bytes()).hexdigest()[:8]
    flags = f"-O1 -D__AMX_TILE__ -D__AMX_BF16__ -DEMULATION=0x{version} -include {header}"
    monkeypatch.setenv("CXXFLAGS", flags)
    cpu_train.forget()
    assert cpu_train.prepare()
    assert cpu_train.facts()["split_products"]


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize(("rows", "deep", "width"), [(256, 64, 32), (300, 1100, 45), (261, 77, 272)])
@pytest.mark.parametrize("flat", [False, True])
def test_products_are_as_exact_as_float32(rows: int, deep: int, width: int, flat: bool) -> None:
    """The error against float64 is no larger than that of torch's own float32 product by more than a half."""
    x = random(rows, deep + 3)[:, :deep]
    weight = random(*((deep, width) if flat else (width, deep)), seed=1)
    factor = weight if flat else weight.t()
    truth = x.double() @ factor.double()
    found, plain = (((y - truth).square().mean().sqrt()) for y in (product(x, Adapted(weight), flat=flat), x @ factor))
    assert found < 1.5 * plain


@pytest.mark.usefixtures("splits")
@pytest.mark.parametrize("flat", [False, True])
def test_a_product_with_all_that_is_added(flat: bool) -> None:
    """Adapters on two bands of the weight's rows, their inner products, a residual, a bias, and rows that are apart."""
    weight, up, down = random(96, 80), torch.zeros(96, 5), random(5, 80, seed=2)
    blocks = [(slice(0, 40), slice(0, 2)), (slice(50, 96), slice(2, 5))]
    for rows, inner in blocks:
        up[rows, inner] = random(rows.stop - rows.start, inner.stop - inner.start, seed=3)
    x = random(290, 96 if flat else 80, seed=4)
    width = 80 if flat else 96
    residual, bias = random(290, width, seed=5), random(width, seed=6)
    whole = weight + up @ down
    out = torch.full((290, width + 4), 7.0)
    right = Adapted(weight, up, down, blocks)
    low = torch.empty(290, right.rank)
    product(x, right, flat=flat, residual=residual, bias=bias, out=out[:, :width], low=low)
    expected = x @ (whole if flat else whole.t()) + residual + bias
    torch.testing.assert_close(out[:, :width], expected, rtol=1e-4, atol=1e-4)
    assert (out[:, width:] == 7).all()
    torch.testing.assert_close(low, x @ (up if flat else down.t()), rtol=1e-4, atol=1e-4)
    without = product(x, right, flat=flat, residual=residual, bias=bias)
    assert torch.equal(without, out[:, :width])


@pytest.mark.usefixtures("splits")
def test_what_is_not_finite_stays_so() -> None:
    x = random(256, 32)
    x[3, 5], x[9, 1], x[10, 1] = torch.nan, torch.inf, 3e38
    y = product(x, Adapted(torch.ones(32, 32)), flat=True)
    assert not y[3].isfinite().any()
    assert not y[9].isfinite().any()
    assert y[10].isfinite().all()
    assert y[11:].isfinite().all()


@pytest.mark.usefixtures("cpu_operations")
@pytest.mark.parametrize("tokens", [3, 256, 600])
def test_products_of_adapters_gradients(tokens: int) -> None:
    """Of columns of wider tensors, as they are, scaled and turned, within float32's error of the sums."""
    low, wide = random(tokens, 11), random(tokens, 96, seed=1)
    jobs = [Outer(low[:, :5], wide, 0.5), Outer(low[:, 3:], wide[:, 16:64], turned=True)]
    assert takes_outer(*jobs)
    expected = [0.5 * low[:, :5].double().t() @ wide.double(), wide[:, 16:64].double().t() @ low[:, 3:].double()]
    for found, wanted in zip(outer(*jobs), expected, strict=True):
        torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-4)
    assert not takes_outer(Outer(low, wide[:, :50]))


@pytest.mark.usefixtures("cpu_operations")
def test_layouts_and_dtypes_that_are_read_otherwise_are_brought_into_form() -> None:
    """Tables that were parts of a wider tensor, or one row for all tokens, and targets in int32 were read as if they
    lay together: wrong rotations and losses without a word."""
    x, tables, logits = random(5, 2, 8), random(5, 16, seed=1), random(6, 10)
    for cos, sin in ((tables[:, :4], tables[:, 8:12]), (tables[:1, :4], tables[:1, 8:12])):
        turned, wanted = x.clone(), x.clone()
        rope_(turned, cos, sin)
        rope_reference_(wanted, cos, sin)
        torch.testing.assert_close(turned, wanted)
    found, wanted = logits.clone(), logits.clone()
    targets = torch.arange(6)
    losses = cross_entropy_and_grad_(found, targets.int())
    torch.testing.assert_close(losses, cross_entropy_and_grad_reference_(wanted, targets))
    torch.testing.assert_close(found, wanted)
    one = torch.full((1,), 2.0)
    torch.testing.assert_close(rms_norm(x, one, 1e-6)[0], rms_norm_reference(x, one, 1e-6)[0])


@pytest.mark.usefixtures("cpu_operations")
def test_memory_that_is_not_there_is_an_error() -> None:
    """Of shapes that do not fit each other what lay behind a tensor was read, or written over."""
    x, norm, rstd = random(5, 8), torch.ones(8), torch.ones(5)
    q, k = random(9, 4, 16), random(9, 2, 16)
    out, logs = torch.empty_like(q), torch.empty(9, 4)
    with pytest.raises(ValueError, match="rows"):
        cross_entropy_and_grad_(x.clone(), torch.arange(3))
    with pytest.raises(ValueError, match="rows"):
        cpu_train.rms_norm_backward(x[:3], x, norm, rstd, None, True)
    with pytest.raises(ValueError, match="rows"):
        cpu_train.swiglu_backward(x, x, False, None)
    with pytest.raises(ValueError, match="rows"):
        outer(Outer(x, random(4, 16)), Outer(random(4, 3), random(4, 16)))
    for lengths, key in (((5, 5), k), ((5,), k), ((9,), random(9, 3, 16)), ((9,), random(9, 2, 32))):
        with pytest.raises(ValueError, match=r"rows|documents"):
            cpu_train.attend(logs, lengths, q, key, torch.empty_like(key), out)
    with pytest.raises(RuntimeError):
        cpu_train.rms_norm(x, norm[:3], 1e-6)
    with pytest.raises(RuntimeError):
        cross_entropy_and_grad_(random(2, 3, 8), torch.arange(2))


def test_an_operation_without_memory_is_an_error(
    cpu_operations: None, kernel_cache: Path, torch_forks: Callable[..., str]
) -> None:
    """An exception of whichever thread it was ended the process."""
    code = """
import resource
import torch
from tunesmith.kernels import cpu_train

def attend(logs, x, out, *lengths):
    cpu_train.attend(logs, lengths, x, x, x, out)
    return "done"

def memory(tokens):
    return torch.zeros(tokens, 1), torch.zeros(tokens, 1, 128), torch.zeros(tokens, 1, 128)

cpu_train.prepare()
torch.set_num_threads(2)
few, many = memory(14), memory(200_000)
print(attend(*few, 7, 7))
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 2**24, used + 2**24))
try:
    attend(*many, 100_000, 100_000)
except MemoryError as error:
    print(error)
print(attend(*few, 7, 7))
"""
    environment = {"XDG_CACHE_HOME": str(kernel_cache), cpu_train.SWITCH: "1"}
    assert torch_forks(code, **environment).splitlines() == ["done", "no memory for a compiled operation", "done"]


@pytest.mark.usefixtures("cpu_operations")
def test_the_same_bits_by_any_number_of_threads() -> None:
    gate_up, x, weight = random(300, 64), random(300, 48, seed=1), random(40, 48, seed=2)
    norm, threads = torch.ones(48), torch.get_num_threads()
    found = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            y, rstd = cpu_train.rms_norm(x, norm, 1e-6)
            dx, dnorm = cpu_train.rms_norm_backward(y, x, norm, rstd, None, True)
            assert dnorm is not None
            made = [swiglu(gate_up), y, dx, dnorm, *outer(Outer(y[:, :7], x))]
            if cpu_train.takes_product(x, weight):
                made.append(product(x, Adapted(weight), flat=False))
            found.append(made)
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_without_a_compiler_it_is_torch(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(cpu_train.SWITCH, "1")
    monkeypatch.setattr(cpu_compile, "find_compiler", lambda: None)
    cpu_train.forget()
    try:
        assert not cpu_train.prepare()
        assert "slower: no C++ compiler" in caplog.text
        assert "no C++ compiler" in str(cpu_train.facts()["reason"])
        gate_up = random(4, 8)
        torch.testing.assert_close(swiglu(gate_up), swiglu_reference(gate_up))
    finally:
        cpu_train.forget()


def test_it_can_be_switched_off(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv(cpu_train.SWITCH, "off")
    cpu_train.forget()
    try:
        assert not cpu_train.prepare()
        assert not caplog.text
    finally:
        cpu_train.forget()
