"""Turns pytest's JUnit file into JSON that names the commit: python scripts/summarise_junit.py IN.xml OUT.json"""

from __future__ import annotations

import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic


def outcome(case: ET.Element) -> str:
    """What became of one test case."""
    for tag in ("failure", "error", "skipped"):
        if case.find(tag) is not None:
            return {"failure": "failed", "error": "failed"}.get(tag, tag)
    return "passed"


def summarise(junit: Path) -> dict[str, Any]:
    """The campaign as plain data: counts, every case, and the environment with its commit."""
    cases = [
        {
            "name": f"{case.get('classname')}::{case.get('name')}",
            "outcome": outcome(case),
            "duration_s": float(case.get("time", "0")),
        }
        for case in ET.parse(junit).getroot().iter("testcase")
    ]
    outcomes = [case["outcome"] for case in cases]
    return {
        "schema": "tunesmith.test-long",
        "schema_version": 1,
        "counts": {kind: outcomes.count(kind) for kind in ("passed", "failed", "skipped")},
        "cases": cases,
        "environment": environment_fingerprint(),
    }


def main(junit: str, target: str) -> None:
    """Read `junit`, write `target`."""
    write_json_atomic(Path(target), summarise(Path(junit)))


if __name__ == "__main__":
    main(*sys.argv[1:])
