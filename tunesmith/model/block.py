"""A decoder's block, operator by operator: the reference that the written-out form must equal."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from tunesmith.arch import ModelConfig
from tunesmith.model.attention import AttendLayer
from tunesmith.model.layers import ACTIVATIONS, Linear, apply_rope, make_norm
from tunesmith.model.moe import Experts
from tunesmith.model.stream import WHOLE, Stream

Rope = tuple[Tensor, Tensor] | None


class Attention(nn.Module):
    """Projections around the mixer: qkv -> (norm) -> rope -> attend -> output projection."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        query_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        parts = {"c_attn": 3 * query_size}
        if config.family != "gpt2":
            parts = {"q_proj": query_size, "k_proj": kv_size, "v_proj": kv_size}
        output = "c_proj" if config.family == "gpt2" else "o_proj"
        self.qkv = Linear(config.hidden_size, parts, config.qkv_bias)
        self.output = Linear(query_size, {output: config.hidden_size}, config.output_bias)
        self.q_norm: nn.Module | None = make_norm(config, self.head_dim) if config.qk_norm else None
        self.k_norm: nn.Module | None = make_norm(config, self.head_dim) if config.qk_norm else None

    def forward(self, x_TD: Tensor, rope: Rope, attend: AttendLayer) -> Tensor:
        query, key, value = self.project(x_TD, rope)
        return self.output(attend(query, key, value).reshape(x_TD.shape[0], -1))

    def project(self, x_TD: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        """query_TNH, key_TKH, value_TKH, ready for the mixer."""
        heads = (self.num_heads, self.num_kv_heads, self.num_kv_heads)
        fused = self.qkv(x_TD).view(x_TD.shape[0], sum(heads), self.head_dim)
        query, key, value = fused.split(heads, dim=1)
        if self.q_norm is not None and self.k_norm is not None:
            query, key = self.q_norm(query), self.k_norm(key)
        if rope is not None:
            query, key = apply_rope(query, *rope), apply_rope(key, *rope)
        return query, key, value


class Mlp(nn.Module):
    """down(act(gate(x)) * up(x)), or down(act(up(x))) where the family has no gate."""

    def __init__(self, config: ModelConfig, intermediate_size: int) -> None:
        super().__init__()
        self.gated = config.gated_mlp
        self.is_swiglu = config.gated_mlp and config.activation == "silu"
        self.activation = ACTIVATIONS[config.activation]
        up, down = {"gate_proj": intermediate_size, "up_proj": intermediate_size}, "down_proj"
        if not self.gated:
            up, down = {"c_fc": intermediate_size}, "c_proj"
        self.up = Linear(config.hidden_size, up, config.mlp_bias)
        self.down = Linear(intermediate_size, {down: config.hidden_size}, config.mlp_bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        up = self.up(x_TD)
        if not self.gated:
            return self.down(self.activation(up))
        gate, up = up.chunk(2, dim=-1)
        return self.down(self.activation(gate) * up)


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.stream: Stream = WHOLE
        self.attention_norm = make_norm(config, config.hidden_size)
        self.attention = Attention(config)
        self.mlp_norm = make_norm(config, config.hidden_size)
        if config.is_moe(layer):
            assert config.moe is not None
            self.mlp: nn.Module = Experts(
                config.moe, config.hidden_size, partial(Mlp, config, config.moe.intermediate_size)
            )
        else:
            self.mlp = Mlp(config, config.intermediate_size)

    def forward(
        self, x_TD: Tensor, rope: Rope, attend: AttendLayer, written: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """The block's output.

        written: computes it in another form, given x. What watches forward passes, and gathers a block's sharded
        weights for them, then sees this one too.
        """
        if written is not None:
            return written(x_TD)
        return self.feed_forward(x_TD + self._mixed(x_TD, rope, attend))

    def feed_forward(self, x_TD: Tensor) -> Tensor:
        """x + mlp(norm(x))."""
        return x_TD + self.stream.summed(self.mlp(self.stream.gathered(self.mlp_norm(x_TD))))

    def _mixed(self, x_TD: Tensor, rope: Rope, attend: AttendLayer) -> Tensor:
        return self.stream.summed(self.attention(self.stream.gathered(self.attention_norm(x_TD)), rope, attend))
