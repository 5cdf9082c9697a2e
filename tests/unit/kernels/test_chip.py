"""A GPU that is foreseen is what launches on the meta device are cut for, as long as it is."""

from __future__ import annotations

import torch

from tunesmith.hardware import GENERATIONS
from tunesmith.kernels.chip import Chip, chip_of, foreseeing, is_gpu
from tunesmith.kernels.fp8 import has_fp8
from tunesmith.kernels.launch import LEAST_SHARED_BYTES, num_processors, overlapped, overlaps, shared_bytes

META, CPU = torch.device("meta"), torch.device("cpu")
H200, A100 = Chip((9, 0), 132), Chip((8, 0), 108)


def test_the_meta_device_stands_for_a_chip_that_is_foreseen() -> None:
    before = num_processors(META), shared_bytes(META), has_fp8(META)
    for chip in (H200, A100):
        with foreseeing(chip), overlapped():
            assert is_gpu(META) and not is_gpu(CPU)
            assert chip_of(META) == chip
            assert num_processors(META) == chip.num_processors
            assert shared_bytes(META) == GENERATIONS[chip.capability].shared_bytes > LEAST_SHARED_BYTES
            assert overlaps(META) == has_fp8(META) == (chip == H200)
            assert num_processors(CPU) < 10
    assert not is_gpu(META)
    assert (num_processors(META), shared_bytes(META), has_fp8(META)) == before


def test_so_may_the_cpu() -> None:
    with foreseeing(H200, "cpu"):
        assert is_gpu(CPU) and not is_gpu(META)
        assert num_processors(CPU) == 132
    assert chip_of(CPU) is None and not is_gpu(CPU)
