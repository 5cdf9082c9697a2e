"""What is sent fits the server: its context, its vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from tunesmith.bench.serve.fit import fit, fit_lengths
from tunesmith.bench.serve.record import in_words
from tunesmith.bench.serve.target import find_target
from tunesmith.bench.serve.workload import Workload, make_requests
from tunesmith.errors import TunesmithError


@pytest.mark.parametrize(
    ("workload", "prompts", "outputs"),
    [
        (Workload(), (64, 512), (64, 512)),
        (Workload(is_quick=True), (32, 256), (16, 64)),
        (Workload(output_tokens=(10, 200)), (100, 824), (10, 200)),
        (Workload(prompt_tokens=(1000, 1000)), (1000, 1000), (3, 24)),
        (Workload(prompt_tokens=(1000, 1000), output_tokens=(50, 50)), (1000, 1000), (50, 50)),
    ],
)
def test_lengths_that_nobody_typed_shrink_to_the_context(
    workload: Workload, prompts: tuple[int, int], outputs: tuple[int, int]
) -> None:
    fitted, note = fit_lengths(replace(workload, max_model_len=1024))
    assert (fitted.prompts, fitted.outputs) == (prompts, outputs)
    changed = (prompts, outputs) != (workload.prompts, workload.outputs)
    assert (note is not None) == changed and (not changed or "1024" in str(note))
    assert fit_lengths(replace(workload, max_model_len=4096)) == (replace(workload, max_model_len=4096), None)


def test_a_vocabulary_is_learnt_from_the_list_of_models_or_by_asking(known_server: Any) -> None:
    """9,000 ids were assumed, and a server with fewer refused every request."""
    known_server.vocab_size = 300
    fitted, notes = fit(Workload(count=2), find_target(known_server.url), None, 5.0)
    assert fitted.num_ids == 300 and notes == () and known_server.bodies == []
    known_server.vocab_size, known_server.highest_id = None, 1999
    target = find_target(known_server.url)
    fitted, (note,) = fit(Workload(count=2), target, None, 5.0)
    assert fitted.num_ids == 1000 and "--num-ids" in note
    assert all(max(item.prompt) < 1000 for item in make_requests(fitted).items if not isinstance(item.prompt, str))
    known_server.highest_id = -1
    with pytest.raises(TunesmithError, match=r"400: no token id above -1; .*--num-ids"):
        fit(Workload(count=2), target, None, 5.0)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"error": {"message": "too long", "code": 400}}', "400: too long"),
        ('{"object": "error", "message": "too long"}', "400: too long"),
        ('{"detail": "too long"}', "400: too long"),
        ("<p>Bad\nGateway</p>", "400: <p>Bad Gateway</p>"),
    ],
)
def test_an_error_is_said_without_its_json(text: str, words: str) -> None:
    assert in_words(400, text) == words
