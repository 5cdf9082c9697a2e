"""Model states of one process against sums written out by hand."""

from __future__ import annotations

import pytest

from tunesmith.arch import config_from_dict
from tunesmith.cost.memory import state_bytes
from tunesmith.cost.params import adapter_parameters, block_parameters, count_parameters
from tunesmith.cost.shapes import MethodShape
from tunesmith.cost.shards import Formats, Layout, Strategy, rank_states, stage_blocks, zero_bytes

RAW = {
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CONFIG = config_from_dict(RAW)
TOTAL = count_parameters(CONFIG).total
BLOCK = block_parameters(CONFIG, 0)
EMBEDDING = 128 * 64
MASTERS = Formats("float32", "float32", "bfloat16")
PURE = Formats("bfloat16", "bfloat16", "bfloat16")


def test_the_papers_example() -> None:
    """ZeRO's figure 1: 7.5 billion parameters on 64 GPUs: 120, 31.4, 16.6 and 1.9 GB."""
    expected: dict[Strategy, float] = {"ddp": 120e9, "zero1": 31.4e9, "zero2": 16.6e9, "zero3": 1.88e9}
    for strategy, size in expected.items():
        assert zero_bytes(7_500_000_000, Layout(strategy, data=64)).total == pytest.approx(size, rel=0.005)


def test_one_process_holds_what_the_unsharded_formula_says() -> None:
    for method in (MethodShape("full"), MethodShape("lora", rank=4), MethodShape("lora", base="fp8")):
        alone = rank_states(CONFIG, method, Layout(), Formats("bfloat16", "float32"))
        assert alone.held == state_bytes(CONFIG, method, weight_dtype="bfloat16")
        assert (alone.gathered, alone.whole_gradients) == (0, 0)


def test_doubly_quantised_weights_of_one_process() -> None:
    held = rank_states(CONFIG, MethodShape("qlora"), Layout(), Formats("bfloat16")).held
    assert held == state_bytes(CONFIG, MethodShape("qlora"), weight_dtype="bfloat16")


def test_fp32_masters_are_sixteen_bytes_divided() -> None:
    """All sizes of this model divide by four, so that there is no padding but that of the norms."""
    states = rank_states(CONFIG, MethodShape("full"), Layout("zero3", data=4), MASTERS)
    assert states.held.total == 16 * TOTAL // 4
    assert states.held.weights == 4 * TOTAL // 4
    # Two blocks and what is outside of them, in bfloat16.
    outside = 2 * EMBEDDING + 64
    assert states.gathered == 2 * (2 * BLOCK + outside)
    assert states.whole_gradients == 2 * (BLOCK + outside)


def test_pure_bfloat16_is_eight_bytes_divided() -> None:
    assert rank_states(CONFIG, MethodShape("full"), Layout("zero3", data=2), PURE).held.total == 8 * TOTAL // 2


def test_eight_bit_states() -> None:
    """Two bytes a value and two float32 scales for every 256 of them."""
    formats = Formats("bfloat16", "bfloat16", "bfloat16", "adamw8bit")
    held = rank_states(CONFIG, MethodShape("full"), Layout("zero3", data=2), formats).held
    assert held.optimizer == 2 * (TOTAL // 2) + 8 * -(-TOTAL // 2 // 256)


def test_zero1_and_zero2_gather_everything() -> None:
    one, two = (rank_states(CONFIG, MethodShape("full"), Layout(kind, data=2), MASTERS) for kind in ("zero1", "zero2"))
    assert one.held == two.held
    assert one.gathered == two.gathered == 2 * TOTAL
    assert one.whole_gradients == 2 * TOTAL
    assert two.whole_gradients == 2 * (BLOCK + 2 * EMBEDDING + 64)
    assert one.most == 16 * TOTAL // 2 + 4 * TOTAL


def test_ddp_holds_everything() -> None:
    assert rank_states(CONFIG, MethodShape("full"), Layout("ddp", data=4), MASTERS).held.total == 16 * TOTAL


def test_rows_that_do_not_divide_are_padded() -> None:
    config = config_from_dict({**RAW, "vocab_size": 130})
    held = rank_states(config, MethodShape("full"), Layout("zero3", data=4), MASTERS).held
    total = count_parameters(config).total
    assert held.weights == 4 * (total // 4) + 4 * 2 * 32  # 130 / 4 = 32.5 rows: half a row more, twice


def test_adapters_are_replicated_and_their_base_is_sharded() -> None:
    method = MethodShape("lora", rank=4)
    adapters = adapter_parameters(CONFIG, method)
    held = rank_states(CONFIG, method, Layout("zero3", data=4), Formats("bfloat16", "float32")).held
    assert held.weights == 2 * TOTAL // 4
    assert (held.adapters, held.gradients, held.optimizer) == (4 * adapters, 4 * adapters, 8 * adapters)


def test_sharded_nf4_has_plain_scales() -> None:
    linears = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 64 * 384 + 192 * 64)
    states = rank_states(CONFIG, MethodShape("qlora", rank=4), Layout("zero3", data=2), Formats("bfloat16"))
    rest = 2 * (TOTAL - linears)
    assert states.held.weights == (linears // 2 + linears // 64 * 4 + rest) // 2
    # Gathered as it is held: codes and scales, never the values.
    block = linears // 4 // 2 + linears // 4 // 64 * 4 + 2 * 2 * 64
    assert states.gathered == 2 * block + 2 * (2 * EMBEDDING + 64)
    assert states.whole_gradients == 0


def test_tensor_parallel_processes_share_linears_only() -> None:
    linears = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 64 * 384 + 192 * 64)
    held = rank_states(CONFIG, MethodShape("full"), Layout(tensor=2), MASTERS).held
    assert held.total == 16 * (TOTAL - linears + linears // 2)


def test_tensor_parallel_adapters_are_cut_where_their_linear_is() -> None:
    method = MethodShape("lora", rank=4, targets=("q_proj", "down_proj"))
    held = rank_states(CONFIG, method, Layout(tensor=2), Formats("bfloat16", "float32")).held
    q = 4 * 64 + 4 * 64 // 2  # A whole, half of B
    down = 4 * 192 // 2 + 4 * 64  # half of A, B whole
    assert held.adapters == 4 * 4 * (q + down)


def test_pipeline_stages() -> None:
    layout = Layout(pipeline=2)
    first, last = (rank_states(CONFIG, MethodShape("full"), layout, MASTERS, stage=stage).held for stage in (0, 1))
    assert first.total == 16 * (2 * BLOCK + EMBEDDING)
    assert last.total == 16 * (2 * BLOCK + EMBEDDING + 64)
    assert rank_states(CONFIG, MethodShape("full"), layout, MASTERS).held == last
    assert [stage_blocks(7, Layout(pipeline=3), stage) for stage in range(3)] == [range(3), range(3, 5), range(5, 7)]
    assert stage_blocks(7, Layout(pipeline=2, blocks=(5, 2)), 1) == range(5, 7)


def test_a_tied_head_is_held_at_both_ends() -> None:
    config = config_from_dict({**RAW, "tie_word_embeddings": True})
    last = rank_states(config, MethodShape("full"), Layout(pipeline=2), MASTERS, stage=1).held
    assert last.weights == 4 * (2 * BLOCK + EMBEDDING + 64)


def test_everything_at_once() -> None:
    """Eight processes, two of each kind: half of the blocks, half of each linear, half of the states' rows."""
    linears = 64 * (64 + 32 + 32) + 64 * 64 + 64 * 384 + 192 * 64
    held = rank_states(CONFIG, MethodShape("full"), Layout("zero1", 2, 2, 2), MASTERS, stage=0).held
    assert held.total == 16 * (2 * (linears // 2 + 128) + EMBEDDING) // 2


def test_an_fp8_base_is_gathered_in_codes() -> None:
    linears = 4 * (64 * (64 + 32 + 32) + 64 * 64 + 64 * 384 + 192 * 64)
    rows = 4 * (128 + 64 + 384 + 64)
    method = MethodShape("lora", rank=4, base="fp8")
    held = rank_states(CONFIG, method, Layout("zero3", data=2), Formats("bfloat16")).held
    assert held.weights == (linears + 4 * rows + 2 * (TOTAL - linears)) // 2
