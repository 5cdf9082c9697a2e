"""A view found again in a copy of its storage."""

from __future__ import annotations

import torch

from tunesmith.model.saved_view import SavedView


def test_a_strided_view_is_found_in_a_copy_and_holds_nothing_of_the_first() -> None:
    whole = torch.arange(60, dtype=torch.float32).view(3, 20)
    part = whole[1:, 4:12:2].t()
    view = SavedView.note(part)
    copy = whole.clone() + 1
    found = view.of(copy)
    assert torch.equal(found, part + 1)
    assert found.untyped_storage().data_ptr() == copy.untyped_storage().data_ptr()
