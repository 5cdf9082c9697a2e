"""The sweep over kernels of decoding's products, as far as no GPU is needed: what it compiles and compares."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

pytest.importorskip("triton")
SCRIPT = Path(__file__).resolve().parents[3] / "benchmarks" / "decode_linears.py"


@pytest.fixture(scope="module")
def script() -> Iterator[ModuleType]:
    spec = importlib.util.spec_from_file_location("decode_linears", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["decode_linears"] = module
    spec.loader.exec_module(module)
    yield module
    del sys.modules["decode_linears"]


def test_every_kernel_is_compiled_before_it_is_timed(script: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the device's launches ask for it: an earlier recording had the variant of Triton's interpreter."""
    from tunesmith.kernels.warm_up import WarmUp

    found: list[Any] = []

    def compile_all(launches: list[Any], *_: object) -> WarmUp:
        found.extend(launches)
        return WarmUp(len(launches), 1, 0.0)

    monkeypatch.setattr(script, "compile_all", compile_all)
    monkeypatch.setattr(script, "num_processors", lambda _: 132)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    line = script.compiled(["bf16", "int8", "fp8", "int4"], {(37888, 3584)}, [1, 16, 64], 1)
    assert line["compiled"] == len(found)
    names = {launch.name for launch in found}
    assert names == {"quad_kernel", "bytes_kernel", "gemv_kernel", "dot_kernel"}
    assert all(launch.options["BY_HAND"] for launch in found if "BY_HAND" in launch.options)
    wanted = {(format_id, rows) for format_id in range(4) for rows in (8, 16, 32)}
    assert {(job.options["FORMAT"], job.options["ROWS"]) for job in found if job.name == "quad_kernel"} == wanted


@pytest.mark.parametrize("name", ["int8", "fp8", "int4"])
def test_each_candidate_is_compared_and_one_that_fails_is_a_line(
    script: ModuleType, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(script, "seconds_of", lambda call, _: (call(), 1e-3)[1])
    monkeypatch.setattr(script, "has_fp8", lambda _: False)
    generator = torch.Generator().manual_seed(0)
    weight = (torch.randn(24, 256, generator=generator) * 0.02).bfloat16()
    x = torch.randn(16, 256, generator=generator).bfloat16()
    held = script.hold(name, weight)
    dense = held.dequantised(held.codes, torch.float32).double().t()
    truth, size = x.double() @ dense, x.double().abs() @ dense.abs()
    copies = [held.codes, held.codes.clone()]
    lines = {}
    for candidate in script.candidates(name, held, copies, [weight], len(x)):
        lines[candidate.kernel] = script.tried(candidate, x, truth, size, held.num_bytes, 4e12)
    # Without a GPU, and where nothing interprets, Triton's launches fail.
    assert set(lines) == {"fragments", "dot", "cublas-bf16", "dequantised"}
    assert "error" in lines["fragments"]
    assert lines["dequantised"]["is_right"]
    assert lines["dequantised"]["gb_per_s"] == round(held.num_bytes / 0.5e-3 / 1e9, 1)
    # The table has what it is given.
    row = {
        "model": "m",
        "linear": "qkv",
        "format": name,
        "tokens": 1,
        "time_us": 2.5,
        "cublas_bf16_us": 5,
        "gb_per_s": 1,
    }
    lines_of_text = list(script.table(iter([row, {"left_out_for_time": []}])))
    assert f"{2.5 * script.NUM_BLOCKS / 1000:.3f} ms" in lines_of_text[-1]
    # What is not quantised is another weight, of other bytes.
    assert "max_error" not in lines["cublas-bf16"]
    assert lines["cublas-bf16"]["gb_per_s"] == round(weight.nbytes / 1e-3 / 1e9, 1)
