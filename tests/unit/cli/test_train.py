"""`tunesmith train`: what the command line makes of a recipe."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tunesmith.cli.main import run
from tunesmith.cli.train import _certify, _recipe, finished_facts, idle_line, idle_watch
from tunesmith.errors import DataError, RecipeError, VerificationError
from tunesmith.recipe.load import load_recipe, recipe_from_mapping
from tunesmith.recipe.schema import Recipe
from tunesmith.rundir.layout import RunDir, create_run
from tunesmith.verify.certificate import LEFT_TO_VERIFY


def test_data_of_the_command_line_is_taken_as_it_is_written(tmp_path: Path) -> None:
    """Names went through Python's repr into YAML, where a backslash or a wide space became other characters."""
    names = ["it's \\n.jsonl", "全\u3000角.jsonl", 'a "b".jsonl', "x: [y] # z.txt"]
    (tmp_path / "r.yaml").write_text("data: {train: [other.jsonl]}\n", encoding="utf-8")
    assert _recipe(str(tmp_path / "r.yaml"), names, None, [], None).data.train == names
    assert _recipe("builtin:tiny", names, None, [], None).data.train == names


def certificate(**passed: bool) -> SimpleNamespace:
    """A certificate of checks by name."""
    checks = [
        SimpleNamespace(name=n.replace("_", " "), passed=ok, detail=f"why {n}", duration_s=0.4)
        for n, ok in passed.items()
    ]
    skipped = {"merge parity": LEFT_TO_VERIFY, "resume equality": LEFT_TO_VERIFY, "other": "not here"}
    return SimpleNamespace(checks=checks, skipped=skipped, cached=False, duration_s=1.0)


def certify_gives(monkeypatch: pytest.MonkeyPatch, made: SimpleNamespace) -> None:
    monkeypatch.setattr("tunesmith.verify.certificate.certify", lambda *_, **__: made)


def test_a_failed_certificate_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It named the check alone, so that the reason was to be looked up in certificate.json."""
    certify_gives(monkeypatch, certificate(a=True, packing_isolation=False))
    with pytest.raises(
        VerificationError, match=r"\(packing isolation\).*: why packing_isolation; see .*certificate\.json"
    ):
        _certify(recipe_from_mapping({}), tmp_path)


def test_data_that_teaches_nothing_is_no_failure_of_the_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    certify_gives(monkeypatch, certificate(a=True, mask_shown=False))
    with pytest.raises(DataError, match=r"^why mask_shown$"):
        _certify(recipe_from_mapping({}), tmp_path)


def test_the_certificate_says_how_many_checks_there_are_in_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It said 9 where `tunesmith verify` said 11."""
    certify_gives(monkeypatch, certificate(a=True, b=True))
    line = _certify(recipe_from_mapping({}), tmp_path)
    assert "2 quick checks passed" in line
    assert f"tunesmith verify {tmp_path} runs all 4" in line


def test_a_bad_row_is_said_as_data_says_it_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The certificate failed with "the run would be silently wrong", exit code 1, and a run directory stayed."""
    monkeypatch.chdir(tmp_path)
    rows: list[Any] = [{"instruction": f"q{i}", "output": f"a{i}"} for i in range(60)]
    for bad in (6, 50):  # within what the certificate looks at, and beyond
        broken = [*rows[:bad], {"instruction": "no answer"}, *rows[bad + 1 :]]
        (tmp_path / "bad.json").write_text(json.dumps(broken, indent=0), encoding="utf-8")
        assert run(["data", "bad.json"]) == 2
        said = capsys.readouterr().err.splitlines()[-1]
        assert f"bad.json: row {bad + 1}" in said
        assert run(["train", "builtin:tiny", "--data", "bad.json"]) == 2
        assert capsys.readouterr().err.splitlines() == [said]  # "first a check that training is correct" stood above it
        assert [path.name for path in tmp_path.iterdir()] == ["bad.json"]


def test_data_given_as_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It was "en.json is a file: name the directory that holds config.json"."""
    monkeypatch.chdir(tmp_path)
    Path("mine").mkdir()
    Path("mine/en.json").write_text("[]", encoding="utf-8")
    for given in ("mine/en.json", "mine", "gone.jsonl", "builtin:shop?rows=5"):
        command = f"tunesmith train builtin:tiny --data {shlex.quote(given)}"
        with pytest.raises(RecipeError, match=f"^{re.escape(given)} looks like data: {re.escape(command)}$"):
            _recipe(given, [], None, [], None)
    with pytest.raises(RecipeError, match="say what to train builtin:tiny on"):
        _recipe("builtin:tiny", [], None, [], None)


@pytest.fixture
def finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDir:
    """A run that has ended, with an outcome."""
    monkeypatch.setattr("tunesmith.rundir.layout.environment_fingerprint", dict)
    recipe = recipe_from_mapping({"model": {"path": "builtin:tiny"}, "data": {"train": ["my rows.json"]}})
    made = create_run(recipe, path=tmp_path / "run")
    made.final.mkdir()
    made.set_status("finished", steps=20, exit_code=0)
    return made


def test_a_finished_run_that_is_resumed_says_so_and_what_to_type(
    finished: RunDir, capsys: pytest.CaptureFixture[str]
) -> None:
    """It made the certificate and wrote the outcome again, with "going on from ... (step 20 of 20)" in between."""
    before = finished.run.read_bytes()
    for arguments in (["--resume", str(finished.path)], ["--run-dir", str(finished.path)]):
        assert run(["train", *arguments, "--json"]) == 0
        out, err = capsys.readouterr()
        assert "nothing left to do: this run ended at step 20" in err
        command = err.splitlines()[-1].strip()
        adapter = shlex.quote(str(finished.final))
        assert command == f"tunesmith train builtin:tiny --data 'my rows.json' --set method.adapter={adapter}"
        assert json.loads(out)["steps"] == 20
    assert finished.run.read_bytes() == before
    options = shlex.split(command)
    again = _recipe("builtin:tiny", [options[4]], None, [options[-1]], None)
    assert again.method.adapter == str(finished.final)


def test_a_run_that_is_not_finished_or_asked_for_otherwise_goes_on(finished: RunDir) -> None:
    recipe = load_recipe(finished.recipe)
    assert finished_facts(finished.path, recipe) is not None
    assert finished_facts(finished.path, load_recipe(finished.recipe, ["train.epochs=40"])) is None
    finished.final.rmdir()
    assert finished_facts(finished.path, recipe) is None
    finished.final.mkdir()
    finished.set_status("interrupted")
    assert finished_facts(finished.path, recipe) is None


@pytest.mark.parametrize(("rank", "packs", "said"), [("0", 1, True), ("0", 2, False), ("0", 5, False), ("1", 1, None)])
def test_processes_that_the_data_leaves_idle_are_told_of_once(
    rank: str, packs: int, said: bool | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Two processes on thirty short rows: one of them had empty micro-batches, and nothing said so."""
    for name, value in {"RANK": rank, "WORLD_SIZE": "4", "LOCAL_RANK": rank}.items():
        monkeypatch.setenv(name, value)
    watch = idle_watch(recipe_from_mapping({"parallel": {"tensor": 2}}))  # two share the data
    assert (watch is None) == (said is None)
    if watch is not None:
        for step in (1, 2):
            watch(SimpleNamespace(step=step, micro_batches=packs))  # type: ignore[arg-type]
        assert len(caplog.messages) == int(bool(said))
        assert idle_line(1, 3) == (
            "idle in every step: 2 of the 3 processes that share the data; a step has only one micro-batch "
            "(train.micro_batch_tokens each). --nproc 1 is as fast"
        )


def test_a_process_alone_watches_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    assert idle_watch(Recipe()) is None
