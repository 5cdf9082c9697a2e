"""Tokenizers for the tests of `text`: real ones unpacked once, and a tiny byte-level one made on the spot."""

from __future__ import annotations

import json
import lzma
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from tunesmith.text.families import read_template
from tunesmith.text.tokenizer import Tokenizer, load_tokenizer

REAL = ("qwen2.5", "llama3", "gpt2", "mistral")


@pytest.fixture(scope="session")
def real_directory(data_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function from a name to the directory of a real tokenizer."""
    made: dict[str, Path] = {}

    def unpack(name: str) -> Path:
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            for file in (data_dir / f"tokenizer_{name}").iterdir():
                content = file.read_bytes()
                packed = file.suffix == ".xz"
                (made[name] / (file.stem if packed else file.name)).write_bytes(
                    lzma.decompress(content) if packed else content
                )
        return made[name]

    return unpack


@pytest.fixture(scope="session")
def real_tokenizer(real_directory: Callable[[str], Path]) -> Callable[[str], Tokenizer]:
    """A function from a name to a real tokenizer, loaded once."""
    loaded: dict[str, Tokenizer] = {}

    def load(name: str) -> Tokenizer:
        if name not in loaded:
            loaded[name] = load_tokenizer(real_directory(name))
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def byte_directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """256 bytes, then <|endoftext|> 256, <|im_start|> 257, <|im_end|> 258, as a tokenizer directory."""
    directory = tmp_path_factory.mktemp("bytes")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = tokenizers.Tokenizer(models.BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    backend.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>", "chat_template": read_template("chatml")}
    (directory / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return directory


@pytest.fixture(scope="session")
def byte_tokenizer(byte_directory: Path) -> Tokenizer:
    return load_tokenizer(byte_directory)


@pytest.fixture
def write_rows(tmp_path: Path) -> Callable[..., str]:
    """A function that writes rows as JSON Lines and returns the path."""

    def write(rows: list[object], name: str = "数据.jsonl") -> str:
        path = tmp_path / name
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
        return str(path)

    return write
