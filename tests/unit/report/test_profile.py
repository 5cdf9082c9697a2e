"""The part of a report that profiles make, from tables made by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.unit.report.conftest import write_run
from tunesmith.report.load import read_run
from tunesmith.report.profile import SHOWN, profile_sections
from tunesmith.report.strings import words_for
from tunesmith.report.write import write_report
from tunesmith.rundir.io import write_json_atomic


def _operator(name: str, own_s: float, on_device: bool) -> dict[str, Any]:
    return {"name": name, "calls": 4, "self_device_s": own_s if on_device else None, "self_host_s": own_s / 2}


def _profile(tmp_path: Path, *, on_device: bool) -> Path:
    path = write_run(tmp_path / "prof", "profile", "shop", steps=2)
    operators = [_operator("<mm>", 0.3, on_device), _operator("copy", 0.1, on_device)]
    kernels = [_operator("gemm", 0.4, on_device)] if on_device else []
    by = "device" if on_device else "host"
    facts = {"steps": 2, "by": by, "operators": operators, "kernels": kernels}
    memory = {"points": [[0.0, 10], [0.1, 50_000_000], [0.2, 20]], "phases": [[0.0, "forward"]], "peak_bytes": 50e6}
    (path / "profile").mkdir()
    write_json_atomic(path / "profile" / "operators.json", facts)
    write_json_atomic(path / "profile" / "memory.json", {**memory, "owners": {"weights_bytes": 10_000_000}})
    return path


def test_a_profile_is_a_page_of_operators_and_memory(tmp_path: Path) -> None:
    """The page of a profile was empty but for the environment."""
    path = _profile(tmp_path, on_device=False)
    (section,) = profile_sections([read_run(path)], words_for("en"))
    assert section.head[2] == "own time on the CPU, a step"
    assert section.rows == (("<mm>", "2.0", "75 ms", "75.0 %"), ("copy", "2.0", "25 ms", "25.0 %"))
    files = write_report([path])
    assert files.headline == "shop: <mm> takes 75.0 % of the 100 ms of operators in a step."
    assert files.sentences == ("At most 50 MB of tensors are allocated during a step.",)
    page = files.html.read_text(encoding="utf-8")
    assert "&lt;mm&gt;" in page and "<mm>" not in page and '<figure class="whole">' in page and "weights 10 MB" in page
    chinese = write_report([path], language="zh").html.read_text(encoding="utf-8")
    assert "前向" in chinese and "forward" not in chinese


def test_kernels_have_a_table_of_their_own_and_tables_are_short(tmp_path: Path) -> None:
    path = _profile(tmp_path, on_device=True)
    operators, kernels = profile_sections([read_run(path)], words_for("en"))
    assert operators.head[2] == "own time on the device, a step" and operators.rows[0][2] == "150 ms"
    assert kernels.rows == (("gemm", "2.0", "200 ms", "100.0 %"),)
    many = [_operator(f"op{index}", 0.1, on_device=False) for index in range(40)]
    write_json_atomic(path / "profile" / "operators.json", {"steps": 1, "by": "host", "operators": many})
    (section,) = profile_sections([read_run(path)], words_for("en"))
    assert len(section.rows) == SHOWN


def test_a_profile_that_did_not_finish_has_no_section(tmp_path: Path) -> None:
    assert profile_sections([read_run(write_run(tmp_path / "prof", "profile", "shop"))], words_for("en")) == []
