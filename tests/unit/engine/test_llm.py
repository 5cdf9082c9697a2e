"""tunesmith.LLM on tiny random models: generate, chat, stream, live models, refusals, page accounting."""

from __future__ import annotations

import random
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

import tunesmith
from tunesmith.checkpoint.load import load_decoder
from tunesmith.engine.batching import small_batches, worst_batches
from tunesmith.engine.llm import LLM
from tunesmith.engine.request import SamplingParams, StructuredSpec
from tunesmith.engine.runner import NativeRunner
from tunesmith.engine.text import WholeDecoder
from tunesmith.engine.transformers_runner import TransformersRunner
from tunesmith.errors import ModelError, RequestError
from tunesmith.model.decoder import Decoder
from tunesmith.model.int8 import Int8Linear
from tunesmith.model.layers import Linear
from tunesmith.text.tokenizer import StreamDecoder, load_tokenizer

MESSAGES = [{"role": "user", "content": "你好, what is red?"}]
# A wide spread makes a random model say varied things instead of one token for ever.
SPREAD = 0.3


@pytest.fixture(scope="module")
def model_dir(tiny_model_dir: Callable[..., Path]) -> Path:
    return tiny_model_dir("qwen2", initializer_range=SPREAD)


@pytest.fixture(scope="module")
def llm(model_dir: Path) -> LLM:
    return LLM(model_dir, device="cpu")


def pages_in_use(llm: LLM) -> int:
    assert isinstance(llm.runner, NativeRunner)
    llm.engine.scheduler.check()
    return llm.runner.pages.num_used


def test_llm_is_public() -> None:
    assert tunesmith.LLM is LLM


def test_one_text_gives_one_completion(llm: LLM) -> None:
    (completion,) = llm.generate("hello", max_tokens=8, ignore_eos=True)
    assert len(completion.token_ids) == 8
    assert completion.finish_reason == "length"
    assert completion.prompt_tokens == 5
    assert pages_in_use(llm) == 0


def test_prompts_of_each_kind_agree_and_keep_their_order(llm: LLM) -> None:
    texts = ["alpha", "be", "gamma delta"]
    from_text = llm.generate(texts, max_tokens=6)
    from_ids = llm.generate([llm.encode(text) for text in texts], max_tokens=6)
    one_by_one = [llm.generate(llm.encode(text), max_tokens=6)[0] for text in texts]
    expected = [c.token_ids for c in from_text]
    assert [c.token_ids for c in from_ids] == expected
    assert [c.token_ids for c in one_by_one] == expected
    assert llm.generate([]) == []


def test_the_text_is_the_tokenizers_without_the_stop_token(llm: LLM) -> None:
    (completion,) = llm.generate("say", max_tokens=60, temperature=1.0, seed=0, ignore_eos=True)
    assert llm.tokenizer is not None
    assert completion.text == llm.tokenizer.decode(completion.token_ids, skip_special=True)


@pytest.mark.parametrize("seed", range(12))
def test_streamed_pieces_join_to_the_whole_text(llm: LLM, seed: int) -> None:
    """A random byte-level model says broken and whole characters of every length."""
    options = {"max_tokens": 40, "temperature": 1.5, "seed": seed}
    (whole,) = llm.generate("流 stream", **options)
    stream = llm.stream("流 stream", **options)
    pieces = list(stream)
    assert "".join(pieces) == whole.text
    assert stream.completion is not None
    assert stream.completion.token_ids == whole.token_ids
    assert stream.completion.finish_reason == whole.finish_reason


@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_text_at_the_end_is_what_streaming_joins_to(kind: str, llm: LLM, request: pytest.FixtureRequest) -> None:
    """Random bytes, and characters and emoji cut anywhere between what the answer goes on from and the answer."""
    tokenizer = llm.tokenizer
    if kind == "sentencepiece":
        tokenizer = load_tokenizer(request.getfixturevalue("data_dir") / "weights_stories260K" / "hf")
    assert tokenizer is not None
    choice = random.Random(0)
    for _ in range(150):
        text = "".join(choice.choice(["a", " b", "é", "你好", "🙂", "👩‍👩‍👧", "\n", " "]) for _ in range(8))
        ids = tokenizer.encode(text)
        if choice.random() < 0.3:
            choice.shuffle(ids)
        cut = choice.randrange(len(ids))
        stream = StreamDecoder(tokenizer)
        for token in ids[:cut]:
            stream.put(token)
        pieces = [stream.put(token) for token in ids[cut:]] + [stream.finish()]
        late = WholeDecoder(partial(tokenizer.decode, skip_special=True), ids[:cut])
        assert [late.put(token) for token in ids[cut:]] == [""] * len(ids[cut:])
        assert late.finish() == "".join(pieces)


def test_chat_renders_the_template(llm: LLM) -> None:
    prompt = "<|im_start|>user\n你好, what is red?<|im_end|>\n<|im_start|>assistant\n"
    assert llm.has_chat_template
    assert llm.encode_messages(MESSAGES) == llm.encode(prompt)
    said = llm.chat(MESSAGES, max_tokens=5)
    assert said.token_ids == llm.generate(prompt, max_tokens=5)[0].token_ids
    assert "".join(llm.stream_chat(MESSAGES, max_tokens=5)) == said.text
    with pytest.raises(RequestError, match=r"a conversation is a list of messages, as .*; got text$"):
        llm.chat("red?")  # type: ignore[arg-type]


def test_an_answer_ends_at_the_end_of_turn(llm: LLM) -> None:
    """258 is <|im_end|>: some seed says it; the text doesn't show it."""
    answers = [llm.generate("x", max_tokens=200, temperature=3.0, seed=seed)[0] for seed in range(6)]
    stopped = [a for a in answers if a.finish_reason == "stop"]
    assert stopped, "258 is one of 272 tokens and 1200 were drawn"
    for answer in stopped:
        assert answer.token_ids[-1] in (256, 258)
        assert "<|im_end|>" not in answer.text


def test_stop_texts_cut_the_answer(llm: LLM) -> None:
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 1, "ignore_eos": True}
    (whole,) = llm.generate("abc", **options)
    stop = whole.text[10:14]
    (cut,) = llm.generate("abc", stop=stop, **options)
    assert cut.text == whole.text[: whole.text.find(stop)]
    assert cut.finish_reason == "stop"
    assert len(cut.token_ids) < len(whole.token_ids)
    assert "".join(llm.stream("abc", stop=stop, **options)) == cut.text


def test_seeds_reproduce(llm: LLM) -> None:
    def draw(seed: int) -> list[int]:
        return llm.generate("seed", max_tokens=20, temperature=1.0, seed=seed)[0].token_ids

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_a_stream_left_early_frees_its_pages(llm: LLM) -> None:
    stream = llm.stream("hello", max_tokens=50, ignore_eos=True)
    next(stream)
    assert pages_in_use(llm) > 0
    stream.close()
    assert pages_in_use(llm) == 0
    assert stream.completion is not None
    assert stream.completion.finish_reason == "abort"
    with llm.stream("again", max_tokens=50, ignore_eos=True) as other:
        next(other)
    assert pages_in_use(llm) == 0
    del other
    for _ in llm.stream("dropped", max_tokens=50, ignore_eos=True):
        break
    assert not llm.engine.has_work


def test_two_streams_may_be_read_in_turn(llm: LLM) -> None:
    alone = ["".join(llm.stream(text, max_tokens=10, ignore_eos=True)) for text in ("one", "two")]
    streams = [llm.stream(text, max_tokens=10, ignore_eos=True) for text in ("one", "two")]
    said = ["", ""]
    for _ in range(12):
        for i, stream in enumerate(streams):
            said[i] += next(stream, "")
    assert said == alone


def test_a_failing_prompt_leaves_nothing_queued(llm: LLM) -> None:
    with pytest.raises(RequestError, match="no room for an answer"):
        llm.generate(["short", "x" * 600], max_tokens=3)
    assert not llm.engine.has_work
    assert pages_in_use(llm) == 0


def test_requests_together_equal_requests_alone(model_dir: Path, llm: LLM) -> None:
    wide = LLM(model_dir, device="cpu", max_running=4)
    texts = [f"prompt {i} " * (i + 1) for i in range(7)]
    together = wide.generate(texts, max_tokens=12)
    assert [c.token_ids for c in together] == [c.token_ids for c in llm.generate(texts, max_tokens=12)]
    assert pages_in_use(wide) == 0


def test_a_model_in_training_is_sampled_and_left_in_training(model_dir: Path, llm: LLM) -> None:
    model = load_decoder(model_dir, dtype=torch.float32).train()
    model.noise_alpha = 50.0  # would change every token if generation ran in training mode
    live = LLM(model, tokenizer=model_dir)
    expected = llm.generate("live", max_tokens=10)[0].token_ids
    assert live.generate("live", max_tokens=10)[0].token_ids == expected
    assert model.training
    with torch.no_grad():
        model.embedding.weight.add_(torch.randn(model.embedding.weight.shape) * 0.5)
    assert live.generate("live", max_tokens=10)[0].token_ids != expected, "the new weights must be used"


def test_a_model_whose_compute_dtype_changes_still_generates(model_dir: Path) -> None:
    model = load_decoder(model_dir, dtype=torch.float32).eval()
    live = LLM(model, tokenizer=model_dir)
    live.generate("x", max_tokens=3)
    model.compute_dtype = torch.bfloat16
    assert len(live.generate("x", max_tokens=3, ignore_eos=True)[0].token_ids) == 3


def test_without_a_tokenizer_ids_go_in_and_out(model_dir: Path, llm: LLM) -> None:
    bare = LLM(load_decoder(model_dir, dtype=torch.float32).eval())
    ids = llm.encode("hello")
    (completion,) = bare.generate([ids], max_tokens=5)
    assert completion.token_ids == llm.generate("hello", max_tokens=5)[0].token_ids
    assert completion.text == ""
    with pytest.raises(RequestError, match="without a tokenizer"):
        bare.generate("hello")
    with pytest.raises(RequestError, match="from 0 to 271, got 272"):
        bare.generate([[1, 272]])


def test_other_architectures_run_through_transformers(model_dir: Path, llm: LLM) -> None:
    theirs = LLM(model_dir, device="cpu", backend="transformers")
    assert isinstance(theirs.runner, TransformersRunner)
    texts = ["one", "and another one"]
    ours = [c.token_ids for c in llm.generate(texts, max_tokens=20)]
    assert [c.token_ids for c in theirs.generate(texts, max_tokens=20)] == ours
    assert theirs.runner.states == {} and theirs.runner.pages.num_used == 0
    together = LLM(model_dir, device="cpu", backend="transformers", max_num_seqs=2, debug_pages=True)
    scored = together.generate(texts, max_tokens=4, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    own = llm.generate(texts, max_tokens=4, logprobs=1, prompt_logprobs=0, ignore_eos=True)
    for mine, other in zip(scored, own, strict=True):
        assert mine.token_ids == other.token_ids and mine.prompt_logprobs and other.prompt_logprobs
        pairs = zip(mine.prompt_logprobs[1:], other.prompt_logprobs[1:], strict=True)
        assert all(a and b and a.logprob == pytest.approx(b.logprob, abs=1e-4) for a, b in pairs)
    for options, name in (
        ({"speculative": {"method": "ngram"}}, "speculation"),
        ({"batch_invariant": True}, "batch_inv"),
    ):
        with pytest.raises(RequestError, match=name):
            LLM(model_dir, device="cpu", backend="transformers", **options)


def test_max_model_len_is_the_context(model_dir: Path) -> None:
    short = LLM(model_dir, device="cpu", max_model_len=10)
    assert len(short.generate("hello", ignore_eos=True)[0].token_ids) == 5
    with pytest.raises(RequestError, match="max_tokens of at most 5"):
        short.generate("hello", max_tokens=6)
    with pytest.raises(RequestError, match="between 2 and the model's 512"):
        LLM(model_dir, device="cpu", max_model_len=513)


def test_unknown_options_are_named(llm: LLM) -> None:
    with pytest.raises(RequestError, match="'temprature' is not a sampling option"):
        llm.generate("x", temprature=1.0)


def test_options_override_params(llm: LLM) -> None:
    (completion,) = llm.generate("x", SamplingParams(max_tokens=9, ignore_eos=True), max_tokens=2)
    assert len(completion.token_ids) == 2


def test_adapters_go_with_paths(model_dir: Path) -> None:
    with pytest.raises(RequestError, match="taken as it stands"):
        LLM(load_decoder(model_dir), adapter="somewhere")


def test_what_the_head_is_held_in_goes_with_paths(model_dir: Path) -> None:
    for head, form in (("int8", Int8Linear), ("stored", Linear)):
        model = LLM(model_dir, device="cpu", quantize="int8", head=head).model
        assert isinstance(model, Decoder) and type(model.head) is form
    with pytest.raises(RequestError, match="head go with a model's path"):
        LLM(load_decoder(model_dir), head="int8")
    with pytest.raises(RequestError, match="processes that share a model choose its head"):
        LLM(model_dir, device="cpu", head="stored", tensor_parallel_size=2)
    with pytest.raises(ModelError, match="two heads, and batch_invariant wants one"):
        LLM(model_dir, device="cpu", head="copy", batch_invariant=True)


def test_logprobs_are_the_models_own(model_dir: Path, llm: LLM) -> None:
    """Of the answer and of the prompt, against the training forward; penalties and temperature don't change them."""
    from tunesmith.model.language_model import logits

    ids = llm.encode("some prompt, longer than a page of the cache")
    small = LLM(model_dir, device="cpu", max_num_seqs=2, max_num_batched_tokens=13)
    for one in (llm, small):
        options = {"temperature": 0.8, "seed": 3, "presence_penalty": 1.0}
        one.generate([ids], max_tokens=2)  # what is cached is computed again where the prompt's are asked for
        (said,) = one.generate([ids], max_tokens=6, ignore_eos=True, logprobs=2, prompt_logprobs=1, **options)
        whole = logits(one.model, [[*ids, *said.token_ids]])[0].log_softmax(-1)
        assert said.prompt_logprobs is not None and said.logprobs is not None
        assert len(said.prompt_logprobs) == len(ids) and said.prompt_logprobs[0] is None
        assert said.cached_tokens == 0
        rows = [*said.prompt_logprobs[1:], *said.logprobs]
        for place, own in enumerate(rows):
            assert own is not None and own.token_id == [*ids, *said.token_ids][place + 1]
            assert own.logprob == pytest.approx(float(whole[place, own.token_id]), abs=1e-4)
            assert own.top[0][0] == int(whole[place].argmax())
        assert [len(own.top) for own in said.logprobs] == [2] * 6
    (plain,) = llm.generate([ids], max_tokens=2)
    assert plain.logprobs is None and plain.prompt_logprobs is None


def test_stop_tokens_and_texts_wait_for_min_tokens(llm: LLM) -> None:
    options = {"max_tokens": 40, "temperature": 1.5, "seed": 1, "ignore_eos": True}
    (whole,) = llm.generate("abc", **options)
    (cut,) = llm.generate("abc", stop_token_ids=(whole.token_ids[5],), min_tokens=2, **options)
    assert len(cut.token_ids) <= 6 and cut.stop_reason == whole.token_ids[5]
    stop = next(char for char in whole.text if char.isascii() and char.isprintable())
    (early,) = llm.generate("abc", stop=stop, **options)
    assert early.stop_reason == stop and stop not in early.text
    (late,) = llm.generate("abc", stop=stop, min_tokens=30, **options)
    assert len(late.token_ids) >= 30 and late.token_ids[:30] == whole.token_ids[:30]


@pytest.mark.parametrize("speculative", [{"method": "ngram"}, {"method": "draft", "num_tokens": 2}])
def test_speculation_says_the_same(model_dir: Path, llm: LLM, speculative: dict) -> None:
    if speculative["method"] == "draft":
        speculative = {**speculative, "model": model_dir}
    guessing = LLM(model_dir, device="cpu", max_num_seqs=3, speculative=speculative)
    texts = ["ab ab ab ab", "once more: once more: once", "流"]
    expected = [c.token_ids for c in llm.generate(texts, max_tokens=20)]
    assert [c.token_ids for c in guessing.generate(texts, max_tokens=20)] == expected
    assert guessing.engine.stats().drafted_tokens > 0
    with pytest.raises(RequestError, match="speculative has no 'methd'"):
        LLM(model_dir, device="cpu", speculative={"methd": "ngram"})


def test_an_answer_that_could_not_go_on_is_raised_or_returned(model_dir: Path) -> None:
    model = load_decoder(model_dir, dtype=torch.float32).eval()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    broken = LLM(model, tokenizer=model_dir)
    with pytest.raises(RequestError, match="not numbers"):
        broken.generate("x", max_tokens=2)
    with pytest.raises(RequestError, match="not numbers"):
        list(broken.stream("x", max_tokens=2))
    (completion,) = broken.generate("x", max_tokens=2, raise_errors=False)
    assert completion.finish_reason == "error" and "not numbers" in (completion.error or "")
    assert pages_in_use(broken) == 0


def test_structured_answers_match(llm: LLM) -> None:
    pytest.importorskip("llguidance")
    free, *bound = llm.generate(
        ["pick: "] * 3,
        [
            SamplingParams(max_tokens=12, temperature=1.0, seed=2, structured=spec)
            for spec in (None, StructuredSpec("choice", ("red", "green")), StructuredSpec("regex", "[0-9]{4}"))
        ],
    )
    assert bound[0].text in ("red", "green") and bound[1].text.isdigit() and len(bound[1].text) == 4
    assert free.finish_reason in ("length", "stop") and {c.finish_reason for c in bound} == {"stop"}
    with pytest.raises(RequestError):
        llm.generate("x", structured=StructuredSpec("regex", "[0-9"))
    assert not llm.engine.has_work


def test_adapters_answer_beside_the_base(model_dir: Path, llm: LLM, tmp_path: Path) -> None:
    from tunesmith.checkpoint.adapter import save_adapter
    from tunesmith.model.methods import apply_method
    from tunesmith.recipe.schema import MethodSection

    model = load_decoder(model_dir, dtype=torch.float32)
    apply_method(model, MethodSection(kind="lora", rank=4), seed=0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.3)
    save_adapter(model, tmp_path / "mine", str(model_dir))
    many = LLM(model_dir, device="cpu", enable_lora=True, max_loras=2)
    many.load_adapter("mine", tmp_path / "mine")
    text = "a prompt that is longer than one page"
    adapted = LLM(model_dir, adapter=tmp_path / "mine", device="cpu").generate(text, max_tokens=9)[0].token_ids
    base = llm.generate(text, max_tokens=9)[0].token_ids
    assert adapted != base
    for _ in range(2):  # prefixes of one are not taken for the other
        assert many.generate(text, max_tokens=9, adapter="mine")[0].token_ids == adapted
        assert many.generate(text, max_tokens=9)[0].token_ids == base
    with pytest.raises(RequestError, match="there is no adapter 'mein'"):
        many.generate(text, adapter="mein")
    with pytest.raises(RequestError, match="enable_lora"):
        llm.load_adapter("mine", tmp_path / "mine")


def test_a_progress_bar_is_shown_when_asked(llm: LLM, capsys: pytest.CaptureFixture[str]) -> None:
    assert len(llm.generate(["a", "b"], max_tokens=2, progress=True)) == 2
    assert capsys.readouterr().out == ""


def test_the_largest_pass_can_be_measured(model_dir: Path) -> None:
    """What a GPU's cache leaves room for: prompts longer than a step, and decoding at full context, over one page."""
    llm = LLM(model_dir, device="cpu", max_num_seqs=5, max_num_batched_tokens=70, max_model_len=32)
    assert isinstance(llm.runner, NativeRunner)
    largest, decoding = worst_batches(llm.engine.config)
    assert (largest.starts[-1], decoding.starts[-1]) == (70, 5)
    assert largest.contexts.tolist() == [32, 32, 6] and set(decoding.contexts) == {32}
    assert decoding.positions.tolist() == [31] * 5
    small = [
        (host.starts[-1], len(host.contexts), int(host.contexts.max())) for host in small_batches(llm.engine.config)
    ]
    assert small == [(1, 1, 32), (33, 2, 32), (4, 4, 32), (36, 5, 32)]
    assert all((host.slots == -1).all() for host in small_batches(llm.engine.config))
    llm.runner.worst_pass()
    before = llm.generate("one", max_tokens=5)[0].token_ids
    llm.runner.worst_pass()
    assert llm.generate("one", max_tokens=5)[0].token_ids == before
