"""Rings against numbers worked out by hand."""

from __future__ import annotations

import pytest

from tunesmith.cost.collectives import (
    Cluster,
    Link,
    Message,
    Ring,
    fit_link,
    message_s,
    parse_network,
    ring_of,
    wire_bytes,
)
from tunesmith.errors import RecipeError

NVLINK = Link(100e9, 2e-6)
INSIDE = Cluster(8, NVLINK)
SPREAD = Cluster(8, NVLINK, Link(50e9, 10e-6))


def test_what_goes_over_the_wire() -> None:
    assert wire_bytes("all_gather", 800, 4) == 600
    assert wire_bytes("reduce_scatter", 800, 4) == 600
    assert wire_bytes("all_reduce", 800, 4) == 1200
    assert wire_bytes("send", 800, 4) == 800
    assert wire_bytes("all_reduce", 800, 1) == 0


def test_inside_a_node() -> None:
    """400 MB over four: 300 MB at 100 GB/s are 3 ms, and three hops of 2 us; an all-reduce is twice that."""
    assert message_s(Message("all_gather", 400e6), Ring(4), INSIDE) == pytest.approx(3.006e-3)
    assert message_s(Message("all_reduce", 400e6), Ring(4), INSIDE) == pytest.approx(6.012e-3)
    assert message_s(Message("all_gather", 400e6, 10), Ring(4), INSIDE) == pytest.approx(30.06e-3)
    assert message_s(Message("all_gather", 400e6), Ring(1), INSIDE) == 0


def test_between_nodes_the_network_decides() -> None:
    """1.6 GB over 16 GPUs of two nodes: 1.5 GB enter each node at 50 GB/s, 30 ms; 14 hops inside and one between."""
    found = message_s(Message("reduce_scatter", 1.6e9), Ring(16, nodes=2), SPREAD)
    assert found == pytest.approx(30e-3 + 14 * 2e-6 + 10e-6)


def test_a_network_faster_than_a_gpus_link_does_not_decide() -> None:
    fast = Cluster(8, NVLINK, Link(400e9, 10e-6))
    assert message_s(Message("all_gather", 1.6e9), Ring(16, nodes=2), fast) == pytest.approx(15e-3 + 38e-6)


def test_rings_share_a_nodes_network() -> None:
    """Tensor parallelism of four: four data-parallel rings leave each node."""
    ring = ring_of(4, 4, SPREAD)
    assert ring == Ring(4, nodes=2, sharing=4)
    found = message_s(Message("all_gather", 400e6), ring, SPREAD)
    assert found == pytest.approx(300e6 / 12.5e9 + 2 * 2e-6 + 10e-6)


def test_where_rings_lie() -> None:
    assert ring_of(8, 1, SPREAD) == Ring(8)
    assert ring_of(16, 1, SPREAD) == Ring(16, nodes=2, sharing=1)
    assert ring_of(2, 8, SPREAD) == Ring(2, nodes=2, sharing=8)
    assert ring_of(2, 16, SPREAD) == Ring(2, nodes=2, sharing=8)


def test_a_send_between_nodes() -> None:
    found = message_s(Message("send", 100e6, 2), Ring(2, nodes=2, sharing=8), SPREAD)
    assert found == pytest.approx(2 * (100e6 / 6.25e9 + 10e-6))


def test_an_unknown_network_is_an_error() -> None:
    with pytest.raises(RecipeError, match="--network 400Gb"):
        message_s(Message("all_gather", 1e6), Ring(16, nodes=2), INSIDE)


@pytest.mark.parametrize(
    ("text", "bytes_per_s"),
    [
        ("400Gb", 50e9),
        ("8x400Gb", 400e9),
        ("50GB", 50e9),
        ("8 x 400 Gbit/s", 400e9),
        ("12.5GB/s", 12.5e9),
        ("100Gbps", 12.5e9),
    ],
)
def test_networks_as_people_write_them(text: str, bytes_per_s: float) -> None:
    assert parse_network(text, 5e-6) == Link(bytes_per_s, 5e-6)


@pytest.mark.parametrize("text", ["", "fast", "400", "400 gb", "-1Gb", "0Gb", "x8Gb"])
def test_networks_that_are_none(text: str) -> None:
    with pytest.raises(RecipeError, match="--network"):
        parse_network(text, 5e-6)


def test_a_link_is_found_again_in_its_own_timings() -> None:
    """Of nothing but latency, and of much: what was put in comes out."""
    times = [(size, message_s(Message("all_reduce", size), Ring(4), INSIDE)) for size in (0.0, 1e6, 1e9)]
    found = fit_link("all_reduce", 4, times)
    assert found is not None
    assert found.bandwidth_bytes_per_s == pytest.approx(100e9)
    assert found.latency_s == pytest.approx(2e-6)


def test_timings_that_tell_nothing() -> None:
    assert fit_link("all_reduce", 1, [(1, 1.0), (2, 2.0)]) is None
    assert fit_link("all_reduce", 2, [(1, 1.0)]) is None
    assert fit_link("all_reduce", 2, [(1, 1.0), (1000, 0.5)]) is None
