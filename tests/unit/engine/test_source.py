"""What LLM is pointed at: directories, adapters, and the outcomes of runs."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tunesmith.checkpoint.adapter import save_adapter
from tunesmith.checkpoint.load import load_decoder
from tunesmith.checkpoint.save import save_decoder
from tunesmith.engine.llm import LLM
from tunesmith.engine.source import find_source
from tunesmith.errors import AdapterError, RunDirError
from tunesmith.model.decoder import Decoder
from tunesmith.model.methods import apply_method
from tunesmith.recipe.schema import DataSection, MethodSection, ModelSection, Recipe
from tunesmith.rundir.layout import RunDir, create_run
from tunesmith.rundir.model_notes import ModelNotes, write_notes
from tunesmith.text.tokenizer import load_tokenizer

MESSAGES = [{"role": "user", "content": "hi"}]
LORA = MethodSection(kind="lora", rank=4)
QLORA = MethodSection(kind="qlora", rank=4, double_quantisation=False)


@pytest.fixture(scope="module")
def base(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("qwen2", hidden_size=64, initializer_range=0.3)


def trained(base: Path, method: MethodSection, change: float = 0.2) -> Decoder:
    """A model with adapters that do something."""
    quantize = "nf4" if method.kind == "qlora" else None
    model = load_decoder(base, dtype=torch.float32, quantize=quantize)
    apply_method(model, method, seed=0)
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * change)
    return model.eval()


def make_run(folder: Path, base: Path, method: MethodSection, **data: object) -> RunDir:
    recipe = Recipe(
        output=str(folder), model=ModelSection(path=str(base)), method=method, data=DataSection.model_validate(data)
    )
    return create_run(recipe)


def answer(llm: LLM) -> list[int]:
    return llm.chat(MESSAGES, max_tokens=12, ignore_eos=True).token_ids


@pytest.mark.parametrize("method", [LORA, QLORA], ids=["lora", "qlora"])
def test_a_run_answers_as_the_model_that_was_trained(base: Path, tmp_path: Path, method: MethodSection) -> None:
    live = LLM(trained(base, method), tokenizer=base)
    expected = answer(live)
    assert expected != answer(LLM(base, device="cpu")), "the adapter must matter"
    run = make_run(tmp_path, base, method)
    save_adapter(live.model, run.final, str(base))
    quantize = "nf4" if method.kind == "qlora" else None
    for llm in (
        LLM(run.path, device="cpu"),
        LLM(run.final, device="cpu"),
        LLM(base, adapter=run.final, device="cpu"),
        LLM(base, adapter=run.path, device="cpu"),
    ):
        assert llm.source is not None and llm.source.quantize == quantize
        assert answer(llm) == expected


def test_an_adapter_of_no_run_says_itself_that_its_base_was_4_bit(base: Path, tmp_path: Path) -> None:
    model = trained(base, QLORA)
    save_adapter(model, tmp_path / "mine", str(base))
    assert find_source(str(base), tmp_path / "mine", None, None).quantize == "nf4"
    assert find_source(str(base), tmp_path / "mine", "nf4-double", None).quantize == "nf4-double"
    assert answer(LLM(base, adapter=tmp_path / "mine", device="cpu")) == answer(LLM(model, tokenizer=base))


def test_a_whole_model_comes_out_of_a_full_run(base: Path, tmp_path: Path) -> None:
    model = load_decoder(base, dtype=torch.float32)
    with torch.no_grad():
        model.blocks[0].attention_norm.weight.mul_(-1.5)  # type: ignore[union-attr, operator]
    run = make_run(tmp_path, base, MethodSection(kind="full"), system="be brief")
    save_decoder(model, run.final)
    load_tokenizer(base).save(run.final)
    llm = LLM(run.path, device="cpu")
    assert llm.source is not None and llm.source.adapter is None and llm.source.quantize is None
    assert llm.system == "be brief"
    assert answer(llm) == answer(LLM(model.eval(), tokenizer=base))
    with pytest.raises(AdapterError, match="name the run as the model"):
        LLM(base, adapter=run.path)


def test_a_run_brings_its_template(base: Path, tmp_path: Path) -> None:
    template = tmp_path / "模板.jinja"
    template.write_text("{{ messages[0]['content'] }}!{{ mark }}", encoding="utf-8")
    run = make_run(tmp_path, base, LORA, chat_template=str(template), template_arguments={"mark": "?"})
    save_adapter(trained(base, LORA), run.final, str(base))
    llm = LLM(run.path, device="cpu")
    assert llm.tokenizer is not None
    assert llm.tokenizer.decode(llm.encode_messages(MESSAGES)) == "hi!?"
    assert llm.has_chat_template


def test_a_run_without_an_outcome_says_how_to_go_on(base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, base, LORA)
    with pytest.raises(RunDirError, match="tunesmith train --resume"):
        LLM(run.path)


def test_a_run_takes_no_second_adapter(base: Path, tmp_path: Path) -> None:
    run = make_run(tmp_path, base, LORA)
    with pytest.raises(AdapterError, match="brings its own outcome"):
        LLM(run.path, adapter=tmp_path)


@pytest.mark.parametrize(
    "method", [LORA, QLORA, MethodSection(kind="lora", rank=4, dora=True)], ids=["lora", "qlora", "dora"]
)
def test_prefill_equals_decode_with_methods(tiny_model_dir: Callable[..., Path], method: MethodSection) -> None:
    """Decode is T = 1, where quantised and adapted linears may take another path.

    The weights are mild: with wild ones softmaxes are so sharp that rounding alone grows to 2e-5.
    """
    from tunesmith.engine.probe import probe_runner, stepwise_logits
    from tunesmith.model.language_model import logits

    model = trained(tiny_model_dir("qwen2", hidden_size=64, initializer_range=0.1), method, change=0.05)
    ids = list(range(40))
    whole = logits(model, [ids])[0]
    decoded = stepwise_logits(probe_runner(model, 64), ids, range(1, 41))
    assert (decoded - whole).abs().max() / whole.abs().max() < 1e-5


@pytest.mark.parametrize("kind", ["bench", "profile"])
def test_a_run_that_trains_no_model_says_what_it_is(base: Path, tmp_path: Path, kind: Any) -> None:
    """The bug: a bench's directory was said to have no trained model yet, to be gone on with."""
    recipe = Recipe(output=str(tmp_path), model=ModelSection(path=str(base)))
    run = create_run(recipe, kind=kind)
    with pytest.raises(RunDirError, match=rf"is a {kind} run: chat, eval and merge take a training run") as caught:
        find_source(str(run.path), None, None, None)
    assert "--resume" not in str(caught.value) and f"tunesmith report {run.path}" in str(caught.value)


@pytest.mark.parametrize(
    ("status", "said"),
    [("interrupted", "ended before its first checkpoint: nothing it learnt was kept"), ("running", "let it go on")],
)
def test_a_run_without_a_checkpoint_has_nothing_to_go_on_from(
    base: Path, tmp_path: Path, status: Any, said: str
) -> None:
    run = make_run(tmp_path, base, LORA)
    run.set_status(status)
    with pytest.raises(RunDirError, match=said) as caught:
        find_source(str(run.path), None, None, None)
    assert "nothing to go on from" in str(caught.value) and "from the first step: tunesmith train" in str(caught.value)


@pytest.mark.parametrize(
    ("data", "single"),
    [
        ({"conversations": 5, "multi_turn": 0}, True),
        ({"conversations": 5, "multi_turn": 1}, False),
        ({"conversations": 0, "multi_turn": 0}, False),  # plain text
        (None, False),  # an older run
    ],
)
def test_whether_its_conversations_had_one_question_each(base: Path, tmp_path: Path, data: Any, single: bool) -> None:
    run = make_run(tmp_path, base, LORA)
    save_adapter(trained(base, LORA), run.final, str(base))
    run.set_status("finished", data=data)
    assert find_source(str(run.path), None, None, None).single_turns is single


def test_a_model_made_from_a_run_is_asked_as_it_was_trained(base: Path, tmp_path: Path) -> None:
    """The bug: a merged model lost the run's system message and the switches of its template."""
    model = tmp_path / "merged"
    shutil.copytree(base, model)
    assert not find_source(str(model), None, None, None).is_tuned
    write_notes(model, ModelNotes(system="be brief", template_arguments={"enable_thinking": False}))
    source = find_source(str(model), None, None, None)
    assert (source.system, source.template_arguments) == ("be brief", {"enable_thinking": False})
    assert source.is_tuned and source.tokenizer is None


def test_a_folder_of_runs_names_them(base: Path, tmp_path: Path) -> None:
    """The bug: the demo's folder was said to have no config.json."""
    recipe = Recipe(output=str(tmp_path), model=ModelSection(path=str(base)))
    create_run(recipe, kind="bench", path=tmp_path / "matrix")
    create_run(recipe, path=tmp_path / "quality")
    with pytest.raises(RunDirError, match=rf"holds runs and is none itself: name one of them: {tmp_path}/quality$"):
        find_source(str(tmp_path), None, None, None)
