"""What a launch decides before it starts anything."""

from __future__ import annotations

from ctypes import c_int
from pathlib import Path
from typing import Any

import pytest

from tunesmith.errors import ParallelError
from tunesmith.launch import cards
from tunesmith.launch.plan import (
    Plan,
    check_endpoint,
    count_processes,
    debug_environment,
    environment_for,
    parse_nodes,
    rank_command,
    shell_line,
)


class Driver:
    """A driver whose GPUs reach each other only within `islands`."""

    def __init__(self, *islands: tuple[int, ...]) -> None:
        self.islands = islands

    def cuDeviceGetCount(self, count: Any) -> int:  # noqa: N802
        count._obj.value = sum(map(len, self.islands))
        return 0

    def cuDeviceGet(self, handle: Any, number: int) -> int:  # noqa: N802
        handle._obj.value = number
        return 0

    def cuDeviceCanAccessPeer(self, able: Any, device: c_int, peer: c_int) -> int:  # noqa: N802
        able._obj.value = any(device.value in island and peer.value in island for island in self.islands)
        return 0


def test_pairs_that_can_not_reach_each_other_are_found() -> None:
    assert cards.gpu_count(Driver((0, 1), (2,))) == 3
    assert cards.pairs_without_peer_access(Driver((0, 1), (2,)), 3) == [(0, 2), (1, 2)]
    assert cards.pairs_without_peer_access(Driver((0, 1, 2)), 3) == []
    assert cards.pairs_without_peer_access(None, 4) == []


def test_without_a_driver_there_are_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> Any:
        raise OSError(name)

    monkeypatch.setattr(cards.ctypes, "CDLL", missing)
    assert cards.driver() is None
    assert cards.gpu_count(cards.driver()) == 0


def test_nccl_is_told_of_cards_without_peer_access(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    environment, notes = environment_for(2, cpu=False, library=Driver((0,), (1,)))
    assert environment["NCCL_P2P_DISABLE"] == "1"
    assert "GPUs 0-1 can't read each other's memory" in notes[0]
    assert "NCCL_P2P_DISABLE" not in environment_for(2, cpu=False, library=Driver((0, 1)))[0]
    monkeypatch.setenv("NCCL_P2P_DISABLE", "0")
    assert "NCCL_P2P_DISABLE" not in environment_for(2, cpu=False, library=Driver((0,), (1,)))[0]


def test_cores_are_shared_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tunesmith.launch.plan.usable_cores", lambda: 8)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert environment_for(2, cpu=True, library=None)[0] == {"OMP_NUM_THREADS": "4", "CUDA_VISIBLE_DEVICES": ""}
    assert environment_for(16, cpu=True, library=None)[0]["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert "OMP_NUM_THREADS" not in environment_for(2, cpu=True, library=None)[0]


def test_auto_is_a_process_for_each_gpu() -> None:
    assert count_processes("auto", cpu=False, gpus=4) == (4, None)
    assert count_processes("2", cpu=False, gpus=4) == (2, None)
    assert count_processes("8", cpu=True, gpus=4) == (8, None)
    count, note = count_processes("auto", cpu=True, gpus=4)
    assert count == 1
    assert note is not None and "--nproc" in note


@pytest.mark.parametrize("text", ["0", "-1", "two", "1.5", ""])
def test_a_number_of_processes_that_is_none(text: str) -> None:
    with pytest.raises(ParallelError, match="--nproc"):
        count_processes(text, cpu=True, gpus=0)


def test_more_processes_than_gpus_are_refused() -> None:
    with pytest.raises(ParallelError, match="more than this machine's 2 GPUs"):
        count_processes("4", cpu=False, gpus=2)


def test_machines() -> None:
    assert parse_nodes("3") == (3, 3)
    assert parse_nodes("2:4") == (2, 4)
    for text in ("0", "4:2", "a", "2:", "2;ls"):
        with pytest.raises(ParallelError, match="--nnodes"):
            parse_nodes(text)


def test_several_machines_need_a_place_to_meet() -> None:
    assert check_endpoint(None, (1, 1)) is None
    assert check_endpoint("node1:29400", (2, 2)) == "node1:29400"
    assert check_endpoint("[fe80::1]:29400", (2, 2)) == "[fe80::1]:29400"
    with pytest.raises(ParallelError, match="--rdzv HOST:PORT"):
        check_endpoint(None, (2, 2))
    for text in ("node1", "node1:port", "a b:1", "$(ls):1"):
        with pytest.raises(ParallelError, match="HOST:PORT"):
            check_endpoint(text, (2, 2))


def test_the_printed_command_is_torchs_own() -> None:
    command = rank_command("module", ["train", "my recipe.yaml"], Path("run/logs"))
    alone = Plan(command, Path("run"), 2)
    assert "--standalone" in alone.torchrun()
    assert alone.torchrun()[-6:] == [*command]
    several = Plan(command, Path("run"), 2, nodes=(2, 4), rendezvous="a:1", rendezvous_id="x").torchrun()
    assert {"--nnodes=2:4", "--rdzv-endpoint=a:1", "--rdzv-id=x"} <= set(several)
    assert "'my recipe.yaml'" in shell_line(several, {"A": "b c"})
    assert shell_line(["x"], {"A": "b c"}) == "A='b c' x"


def test_debugging_writes_into_the_logs() -> None:
    found = debug_environment(Path("/run/logs"))
    assert found["TORCH_DISTRIBUTED_DEBUG"] == "DETAIL"
    assert found["TORCH_FR_DUMP_TEMP_FILE"] == "/run/logs/flight-rank-"
