"""What somebody who is new to the server reads: what a model is, their own letters, what was wrong and what to do."""

from __future__ import annotations

import tempfile
from pathlib import Path

from serve_fakes import Served, in_server

from tunesmith.rundir.model_notes import ModelNotes, write_notes


@in_server(allow_adapter_loading=True)
async def test_models_say_whether_they_learnt_from_single_questions(one: Served) -> None:
    assert not (await one.client.get("/v1/models/tiny")).json()["single_turns"]
    one.server.engine.facts["single_turns"] = True
    with tempfile.TemporaryDirectory() as single:
        write_notes(Path(single), ModelNotes(single_turns=True))
        for name, path in (("single", single), ("other", "/somewhere")):
            await one.post("/v1/load_lora_adapter", lora_name=name, lora_path=path)
    cards = {card["id"]: card["single_turns"] for card in (await one.client.get("/v1/models")).json()["data"]}
    assert cards == {"tiny": True, "other-name": True, "single": True, "other": False}
