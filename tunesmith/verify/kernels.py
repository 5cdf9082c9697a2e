"""Every operation of the model against torch's own, on the run's shapes: its error against float64, forward and
backward, is at most twice that of the torch operator in the same dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from tunesmith.arch import ModelConfig
from tunesmith.kernels.fp8 import quantize_rows_reference
from tunesmith.kernels.nf4 import dequantize_nf4, dequantize_reference
from tunesmith.model.attention import PackedAttention, causal_mask
from tunesmith.model.fp8 import Fp8Linear
from tunesmith.model.layers import Linear, apply_rope, make_norm, rope_frequencies, rope_tables
from tunesmith.model.lora import AdaptedLinear, AdapterOptions
from tunesmith.model.packed import PackedTokens, packed
from tunesmith.model.quant import NF4Linear, dense_weight, fp8_weight, quantised, quantised_as, set_compute
from tunesmith.model.trained_fp8 import TrainedFp8Linear
from tunesmith.model.uncompiled import gradients
from tunesmith.recipe.schema import MethodSection, TrainSection
from tunesmith.train.losses import cross_entropy_sum
from tunesmith.verify.check import Outcome

LIMIT = 2.0
FP8_LIMIT = 0.01
Operation = Callable[..., Tensor]


@dataclass(frozen=True)
class Shapes:
    """The run's shapes, its tokens and words limited so that the checks stay quick."""

    config: ModelConfig
    tokens: int
    vocab_size: int

    def describe(self) -> str:
        """In words."""
        return f"{self.tokens} tokens, hidden {self.config.hidden_size}"


@dataclass(frozen=True)
class Case:
    """ours(*inputs) against torch's operator; truth (theirs unless given) runs in float64."""

    name: str
    ours: Operation
    theirs: Operation
    inputs: tuple[Tensor, ...]
    detail: str
    truth: Operation | None = None


def shapes_of(config: ModelConfig, train: TrainSection, device: torch.device) -> Shapes:
    """Real widths; on a CPU few tokens, and nowhere more words than make a matrix of 2^26 weights."""
    most = 1024 if device.type == "cuda" else 96
    vocab_size = min(config.vocab_size, max(256, 2**26 // config.hidden_size))
    if device.type == "cuda" and vocab_size < config.vocab_size:
        vocab_size -= vocab_size % 128  # as aligned as real vocabularies are: the run's own kernel, not another
    if device.type == "cpu":
        vocab_size = min(vocab_size, max(256, 2**21 // config.hidden_size))
    return Shapes(config, min(train.micro_batch_tokens or most, most), vocab_size)


def compare(case: Case) -> Outcome:
    """The larger of the ratios (error of ours) / (error of torch's) of the output and of every gradient."""
    dtype = next(x.dtype for x in case.inputs if x.is_floating_point())
    truth = _results(case.truth or case.theirs, [x.double() if x.is_floating_point() else x for x in case.inputs])
    ours, theirs = _results(case.ours, case.inputs), _results(case.theirs, case.inputs)
    eps = torch.finfo(dtype).eps
    worst = 0.0
    for a, b, exact in zip(ours, theirs, truth, strict=True):
        # Where torch's operator is exact by luck, a rounding of ours is no fault; a lone number is a matter of luck.
        floor = 2 * eps if exact.numel() == 1 else eps / 8
        worst = max(worst, _error(a, exact) / max(_error(b, exact), floor))
    error = max(_error(a, exact) for a, exact in zip(ours, truth, strict=True))
    short = str(dtype).removeprefix("torch.")
    return Outcome(worst, LIMIT, f"relative error {error:.2g} in {short}, as a multiple of torch's; {case.detail}")


def _results(operation: Operation, inputs: Sequence[Tensor]) -> list[Tensor]:
    """The output and the gradient of every floating-point input, for one fixed direction."""
    leaves = [x.detach().clone().requires_grad_(x.is_floating_point()) for x in inputs]
    with torch.enable_grad():
        out = operation(*leaves)
        generator = torch.Generator().manual_seed(1)
        direction = torch.randn(out.shape, generator=generator).to(out.device).to(inputs[0].dtype).to(out.dtype)
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = gradients(out, wanted, direction)
    return [out.detach(), *[torch.zeros_like(w) if g is None else g for g, w in zip(found, wanted, strict=True)]]


def _error(result: Tensor, truth: Tensor) -> float:
    exact = truth.double()
    difference = torch.linalg.vector_norm(result.double() - exact)
    return float(difference / torch.linalg.vector_norm(exact).clamp(min=1e-300))


def model_cases(shapes: Shapes, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """Norm, rope and attention (and its window) of the native decoder."""
    make = _Random(device, dtype)
    yield _norm_case(shapes, make)
    if shapes.config.rope is not None:
        yield _rope_case(shapes, make)
    config = _with_short_window(shapes)
    windows = {config.window(layer): layer for layer in range(config.num_hidden_layers)}
    for layer in windows.values():
        yield _attention_case(config, shapes.tokens, make, layer)


def _with_short_window(shapes: Shapes) -> ModelConfig:
    """A window that these few tokens outgrow, so that it is tried at all."""
    window = shapes.config.sliding_window
    return shapes.config if window is None else replace(shapes.config, sliding_window=min(window, shapes.tokens // 4))


def loss_case(shapes: Shapes, device: torch.device, dtype: torch.dtype, chunk_tokens: int) -> Case:
    """The chunked loss over the trained tokens against the whole cross-entropy."""
    make = _Random(device, dtype)
    hidden = make(shapes.tokens, shapes.config.hidden_size)
    weight = make(shapes.vocab_size, shapes.config.hidden_size, scale=0.05)
    index = torch.arange(0, shapes.tokens, 2, device=device)
    targets = make.integers(index.numel(), shapes.vocab_size)
    chunk = min(chunk_tokens, max(1, index.numel() // 3))

    def ours(hidden: Tensor, weight: Tensor) -> Tensor:
        return cross_entropy_sum(hidden, index, targets, weight, chunk)

    def theirs(hidden: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(hidden[index], weight)
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, targets, reduction="sum")

    detail = f"{index.numel()} trained of {shapes.tokens} tokens, {shapes.vocab_size} words, chunks of {chunk}"
    return Case("chunked loss", ours, theirs, (hidden, weight), detail)


def linear_cases(shapes: Shapes, method: MethodSection, device: torch.device, dtype: torch.dtype) -> Iterator[Case]:
    """The linears that the method puts in place: NF4's product and the adapted product."""
    make = _Random(device, dtype)
    linear = _dense_linear(shapes.config, make)
    x = make(shapes.tokens, linear.in_features)
    base: nn.Module = linear
    if method.quantisation is not None:
        base = quantised_as(linear, method.quantisation)
        set_compute(base, "weights")
    if method.kind == "qlora":
        weight = dense_weight(base, dtype)
        yield Case("NF4 linear", base, lambda x: F.linear(x, weight.to(x.dtype)), (x,), _width(linear))
    yield _adapter_case(base, linear, method, make, x)


def nf4_dequantise(shapes: Shapes, method: MethodSection, device: torch.device, dtype: torch.dtype) -> Outcome:
    """The dequantised weight against the reference in plain torch: equal in every bit."""
    base = quantised(_dense_linear(shapes.config, _Random(device, dtype)), method.double_quantisation)
    assert isinstance(base, NF4Linear)
    worst = 0.0
    for part in base.parts:
        held = base.part_nf4(part)
        difference = dequantize_nf4(held, dtype).float() - dequantize_reference(held, dtype).float()
        worst = max(worst, float(difference.abs().max()))
    return Outcome(worst, 0.0, f"largest difference between kernel and reference, {_width(base)}")


def fp8_products(shapes: Shapes, method: MethodSection, device: torch.device, dtype: torch.dtype) -> Outcome:
    """Forward product and input gradient in fp8 against float64 products of the same codes and scales; of a linear
    that is trained, its weight's gradient too.

    The limit is bfloat16's output and the hardware's accumulation; what rounding to fp8 costs is in no check: it is the
    format's price, and shows in the loss.
    """
    make = _Random(device, dtype)
    if method.quantisation is None:
        return _trained_products(shapes, make)
    base = quantised_as(_dense_linear(shapes.config, make), method.quantisation)
    set_compute(base, "fp8")
    held = fp8_weight(base)
    x, g = make(shapes.tokens, base.in_features), make(shapes.tokens, base.out_features)
    codes = held.codes.double()
    forward = _dequantised(x) @ (codes * held.scale[:, None]).t()
    backward = _dequantised(g, held.scale) @ codes
    worst = max(_error(base.product(x), forward), _error(base.input_grad(g), backward))
    return Outcome(worst, FP8_LIMIT, f"relative error of the larger of both products, {_width(base)}")


def _trained_products(shapes: Shapes, make: _Random) -> Outcome:
    """The three products of a linear that is trained in fp8."""
    linear = TrainedFp8Linear(_dense_linear(shapes.config, make))
    x, g = make(shapes.tokens, linear.in_features), make(shapes.tokens, linear.out_features)
    weight = linear.weight.detach()
    pairs = (
        (linear.product(x), _dequantised(x) @ _dequantised(weight).t()),
        (linear.input_grad(g), _dequantised(g) @ _dequantised(weight.t()).t()),
        (linear.weight_grad(g, x), _dequantised(g.t()) @ _dequantised(x.t()).t()),
    )
    worst = max(_error(found, exact) for found, exact in pairs)
    return Outcome(worst, FP8_LIMIT, f"relative error of the largest of three products, {_width(linear)}")


def _dequantised(x: Tensor, fold: Tensor | None = None) -> Tensor:
    codes, scale = quantize_rows_reference(x, fold)
    return codes.double() * scale


class _Random:
    """Random tensors of one dtype on one device, the same at every call."""

    def __init__(self, device: torch.device, dtype: torch.dtype) -> None:
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator(device).manual_seed(0)

    def __call__(self, *shape: int, scale: float = 1.0) -> Tensor:
        wide = torch.randn(shape, generator=self.generator, device=self.device) * scale
        return wide.to(self.dtype)

    def integers(self, count: int, high: int) -> Tensor:
        return torch.randint(high, (count,), generator=self.generator, device=self.device)


def _norm_case(shapes: Shapes, make: _Random) -> Case:
    config = shapes.config
    norm: Any = make_norm(config, config.hidden_size).to(make.device)
    inputs = [make(shapes.tokens, config.hidden_size), make(config.hidden_size)]
    if config.norm == "layer":
        inputs.append(make(config.hidden_size))

    def ours(x: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(("weight", "bias"), weights, strict=False))
        return torch.func.functional_call(norm, named, (x,))

    def theirs(x: Tensor, *weights: Tensor) -> Tensor:
        if config.norm == "layer":
            return F.layer_norm(x, (config.hidden_size,), weights[0], weights[1], config.norm_eps)
        return F.rms_norm(x, (config.hidden_size,), weights[0], config.norm_eps)

    return Case("layer norm" if config.norm == "layer" else "RMS norm", ours, theirs, tuple(inputs), shapes.describe())


def _rope_case(shapes: Shapes, make: _Random) -> Case:
    config = shapes.config
    assert config.rope is not None
    inverse = rope_frequencies(config.rope, config.head_dim).to(make.device)
    positions = torch.arange(shapes.tokens, device=make.device)
    x = make(shapes.tokens, config.num_attention_heads, config.head_dim)

    def theirs(x: Tensor) -> Tensor:
        """A rotation of complex numbers, where the halves of a head are their real and imaginary parts."""
        wide = torch.float64 if x.dtype == torch.float64 else torch.float32
        angles = positions.to(wide)[:, None] * inverse.to(wide)[None, :]
        cos, sin = angles.cos().to(x.dtype)[:, None, :], angles.sin().to(x.dtype)[:, None, :]
        real, imaginary = x.chunk(2, dim=-1)
        return torch.cat((real * cos - imaginary * sin, imaginary * cos + real * sin), dim=-1)

    def ours(x: Tensor) -> Tensor:
        return apply_rope(x, *rope_tables(inverse, positions, x.dtype))

    return Case("rope", ours, theirs, (x,), f"{shapes.tokens} positions, {config.num_attention_heads} heads")


def _attention_case(config: ModelConfig, tokens: int, make: _Random, layer: int) -> Case:
    window = config.window(layer)
    lengths = _ragged(tokens)
    pack = packed(torch.zeros(tokens, dtype=torch.int64, device=make.device), lengths)
    query = make(tokens, config.num_attention_heads, config.head_dim)
    key, value = (make(tokens, config.num_key_value_heads, config.head_dim) for _ in range(2))
    attend = PackedAttention(config, pack)[layer]
    detail = f"documents of {', '.join(map(str, lengths))} tokens, {config.num_attention_heads} heads"
    name = "attention" if window is None else "sliding-window attention"
    detail += "" if window is None else f", window {window}"
    theirs = _each_document(pack, window, exact=False)
    return Case(name, attend, theirs, (query, key, value), detail, _each_document(pack, window, exact=True))


def _ragged(tokens: int) -> tuple[int, ...]:
    """Lengths of three documents, one of them a single token."""
    second = tokens // 3
    return (tokens - second - 1, 1, second)


def _each_document(pack: PackedTokens, window: int | None, *, exact: bool) -> Operation:
    """One document after the other: torch's operator, or the formula softmax(q k / sqrt(H)) v written out."""

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        parts = zip(*(x.split(list(pack.lengths)) for x in (query, key, value)), strict=True)
        return torch.cat([one(q.transpose(0, 1), k.transpose(0, 1), v.transpose(0, 1)) for q, k, v in parts])

    def one(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        group = query.shape[0] // key.shape[0]
        key, value = key.repeat_interleave(group, 0), value.repeat_interleave(group, 0)
        mask = causal_mask(query.shape[1], key.shape[1], window, query.device)
        if not exact:
            # cuDNN's attention takes seconds to plan its first call.
            with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.MATH]):
                return F.scaled_dot_product_attention(query[None], key[None], value[None], mask)[0].transpose(0, 1)
        scores = query @ key.transpose(1, 2) / query.shape[-1] ** 0.5
        return (scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value).transpose(0, 1)

    return attend


def _dense_linear(config: ModelConfig, make: _Random) -> Linear:
    """The query, key and value projections of the run's model, random."""
    kv_size = config.num_key_value_heads * config.head_dim
    sizes = {"q_proj": config.num_attention_heads * config.head_dim, "k_proj": kv_size, "v_proj": kv_size}
    with torch.device(make.device):
        linear = Linear(config.hidden_size, sizes, bias=False).to(make.dtype)
    with torch.no_grad():
        linear.weight.copy_(make(*linear.weight.shape, scale=0.02))
    return linear.requires_grad_(False)


def _adapter_case(base: nn.Module, linear: Linear, method: MethodSection, make: _Random, x: Tensor) -> Case:
    options = AdapterOptions(method.rank, method.alpha, 0.0, method.rslora, method.dora)
    adapted = AdaptedLinear(base, linear.parts, dict.fromkeys(linear.parts, options), linear.in_features)
    factors = []
    for part in linear.parts:
        adapter = adapted.adapter(part).to(make.device)
        factors += [make(*adapter.A.shape, scale=0.05), make(*adapter.B.shape, scale=0.05)]
    names = [f"adapters.{part}.{name}" for part in linear.parts for name in ("A", "B")]
    weight = dense_weight(base, make.dtype)
    magnitudes = [adapted.adapter(part).magnitude for part in linear.parts]

    def ours(x: Tensor, *factors: Tensor) -> Tensor:
        return torch.func.functional_call(adapted, dict(zip(names, factors, strict=True)), (x,))

    def theirs(x: Tensor, *factors: Tensor) -> Tensor:
        outputs = []
        for i, part in enumerate(linear.parts):
            rows, down, up = weight[linear.rows(part)].to(x.dtype), factors[2 * i], factors[2 * i + 1]
            out = F.linear(x, rows) + options.scale * F.linear(F.linear(x, down), up)
            outputs.append(out if magnitudes[i] is None else out * _dora_ratio(rows, down, up, magnitudes[i]))
        return torch.cat(outputs, dim=-1)

    def _dora_ratio(rows: Tensor, down: Tensor, up: Tensor, magnitude: Any) -> Tensor:
        norm = torch.linalg.vector_norm((rows + options.scale * up @ down).detach(), dim=1)
        return magnitude.to(rows.dtype) / norm

    name = "DoRA linear" if method.dora else "LoRA linear"
    return Case(name, ours, theirs, (x, *factors), f"rank {method.rank}, {_width(linear)}")


def _width(linear: Linear | NF4Linear | Fp8Linear) -> str:
    return f"{linear.in_features} -> {linear.out_features}"
