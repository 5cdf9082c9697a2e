"""`tunesmith train` as a person types it, and `tunesmith.train` as a program calls it."""

from __future__ import annotations

import json
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch

import tunesmith
from tunesmith.checkpoint.state import list_states
from tunesmith.cli import main
from tunesmith.errors import CheckpointError, DataError, NonFiniteError, RecipeError, TrainingError
from tunesmith.recipe.load import load_recipe, recipe_from_mapping
from tunesmith.rundir.io import read_jsonl
from tunesmith.rundir.layout import open_run
from tunesmith.train.loop import resume as resume_from
from tunesmith.train.metrics import StepMetrics
from tunesmith.train.session import build_session

Recipe = dict[str, Any]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty short conversations, in a folder and file with Chinese names."""
    path = tmp_path_factory.mktemp("数据") / "问答.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            question, answer = f"What is {i} plus {i}?", f"It is {2 * i}. 好的"
            turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            file.write(json.dumps({"messages": turns}, ensure_ascii=False) + "\n")
    return path


@pytest.fixture
def recipe(tiny_model_dir: Callable[..., Path], rows: Path, tmp_path: Path) -> Recipe:
    """A LoRA run of 12 steps with everything random in it."""
    return {
        "output": str(tmp_path / "runs"),
        "model": {"path": str(tiny_model_dir("qwen2")), "device": "cpu"},
        "method": {"kind": "lora", "rank": 4, "dropout": 0.1},
        "data": {"train": [str(rows)], "max_length": 96, "validation_fraction": 0.1, "workers": 0},
        "train": {
            "max_steps": 12,
            "micro_batch_tokens": 192,
            "accumulation": 2,
            "learning_rate": 5e-3,
            "neftune_alpha": 5.0,
        },
        "checkpoint": {"every_steps": 4},
        "evaluation": {"every_steps": 6},
        "log": {"trackers": []},
    }


def with_keys(recipe: Recipe, **sections: dict[str, Any]) -> Recipe:
    """The recipe with keys of some sections replaced."""
    return {**recipe, **{name: {**recipe.get(name, {}), **keys} for name, keys in sections.items()}}


def losses(run: Path) -> list[tuple[int, float]]:
    return [(row["step"], row["loss"]) for row in read_jsonl(run / "metrics.jsonl") if row["event"] == "step"]


def test_a_run_leaves_everything_in_its_directory(recipe: Recipe) -> None:
    seen: list[StepMetrics] = []
    result = tunesmith.train(recipe, on_step=seen.append, quiet=True)
    run = open_run(result.run_dir)
    assert [metrics.step for metrics in seen] == list(range(1, 13))
    assert result.steps == 12
    assert losses(run.path)[-1] == (12, result.loss)
    assert losses(run.path)[-1][1] < losses(run.path)[0][1]
    row = read_jsonl(run.metrics)[0]
    assert row["tokens"] >= row["trained_tokens"] > 0
    assert row["model_flops_per_s"] > 0
    assert row["mfu_ratio"] is None  # a CPU's peak is not known
    assert row["host_resident_bytes"] > 10**7
    validations = [row for row in read_jsonl(run.metrics) if row["event"] == "validation"]
    assert [row["step"] for row in validations] == [6, 12]
    assert validations[-1]["validation_loss"] == result.validation_loss
    resolved = load_recipe(run.recipe)
    assert (resolved.train.precision, resolved.train.master_weights, resolved.model.dtype) == ("float32",) * 3
    assert run.info().status == "finished"
    assert run.info().facts["trainable_parameters"] > 0
    assert "It is" in "".join(piece["text"] for piece in json.loads(run.preview.read_text(encoding="utf-8"))["pieces"])
    assert [path.name for path in list_states(run.checkpoints)] == ["step-00000008", "step-00000012"]


def test_the_adapter_gives_the_logits_that_were_trained(recipe: Recipe) -> None:
    result = tunesmith.train(recipe, quiet=True)
    model = tunesmith.load_model(recipe["model"]["path"], adapter=result.final, device="cpu")
    base = tunesmith.load_model(recipe["model"]["path"], device="cpu")
    session = build_session(recipe_from_mapping(recipe))
    resume_from(session, open_run(result.run_dir).checkpoints)
    session.model.eval()
    document = [[1, 2, 3, 40, 50, 60]]
    trained = tunesmith.logits(session.model, document)[0]
    torch.testing.assert_close(tunesmith.logits(model, document)[0], trained, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(tunesmith.logits(base, document)[0], trained, atol=1e-3)


@pytest.mark.parametrize("kind", ["full", "freeze"])
def test_a_whole_model_comes_out_and_transformers_loads_it(recipe: Recipe, kind: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    method = {"kind": kind, "trainable": ["last:1", "head"] if kind == "freeze" else []}
    result = tunesmith.train(with_keys(recipe, method=method, train={"max_steps": 3}), quiet=True)
    assert result.final is not None
    ours = tunesmith.load_model(result.final, device="cpu")
    theirs = AutoModelForCausalLM.from_pretrained(result.final)
    document = [5, 6, 7, 80, 90]
    with torch.no_grad():
        expected = theirs(torch.tensor([document])).logits[0]
    torch.testing.assert_close(tunesmith.logits(ours, [document])[0], expected, rtol=1e-4, atol=1e-4)
    assert AutoTokenizer.from_pretrained(result.final).encode("a b")


@pytest.mark.parametrize("kind", ["full", "lora", "qlora"])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_every_method_learns_in_every_precision(recipe: Recipe, kind: str, precision: str) -> None:
    method = {"kind": kind, "dropout": 0.0}
    train = {"precision": precision, "neftune_alpha": 0.0, "checkpointing": "block"}
    session = build_session(recipe_from_mapping(with_keys(recipe, method=method, train=train)))
    measured = [session.step().loss for _ in range(12)]
    session.close()
    assert measured[-1] < measured[0] - 0.05
    trained = {parameter.dtype for parameter in session.trained_weights().values()}
    assert trained == {torch.float32}


def test_pure_bfloat16_holds_weights_and_states_in_bfloat16(recipe: Recipe) -> None:
    changed = with_keys(recipe, method={"kind": "full"}, train={"precision": "bfloat16", "master_weights": "compute"})
    session = build_session(recipe_from_mapping(changed))
    session.step()
    session.close()
    assert {parameter.dtype for parameter in session.model.parameters()} == {torch.bfloat16}
    states = [value for state in session.optimizer.state.values() for key, value in state.items() if key != "step"]
    assert {value.dtype for value in states} == {torch.bfloat16}


def test_the_transformers_backend_trains_in_the_same_loop(recipe: Recipe) -> None:
    """Padded rows instead of packs, and all weights trained: the losses are those of our decoder."""
    quiet = {"neftune_alpha": 0.0, "max_steps": 3, "precision": "float32"}
    native = with_keys(recipe, method={"kind": "full"}, train={**quiet, "learning_rate": 1e-3})
    foreign = with_keys(native, model={"backend": "transformers"})
    results = [tunesmith.train(with_keys(chosen), quiet=True) for chosen in (native, foreign)]
    ours, theirs = (losses(result.run_dir) for result in results)
    assert [loss for _, loss in theirs] == pytest.approx([loss for _, loss in ours], rel=1e-4)
    assert open_run(results[1].run_dir).info().facts["backend"] == "transformers"


class _CutError(Exception):
    pass


def _cut(recipe: Recipe, after: int) -> Path:
    """A run that stops without a word after so many steps, as if it had been killed."""

    def on_step(metrics: StepMetrics) -> None:
        if metrics.step == after:
            raise _CutError

    with pytest.raises(_CutError):
        tunesmith.train(recipe, on_step=on_step, quiet=True)
    return next(Path(recipe["output"]).iterdir())


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_a_resumed_run_has_the_same_remaining_losses_bit_for_bit(
    recipe: Recipe, tmp_path: Path, optimizer: str
) -> None:
    recipe = with_keys(recipe, train={"optimizer": optimizer})
    whole = tunesmith.train({**recipe, "output": str(tmp_path / "whole")}, quiet=True)
    run = _cut(recipe, after=7)
    assert open_run(run).info().status == "failed"
    again = tunesmith.train(recipe, resume=run, quiet=True)
    assert again.run_dir == run
    assert losses(run) == losses(whole.run_dir)
    assert again.validation_loss == whole.validation_loss
    assert open_run(run).info().status == "finished"


def test_a_finished_run_that_is_resumed_keeps_what_it_recorded(recipe: Recipe) -> None:
    """Its losses became null and its duration 0."""
    result = tunesmith.train(recipe, quiet=True)
    before = open_run(result.run_dir).info()
    tunesmith.train(recipe, resume=result.run_dir, quiet=True)
    after = open_run(result.run_dir).info()
    assert after.status == "finished"
    assert after.facts == before.facts
    assert after.facts["loss"] == result.loss


def test_a_run_cut_before_its_first_checkpoint_starts_again(recipe: Recipe, tmp_path: Path) -> None:
    whole = tunesmith.train({**recipe, "output": str(tmp_path / "whole")}, quiet=True)
    run = _cut(recipe, after=2)
    tunesmith.train(recipe, resume=run, quiet=True)
    assert losses(run) == losses(whole.run_dir)


def test_a_resume_with_a_changed_recipe_is_refused_by_key(recipe: Recipe) -> None:
    run = _cut(recipe, after=5)
    with pytest.raises(RecipeError, match=r"train\.learning_rate: 0\.005, and would go on with 0\.001"):
        tunesmith.train(with_keys(recipe, train={"learning_rate": 1e-3}), resume=run, quiet=True)
    with pytest.raises(RecipeError, match=r"method\.dropout"):
        tunesmith.train(with_keys(recipe, method={"dropout": 0.0}), resume=run, quiet=True)
    tunesmith.train(with_keys(recipe, checkpoint={"every_steps": 3}), resume=run, quiet=True)


def test_a_resume_with_changed_data_is_refused(recipe: Recipe, tmp_path: Path, rows: Path) -> None:
    copy = tmp_path / "rows.jsonl"
    copy.write_bytes(rows.read_bytes())
    recipe = with_keys(recipe, data={"train": [str(copy)]})
    run = _cut(recipe, after=5)
    copy.write_text(copy.read_text(encoding="utf-8").replace("What is", "What was"), encoding="utf-8")
    with pytest.raises(CheckpointError, match="the training data is not what the checkpoint was trained on"):
        tunesmith.train(recipe, resume=run, quiet=True)


def test_divergence_stops_before_the_update_and_names_the_rows(recipe: Recipe) -> None:
    recipe = with_keys(recipe, method={"kind": "full"}, train={"learning_rate": 1e30, "max_grad_norm": 0.0})
    with pytest.raises(NonFiniteError, match=r"nothing was updated. Batch: .*问答\.jsonl:\d+"):
        tunesmith.train(recipe, quiet=True)
    run = open_run(next(Path(recipe["output"]).iterdir()))
    assert run.info().status == "failed"
    assert "NonFiniteError" in (run.info().error or "")


def test_a_failed_preflight_stops_before_the_first_step(recipe: Recipe) -> None:
    def refuse(resolved: Any, run_dir: Path) -> str:
        assert resolved.train.micro_batch_tokens == 192
        raise TrainingError("not this one")

    with pytest.raises(TrainingError, match="not this one"):
        tunesmith.train(recipe, preflight=refuse, quiet=True)
    run = next(Path(recipe["output"]).iterdir())
    assert not (run / "metrics.jsonl").exists()


def test_nothing_to_train_on_is_refused(recipe: Recipe) -> None:
    with pytest.raises(RecipeError, match=r"data\.train is empty"):
        build_session(recipe_from_mapping(with_keys(recipe, data={"train": []})))
    foreign = with_keys(recipe, data={"train": [recipe["data"]["train"][0] + ".missing"]})
    with pytest.raises(DataError):
        build_session(recipe_from_mapping(foreign))


def test_random_tokens_need_no_tokenizer(recipe: Recipe, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((Path(recipe["model"]["path"]) / "config.json").read_bytes())
    changed = with_keys(
        recipe,
        model={"path": str(bare), "weights": "random"},
        data={"train": [], "format": "tokens", "max_length": 64, "max_rows": 20},
        train={"max_steps": 3},
    )
    result = tunesmith.train(changed, quiet=True)
    first = read_jsonl(result.run_dir / "metrics.jsonl")[0]
    assert (first["tokens"], first["trained_tokens"], first["samples"]) == (2 * 192, 2 * 3 * 63, 6)


def test_command_line_without_a_recipe(
    recipe: Recipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    keys = ("data.max_length=96", "train.max_steps=2", "log.trackers=[]", "train.micro_batch_tokens=192")
    options = [part for key in keys for part in ("--set", key)]
    model, data = recipe["model"]["path"], recipe["data"]["train"][0]
    code = main.run(["train", model, "--data", data, "--method", "qlora", *options, "--json"])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    result = json.loads(captured.out.strip().splitlines()[-1])
    assert result["steps"] == 2
    assert load_recipe(Path(result["run_dir"]) / "recipe.yaml").method.kind == "qlora"
    assert f"tunesmith chat {result['run_dir']}" in captured.err
    assert "It is" in captured.err  # the example with its mask
    assert "checks passed" in captured.err
    assert (Path(result["run_dir"]) / "certificate.json").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "name a recipe or a model"),
        (["MODEL"], "say what to train"),
        (["MODEL", "--data", "x", "--method", "lorra"], "method.kind"),
        (["--resume", "nowhere"], "there is no run directory"),
    ],
)
def test_mistakes_of_use_are_one_line_and_exit_2(
    recipe: Recipe, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [recipe["model"]["path"] if part == "MODEL" else part for part in arguments]
    assert main.run(["train", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


LONG_RUN = """
import json, sys
import tunesmith
result = tunesmith.train(json.loads(sys.argv[1]), quiet=True)
sys.exit(result.exit_code)
"""


def _wait_for_steps(run_parent: Path, process: subprocess.Popen[str], count: int) -> Path:
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        metrics = next(run_parent.glob("*/metrics.jsonl"), None)
        if metrics is not None and metrics.read_bytes().count(b"\n") >= count:
            return metrics.parent
        time.sleep(0.01)
    raise AssertionError(process.communicate()[1])


def test_sigterm_saves_and_the_process_exits_with_143(recipe: Recipe) -> None:
    recipe = with_keys(recipe, train={"max_steps": 100_000}, checkpoint={"every_steps": None})
    process = subprocess.Popen(
        [sys.executable, "-c", LONG_RUN, json.dumps(recipe)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    run = _wait_for_steps(Path(recipe["output"]), process, 3)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    done = losses(run)[-1][0]
    assert [path.name for path in list_states(run / "checkpoints")] == [f"step-{done:08d}"]
    assert open_run(run).info().status == "interrupted"


@contextmanager
def _files_limited_to(num_bytes: int) -> Iterator[None]:
    """Files may not grow beyond this: enough for rows and recipes, too little for a checkpoint."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_disk_that_is_full_at_the_end_is_a_clear_error(recipe: Recipe) -> None:
    recipe = with_keys(recipe, train={"max_steps": 5})
    build_session(recipe_from_mapping(recipe))  # the data goes into the cache
    with (
        _files_limited_to(40_000),
        pytest.raises(TrainingError, match=r"the disk is full \(File too large.*There is no checkpoint yet"),
    ):
        tunesmith.train(recipe, quiet=True)
    run = next(Path(recipe["output"]).iterdir())
    assert len(losses(run)) == 5
    assert list((run / "checkpoints").iterdir()) == []
    tunesmith.train(recipe, resume=run, quiet=True)
    assert len(losses(run)) == 5
