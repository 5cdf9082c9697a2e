"""How many parameters a decoder has, by owner, and how many of them a method trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields

from tunesmith.arch import ModelConfig
from tunesmith.cost.shapes import Method, block_linears, linears
from tunesmith.errors import RecipeError


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters by owner. `head` is 0 where it is tied to the embedding."""

    embedding: int
    attention: int
    mlp: int
    experts: int
    router: int
    norms: int
    head: int

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class TrainedParts:
    """What a method without adapters trains: whole blocks, and the parts outside them."""

    blocks: frozenset[int]
    embedding: bool
    head: bool
    norms: bool


def count_parameters(config: ModelConfig) -> ParameterCounts:
    """Parameters of the decoder by owner, adapters left out."""
    owners = dict.fromkeys(("attention", "mlp", "experts", "router"), 0)
    for linear in linears(config):
        owners[linear.owner] += linear.num_parameters
    return ParameterCounts(
        embedding=embedding_parameters(config),
        norms=config.num_hidden_layers * block_norm_parameters(config) + norm_parameters(config, config.hidden_size),
        head=0 if config.tie_word_embeddings else config.vocab_size * config.hidden_size,
        **owners,
    )


def embedding_parameters(config: ModelConfig) -> int:
    """V * D, and the learned positions where the family has them."""
    positions = config.max_position_embeddings if config.learned_positions else 0
    return (config.vocab_size + positions) * config.hidden_size


def norm_parameters(config: ModelConfig, size: int) -> int:
    """A norm over `size` features: a weight, and a bias for a layer norm."""
    return size if config.norm == "rms" else 2 * size


def block_norm_parameters(config: ModelConfig) -> int:
    """The norms of one block: before attention, before the MLP, and of queries and keys where they are normalised."""
    qk = 2 * norm_parameters(config, config.head_dim) if config.qk_norm else 0
    return 2 * norm_parameters(config, config.hidden_size) + qk


def block_parameters(config: ModelConfig, layer: int) -> int:
    """All parameters of one block."""
    return block_norm_parameters(config) + sum(linear.num_parameters for linear in block_linears(config, layer))


def adapter_parameters(config: ModelConfig, method: Method) -> int:
    """Values in the adapters of LoRA, DoRA or QLoRA; 0 for the other methods."""
    return sum(linear.adapter_parameters(method) for linear in linears(config))


def trained_parts(config: ModelConfig, method: Method) -> TrainedParts:
    """Which of the decoder's own parameters the method trains (none with adapters).

    A tied head and embedding are one matrix: naming either trains it.
    Raises: RecipeError for a name in `method.trainable` that is not known.
    """
    num_layers = config.num_hidden_layers
    if method.kind == "full":
        return TrainedParts(frozenset(range(num_layers)), True, True, True)
    if method.kind != "freeze":
        return TrainedParts(frozenset(), False, False, False)
    names = set(method.trainable)
    tied = config.tie_word_embeddings and bool(names & {"head", "embedding"})
    return TrainedParts(
        blocks=_trained_blocks(method.trainable, num_layers),
        embedding=tied or "embedding" in names,
        head=tied or "head" in names,
        norms="norms" in names,
    )


def _trained_blocks(trainable: Sequence[str], num_layers: int) -> frozenset[int]:
    blocks: set[int] = set()
    for name in trainable:
        if name in ("head", "embedding", "norms"):
            continue
        side, _, count = name.partition(":")
        if side not in ("first", "last") or not count.isdigit():
            raise RecipeError(f"method.trainable: {name!r} is not one of first:N, last:N, head, embedding, norms")
        number = min(int(count), num_layers)
        blocks |= set(range(number)) if side == "first" else set(range(num_layers - number, num_layers))
    return frozenset(blocks)


def trained_base_parameters(config: ModelConfig, method: Method) -> int:
    """The decoder's own parameters that the method trains: all of them for full, 0 with adapters."""
    parts = trained_parts(config, method)
    total = sum(block_parameters(config, layer) for layer in parts.blocks)
    total += config.vocab_size * config.hidden_size if _trains_head(config, parts) else 0
    total += embedding_parameters(config) if parts.embedding else 0
    return total + (_norms_outside(config, parts) if parts.norms else 0)


def _trains_head(config: ModelConfig, parts: TrainedParts) -> bool:
    return parts.head and not config.tie_word_embeddings


def _norms_outside(config: ModelConfig, parts: TrainedParts) -> int:
    """Norms that are not already counted with a trained block: the final one, and those of frozen blocks."""
    frozen_blocks = config.num_hidden_layers - len(parts.blocks)
    return frozen_blocks * block_norm_parameters(config) + norm_parameters(config, config.hidden_size)


def trainable_parameters(config: ModelConfig, method: Method) -> int:
    """Parameters that get a gradient: adapters, or what full and freeze train of the decoder itself."""
    return adapter_parameters(config, method) + trained_base_parameters(config, method)
