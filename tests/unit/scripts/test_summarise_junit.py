"""The long campaign's result names every case and the commit."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
JUNIT = """<testsuites><testsuite>
<testcase classname="tests.long.a" name="fine" time="1.5"/>
<testcase classname="tests.long.a" name="wrong" time="0.5"><failure message="x">trace</failure></testcase>
<testcase classname="tests.long.a" name="crash" time="0.5"><error message="x">trace</error></testcase>
<testcase classname="tests.long.a" name="left" time="0"><skipped message="no GPU"/></testcase>
</testsuite></testsuites>"""


def test_counts_cases_and_commit(tmp_path: Path) -> None:
    (tmp_path / "in.xml").write_text(JUNIT, encoding="utf-8")
    script = ROOT / "scripts" / "summarise_junit.py"
    subprocess.run([sys.executable, script, tmp_path / "in.xml", tmp_path / "out.json"], check=True)
    result = json.loads((tmp_path / "out.json").read_text(encoding="utf-8"))
    assert result["counts"] == {"passed": 1, "failed": 2, "skipped": 1}
    assert result["cases"][0] == {"name": "tests.long.a::fine", "outcome": "passed", "duration_s": 1.5}
    assert "git" in result["environment"]


def test_scripts_are_executable_and_say_what_is_missing(tmp_path: Path) -> None:
    """A checkout without an environment is told which command makes one."""
    (tmp_path / "scripts").mkdir()
    for name in ("check", "test", "test-long"):
        copy = tmp_path / "scripts" / name
        copy.write_bytes((ROOT / "scripts" / name).read_bytes())
        done = subprocess.run(["bash", copy], capture_output=True, text=True)
        assert done.returncode == 2
        assert "make setup" in done.stderr
