"""Trains the tokenizer of builtin:tiny on generated text and writes the model directory's small files.

    python -m tunesmith.text.builtin.tokenizer DIRECTORY

Byte-level BPE. A Chinese character or a digit is never merged with its neighbours, so that a value has the same tokens
in the context and in the answer.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

from tunesmith.text.builtin.pretrain import Row, rows

VOCAB_SIZE = 4096
SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_PIECES = (
    r"\p{Han}|\p{N}|'(?:s|t|re|ve|m|ll|d)\b| ?[\p{L}&&[^\p{Han}]]+| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# Everyday characters get a token of their own, however rare they are in the generated text.
_EVERYDAY_HAN = (
    "的一是不了在人有我他这个们中来上大为和国地到以说时要就出会可也你对生能而子那得于着下自之年过发后作里用道行所然家种事成方多经么去法学如都同现当没动面起看定天分还进好小部其些主样理心她本前开但因只从想实"
    "日军者意无力它与长把机十民第公此已工使情明性知全三又关点正业外将两高间由问很最重并物手应战向头文体政美相见被利什二等产或新己制身果加西斯月话合回特代内信表化老给世位次度门任常先海通教儿原东声提立及比员"
    "解水名真论处走义各入几口认条平系气题活尔更别打女变四神总何电数安少报才结反受目太量再感建务做接必场件计管期市直德资命山金指克许统区保至队形社便空决治展马科司五基眼书非则听白却界达光放强即像难且权思王象"
    "完设式色路记南品住告类求据程北边死张该交规万取拉格望觉术领共确传师观清今切院让识候带导争运笔往费英快言房够买卖店客服价钱货尺寸材质颜红绿蓝黄黑吃喝茶饭菜车船飞步远近早晚夏秋冬春雨雪风云花草树木鱼鸟牛羊"
    "狗猫衣裤鞋帽包箱桌椅床灯杯碗笑哭爱恨喜怒哀乐朋友父母兄弟姐妹孩童男帮助谢请欢迎试音视频图片照字词句段章节页版单双左右六七八九零百千亿元角斤米升周岁半旧轻厚薄软硬热冷温凉甜苦酸辣香臭丑贵贱坏"
)
_EVERYDAY_WEIGHT = 400
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def _texts(row: Row) -> Iterator[str]:
    if "text" in row:
        yield row["text"]
        return
    for message in row["messages"]:
        yield f"{message['role']}\n"
        yield message["content"]


def _corpus(num_rows: int, seed: int) -> Iterator[str]:
    for row in rows(seed, num_rows):
        yield from _texts(row)
    yield _EVERYDAY_HAN * _EVERYDAY_WEIGHT


def train_tokenizer(num_rows: int = 90_000, seed: int = 2026) -> Tokenizer:
    """A tokenizer trained on rows of the pre-training generator: the same on every machine."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(num_rows, seed), trainer)
    return tokenizer


def tokenizer_config() -> dict[str, Any]:
    """What tokenizer_config.json holds: ChatML without a default system message."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": 2048,
        "chat_template": CHAT_TEMPLATE,
    }


def write(directory: Path, tokenizer: Tokenizer) -> None:
    """Save the tokenizer's two files."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    text = json.dumps(tokenizer_config(), indent=2, ensure_ascii=False)
    (directory / "tokenizer_config.json").write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    write(Path(sys.argv[1]), train_tokenizer())
