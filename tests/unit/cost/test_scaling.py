"""Messages of a step, how much is hidden, and extended curves, against numbers worked out by hand."""

from __future__ import annotations

from collections import Counter

import pytest

from tunesmith.arch import config_from_dict
from tunesmith.cost.collectives import Cluster, Link, Message
from tunesmith.cost.params import adapter_parameters, block_parameters, count_parameters
from tunesmith.cost.scaling import (
    BUCKET_BYTES,
    Curve,
    Measured,
    Parts,
    Talk,
    Work,
    bubble_ratio,
    exposed_s,
    extend,
    fit_hidden,
    step_messages,
    talk,
)
from tunesmith.cost.shapes import MethodShape
from tunesmith.cost.shards import Formats, Layout

CONFIG = config_from_dict(
    {
        "model_type": "llama",
        "vocab_size": 128,
        "hidden_size": 64,
        "intermediate_size": 192,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
)
TOTAL, BLOCK = count_parameters(CONFIG).total, block_parameters(CONFIG, 0)
OUTSIDE = 2 * 128 * 64 + 64
FULL, MASTERS = MethodShape("full"), Formats("float32", "float32", "bfloat16")


def _bytes(messages: tuple[Message, ...]) -> Counter[str]:
    total: Counter[str] = Counter()
    for message in messages:
        total[message.kind] += int(message.size_bytes * message.count)
    return total


def test_one_process_says_nothing() -> None:
    assert step_messages(CONFIG, FULL, Layout(), MASTERS, Work(256)) == ()


def test_ddp_sums_gradients_once_in_buckets() -> None:
    messages = step_messages(CONFIG, FULL, Layout("ddp", data=4), MASTERS, Work(256, micro_batches=8))
    assert messages == (Message("all_reduce", 4 * TOTAL, 1),)
    large = config_from_dict({"model_type": "llama", **_shape(CONFIG), "vocab_size": 200_000})
    (bucketed,) = step_messages(large, FULL, Layout("ddp", data=4), MASTERS, Work(256))
    size = 4 * count_parameters(large).total
    assert bucketed.count == -(-size // BUCKET_BYTES)
    assert bucketed.size_bytes * bucketed.count == pytest.approx(size)


def _shape(config: object) -> dict[str, int]:
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    return {name: getattr(config, name) for name in names}


def test_zero3_gathers_blocks_twice_a_micro_batch() -> None:
    """In bfloat16 as computed: blocks for the forward and the backward pass, what is outside of them once."""
    for micro_batches in (1, 3):
        work = Work(256, micro_batches)
        sent = _bytes(step_messages(CONFIG, FULL, Layout("zero3", data=4), MASTERS, work))
        assert sent["all_gather"] == micro_batches * 2 * (2 * 4 * BLOCK + OUTSIDE)
        assert sent["reduce_scatter"] == micro_batches * 2 * TOTAL


def test_zero2_gathers_once_a_micro_batch_and_zero1_once_a_step() -> None:
    work = Work(256, micro_batches=3)
    two = _bytes(step_messages(CONFIG, FULL, Layout("zero2", data=4), MASTERS, work))
    one = _bytes(step_messages(CONFIG, FULL, Layout("zero1", data=4), MASTERS, work))
    assert (two["all_gather"], two["reduce_scatter"]) == (3 * 2 * TOTAL, 3 * 2 * TOTAL)
    assert (one["all_gather"], one["reduce_scatter"]) == (2 * TOTAL, 2 * TOTAL)


def test_adapters_are_summed_in_one_message_that_nothing_hides() -> None:
    method = MethodShape("lora", rank=4)
    messages = step_messages(CONFIG, method, Layout("zero3", data=2), Formats("bfloat16", "float32"), Work(256))
    assert messages[-1] == Message("all_reduce", 4 * adapter_parameters(CONFIG, method), overlaps=False)
    assert _bytes(messages)["all_gather"] == 2 * (2 * 4 * BLOCK + OUTSIDE)
    assert "reduce_scatter" not in _bytes(messages)


def test_tensor_parallel_blocks_exchange_the_stream() -> None:
    """Two gathers and two scatters forward, the same backward, of 256 x 64 bfloat16; embedding, norm, head summed."""
    messages = step_messages(CONFIG, FULL, Layout(tensor=2), MASTERS, Work(256, micro_batches=3))
    stream = 256 * 64 * 2
    assert messages[:2] == (
        Message("all_gather", stream, 4 * 4 * 3, "tensor", overlaps=False),
        Message("reduce_scatter", stream, 4 * 4 * 3, "tensor", overlaps=False),
    )
    assert messages[2] == Message("all_reduce", 4 * OUTSIDE, 1, "tensor", overlaps=False)


def test_pipeline_neighbours_send_the_stream_and_its_gradient() -> None:
    messages = step_messages(CONFIG, FULL, Layout(pipeline=2), MASTERS, Work(256, micro_batches=6))
    assert messages == (Message("send", 256 * 64 * 2, 12, "pipeline", overlaps=False),)
    assert bubble_ratio(4, 12) == 3 / 15
    assert bubble_ratio(1, 12) == 0


def test_hidden_communication_ends_where_computing_does() -> None:
    assert exposed_s(Talk(0.2, 0.0), compute_s=1.0, hidden_ratio=0.75) == pytest.approx(0.05)
    assert exposed_s(Talk(2.0, 0.1), compute_s=1.0, hidden_ratio=1.0) == pytest.approx(1.1)
    assert exposed_s(Talk(0.2, 0.3), compute_s=1.0, hidden_ratio=0.0) == pytest.approx(0.5)


def _measured(step_s: float, hideable_s: float, serial_s: float = 0.0) -> Measured:
    return Measured(step_s, Parts(0.9, step_s - 1.0, 0.02, 0.08), Talk(hideable_s, serial_s))


def test_the_hidden_share_is_the_least_squares_one() -> None:
    """Exact where one number explains all; between where none does: (0.4 * 0.3 + 0.2 * 0.2) / (0.16 + 0.04) = 0.8."""
    exact = fit_hidden([_measured(1.0, 0.0), _measured(1.05, 0.2), _measured(1.1, 0.4)])
    assert exact is not None
    assert exact.hidden_ratio == pytest.approx(0.75)
    assert exact.error_ratio == pytest.approx(0.0, abs=1e-12)
    between = fit_hidden([_measured(1.1, 0.4), _measured(1.0, 0.2)])
    assert between is not None
    assert between.hidden_ratio == pytest.approx(0.8)
    assert between.error_ratio == pytest.approx(0.04)


def test_the_hidden_share_is_a_share() -> None:
    """At most all is hidden; messages that cost more than their bytes have a negative one: 0.9 s for 0.2 s."""
    quicker = fit_hidden([_measured(0.9, 0.2)])
    assert quicker is not None
    assert quicker.hidden_ratio == 1.0
    assert quicker.error_ratio == pytest.approx(0.1 / 0.9)
    slower = fit_hidden([_measured(1.9, 0.2)])
    assert slower is not None
    assert slower.hidden_ratio == pytest.approx(-3.5)
    assert slower.error_ratio == pytest.approx(0.0, abs=1e-12)
    assert fit_hidden([_measured(1.0, 0.0)]) is None
    assert fit_hidden([]) is None


def test_a_curve_gives_back_what_it_was_fitted_to() -> None:
    cluster = Cluster(4, Link(1e9, 1e-5), Link(1e8, 1e-4))
    layout, work = Layout("zero3", data=4), Work(256, 2)
    spoken = talk(step_messages(CONFIG, FULL, layout, MASTERS, work), layout, cluster)
    parts = Parts(0.01, 0.4 * spoken.hideable_s, 0.0001, 0.0004)
    overlap = fit_hidden([Measured(parts.step_s, parts, spoken)])
    assert overlap is not None
    assert overlap.hidden_ratio == pytest.approx(0.6)
    curve = Curve(CONFIG, FULL, layout, MASTERS, work, parts, overlap.hidden_ratio)
    assert curve.at(4, cluster).step_s == pytest.approx(parts.step_s)
    assert curve.at(4, cluster).tokens_per_s == pytest.approx(4 * 2 * 256 / parts.step_s)


def test_extended_over_a_slow_network_by_hand() -> None:
    """DDP on two nodes of two: one all-reduce of 4 * TOTAL bytes over four, 3/4 of it twice, at 100 MB/s."""
    cluster = Cluster(2, Link(1e9, 0.0), Link(1e8, 0.0))
    curve = Curve(CONFIG, FULL, Layout("ddp", data=2), MASTERS, Work(256), Parts(1.0, 0.0, 0.1, 0.2), hidden_ratio=0.5)
    one, two = extend(curve, cluster, nodes=2)
    assert (one.gpus, two.gpus, two.is_projected) == (2, 4, True)
    assert one.step_s == pytest.approx(1.3 + 0.5 * 4 * TOTAL / 1e9)
    assert two.step_s == pytest.approx(1.3 + 0.5 * 6 * TOTAL / 1e8)
    assert two.tokens_per_s == pytest.approx(4 * 256 / two.step_s)


def test_updates_of_shards_shrink_and_strong_scaling_divides_the_batch() -> None:
    cluster = Cluster(8, Link(1e18, 0.0), Link(1e18, 0.0))
    curve = Curve(
        CONFIG, FULL, Layout("zero3", data=2), MASTERS, Work(256, 8), Parts(0.8, 0.0, 0.0, 0.4), 1.0, mode="strong"
    )
    point = curve.at(8, cluster)
    assert point.step_s == pytest.approx(0.2 + 0.1)
    assert point.tokens_per_s == pytest.approx(16 * 256 / 0.3)


def test_nodes_are_doubled_up_to_the_last() -> None:
    curve = Curve(CONFIG, FULL, Layout("ddp", data=2), MASTERS, Work(256), Parts(1.0), 1.0)
    cluster = Cluster(2, Link(1e9, 0.0), Link(1e9, 0.0))
    assert [point.gpus for point in extend(curve, cluster, nodes=6)] == [2, 4, 8, 12]
    assert [point.gpus for point in extend(curve, cluster, nodes=8)] == [2, 4, 8, 16]


def test_strong_scaling_of_a_pipeline_keeps_its_bubble() -> None:
    """Six micro-batches in two stages take seven turns; three take four."""
    layout = Layout("ddp", data=2, pipeline=2)
    cluster = Cluster(8, Link(1e18, 0.0))
    curve = Curve(CONFIG, FULL, layout, MASTERS, Work(256, 6), Parts(0.7), 1.0, mode="strong")
    assert curve.at(8, cluster).step_s == pytest.approx(0.4)
