"""One packed-token decoder for every family: configured, not copied."""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tunesmith.arch import ModelConfig
from tunesmith.errors import ModelError
from tunesmith.kernels.dropout import Noise
from tunesmith.model.attention import Attend, PackedAttention
from tunesmith.model.block import Block, Rope
from tunesmith.model.captured import CapturedBlocks
from tunesmith.model.checkpointing import run_checkpointed
from tunesmith.model.final_norm import final_norm
from tunesmith.model.fused_block import NOTHING, Again, FusedBlocks, FusedRope
from tunesmith.model.layers import Linear, make_norm, rope_frequencies, rope_tables
from tunesmith.model.offload import OffloadedPass, Offloader
from tunesmith.model.packed import PackedTokens
from tunesmith.model.stream import WHOLE, Stream
from tunesmith.model.transfer import CudaTransfer

Checkpointing = Literal["none", "block", "selective", "selective-qkv", "offload", "offload-block"]
_EAGER: dict[str, Checkpointing] = {"offload": "selective", "offload-block": "block", "selective-qkv": "selective"}
"""Kinds that only the written-out blocks have, and what the eager blocks do instead."""
_OFFLOADS = ("offload", "offload-block")
_AGAIN = {
    "selective": Again(gate_up=True),
    "selective-qkv": Again(gate_up=True, qkv=True),
    "offload": Again(gate_up=True),
}
"""What the written-out blocks make again in the backward pass."""


class Decoder(nn.Module):
    """Token ids in, the last hidden states out; `logits` applies the head.

    Weights may be held in any dtype; the stream runs in `compute_dtype` (the dtype of the embedding unless set).
    With `is_fused` the blocks run in their written-out form (model/fused.py), where they have one; with `captured` too,
    that is recorded as CUDA graphs while training. There, checkpointing "selective-qkv" makes query, key and value
    again too, "offload" is "selective" with what is held moved to the host, and `mlp_tile_tokens` are how many tokens
    the MLP goes through at a time; the eager blocks, which are the reference, know none of that. `has_same_weights`
    promises that no parameter was written since the last forward pass (a step of several micro-batches): what depends
    on them alone is kept.
    `head_copy` is the head once more, for whoever answers few requests at a time (model/head_copy.py).
    A stage of a pipeline holds some of the blocks; `incoming` is the stream out of the blocks before them, which takes
    the place of the embeddings.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backend: Literal["native", "transformers"] = "native"
        self.compute_dtype: torch.dtype | None = None
        self.stream: Stream = WHOLE
        self.incoming: Tensor | None = None
        self.checkpointing: Checkpointing = "none"
        self.noise_alpha = 0.0
        self.is_fused = False
        self._fused = FusedBlocks()
        self.captured: CapturedBlocks | None = None
        self.has_same_weights = False
        self.skip_last = 0
        self.mlp_tile_tokens: int | None = None
        self.offloader: Offloader | None = None
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
        self.head_copy: nn.Module | None = None

    def forward(self, tokens_T: Tensor, positions_T: Tensor, attend: Attend, lengths_T: Tensor | None = None) -> Tensor:
        """hidden_TD after the final norm, in the compute dtype: the rows of this process's tokens, where `stream` cuts
        them. lengths_T: see `embed`."""
        hidden = self.incoming
        if hidden is None:
            hidden = self.stream.own(self.embed(tokens_T, positions_T, lengths_T))
        kind = self.checkpointing if self.training else "none"
        if not self.is_fused:
            return self.norm(self._run_eager(hidden, positions_T, attend, kind))
        self._fused.of(self.blocks, hidden.dtype)
        seed = self._prepare_fused(hidden)
        return final_norm(self.norm, self._run_fused(hidden, positions_T, attend, kind, seed))

    def _run_eager(self, hidden: Tensor, positions_T: Tensor, attend: Attend, kind: Checkpointing) -> Tensor:
        rope = self.rope(positions_T, hidden.dtype)
        kind = _EAGER.get(kind, kind)
        for layer, block in enumerate(self.blocks):
            if isinstance(block, Block):
                hidden = run_checkpointed(self._kind_of(layer, kind), block, hidden, rope, attend[layer])
        return hidden

    def _prepare_fused(self, hidden: Tensor) -> Tensor | None:
        """What is not part of a recording: rows' norms are measured; the seed of this pass's dropout is drawn."""
        if not self.has_same_weights:
            self._fused.measure()
        return self._fused.draw(hidden.device) if self.training else None

    def _run_fused(
        self, hidden: Tensor, positions_T: Tensor, attend: Attend, kind: Checkpointing, seed: Tensor | None
    ) -> Tensor:
        rope = None if self.config.rope is None else FusedRope.of(self._inverse(positions_T.device), positions_T)
        blocks = self._fused.blocks
        self._fused.refresh()
        offloaded = self._begin_offloading(kind, hidden.device)
        tile, recipe_kind = self.mlp_tile_tokens, kind
        noise = None if seed is None else Noise(seed)
        for block in blocks:
            layer = block.layer
            kind = self._kind_of(layer, recipe_kind)
            again = _AGAIN.get(kind, NOTHING)
            if kind in ("selective", "selective-qkv") and block.up is None:
                # Selective checkpointing goes by operators, and the written-out parts write over theirs.
                tables = None if rope is None else rope.eager(hidden.dtype)
                hidden = run_checkpointed("selective", block.block, hidden, tables, attend[layer])
            elif offloaded is not None:
                fixed, is_last = block.fixed(rope), kind == "none" or block is blocks[-1]
                whole = kind == "offload-block"
                run = partial(run_checkpointed, "block", block, is_random=not block.is_whole) if whole else block
                hidden = offloaded.run(
                    run, hidden, rope, attend[layer], again, tile, noise, kept=fixed, is_last=is_last
                )
            else:
                outer = "block" if kind == "block" else "none"
                hidden = run_checkpointed(
                    outer, block, hidden, rope, attend[layer], again, tile, noise, is_random=not block.is_whole
                )
        return hidden

    def _kind_of(self, layer: int, kind: Checkpointing) -> Checkpointing:
        """How one block is checkpointed: the last `skip_last` hold everything, for a moment only."""
        return "none" if layer >= len(self.blocks) - self.skip_last else kind

    def checkpointing_by_block(self) -> dict[Checkpointing, int]:
        """How many of the blocks here are checkpointed in which way, where what was asked for may not be had."""
        fused = self._fused.of(self.blocks, self._stream_dtype) if self.is_fused else []
        remade = {block.layer for block in fused if block.up is not None and block.qkv is not None}
        here = [layer for layer, block in enumerate(self.blocks) if isinstance(block, Block)]
        kinds = [self._kind_of(layer, self.checkpointing) for layer in here]
        if not self.is_fused:
            return Counter(_EAGER.get(kind, kind) for kind in kinds)
        had = zip(here, kinds, strict=True)
        return Counter("selective" if k == "selective-qkv" and layer not in remade else k for layer, k in had)

    def _begin_offloading(self, kind: Checkpointing, device: torch.device) -> OffloadedPass | None:
        if kind not in _OFFLOADS or not torch.is_grad_enabled():
            return None
        if self.offloader is None:
            self.offloader = Offloader(CudaTransfer(device))
        return self.offloader.begin()

    @property
    def has_written_mlps(self) -> bool:
        """Whether the MLP of every block has a written-out form."""
        return all(block.up is not None for block in self._fused.of(self.blocks, self._stream_dtype))

    @property
    def num_fused_blocks(self) -> int:
        """How many blocks run wholly in their written-out form."""
        return sum(b.is_whole for b in self._fused.of(self.blocks, self._stream_dtype)) if self.is_fused else 0

    def _captures(self, pack: PackedTokens) -> bool:
        """Whether the blocks run as CUDA graphs: in training, where no block is left to its eager form."""
        if self.captured is None or not (self.is_fused and self.training and torch.is_grad_enabled()):
            return False
        if not pack.tokens_T.is_cuda:
            return False
        self._fused.of(self.blocks, self._stream_dtype)
        return self._fused.are_whole

    def _run_captured(self, hidden: Tensor, pack: PackedTokens) -> Tensor:
        assert self.captured is not None
        self.captured.belong_to(self._fused.blocks)

        def run(hidden: Tensor, pack: PackedTokens, seed: Tensor | None) -> Tensor:
            attend = PackedAttention(self.config, pack)
            return self._run_fused(hidden, pack.positions_T, attend, self.checkpointing, seed)

        seed = self._prepare_fused(hidden)
        kind = f"{self.checkpointing}, {self.skip_last} spared"
        return self.captured(run, hidden, pack, kind, self._fused.trained(), seed)

    def hidden(self, pack: PackedTokens) -> Tensor:
        """hidden_TD of packed documents, each attending to itself only (what training and evaluation call).

        Where `stream` cuts the tokens, the rows of this process's own.
        Raises: ModelError when a document is longer than a model with learned positions has positions.
        """
        if self.positions is not None and pack.max_length > self.positions.num_embeddings:
            raise ModelError(
                f"a document has {pack.max_length} tokens, "
                f"and the model {self.positions.num_embeddings} learned positions"
            )
        pack = self.stream.padded(pack)
        lengths_T = pack.length_of_each_token() if self.training and self.noise_alpha else None
        if self._captures(pack):
            hidden = self.stream.own(self.embed(pack.tokens_T, pack.positions_T, lengths_T))
            return final_norm(self.norm, self._run_captured(hidden, pack))
        return self(pack.tokens_T, pack.positions_T, PackedAttention(self.config, pack), lengths_T)

    def embed(self, tokens_T: Tensor, positions_T: Tensor, lengths_T: Tensor | None = None) -> Tensor:
        """The embeddings, in the compute dtype, with NEFTune's noise where `lengths_T` is given.

        lengths_T: the length of each token's document.
        Source of the noise: arXiv 2310.05914, section 2: uniform in ±alpha / sqrt(length * D).
        """
        hidden = F.embedding(tokens_T, self.embedding.weight).to(self._stream_dtype)
        if lengths_T is not None:
            scale_T = self.noise_alpha / (lengths_T * hidden.shape[1]).sqrt()
            hidden = hidden + torch.empty_like(hidden).uniform_(-1, 1) * scale_T[:, None].to(hidden.dtype)
        if self.positions is not None:
            hidden = hidden + F.embedding(positions_T, self.positions.weight).to(hidden.dtype)
        return hidden

    @property
    def _stream_dtype(self) -> torch.dtype:
        return self.compute_dtype or self.embedding.weight.dtype

    def rope(self, positions_T: Tensor, dtype: torch.dtype) -> Rope:
        """cos and sin for these positions, or None where positions are learned."""
        if self.config.rope is None:
            return None
        return rope_tables(self._inverse(positions_T.device), positions_T, dtype)

    def _inverse(self, device: torch.device) -> Tensor:
        """The inverse frequencies on a device."""
        assert self.config.rope is not None
        inverse = self._rope_frequencies.get(device)
        if inverse is None:
            # Copied once: a copy waits for the device. Never as an inference tensor, which training could not use.
            with torch.inference_mode(False):
                inverse = rope_frequencies(self.config.rope, self.config.head_dim).to(device)
            self._rope_frequencies[device] = inverse
        return inverse

    def logits(self, hidden_TD: Tensor) -> Tensor:
        """logits_TV in the dtype of the hidden states."""
        if self.head is not None:
            return self.head(hidden_TD)
        return F.linear(hidden_TD, self.embedding.weight.to(hidden_TD.dtype))


def _embedding(rows: int, columns: int) -> nn.Embedding:
    """Without torch's random start, which nothing uses: on the meta device it alone imports torch's whole compiler."""
    return nn.Embedding(rows, columns, _weight=torch.empty(rows, columns))
