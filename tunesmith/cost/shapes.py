"""The matrices of a decoder, in the order a token meets them: what parameters, FLOPs and bytes are counted from."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from tunesmith.arch import ModelConfig

Owner = Literal["attention", "mlp", "experts", "router"]


class Method(Protocol):
    """What cost asks of a fine-tuning method (a recipe's `method` section has all of it)."""

    @property
    def kind(self) -> Literal["full", "freeze", "lora", "qlora"]: ...
    @property
    def rank(self) -> int: ...
    @property
    def targets(self) -> Sequence[str] | Literal["all"]: ...
    @property
    def dora(self) -> bool: ...
    @property
    def base(self) -> Literal["checkpoint", "fp8"]: ...
    @property
    def fp8_blocks(self) -> Literal["auto", "all", "inner"]: ...
    @property
    def double_quantisation(self) -> bool: ...
    @property
    def trainable(self) -> Sequence[str]: ...


@dataclass(frozen=True)
class MethodShape:
    """A method as plain values, where there is no recipe to take it from."""

    kind: Literal["full", "freeze", "lora", "qlora"] = "full"
    rank: int = 16
    targets: Sequence[str] | Literal["all"] = "all"
    dora: bool = False
    double_quantisation: bool = True
    trainable: Sequence[str] = ()
    base: Literal["checkpoint", "fp8"] = "checkpoint"
    fp8_blocks: Literal["auto", "all", "inner"] = "all"


@dataclass(frozen=True)
class LinearShape:
    """A fused linear of one block: `parts` are output features by projection, `copies` how many experts hold one.

    `active` is how many of the copies a token passes through.
    """

    layer: int
    owner: Owner
    in_features: int
    parts: Mapping[str, int]
    bias: bool
    copies: int = 1
    active: int = 1

    @property
    def out_features(self) -> int:
        """Output features of all parts together."""
        return sum(self.parts.values())

    @property
    def weight_size(self) -> int:
        """Values in the weight of one copy."""
        return self.in_features * self.out_features

    @property
    def num_parameters(self) -> int:
        """Weights and biases of all copies."""
        return self.copies * (self.weight_size + (self.out_features if self.bias else 0))

    def targeted(self, method: Method) -> tuple[str, ...]:
        """The parts that `method` gives adapters to: never a router's."""
        if method.kind not in ("lora", "qlora") or self.owner == "router":
            return ()
        return tuple(part for part in self.parts if method.targets == "all" or part in method.targets)

    def adapter_parameters(self, method: Method) -> int:
        """Adapter values on all copies: R * (in + out) for each targeted part, and DoRA's magnitude of `out`."""
        per_copy = 0
        for part in self.targeted(method):
            per_copy += method.rank * (self.in_features + self.parts[part]) + (self.parts[part] if method.dora else 0)
        return self.copies * per_copy


def linears(config: ModelConfig) -> tuple[LinearShape, ...]:
    """Every linear of the blocks, in forward order (the head is not one of them)."""
    return tuple(linear for layer in range(config.num_hidden_layers) for linear in block_linears(config, layer))


def block_linears(config: ModelConfig, layer: int) -> tuple[LinearShape, ...]:
    """The linears of one block, in forward order."""
    return (*_attention(config, layer), *_mlp(config, layer))


def _attention(config: ModelConfig, layer: int) -> tuple[LinearShape, ...]:
    query, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    gpt2 = config.family == "gpt2"
    parts = {"c_attn": 3 * query} if gpt2 else {"q_proj": query, "k_proj": kv, "v_proj": kv}
    output = "c_proj" if gpt2 else "o_proj"
    return (
        LinearShape(layer, "attention", config.hidden_size, parts, config.qkv_bias),
        LinearShape(layer, "attention", query, {output: config.hidden_size}, config.output_bias),
    )


def _mlp(config: ModelConfig, layer: int) -> tuple[LinearShape, ...]:
    hidden, bias = config.hidden_size, config.mlp_bias
    if config.moe is None or not config.is_moe(layer):
        up, down, size = _mlp_parts(config, config.intermediate_size)
        return LinearShape(layer, "mlp", hidden, up, bias), LinearShape(layer, "mlp", size, down, bias)
    moe = config.moe
    up, down, size = _mlp_parts(config, moe.intermediate_size)
    counts = (moe.num_experts, moe.num_experts_per_tok)
    return (
        LinearShape(layer, "router", hidden, {"gate": moe.num_experts}, False),
        LinearShape(layer, "experts", hidden, up, bias, *counts),
        LinearShape(layer, "experts", size, down, bias, *counts),
    )


def _mlp_parts(config: ModelConfig, size: int) -> tuple[dict[str, int], dict[str, int], int]:
    if config.gated_mlp:
        return {"gate_proj": size, "up_proj": size}, {"down_proj": config.hidden_size}, size
    return {"c_fc": size}, {"c_proj": config.hidden_size}, size
