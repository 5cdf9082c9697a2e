"""Records add up by copying; what is newer or absent is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tunesmith.bench.peers.store import load_records, new_record, save_record, slug
from tunesmith.bench.peers.timing import CONTINUOUS, IDLE_TO_IDLE
from tunesmith.errors import RunDirError


def record(started: str = "2026-01-02T03:04:05Z", rounds: int = 0, **environment: Any) -> dict[str, Any]:
    facts = {"driver": "580", "packages": {"torch": "2.11"}, "git": {"commit": "a" * 40, "dirty": True}, **environment}
    return new_record(
        recipe={"name": "7B LoRA"},
        recipe_hash="h",
        resolved={},
        lengths=[4],
        chip="NVIDIA H200",
        environment=facts,
        command="c",
        started=started,
        timing=CONTINUOUS,
        rounds_asked=2,
        rows=[{"round": round_} for round_ in range(rounds) for _ in range(2)],
    )


def test_the_key_names_machine_and_commit() -> None:
    assert record()["key"] == {
        "chip": "NVIDIA H200",
        "driver": "580",
        "torch": "2.11",
        "commit": "aaaaaaaaaaaa+changes",
        "row": "7B LoRA",
        "recipe_hash": "h",
        "timing": CONTINUOUS,
    }
    assert record(git=None)["key"]["commit"] is None


def test_records_come_back_oldest_first_and_never_overwrite(tmp_path: Path) -> None:
    paths = [save_record(record(f"2026-01-02T03:04:0{second}Z"), tmp_path) for second in (5, 3, 5)]
    assert len({*paths}) == 3
    assert {path.parent.name for path in paths} == {"nvidia-h200"}
    assert all(path.name.startswith("7b-lora-2026010203040") for path in paths)
    (tmp_path / "peers.json").write_text('{"schema": "tunesmith.bench.peers.table"}', encoding="utf-8")
    assert [r["started"][-3:] for r in load_records(tmp_path)] == ["03Z", "05Z", "05Z"]


def test_a_run_replaces_its_own_record_of_fewer_rounds(tmp_path: Path) -> None:
    path = save_record(record(rounds=1), tmp_path)
    assert save_record(record(rounds=2), tmp_path, path) == path
    (stored,) = load_records(tmp_path)
    assert (stored["rounds"], stored["rounds_asked"], len(stored["rows"])) == (2, 2, 4)


def test_records_of_version_1_were_timed_in_the_one_way_there_was(tmp_path: Path) -> None:
    old = record()
    del old["key"]["timing"]
    (tmp_path / "old.json").write_text(json.dumps({**old, "schema_version": 1}), encoding="utf-8")
    assert load_records(tmp_path)[0]["key"]["timing"] == IDLE_TO_IDLE


def test_newer_records_and_empty_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RunDirError, match="no record"):
        load_records(tmp_path)
    (tmp_path / "x.json").write_text(json.dumps({**record(), "schema_version": 99}), encoding="utf-8")
    with pytest.raises(RunDirError, match="version 99"):
        load_records(tmp_path)


@pytest.mark.parametrize(("text", "expected"), [("NVIDIA H200", "nvidia-h200"), ("../..", "unknown"), ("", "unknown")])
def test_slug(text: str, expected: str) -> None:
    assert slug(text) == expected
