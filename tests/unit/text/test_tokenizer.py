"""Ids are those models were trained on, special ones only from templates; streams never split a character."""

from __future__ import annotations

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tunesmith.errors import DataError, TokenizerError
from tunesmith.text.tokenizer import StreamDecoder, Tokenizer, load_tokenizer

REAL = ("qwen2.5", "llama3", "gpt2", "mistral")
TEXTS = [
    "Hello, world!",
    "  two  spaces \n\n\t and tabs\r\n",
    "今天天气很好，我们去公园吧。",
    "emoji 😀👍🏽 👨‍👩‍👧 and ǆ Ǆ é e\u0301",
    "def f(x):\n    return x ** 2  # 2024-07-26 3.14159",
    "",
    " leading",
    "한국어 العربية עברית ไทย",
]


def stream(tokenizer: Tokenizer, ids: list[int], *, skip_special: bool = False) -> list[str]:
    decoder = StreamDecoder(tokenizer, skip_special=skip_special)
    return [decoder.put(token) for token in ids] + [decoder.finish()]


def test_ids_equal_sentencepiece(
    real_directory: Callable[[str], Path], real_tokenizer: Callable[[str], Tokenizer]
) -> None:
    """The model of Mistral was trained on SentencePiece's ids; transformers 5 rebuilds this tokenizer from its class
    and gives others for a text with leading spaces."""
    sentencepiece = pytest.importorskip("sentencepiece")
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(real_directory("mistral") / "tokenizer.model"))
    for text in TEXTS:
        ids = theirs.encode(text)
        assert real_tokenizer("mistral").encode(text) == ids
        assert real_tokenizer("mistral").decode(ids) == theirs.decode(ids)


@pytest.mark.parametrize("name", ["qwen2.5", "llama3", "gpt2"])
def test_ids_and_text_equal_transformers(
    name: str, real_directory: Callable[[str], Path], real_tokenizer: Callable[[str], Tokenizer]
) -> None:
    transformers = pytest.importorskip("transformers")
    directory, ours = real_directory(name), real_tokenizer(name)
    if name == "gpt2":
        theirs = transformers.GPT2Tokenizer(vocab=str(directory / "vocab.json"), merges=str(directory / "merges.txt"))
    else:
        theirs = transformers.AutoTokenizer.from_pretrained(str(directory))
    for text in TEXTS:
        ids = theirs(text, add_special_tokens=False)["input_ids"]
        assert ours.encode(text, parse_special=True) == ids
        assert ours.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    marked = f"a{theirs.eos_token}b"
    assert ours.encode(marked, parse_special=True) == theirs(marked, add_special_tokens=False)["input_ids"]
    assert (ours.bos_id, ours.eos_id) == (theirs.bos_token_id, theirs.eos_token_id)
    assert ours.vocab_size == len(theirs)


@pytest.mark.parametrize("name", REAL)
def test_special_text_of_a_user_is_not_a_control_token(name: str, real_tokenizer: Callable[[str], Tokenizer]) -> None:
    tokenizer = real_tokenizer(name)
    control = tokenizer.special_tokens["eos_token"]
    assert tokenizer.eos_id not in tokenizer.encode(f"x {control} y")
    assert tokenizer.eos_id in tokenizer.encode(f"x {control} y", parse_special=True)
    assert tokenizer.decode(tokenizer.encode(f"x {control} y")) == f"x {control} y"


def test_what_models_stop_at(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    qwen, llama = real_tokenizer("qwen2.5"), real_tokenizer("llama3")
    assert qwen.stop_ids == (151643, 151645)
    assert qwen.end_of_turn_id == 151645
    assert llama.stop_ids == (128001, 128008, 128009)
    assert (llama.adds_bos, qwen.adds_bos) == (True, False)
    assert real_tokenizer("gpt2").stop_ids == (50256,)
    assert real_tokenizer("mistral").stop_ids == (2,)


@pytest.mark.parametrize("name", REAL)
@pytest.mark.parametrize("text", TEXTS)
def test_stream_joins_to_the_whole(name: str, text: str, real_tokenizer: Callable[[str], Tokenizer]) -> None:
    tokenizer = real_tokenizer(name)
    ids = tokenizer.encode(text)
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in pieces)


@pytest.mark.parametrize("name", REAL)
def test_stream_of_any_ids_joins_to_the_whole(name: str, real_tokenizer: Callable[[str], Tokenizer]) -> None:
    """Random ids are full of broken characters; a stream must still agree with the decoder at the end."""
    tokenizer = real_tokenizer(name)

    @settings(max_examples=60, deadline=None)
    @given(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=24), st.booleans())
    def check(ids: list[int], skip_special: bool) -> None:
        pieces = stream(tokenizer, ids, skip_special=skip_special)
        assert "".join(pieces) == tokenizer.decode(ids, skip_special=skip_special)

    check()


def test_stream_of_byte_fallback(real_tokenizer: Callable[[str], Tokenizer]) -> None:
    """The library turns a run of byte tokens into U+FFFD as a whole when its last character is incomplete, so a
    character already streamed would have changed afterwards."""
    tokenizer = real_tokenizer("mistral")
    ids = [tokenizer.token_id(f"<0x{byte:02X}>") for byte in "龘龘".encode()]
    assert None not in ids
    numbers = [token for token in ids if token is not None]
    assert stream(tokenizer, numbers) == ["", "", "龘", "", "", "龘", ""]
    assert "".join(stream(tokenizer, numbers[:-1])) == tokenizer.decode(numbers[:-1]) == "龘\ufffd"


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=24))
def test_bytes_stream_as_soon_as_a_character_is_whole(raw: bytes) -> None:
    tokenizer = _Bytes()
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.put(token) for token in tokenizer.of_bytes(raw)] + [decoder.finish()]
    assert "".join(pieces) == raw.decode("utf-8", errors="replace")


@settings(max_examples=100, deadline=None)
@given(st.lists(st.sampled_from([0x41, 0x80, 0xE4, 0xBD, 0xA0, 0xF0, 0x9F, 0xFF]), max_size=80))
def test_long_runs_of_broken_bytes_are_the_text_of_all_of_them(raw: list[int]) -> None:
    """Where nothing is a character for long, what is looked back to is cut short; no character is lost to that."""
    decoder = StreamDecoder(_Bytes())
    pieces = [decoder.put(token) for token in raw] + [decoder.finish()]
    assert "".join(pieces) == bytes(raw).decode("utf-8", errors="replace")


def test_an_answer_of_broken_bytes_costs_each_id_the_same() -> None:
    """Every id was decoded once more for each that followed: 0.4 ms an id after 2,000, of everybody's step."""
    tokenizer = _Bytes()
    decoder = StreamDecoder(tokenizer)
    pieces = [decoder.put(0x80) for _ in range(1000)]
    assert tokenizer.num_decoded < 40 * 1000
    assert "".join([*pieces, decoder.finish()]) == "\N{REPLACEMENT CHARACTER}" * 1000


class _Bytes:
    """A stand-in whose decoder is Python's own."""

    num_decoded = 0

    def of_bytes(self, raw: bytes) -> list[int]:
        return list(raw)

    def decode(self, ids: list[int], *, skip_special: bool = False) -> str:
        self.num_decoded += len(ids)
        return bytes(ids).decode("utf-8", errors="replace")


def test_lone_surrogate_is_a_data_error(byte_tokenizer: Tokenizer) -> None:
    with pytest.raises(DataError):
        byte_tokenizer.encode("a\ud800b")


@pytest.mark.parametrize("name", REAL)
def test_saved_tokenizer_is_the_same(name: str, real_tokenizer: Callable[[str], Tokenizer], tmp_path: Path) -> None:
    tokenizer = real_tokenizer(name)
    tokenizer.save(tmp_path / "新")
    again = load_tokenizer(tmp_path / "新")
    assert again.encode(TEXTS[2]) == tokenizer.encode(TEXTS[2])
    assert (again.eos_id, again.bos_id, again.stop_ids) == (tokenizer.eos_id, tokenizer.bos_id, tokenizer.stop_ids)
    assert again.chat_template == tokenizer.chat_template
    again.save(tmp_path / "新")


def test_template_given_is_saved(byte_tokenizer: Tokenizer, tmp_path: Path) -> None:
    changed = byte_tokenizer.with_chat_template("{{ messages[0].content }}\n")
    assert changed.fingerprint != byte_tokenizer.fingerprint
    changed.save(tmp_path)
    assert load_tokenizer(tmp_path).chat_template == "{{ messages[0].content }}\n"


def test_other_end_tokens_are_another_fingerprint(byte_directory: Path, tmp_path: Path) -> None:
    """They decide where a mask ends; cached masks were once used on after generation_config.json had changed."""
    changed = tmp_path / "changed"
    shutil.copytree(byte_directory, changed)
    (changed / "generation_config.json").write_text('{"eos_token_id": [0, 1]}', encoding="utf-8")
    before, after = load_tokenizer(byte_directory), load_tokenizer(changed)
    assert before.stop_ids != after.stop_ids
    assert before.fingerprint != after.fingerprint


def test_pickle_gives_the_same_tokenizer(byte_tokenizer: Tokenizer) -> None:
    again = pickle.loads(pickle.dumps(byte_tokenizer))
    assert again.encode("hé<|im_end|>", parse_special=True) == byte_tokenizer.encode("hé<|im_end|>", parse_special=True)
    assert again.fingerprint == byte_tokenizer.fingerprint


def test_special_tokens_only_in_the_configuration_are_added(byte_directory: Path, tmp_path: Path) -> None:
    load_tokenizer(byte_directory).save(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["added_tokens_decoder"] = {"259": {"content": "<|new|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode("<|new|>", parse_special=True) == [259]
    config["added_tokens_decoder"] = {"400": {"content": "<|new|>", "special": True}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(TokenizerError, match="400"):
        load_tokenizer(tmp_path)


def test_list_of_named_templates(byte_directory: Path, tmp_path: Path) -> None:
    load_tokenizer(byte_directory).save(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config["chat_template"] = [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).chat_template == "d"


@pytest.mark.parametrize(
    ("files", "reason"),
    [
        ({}, "no tokenizer"),
        ({"tokenizer.json": "{"}, "not a tokenizer"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "["}, "not readable JSON"),
        ({"tokenizer.json": "{}", "tokenizer_config.json": "[]"}, "JSON object"),
    ],
)
def test_broken_directory_is_a_tokenizer_error(files: dict[str, str], reason: str, tmp_path: Path) -> None:
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(TokenizerError, match=reason):
        load_tokenizer(tmp_path)


def test_loading_tokenizer_json_imports_neither_torch_nor_transformers(byte_directory: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tunesmith.text.tokenizer import load_tokenizer;"
        "load_tokenizer(Path(sys.argv[1])).encode('a');"
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(byte_directory)], check=True, timeout=60)


def test_sentencepiece_model_alone_is_converted(
    real_directory: Callable[[str], Path], real_tokenizer: Callable[[str], Tokenizer], tmp_path: Path
) -> None:
    pytest.importorskip("sentencepiece")
    for name in ("tokenizer.model", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((real_directory("mistral") / name).read_bytes())
    converted, ours = load_tokenizer(tmp_path), real_tokenizer("mistral")
    for text in ("Hello 世界 😀", "龘 a\n", "2 + 2 = 4"):
        assert converted.encode(text) == ours.encode(text)
        assert converted.decode(converted.encode(text)) == text
    assert (converted.bos_id, converted.eos_id) == (1, 2)
    converted.save(tmp_path / "saved")
    assert load_tokenizer(tmp_path / "saved").encode("Hello 世界") == ours.encode("Hello 世界")
