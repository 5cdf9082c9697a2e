"""Bytes of the number formats, scales included."""

from __future__ import annotations

import pytest

from tunesmith.formats import FORMATS


@pytest.mark.parametrize(("name", "num_bytes"), [("float32", 4096), ("bfloat16", 2048), ("float16", 2048)])
def test_plain_formats_have_no_scales(name: str, num_bytes: int) -> None:
    assert FORMATS[name].bytes_for(1024) == num_bytes


def test_nf4_has_a_float_scale_for_every_64_values() -> None:
    assert FORMATS["nf4"].bytes_for(1024) == 512 + 16 * 4


def test_double_quantisation_keeps_a_byte_a_scale_and_a_second_level() -> None:
    values = 64 * 256 * 2
    assert FORMATS["nf4-double"].bytes_for(values) == values // 2 + 512 + 2 * 4 + 4


def test_ragged_groups_round_up() -> None:
    assert FORMATS["nf4"].bytes_for(65) == 33 + 2 * 4
