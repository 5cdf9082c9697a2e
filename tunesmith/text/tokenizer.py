"""The tokenizer: text to ids and back, and the special tokens a model stops at.

A `tokenizer.json` is read by the `tokenizers` library alone, so that nothing heavy is imported; vocabularies
of older kinds (vocab and merges, SentencePiece) are converted by transformers first.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from functools import cached_property
from pathlib import Path
from typing import Any

import tokenizers

from tunesmith.errors import DataError, TokenizerError
from tunesmith.text.families import family_template
from tunesmith.text.surrogates import no_character
from tunesmith.text.template import render_template

# What `save` copies; everything that a tokenizer is made of in Hugging Face's layout.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "generation_config.json",
    "chat_template.jinja", "chat_template.json", "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "spiece.model", "vocab.txt",
)  # fmt: skip
_NAMED_TOKENS = ("bos_token", "eos_token", "pad_token", "unk_token")


class Tokenizer:
    """Text to token ids and back.

    `chat_template` is the tokenizer's own, else its family's (`own_chat_template` tells which), else None.
    `bos_id`, `eos_id`, `pad_id` are None where the tokenizer has none. Pickles and copies are cheap to make.
    """

    def __init__(self, backend: tokenizers.Tokenizer, config: dict[str, Any], directory: Path) -> None:
        self._backend = backend
        self._config = config
        self._directory = directory
        self.special_tokens: dict[str, str] = {
            name: text for name in _NAMED_TOKENS if (text := _token_text(config.get(name))) is not None
        }
        self.bos_id = self._id_of("bos_token")
        self.eos_id = self._id_of("eos_token")
        if self.eos_id is None:
            self.eos_id = next(iter(_ids(config.get("eos_token_id"))), None)
            if self.eos_id is not None:
                self.special_tokens["eos_token"] = backend.id_to_token(self.eos_id) or ""
        self.pad_id = self._id_of("pad_token")
        self.chat_template: str | None = config.get("chat_template")
        self.own_chat_template = self.chat_template is not None
        if self.chat_template is None:
            self.chat_template = family_template(backend.token_to_id, self.eos_id, config.get("model_type"))

    def _id_of(self, name: str) -> int | None:
        text = self.special_tokens.get(name)
        return None if text is None else self._backend.token_to_id(text)

    @cached_property
    def vocab_size(self) -> int:
        """One more than the highest id (a model's embedding may be longer)."""
        return max(self._backend.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    @cached_property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts a beginning-of-sequence token before a text."""
        return self.bos_id is not None and self._backend.encode("a", add_special_tokens=True).ids[:1] == [self.bos_id]

    @cached_property
    def end_of_turn_id(self) -> int | None:
        """The special token the chat template puts after an answer; None without a template or such a token."""
        if self.chat_template is None:
            return None
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "answer"}]
        try:
            text = render_template(self.chat_template, turns, self.template_variables).text
        except DataError:
            return None
        ids = self.encode(text[text.rfind("answer") + len("answer") :], parse_special=True)
        return next((token for token in ids if token in self._special_ids), None)

    @cached_property
    def stop_ids(self) -> tuple[int, ...]:
        """Ids that end an answer: the end of sequence, generation_config's and config's, and the end of a turn."""
        ids = {self.eos_id, self.end_of_turn_id, *_ids(self._config.get("eos_token_id"))}
        ids |= set(_ids(self._config.get("generation_eos_token_id")))
        return tuple(sorted(token for token in ids if token is not None))

    @cached_property
    def _special_ids(self) -> frozenset[int]:
        added = self._backend.get_added_tokens_decoder()
        special = {token for token, added_token in added.items() if added_token.special}
        return frozenset(special | {i for name in _NAMED_TOKENS if (i := self._id_of(name)) is not None})

    @cached_property
    def _plain_backend(self) -> tokenizers.Tokenizer:
        """A copy that reads the text of a special token as ordinary characters."""
        plain = tokenizers.Tokenizer.from_str(self._backend.to_str())
        plain.encode_special_tokens = True
        return plain

    @property
    def template_variables(self) -> dict[str, Any]:
        """The special tokens by the names that templates use."""
        return dict(self.special_tokens)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 over everything that changes ids or masks: vocabulary, rules, special and end tokens, template."""
        digest = hashlib.sha256(self._backend.to_str().encode())
        ends = [_ids(self._config.get(key)) for key in ("eos_token_id", "generation_eos_token_id")]
        extra = [self.special_tokens, self.chat_template, self.adds_bos, self.eos_id, ends]
        digest.update(json.dumps(extra, sort_keys=True).encode())
        return digest.hexdigest()

    def to_json(self) -> str:
        """The vocabulary and its rules as `tokenizers` writes them, added tokens included."""
        return self._backend.to_str()

    def encode(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Token ids of a text.

        Args: `parse_special`: read `<|im_end|>` and its like as one token (a rendered template), not as the
            characters a user typed; `add_special`: let the tokenizer add its own (such as a bos).
        Raises: DataError for text that is no Unicode (lone surrogates).
        """
        return self.encodings([text], parse_special=parse_special, add_special=add_special)[0].ids

    def encodings(
        self, texts: Sequence[str], *, parse_special: bool = False, add_special: bool = False, offsets: bool = True
    ) -> list[tokenizers.Encoding]:
        """The texts' encodings (`.ids`, and `.offsets` in characters where asked for), on all cores."""
        backend = self._backend if parse_special else self._plain_backend
        batch = backend.encode_batch if offsets else backend.encode_batch_fast
        try:
            return batch(list(texts), add_special_tokens=add_special)
        except (UnicodeEncodeError, TypeError) as error:
            raise DataError(f"text that can't be tokenised: {no_character(texts) or error}") from None

    def decode(self, ids: Iterable[int], *, skip_special: bool = False) -> str:
        """The text of token ids; bytes that form no character become U+FFFD."""
        tokens = [int(token) for token in ids]
        if not self._byte_tokens:
            return self._backend.decode(tokens, skip_special_tokens=skip_special)
        kept = [token for token in tokens if not (skip_special and token in self._special_ids)]
        return self._backend.decoder.decode(list(self._pieces(kept)))

    @cached_property
    def _byte_tokens(self) -> dict[int, int]:
        """`<0x41>` and its like, by id: the byte each stands for (SentencePiece's byte fallback)."""
        if self._backend.decoder is None or "ByteFallback" not in repr(self._backend.decoder):
            return {}
        ids = {byte: self._backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)}
        return {token: byte for byte, token in ids.items() if token is not None}

    def _pieces(self, ids: list[int]) -> Iterator[str]:
        """Tokens' texts, with each run of byte tokens already made characters.

        The library turns a whole run into U+FFFD when its last character is incomplete, so text already
        streamed would change afterwards; here only what is incomplete does.
        """
        run = bytearray()
        for token in ids:
            byte = self._byte_tokens.get(token)
            if byte is not None:
                run.append(byte)
                continue
            if run:
                yield run.decode("utf-8", errors="replace")
                run.clear()
            piece = self._backend.id_to_token(token)
            if piece is not None:
                yield piece
        if run:
            yield run.decode("utf-8", errors="replace")

    def token_text(self, token: int) -> str:
        """The token as the vocabulary writes it."""
        return self._backend.id_to_token(token) or f"<{token}>"

    def token_id(self, text: str) -> int | None:
        """The id of a token as the vocabulary writes it, or None."""
        return self._backend.token_to_id(text)

    def is_special(self, token: int) -> bool:
        """Whether an id is a control token, not text."""
        return token in self._special_ids

    def with_chat_template(self, template: str) -> Tokenizer:
        """The same tokenizer with another chat template."""
        other = copy(self)
        for cached in ("end_of_turn_id", "stop_ids", "fingerprint"):
            other.__dict__.pop(cached, None)
        other._config = {**self._config, "chat_template": template}
        other.chat_template, other.own_chat_template = template, True
        return other

    def save(self, directory: Path) -> None:
        """Writes Hugging Face's tokenizer files: copies of the originals, and the template in use."""
        directory.mkdir(parents=True, exist_ok=True)
        for name in TOKENIZER_FILES:
            source = self._directory / name
            if source.is_file() and source.resolve() != (directory / name).resolve():
                (directory / name).write_bytes(source.read_bytes())
        if not (directory / "tokenizer.json").is_file():
            self._backend.save(str(directory / "tokenizer.json"))
            config = {k: v for k, v in self._config.items() if k in ("chat_template", *_NAMED_TOKENS) and v is not None}
            if not (directory / "tokenizer_config.json").is_file():
                text = json.dumps(
                    {"tokenizer_class": "PreTrainedTokenizerFast", **config}, ensure_ascii=False, indent=2
                )
                (directory / "tokenizer_config.json").write_text(text, encoding="utf-8")
        if self.own_chat_template and self.chat_template is not None:
            (directory / "chat_template.jinja").write_text(self.chat_template, encoding="utf-8", newline="")


# Bytes of a character at most, and ids that are no character together, from which on some are settled.
_LONGEST_CHARACTER, _LONG_RUN = 4, 16


class StreamDecoder:
    """Ids in one at a time, whole characters out: the pieces joined are `tokenizer.decode` of all ids.

    Text is put out as soon as no later byte can change it. Decoding looks back only to the ids of the last
    piece, which is enough context for every decoder (a leading space is dropped at the very start only).
    """

    def __init__(self, tokenizer: Tokenizer, *, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._context: list[int] = []
        self._new: list[int] = []
        self._context_text = ""
        self._emitted = 0  # characters already put out of the text of `_new`

    def put(self, token: int) -> str:
        """The characters that this token completes, often none or several."""
        self._new.append(token)
        text = self._pending_text()
        if text.endswith("\N{REPLACEMENT CHARACTER}"):
            piece = text[self._emitted : -1]
            self._emitted = max(self._emitted, len(text) - 1)
            if len(self._new) % _LONG_RUN == 0:
                self._settle(text)
            return piece
        piece = text[self._emitted :]
        if text:
            self._context, self._new, self._emitted = self._new, [], 0
            self._context_text = self._decode(self._context)
        return piece

    def _settle(self, text: str) -> None:
        """Look back to fewer ids where so many were no characters that none of these can become one any more.

        Else every id of an answer that is nothing but broken bytes would be decoded once more for each that follows.
        """
        for count in range(len(self._new) - _LONGEST_CHARACTER, _LONGEST_CHARACTER, -1):
            settled, rest = self._new[:count], self._new[count:]
            before = self._decode(self._context + settled)[len(self._context_text) :]
            own = self._decode(settled)
            after = text[len(before) :]
            if before and after and text == before + after and self._decode(self._new)[len(own) :] == after:
                self._context, self._context_text, self._new = settled, own, rest
                self._emitted -= len(before)
                return

    def finish(self) -> str:
        """The rest: an incomplete character as U+FFFD."""
        piece = self._pending_text()[self._emitted :]
        self._context, self._new, self._context_text, self._emitted = [], [], "", 0
        return piece

    def _pending_text(self) -> str:
        return self._decode(self._context + self._new)[len(self._context_text) :]

    def _decode(self, ids: list[int]) -> str:
        return self._tokenizer.decode(ids, skip_special=self._skip_special)


def load_tokenizer(directory: Path) -> Tokenizer:
    """The tokenizer of a model directory.

    Raises: TokenizerError when there is none, or it is broken.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise TokenizerError(f"{directory} is not a directory; give a model directory that holds tokenizer.json")
    config = _read_config(directory)
    file = directory / "tokenizer.json"
    backend = _read_backend(file) if file.is_file() else _converted_backend(directory, config)
    backend.no_padding()
    backend.no_truncation()
    _add_missing_tokens(backend, config)
    return Tokenizer(backend, config, directory)


def _read_backend(file: Path) -> tokenizers.Tokenizer:
    try:
        return tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises bare Exception
        raise TokenizerError(f"{file} is not a tokenizer: {error}") from None


def _converted_backend(directory: Path, config: dict[str, Any]) -> tokenizers.Tokenizer:
    """transformers' conversion of an older vocabulary, never with code from the directory."""
    names = ("vocab.json", "tokenizer.model", "spiece.model", "vocab.txt")
    if not any((directory / name).is_file() for name in names):
        raise TokenizerError(
            f"{directory} has no tokenizer: looked for tokenizer.json, {', '.join(names)}; "
            f"copy the tokenizer's files there from the model they belong to"
        )
    import transformers

    try:
        if not {"tokenizer_class", "model_type"} & set(config) and (directory / "merges.txt").is_file():
            files = {"vocab": str(directory / "vocab.json"), "merges": str(directory / "merges.txt")}
            converted = transformers.GPT2Tokenizer(**files)
        else:
            converted = transformers.AutoTokenizer.from_pretrained(
                str(directory), trust_remote_code=False, local_files_only=True
            )
        backend = tokenizers.Tokenizer.from_str(converted.backend_tokenizer.to_str())
    except Exception as error:  # each converter raises its own kind
        raise TokenizerError(f"the tokenizer in {directory} can't be converted: {error}") from None
    for name in _NAMED_TOKENS:
        config.setdefault(name, getattr(converted, name, None))
    return backend


def _add_missing_tokens(backend: tokenizers.Tokenizer, config: dict[str, Any]) -> None:
    """Tokens that only tokenizer_config.json or special_tokens_map.json knows."""
    decoder = config.get("added_tokens_decoder") or {}
    known = backend.get_added_tokens_decoder()
    for token, entry in sorted(decoder.items(), key=lambda item: int(item[0])):
        present = known.get(int(token))
        if present is not None and present.content == entry["content"]:
            continue
        flags = {k: entry[k] for k in ("lstrip", "rstrip", "normalized", "single_word", "special") if k in entry}
        backend.add_tokens([tokenizers.AddedToken(entry["content"], **flags)])
        if backend.token_to_id(entry["content"]) != int(token):
            raise TokenizerError(
                f"tokenizer_config.json gives {entry['content']!r} the id {token}, tokenizer.json another"
            )


def _read_config(directory: Path) -> dict[str, Any]:
    """One mapping out of the five files that describe a tokenizer beside its vocabulary."""
    config: dict[str, Any] = {}
    model = _read_json(directory / "config.json")
    config.update({key: model[key] for key in ("model_type", "eos_token_id") if model.get(key) is not None})
    config["generation_eos_token_id"] = _read_json(directory / "generation_config.json").get("eos_token_id")
    own = _read_json(directory / "tokenizer_config.json")
    config.update({k: v for k, v in _read_json(directory / "special_tokens_map.json").items() if v is not None})
    config.update({key: value for key, value in own.items() if value is not None})
    config["chat_template"] = _chat_template(directory, own)
    return config


def _chat_template(directory: Path, own: dict[str, Any]) -> str | None:
    """chat_template.jinja, else chat_template.json, else the entry (or its part named default) of the configuration."""
    file = directory / "chat_template.jinja"
    if file.is_file():
        with file.open(encoding="utf-8", newline="") as stream:
            return stream.read()
    template = _read_json(directory / "chat_template.json").get("chat_template") or own.get("chat_template")
    if isinstance(template, list):
        named = {part.get("name"): part.get("template") for part in template if isinstance(part, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except (ValueError, OSError) as error:
        raise TokenizerError(f"{path} is not readable JSON: {error}") from None
    if not isinstance(value, dict):
        raise TokenizerError(f"{path} must hold a JSON object, got {type(value).__name__}")
    return value


def _token_text(value: object) -> str | None:
    if isinstance(value, dict):
        value = value.get("content")
    return str(value) if value is not None else None


def _ids(value: object) -> list[int]:
    """A configuration's eos_token_id: an id, a list of them, or nothing."""
    values = value if isinstance(value, list) else [value]
    return [item for item in values if isinstance(item, int)]
