"""How long processes talk: collectives on rings, by bytes, bandwidth and latency.

A ring of n processes moves S bytes (of the whole tensor) in n - 1 turns of S / n bytes each:

    all-gather, reduce-scatter     S (n - 1) / n bytes a process,   n - 1 hops
    all-reduce                     twice that: both, one after the other
    send                           S bytes,                         1 hop

Sources: Thakur, Rabenseifner and Gropp, "Optimization of Collective Communication Operations in MPICH", 2005;
Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", 2009.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from tunesmith.errors import RecipeError
from tunesmith.units import ceil_div

Kind = Literal["all_gather", "reduce_scatter", "all_reduce", "send"]
_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}
_NETWORK = re.compile(r"(?:(\d+)\s*x\s*)?(\d+(?:\.\d+)?)\s*(Gb|GB)(?:it|yte)?(?:/?p?s)?", re.ASCII)


@dataclass(frozen=True)
class Link:
    """bandwidth: bytes per second in one direction. latency: seconds of a hop."""

    bandwidth_bytes_per_s: float
    latency_s: float


@dataclass(frozen=True)
class Cluster:
    """Nodes of `per_node` GPUs. inside: a GPU's link to its neighbours; between: all of a node's network together."""

    per_node: int
    inside: Link
    between: Link | None = None


@dataclass(frozen=True)
class Ring:
    """Processes that talk to each other: of `size`, `nodes` machines, `sharing` such rings on the network of each."""

    size: int
    nodes: int = 1
    sharing: int = 1


@dataclass(frozen=True)
class Message:
    """`count` collectives alike. size_bytes: of the whole tensor. overlaps: whether computing may go on meanwhile."""

    kind: Kind
    size_bytes: float
    count: int = 1
    over: Literal["data", "tensor", "pipeline"] = "data"
    overlaps: bool = True


def wire_bytes(kind: Kind, size_bytes: float, processes: int) -> float:
    """Bytes that each process sends."""
    if processes == 1:
        return 0.0
    return size_bytes if kind == "send" else _PASSES[kind] * size_bytes * (processes - 1) / processes


def message_s(message: Message, ring: Ring, cluster: Cluster) -> float:
    """Seconds of all `message.count` of them, one after the other.

    A ring over nodes enters each once: its bytes share the node's network with the other rings there. The slower of
    that and a GPU's own link decides.
    Raises: RecipeError where nodes talk and their network is not known.
    """
    if ring.size == 1:
        return 0.0
    sent = wire_bytes(message.kind, message.size_bytes, ring.size)
    return message.count * (sent / _bandwidth(ring, cluster) + _latency_s(message.kind, ring, cluster))


def _bandwidth(ring: Ring, cluster: Cluster) -> float:
    inside = cluster.inside.bandwidth_bytes_per_s
    if ring.nodes == 1:
        return inside
    between = _between(cluster).bandwidth_bytes_per_s / ring.sharing
    return between if ring.nodes == ring.size else min(inside, between)


def _latency_s(kind: Kind, ring: Ring, cluster: Cluster) -> float:
    """All hops of the ring: between nodes as many as there are gaps between them."""
    if kind == "send":
        return cluster.inside.latency_s if ring.nodes == 1 else _between(cluster).latency_s
    far = ring.nodes - 1
    near = ring.size - 1 - far
    hops_s = near * cluster.inside.latency_s + (far * _between(cluster).latency_s if far else 0.0)
    return _PASSES[kind] * hops_s


def _between(cluster: Cluster) -> Link:
    if cluster.between is None:
        raise RecipeError("the network between the nodes is not known: name it, as --network 400Gb or 8x400Gb")
    return cluster.between


def ring_of(processes: int, stride: int, cluster: Cluster) -> Ring:
    """The ring of every `stride`-th process: one dimension of a mesh, whose inner ones lie on neighbouring GPUs."""
    here = max(1, cluster.per_node // stride)
    nodes = ceil_div(processes, here)
    return Ring(processes, nodes, sharing=1 if nodes == 1 else min(stride, cluster.per_node))


def parse_network(text: str, latency_s: float) -> Link:
    """A node's network from "400Gb" (bits per second), "8x400Gb" (eight such cards) or "50GB" (bytes per second).

    Raises: RecipeError.
    """
    found = _NETWORK.fullmatch(text.strip())
    rate = 0.0 if found is None else int(found[1] or 1) * float(found[2]) * 1e9
    if found is None or rate <= 0:
        raise RecipeError(
            f"--network is what a node has in all: 400Gb (gigabits per second), 8x400Gb or 50GB; got {text!r}"
        )
    return Link(rate / 8 if found[3] == "Gb" else rate, latency_s)


def fit_link(kind: Kind, processes: int, timings: Sequence[tuple[float, float]]) -> Link | None:
    """The link that explains measured collectives [(size_bytes, seconds)] best; None where they tell nothing.

    Latency from the smallest, bandwidth from the largest less that latency: what each of them is made of.
    """
    if processes == 1 or len(timings) < 2:
        return None
    (_, least_s), (size, most_s) = min(timings), max(timings)
    transfer_s = most_s - least_s
    if transfer_s <= 0 or least_s < 0:
        return None
    hops = 1 if kind == "send" else _PASSES[kind] * (processes - 1)
    return Link(wire_bytes(kind, size, processes) / transfer_s, least_s / hops)
