"""What goes to a GPU in one buffer comes out as it went in, aligned; and what is pinned ahead of the steps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tunesmith.engine.moving import fill, move, parts, pin_ahead, pinned_sizes, places_of

ARRAYS = [
    np.arange(7),
    np.arange(5, dtype=np.int32),
    np.zeros(0, dtype=np.int64),
    np.arange(12, dtype=np.int32).reshape(3, 4)[:, ::2],
    np.array([[0.5, -1.0], [2.0, 3.5]], dtype=np.float32),
    np.arange(8)[::-3],
]


def test_a_buffer_holds_arrays_of_any_strides() -> None:
    places, total = places_of([array.nbytes for array in ARRAYS])
    buffer = np.full(total, 255, dtype=np.uint8)
    fill(buffer, ARRAYS, places)
    tensors = parts(torch.from_numpy(buffer), ARRAYS, places)
    for tensor, array in zip(tensors, ARRAYS, strict=True):
        assert tensor.shape == array.shape and tensor.is_contiguous()
        assert tensor.numpy().dtype == array.dtype
        assert np.array_equal(tensor.numpy(), array)
        assert (tensor.data_ptr() - torch.from_numpy(buffer).data_ptr()) % 16 == 0 or not array.size
    assert total % 16 == 0


def test_on_a_cpu_arrays_are_taken_as_they_are() -> None:
    for tensor, array in zip(move(ARRAYS, torch.device("cpu")), ARRAYS, strict=True):
        assert np.array_equal(tensor.numpy(), array)


@pytest.mark.parametrize("most", [1, 8, 9, 70_000, 2**21])
def test_there_are_buffers_of_every_size_that_a_step_may_want(most: int) -> None:
    sizes = dict(pinned_sizes(most))
    for wanted in {1, min(8, most), min(144, most), most}:
        assert sizes[1 << (wanted - 1).bit_length()] >= 4, "rounded up to a power of two, as torch does"
    assert max(sizes) < 2 * max(most, 2)
    assert sum(size * number for size, number in sizes.items()) < 8 * max(most, 2) + 2 * 16 * 2**16


def test_nothing_is_pinned_where_there_is_no_gpu() -> None:
    pin_ahead(2**40, torch.device("cpu"))
