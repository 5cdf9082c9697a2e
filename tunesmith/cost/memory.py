"""Bytes of what training holds from step to step, by owner: weights, adapters, gradients, optimiser states.

Activations are not here: they depend on kernels and are measured (`bench`) or predicted (`plan`); except those that
are offloaded, whose place on the host is asked for in advance.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from tunesmith.arch import ModelConfig
from tunesmith.cost.params import adapter_parameters, count_parameters, trained_base_parameters
from tunesmith.cost.shapes import LinearShape, Method, MethodShape, block_linears, linears
from tunesmith.formats import FORMATS
from tunesmith.units import MIB, ceil_div

Optimizer = Literal["adamw", "adamw8bit", "sgd"]
DTypeName = Literal["float32", "bfloat16", "float16"]
_LEAST_BLOCKS = 3  # of fewer, an fp8 base holds all in fp8
LEAST_MOVED_BYTES = MIB
"""Of a trained tensor, for its optimiser states to wait on the host: smaller ones are not worth a copy."""
BLOCK_SIZE = 256  # values that share one scale in 8-bit optimiser states


@dataclass(frozen=True)
class OwnerBytes:
    """Bytes by owner on the device; `optimizer_host`: those of the optimiser's states that wait in host memory."""

    weights: int
    adapters: int
    gradients: int
    optimizer: int
    optimizer_host: int = 0

    @property
    def total(self) -> int:
        """All owners together, on the device."""
        return self.weights + self.adapters + self.gradients + self.optimizer


def state_bytes(
    config: ModelConfig,
    method: Method,
    *,
    weight_dtype: DTypeName,
    master_dtype: DTypeName = "float32",
    optimizer: Optimizer = "adamw",
    offload_optimizer: bool = False,
) -> OwnerBytes:
    """Bytes of weights, adapters, gradients and optimiser states.

    Args: `weight_dtype` holds frozen weights, `master_dtype` trained ones, their gradients and AdamW's two moments.
    offload_optimizer: the moments wait in host memory, all of them: the few of tensors under `LEAST_MOVED_BYTES`, which
    stay on the device, are not told apart.
    """
    master = FORMATS[master_dtype].bytes_for(1)
    adapters = adapter_parameters(config, method)
    trained = trained_base_parameters(config, method)
    states = optimizer_bytes(adapters + trained, optimizer, master)
    return OwnerBytes(
        weights=frozen_weight_bytes(config, method, weight_dtype) + trained * master,
        adapters=adapters * master,
        gradients=(adapters + trained) * master,
        optimizer=0 if offload_optimizer else states,
        optimizer_host=states if offload_optimizer else 0,
    )


def frozen_weight_bytes(config: ModelConfig, method: Method, weight_dtype: DTypeName) -> int:
    """Bytes of the weights that are not trained; the projections of the blocks are NF4 with qlora, or fp8."""
    frozen = count_parameters(config).total - trained_base_parameters(config, method)
    width = FORMATS[weight_dtype].bytes_for(1)
    if method.kind != "qlora" and method.base != "fp8":
        return frozen * width
    quantised = [
        linear for linear in linears(config) if linear.owner != "router" and is_quantised(linear, config, method)
    ]
    rest = frozen - sum(linear.copies * linear.weight_size for linear in quantised)
    return rest * width + sum(linear.copies * _part_bytes(linear, method) for linear in quantised)


def keeps_outer_blocks(config: ModelConfig, weight_dtype: DTypeName) -> bool:
    """Whether an fp8 base affords its first and last block in `weight_dtype`: for at most a tenth of its bytes more.

    Or for 64 MiB: small models feel roundings most, and nobody misses that.
    """
    whole = frozen_weight_bytes(config, MethodShape("lora", base="fp8"), weight_dtype)
    inner = frozen_weight_bytes(config, MethodShape("lora", base="fp8", fp8_blocks="inner"), weight_dtype)
    return config.num_hidden_layers >= _LEAST_BLOCKS and inner - whole <= max(whole // 10, 64 * MIB)


def is_quantised(linear: LinearShape, config: ModelConfig, method: Method) -> bool:
    """Whether the block of this linear is quantised: of an fp8 base perhaps the inner ones only."""
    if method.kind == "qlora" or method.fp8_blocks != "inner" or config.num_hidden_layers < _LEAST_BLOCKS:
        return True
    return 0 < linear.layer < config.num_hidden_layers - 1


def _part_bytes(linear: LinearShape, method: Method) -> int:
    """Bytes of one copy: every projection is quantised by itself; in fp8 a row of it has a float32 scale."""
    if method.base == "fp8":
        return FORMATS["fp8"].bytes_for(linear.weight_size) + FORMATS["float32"].bytes_for(linear.out_features)
    nf4 = FORMATS["nf4-double" if method.double_quantisation else "nf4"]
    return sum(nf4.bytes_for(linear.in_features * size) for size in linear.parts.values())


def optimizer_bytes(num_trained: int, optimizer: Optimizer, width: int) -> int:
    """Bytes of the optimiser's states: two moments for AdamW, none for plain SGD.

    8-bit AdamW holds a byte for each moment and value, and a float32 scale for every block of values
    (as if all trained values were one tensor: a tensor that ends inside a block adds one scale).
    """
    if optimizer == "sgd":
        return 0
    if optimizer == "adamw":
        return 2 * num_trained * width
    return 2 * (num_trained + 4 * ceil_div(num_trained, BLOCK_SIZE))


def offloaded_bytes(
    config: ModelConfig,
    method: Method,
    num_tokens: int,
    dtype: DTypeName,
    inputs_only: bool = False,
    num_spared: int = 0,
) -> int:
    """Host bytes of checkpointing "offload": what every block but the last saves for its backward pass, on a GPU.

    inputs_only: of "offload-block", where that is a block's input. num_spared: the last so many blocks stay on the
    device (`checkpointing_skip_last`); the very last one always does.

    Storages under a mebibyte stay on the device. All blocks count, also those that a method's gradient never reaches.
    """
    blocks = range(config.num_hidden_layers - max(1, num_spared))
    if inputs_only:
        return len(blocks) * num_tokens * config.hidden_size * FORMATS[dtype].bytes_for(1)
    sizes = (num_tokens * size for layer in blocks for size in _saved_bytes(config, method, layer, dtype))
    return sum(size for size in sizes if size >= MIB)


def _saved_bytes(config: ModelConfig, method: Method, layer: int, dtype: DTypeName) -> list[int]:
    """Bytes a token of each storage that a written-out block saves: streams, q/k/v, the mixed values, adapters."""
    width, wide = FORMATS[dtype].bytes_for(1), FORMATS["float32"].bytes_for(1)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    rotated = [heads * config.head_dim, kv_heads * config.head_dim]
    values = [config.hidden_size, config.hidden_size, rotated[0] + 2 * rotated[1], rotated[0]]
    linears_of_block = block_linears(config, layer)
    values += [method.rank * len(linear.targeted(method)) for linear in linears_of_block]
    statistics = [wide * heads, wide, wide]  # log-sum-exp of the scores, and of both norms one number
    if config.qk_norm:
        # Query and key are new, and each of their heads has a number.
        values += rotated
        statistics += [wide * heads, wide * kv_heads]
    if method.dora:
        # What the rows' ratios are multiplied by; gate's and up's is made again.
        *others, _, down = [linear.out_features if linear.targeted(method) else 0 for linear in linears_of_block]
        values += [*others, down]
    return [width * value for value in values] + statistics
