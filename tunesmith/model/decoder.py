"""One packed-token decoder for every family: configured, not copied."""

from __future__ import annotations

from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.model.attention import Attend, AttendLayer, PackedAttention
from tunesmith.model.checkpointing import run_checkpointed
from tunesmith.model.layers import ACTIVATIONS, Linear, apply_rope, make_norm, rope_frequencies, rope_tables
from tunesmith.model.moe import Experts
from tunesmith.model.packed import PackedTokens

Checkpointing = Literal["none", "block", "selective"]
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

    def forward(self, x_TD: Tensor, rope: Rope, attend: AttendLayer) -> Tensor:
        x_TD = x_TD + self.attention(self.attention_norm(x_TD), rope, attend)
        return x_TD + self.mlp(self.mlp_norm(x_TD))


class Decoder(nn.Module):
    """Token ids in, the last hidden states out; `logits` applies the head.

    Weights may be held in any dtype; the stream runs in `compute_dtype` (the dtype of the embedding unless set).
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: Literal["native", "transformers"] = "native"
        self.compute_dtype: torch.dtype | None = None
        self.checkpointing: Checkpointing = "none"
        self.noise_alpha = 0.0
        self._rope_frequencies: dict[torch.device, Tensor] = {}
        self.embedding = _embedding(config.vocab_size, config.hidden_size)
        self.positions = (
            _embedding(config.max_position_embeddings, config.hidden_size) if config.learned_positions else None
        )
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = make_norm(config, config.hidden_size)
        self.head = (
            None if config.tie_word_embeddings else Linear(config.hidden_size, {"lm_head": config.vocab_size}, False)
        )

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, lengths_T: Tensor | None = None) -> Tensor:
        """hidden_TD after the final norm, in the compute dtype. lengths_T: see `embed`."""
        hidden = self.embed(tokens_T, positions_T, lengths_T)
        rope = self.rope(positions_T, hidden.dtype)
        for layer, block in enumerate(self.blocks):
            hidden = run_checkpointed(
                self.checkpointing if self.training else "none", block, hidden, rope, attend[layer]
            )
        return self.norm(hidden)

    def hidden(self, pack: PackedTokens) -> Tensor:
        """hidden_TD of packed documents, each attending to itself only (what training and evaluation call).

        Raises: ModelError when a document is longer than a model with learned positions has positions.
        """
        if self.positions is not None and pack.max_length > self.positions.num_embeddings:
            raise ModelError(
                f"a document has {pack.max_length} tokens, "
                f"and the model {self.positions.num_embeddings} learned positions"
            )
        lengths_T = pack.length_of_each_token() if self.training and self.noise_alpha else None
        return self(pack.tokens_T, pack.positions_T, PackedAttention(self.config, pack), lengths_T)

    def embed(self, tokens_T: Tensor, positions_T: Tensor, lengths_T: Tensor | None = None) -> Tensor:
        """The embeddings, in the compute dtype, with NEFTune's noise where `lengths_T` is given.

        lengths_T: the length of each token's document.
        Source of the noise: arXiv 2310.05914, section 2: uniform in ±alpha / sqrt(length * D).
        """
        hidden = F.embedding(tokens_T, self.embedding.weight).to(self.compute_dtype or self.embedding.weight.dtype)
        if lengths_T is not None:
            scale_T = self.noise_alpha / (lengths_T * hidden.shape[1]).sqrt()
            hidden = hidden + torch.empty_like(hidden).uniform_(-1, 1) * scale_T[:, None].to(hidden.dtype)
        if self.positions is not None:
            hidden = hidden + F.embedding(positions_T, self.positions.weight).to(hidden.dtype)
        return hidden

    def rope(self, positions_T: Tensor, dtype: torch.dtype) -> Rope:
        """cos and sin for these positions, or None where positions are learned."""
        if self.config.rope is None:
            return None
        inverse = self._rope_frequencies.get(positions_T.device)
        if inverse is None:
            # Copied once: a copy waits for the device. Never as an inference tensor, which training could not use.
            with torch.inference_mode(False):
                inverse = rope_frequencies(self.config.rope, self.config.head_dim).to(positions_T.device)
            self._rope_frequencies[positions_T.device] = inverse
        return rope_tables(inverse, positions_T, dtype)

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in the dtype of the hidden states."""
        if self.head is not None:
            return self.head(hidden_TD)
        return F.linear(hidden_TD, self.embedding.weight.to(hidden_TD.dtype))


def _embedding(rows: int, columns: int) -> nn.Embedding:
    """Without torch's random start, which nothing uses: on the meta device it alone imports torch's whole compiler."""
    return nn.Embedding(rows, columns, _weight=torch.empty(rows, columns))
