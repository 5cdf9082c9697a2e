"""Adapted linears: initialisation, fused projections, dropout, DoRA; parity with PEFT is in tests/parity."""

from __future__ import annotations

import pytest
import torch

from tunesmith.model.layers import Linear
from tunesmith.model.lora import AdaptedLinear, Adapter, AdapterOptions
from tunesmith.model.quant import quantised

PARTS = {"q_proj": 32, "k_proj": 16, "v_proj": 16}
OPTIONS = AdapterOptions(rank=4, alpha=8)


def base(bias: bool = True) -> Linear:
    torch.manual_seed(0)
    made = Linear(24, PARTS, bias)
    torch.nn.init.normal_(made.weight)
    if made.bias is not None:
        torch.nn.init.normal_(made.bias)
    return made


def adapted(
    options: AdapterOptions = OPTIONS, parts: tuple[str, ...] = tuple(PARTS), trained: bool = True
) -> AdaptedLinear:
    linear = AdaptedLinear(base(), PARTS, dict.fromkeys(parts, options))
    generator = torch.Generator().manual_seed(1)
    for part in parts:
        adapter = linear.adapter(part)
        adapter.reset(part, 0)
        if trained:
            adapter.B.data.normal_(generator=generator)
            if adapter.magnitude is not None:
                adapter.magnitude.data.mul_(1.3)
    return linear


def test_a_fresh_adapter_changes_nothing() -> None:
    x = torch.randn(5, 24)
    assert torch.equal(adapted(trained=False)(x), base()(x))
    fresh = adapted(AdapterOptions(4, 8, dora=True), trained=False)
    assert torch.allclose(fresh(x), base()(x), atol=1e-5)


@pytest.mark.parametrize("parts", [tuple(PARTS), ("q_proj", "v_proj"), ("k_proj",)])
@pytest.mark.parametrize("dora", [False, True])
def test_forward_is_that_of_the_merged_weight(parts: tuple[str, ...], dora: bool) -> None:
    linear = adapted(AdapterOptions(4, 8, dora=dora), parts)
    x = torch.randn(2, 5, 24)
    merged = torch.cat([linear.merged_part(part) for part in PARTS])
    expected = torch.nn.functional.linear(x, merged, linear.bias)
    assert torch.allclose(linear(x), expected, atol=2e-4)
    for part in PARTS:
        changed = not torch.equal(linear.merged_part(part), base().part_weight(part))
        assert changed == (part in parts)


def test_ranks_may_differ_between_projections() -> None:
    options = {"q_proj": AdapterOptions(2, 4), "v_proj": AdapterOptions(5, 10)}
    linear = AdaptedLinear(base(), PARTS, options)
    for part in options:
        linear.adapter(part).reset(part, 0)
        torch.nn.init.normal_(linear.adapter(part).B)
    x = torch.randn(5, 24)
    merged = torch.cat([linear.merged_part(part) for part in PARTS])
    assert torch.allclose(linear(x), torch.nn.functional.linear(x, merged, linear.bias), atol=1e-4)


def test_scale() -> None:
    assert AdapterOptions(16, 32).scale == 2
    assert AdapterOptions(16, 32, rslora=True).scale == 8


def test_initial_values_depend_on_key_and_seed_only() -> None:
    def values(key: str, seed: int) -> torch.Tensor:
        torch.rand(3)  # what else was drawn before must not matter
        adapter = Adapter(24, 8, OPTIONS)
        adapter.reset(key, seed)
        return adapter.A.detach().clone()

    assert torch.equal(values("blocks.0.q", 0), values("blocks.0.q", 0))
    assert not torch.equal(values("blocks.0.q", 0), values("blocks.1.q", 0))
    assert not torch.equal(values("blocks.0.q", 0), values("blocks.0.q", 1))
    drawn = torch.cat([values(str(key), 0).view(-1) for key in range(50)])
    assert drawn.abs().max() <= 24**-0.5
    # The variance of a uniform in ±b is b^2 / 3.
    assert float(drawn.var()) == pytest.approx(1 / 24 / 3, rel=0.05)


def test_only_adapters_get_gradients() -> None:
    linear = adapted(AdapterOptions(4, 8, dora=True))
    linear(torch.randn(5, 24)).square().sum().backward()
    for name, parameter in linear.named_parameters():
        assert (parameter.grad is not None) == name.startswith("adapters."), name
        assert parameter.requires_grad == name.startswith("adapters."), name


def test_masters_are_float32_and_the_stream_keeps_its_dtype() -> None:
    linear = AdaptedLinear(base().bfloat16(), PARTS, {"q_proj": OPTIONS})
    assert {parameter.dtype for parameter in linear.adapters.parameters()} == {torch.float32}
    assert linear(torch.randn(5, 24, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_dropout_acts_on_the_adapter_alone_and_only_in_training() -> None:
    options = AdapterOptions(4, 8, dropout=0.5)
    linear = adapted(options)
    x = torch.randn(64, 24)
    torch.manual_seed(0)
    first, second = linear(x), linear(x)
    assert not torch.equal(first, second)
    linear.eval()
    assert torch.equal(linear(x), linear(x))
    plain = adapted()
    assert torch.equal(linear(x), plain(x))
    fresh = adapted(options, trained=False)
    assert torch.equal(fresh(x), base()(x))


def test_dora_with_dropout_is_unbiased_around_the_exact_result() -> None:
    options = AdapterOptions(4, 8, dropout=0.3, dora=True)
    linear = adapted(options)
    x = torch.randn(4, 24)
    torch.manual_seed(0)
    mean = torch.stack([linear(x) for _ in range(3000)]).mean(0)
    exact = linear.eval()(x)
    assert (mean - exact).abs().max() < 0.1 * exact.abs().max()


def test_norm_is_constant_in_the_backward_pass() -> None:
    """Source: arXiv 2402.09353, section 4.3. The gradient of B is that with the ratio held fixed."""
    linear = adapted(AdapterOptions(4, 8, dora=True), ("q_proj",))
    x = torch.randn(5, 24)
    linear(x).sum().backward()
    adapter = linear.adapter("q_proj")
    assert adapter.magnitude is not None and adapter.B.grad is not None
    norm = torch.linalg.vector_norm(base().part_weight("q_proj") + 2 * adapter.B @ adapter.A, dim=1)
    ratio = (adapter.magnitude / norm).detach()
    expected = 2 * ratio[:, None] * (x @ adapter.A.t()).sum(0)[None, :]
    assert torch.allclose(adapter.B.grad, expected, rtol=1e-4, atol=1e-4)


def test_on_an_nf4_base() -> None:
    nf4 = quantised(base(), True)
    linear = AdaptedLinear(nf4, PARTS, {"k_proj": AdapterOptions(4, 8, dora=True)})
    linear.adapter("k_proj").reset("k_proj", 0)
    x = torch.randn(5, 24, requires_grad=True)
    assert torch.allclose(linear(x), nf4(x), atol=1e-5)
    magnitude = linear.adapter("k_proj").magnitude
    assert magnitude is not None
    assert torch.allclose(magnitude, torch.linalg.vector_norm(nf4.part_weight("k_proj"), dim=1))
