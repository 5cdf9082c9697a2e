"""What is measured, and which of it a step is most like."""

from __future__ import annotations

import pytest
import torch

from tunesmith.engine.attention_shapes import nearest, pages_for, shapes_for, step_of
from tunesmith.engine.config import EngineConfig
from tunesmith.kernels.paged_step import PagedStep

LARGE = EngineConfig(max_model_len=32_768)


def step(requests: int, context: int, max_query: int = 1, min_query: int = 1) -> PagedStep:
    nothing = torch.zeros(requests, dtype=torch.int32)
    return PagedStep(nothing[:, None], nothing, nothing, max_query, context, min_query)


def test_what_a_large_engine_can_meet() -> None:
    assert [shape.label for shape in shapes_for(LARGE)] == [
        "decode 1 over 1024",
        "decode 1 over 8192",
        "decode 16 over 1024",
        "decode 16 over 8192",
        "decode 256 over 1024",
        "decode 256 over 8192",
        "drafts 16x5 over 1024",
        "prompts 1x2048 over 6144",
        "pieces 8x256 over 1280",
        "mixed 1x2048 over 4096 beside 63",
    ]


@pytest.mark.parametrize("most", [1, 4, 300])
@pytest.mark.parametrize("length", [2, 40, 1000, 131_072])
def test_limits_hold_and_steps_are_whole(length: int, most: int) -> None:
    config = EngineConfig(max_model_len=length, max_num_seqs=most)
    shapes = shapes_for(config)
    assert len({shape.label for shape in shapes}) == len(shapes)
    for shape in shapes:
        assert 1 <= shape.num_new <= shape.context <= length
        assert shape.num_rows <= most
        made = step_of(shape, 40, torch.device("cpu"))
        assert made.host is not None and made.query_starts_R1.tolist() == made.host.starts.tolist()
        assert (
            made.max_query == made.query_starts_R1.diff().max() and made.min_query <= made.query_starts_R1.diff().min()
        )
        assert made.block_tables_RP.max() < 40 + shape.num_rows
    assert pages_for(shapes, 1600) <= 100


@pytest.mark.parametrize(
    ("asked", "label"),
    [
        (step(1, 100), "decode 1 over 1024"),
        (step(3, 500), "decode 1 over 1024"),
        (step(5, 30_000), "decode 16 over 8192"),
        (step(100, 2048), "decode 256 over 1024"),
        (step(64, 4096, 4), "drafts 16x5 over 1024"),
        (step(1, 5000, 1500, 1500), "prompts 1x2048 over 6144"),
        (step(4, 600, 200, 100), "pieces 8x256 over 1280"),
        (step(40, 2000, 800), "mixed 1x2048 over 4096 beside 63"),
    ],
)
def test_the_nearest(asked: PagedStep, label: str) -> None:
    assert nearest(asked, shapes_for(LARGE)).label == label


def test_a_kind_that_was_not_measured_is_taken_for_another() -> None:
    shapes = [shape for shape in shapes_for(LARGE) if shape.kind == "decode"]
    assert nearest(step(40, 2000, 800), shapes).kind == "decode"
