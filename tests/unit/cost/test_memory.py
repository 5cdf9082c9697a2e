"""Bytes by owner against sums written out by hand."""

from __future__ import annotations

from dataclasses import replace

from tunesmith.arch import config_from_dict
from tunesmith.cost.memory import keeps_outer_blocks, offloaded_bytes, optimizer_bytes, state_bytes
from tunesmith.cost.params import adapter_parameters, count_parameters
from tunesmith.cost.shapes import MethodShape, linears

CONFIG = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 100,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
TOTAL = count_parameters(CONFIG).total


def test_full_in_float32_is_sixteen_bytes_a_parameter() -> None:
    owned = state_bytes(CONFIG, MethodShape("full"), weight_dtype="float32")
    assert (owned.weights, owned.adapters, owned.gradients, owned.optimizer) == (4 * TOTAL, 0, 4 * TOTAL, 8 * TOTAL)
    assert owned.total == 16 * TOTAL


def test_pure_bfloat16_is_eight_bytes_a_parameter() -> None:
    owned = state_bytes(CONFIG, MethodShape("full"), weight_dtype="bfloat16", master_dtype="bfloat16")
    assert owned.total == 8 * TOTAL


def test_offloaded_states_are_on_the_host() -> None:
    dtypes = {"weight_dtype": "bfloat16", "master_dtype": "bfloat16"}
    owned = state_bytes(CONFIG, MethodShape("full"), **dtypes, offload_optimizer=True)  # type: ignore[arg-type]
    assert (owned.total, owned.optimizer, owned.optimizer_host) == (4 * TOTAL, 0, 4 * TOTAL)


def test_lora_holds_frozen_weights_once() -> None:
    method = MethodShape("lora", rank=4)
    adapters = adapter_parameters(CONFIG, method)
    owned = state_bytes(CONFIG, method, weight_dtype="bfloat16")
    assert owned.weights == 2 * TOTAL
    assert (owned.adapters, owned.gradients, owned.optimizer) == (4 * adapters, 4 * adapters, 8 * adapters)


def test_nf4_is_half_a_byte_and_its_scales() -> None:
    quantised = [
        64 * size if linear.in_features == 64 else 96 * size
        for linear in linears(CONFIG)
        for size in linear.parts.values()
    ]
    rest = 2 * (TOTAL - sum(quantised))
    plain = state_bytes(CONFIG, MethodShape("qlora", double_quantisation=False), weight_dtype="bfloat16")
    assert plain.weights == rest + sum(size // 2 + size // 64 * 4 for size in quantised)
    double = state_bytes(CONFIG, MethodShape("qlora"), weight_dtype="bfloat16")
    assert double.weights == rest + sum(size // 2 + size // 64 + 4 * -(-size // 64 // 256) + 4 for size in quantised)


def test_fp8_is_a_byte_and_a_scale_for_each_row() -> None:
    quantised = sum(linear.weight_size for linear in linears(CONFIG))
    rows = sum(linear.out_features for linear in linears(CONFIG))
    owned = state_bytes(CONFIG, MethodShape("lora", rank=4, base="fp8"), weight_dtype="bfloat16")
    assert owned.weights == 2 * (TOTAL - quantised) + quantised + 4 * rows


def test_an_fp8_base_with_wide_outer_blocks() -> None:
    deep = replace(CONFIG, num_hidden_layers=4)
    inner = [linear for linear in linears(deep) if linear.layer in (1, 2)]
    quantised, rows = sum(linear.weight_size for linear in inner), sum(linear.out_features for linear in inner)
    owned = state_bytes(deep, MethodShape("lora", base="fp8", fp8_blocks="inner"), weight_dtype="bfloat16")
    assert owned.weights == 2 * (count_parameters(deep).total - quantised) + quantised + 4 * rows
    short = replace(CONFIG, num_hidden_layers=2)
    methods = [MethodShape("lora", base="fp8", fp8_blocks=blocks) for blocks in ("all", "inner")]
    assert len({state_bytes(short, method, weight_dtype="bfloat16").weights for method in methods}) == 1


def test_outer_blocks_stay_wide_where_that_is_cheap() -> None:
    """A small model's 64 MiB, or a tenth of a large one's bytes; a model of two blocks has no inner ones."""
    assert keeps_outer_blocks(replace(CONFIG, num_hidden_layers=4), "bfloat16")
    assert not keeps_outer_blocks(replace(CONFIG, num_hidden_layers=2), "bfloat16")
    wide = replace(CONFIG, hidden_size=4096, intermediate_size=16384, num_hidden_layers=32)
    assert keeps_outer_blocks(wide, "bfloat16")
    assert not keeps_outer_blocks(replace(wide, num_hidden_layers=8), "bfloat16")
    assert not keeps_outer_blocks(wide, "float32")


def test_optimizer_states() -> None:
    assert optimizer_bytes(1000, "adamw", 4) == 8000
    assert optimizer_bytes(1000, "adamw8bit", 4) == 2 * (1000 + 4 * 4)
    assert optimizer_bytes(1000, "sgd", 4) == 0


def test_offloaded_bytes_are_what_all_blocks_but_the_last_save() -> None:
    """Streams twice, q/k/v, what attention made of them; what is under a mebibyte stays on the device."""
    tokens, one = 2**13, 2**20
    values = [64, 64, 128, 64]
    assert [tokens * 2 * value >= one for value in values] == [True] * 4
    assert offloaded_bytes(CONFIG, MethodShape("full"), tokens, "bfloat16") == tokens * 2 * sum(values)
    assert offloaded_bytes(CONFIG, MethodShape("full"), tokens // 2, "bfloat16") == tokens // 2 * 2 * 128
    # Of rank 32: q/k/v's three, gate's and up's two; one of rank 32 alone has half a mebibyte.
    adapters = tokens * 2 * (3 * 32 + 2 * 32)
    with_adapters = offloaded_bytes(CONFIG, MethodShape("lora", rank=32), tokens, "bfloat16")
    assert with_adapters == tokens * 2 * sum(values) + adapters


def test_offloaded_bytes_of_normed_heads() -> None:
    normed = replace(CONFIG, qk_norm=True)
    tokens = 2**16
    plain, more = (offloaded_bytes(config, MethodShape("full"), tokens, "bfloat16") for config in (CONFIG, normed))
    # Query and key, and a number for each query head; those of the key heads are under a mebibyte.
    assert more - plain == tokens * ((64 + 32) * 2 + 4 * 4)


def test_offloaded_bytes_of_dora() -> None:
    """Of q/k/v, of the output and of down what the ratios are multiplied by; of gate and up it is made again."""
    tokens = 2**16
    plain, more = (
        offloaded_bytes(CONFIG, MethodShape("lora", rank=16, dora=dora), tokens, "bfloat16") for dora in (False, True)
    )
    assert more - plain == tokens * 2 * (128 + 64 + 64)
