"""The report in a real browser: it renders, its plots are visible, and nothing reaches outside."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tunesmith.report.write import write_report
from tunesmith.rundir.io import write_json_atomic

OWNERS = ("weights", "adapters", "gradients", "optimizer", "activations")
SIZES = {"全参数 full": (40e6, 0, 40e6, 80e6, 40e6), "LoRA": (40e6, 1e6, 1e6, 2e6, 36e6)}


@pytest.fixture(scope="module")
def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium: install it with apt-get install chromium fonts-noto-cjk")
    return found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("网店 run") / "bench"
    (run / "cells").mkdir(parents=True)
    info = {"schema_version": 1, "kind": "bench", "status": "finished", "name": "网店", "tunesmith_version": "0"}
    write_json_atomic(run / "run.json", {**info, "created_at": "2026-01-02T03:04:05+00:00", "facts": {}})
    for index, (name, sizes) in enumerate(SIZES.items()):
        write_json_atomic(run / "cells" / f"{index}.json", cell(name, sizes, 0.1 - 0.03 * index))
    return write_report([run]).html


def cell(name: str, sizes: tuple[float, ...], step_s: float) -> dict[str, Any]:
    return {
        "schema_version": 1,
        "name": name,
        "label": name,
        "parent": None if sizes[1] == 0 else next(iter(SIZES)),
        "status": "ok",
        "command": "tunesmith bench train shop.yaml",
        "times": {"steps_s": [step_s, step_s * 1.01, step_s * 0.99]},
        "work": {"steps": 3, "tokens": 300, "trained_tokens": 100},
        "memory": {"allocated_peak_bytes": sum(sizes), "resident_peak_bytes": 6e8},
        "owners": {f"{owner}_bytes": size for owner, size in zip(OWNERS, sizes, strict=True)},
        "losses": {"training": [3, 2, 1.5], "validation": 2.0},
    }


def browse(chromium: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--disable-dev-shm-usage"]
    command = [chromium, *flags, f"--user-data-dir={folder / 'profile'}", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def test_the_page_draws_colours_and_says_nothing_on_the_console(chromium: str, page: Path, tmp_path: Path) -> None:
    shot = tmp_path / "page.png"
    done = browse(
        chromium,
        tmp_path,
        "--enable-logging=stderr",
        "--window-size=1280,1600",
        f"--screenshot={shot}",
        page.as_uri(),
    )
    assert "CONSOLE" not in done.stderr
    colours = colours_of(shot)
    # The bars of the memory plot: weights, optimiser states and activations, each in its own colour.
    for hexadecimal in ("24588f", "8a6bb8", "bcc2c8"):
        assert colours.get(bytes.fromhex(hexadecimal), 0) > 500


def test_the_page_fits_a_telephone_and_the_copy_button_copies(chromium: str, page: Path, tmp_path: Path) -> None:
    """A probe added to a copy of the page: it clicks the button and measures the width; the page itself has no such."""
    probe = """<script>
      const button = document.querySelector("button[data-copied]");
      button.click();
      const out = {label: button.textContent, selected: String(getSelection()),
        overflow: document.documentElement.scrollWidth - innerWidth,
        plots: [...document.querySelectorAll("svg.plot")].map(s => s.getBoundingClientRect().height)};
      document.body.innerHTML = "<pre>" + JSON.stringify(out) + "</pre>";
    </script></body>"""
    copy = tmp_path / "probe.html"
    copy.write_text(page.read_text(encoding="utf-8").replace("</body>", probe), encoding="utf-8")
    dom = browse(chromium, tmp_path, "--window-size=500,900", "--dump-dom", copy.as_uri()).stdout
    match = re.search(r"<pre>(.*)</pre>", dom)
    assert match is not None
    found = json.loads(match.group(1))
    assert found["label"] == "Copied"
    assert found["selected"] == "tunesmith bench train shop.yaml"
    assert found["overflow"] <= 0
    assert len(found["plots"]) == 6
    assert min(found["plots"]) > 40


def colours_of(path: Path) -> dict[bytes, int]:
    """How many pixels of each colour a screenshot has."""
    with Image.open(path) as image:
        found = image.convert("RGB").getcolors(maxcolors=2**24)
    return {bytes(colour): count for count, colour in found}
