"""What is said where DeepSpeed, or what it needs, is missing."""

from __future__ import annotations

import ctypes.util
import importlib.util
import shutil
from importlib import metadata

import pytest

from tunesmith.errors import MissingExtraError
from tunesmith.parallel import deepspeed_install
from tunesmith.parallel.deepspeed_install import deepspeed_findings, nvme_lacks, nvme_mend, require_deepspeed
from tunesmith.parallel.deepspeed_state import boxes_of


def test_without_deepspeed_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'tunesmith\[deepspeed\]'"):
        require_deepspeed("cpu")
    (finding,) = deepspeed_findings(with_cuda=False)
    assert (finding.level, finding.mend) == ("note", "pip install 'tunesmith[deepspeed]'")


def test_what_nvme_lacks_is_one_line_with_its_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(ctypes.util, "find_library", lambda name: None)
    lacks = nvme_lacks(with_cuda=True)
    assert lacks[:2] == ["a C++ compiler", "libaio"] and lacks[-1] == "the CUDA toolkit (nvcc)"
    assert nvme_mend(lacks).startswith("sudo apt-get install -y libaio-dev g++, and install the CUDA toolkit")


@pytest.mark.parametrize("lacks", [[], ["libaio"]])
def test_offload_to_nvme_is_named_where_it_can_be_had(monkeypatch: pytest.MonkeyPatch, lacks: list[str]) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(metadata, "version", lambda name: "0.19")
    monkeypatch.setattr(deepspeed_install, "nvme_lacks", lambda with_cuda: lacks)
    first, *rest = deepspeed_findings(with_cuda=False)
    assert first.detail.startswith("0.19, ZeRO-1 to 3 and offload to the CPU")
    assert ("NVMe" in first.detail) == (not lacks) and len(rest) == len(lacks)


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4), ()])
def test_any_range_of_a_flattened_tensor_is_boxes(shape: tuple[int, ...]) -> None:
    import torch

    tensor = torch.arange(max(torch.Size(shape).numel(), 1)).view(shape)
    for start in range(tensor.numel() + 1):
        for stop in range(start, tensor.numel() + 1):
            found = list(boxes_of(shape, start, stop))
            parts = [tensor[tuple(slice(a, b) for a, b in slices)].reshape(-1) for slices, _ in found]
            values = torch.cat(parts).tolist() if parts else []
            assert values == list(range(start, stop))
            assert [count for _, count in found] == [len(part) for part in parts]
            assert len(found) <= 2 * max(len(shape), 1) - 1
