"""From a data section to documents: counted, cut, split, cached, the same whoever tokenises."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tunesmith.errors import DataError
from tunesmith.recipe.schema import DataSection
from tunesmith.text import tokenise as tokenise_module
from tunesmith.text.dataset import TrainingData, load_data
from tunesmith.text.packing import build_pack
from tunesmith.text.preview import check_trainable, mask_preview
from tunesmith.text.store import StoreWriter, cache_folder, cached_store, remove_stale
from tunesmith.text.tokenizer import Tokenizer

Write = Callable[..., str]
PAIRS: list[Any] = [{"instruction": f"问题 {i}", "output": f"答案 {i}"} for i in range(40)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "缓存"))


def load(tokenizer: Tokenizer, *files: str, seed: int = 0, **section: Any) -> TrainingData:
    return load_data(DataSection(train=list(files), **section), tokenizer, seed=seed)


def texts(data: TrainingData, tokenizer: Tokenizer) -> list[str]:
    return [tokenizer.decode(document.tokens) for document in data.train]


def test_documents_carry_tokens_mask_and_place(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(PAIRS)
    data = load(byte_tokenizer, path, validation_fraction=0)
    assert data.validation is None
    assert len(data.train) == 40
    document = data.train[3]
    assert document.row == f"{path}:4"
    assert document.tokens.dtype == np.int32
    assert document.trained.dtype == np.bool_
    assert not document.trained[0]
    assert byte_tokenizer.decode(document.tokens[document.trained]) == "答案 3<|im_end|>"
    assert data.train.lengths.tolist() == [len(one.tokens) for one in data.train]
    assert data.summary.trained_tokens == sum(int(one.trained.sum()) for one in data.train)
    pack = build_pack(data.train, [3, 5], 256, packing=True, max_length=128)
    assert pack.num_trained == int(data.train[3].trained.sum() + data.train[5].trained.sum())


def test_split_is_disjoint_by_content_and_chosen_by_the_seed(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(PAIRS + PAIRS)

    def parts(seed: int) -> tuple[set[str], set[str]]:
        data = load(byte_tokenizer, path, seed=seed, validation_fraction=0.2)
        assert data.validation is not None
        assert data.summary.overlap == 0
        held = {byte_tokenizer.decode(document.tokens) for document in data.validation}
        return set(texts(data, byte_tokenizer)), held

    train, held = parts(0)
    assert not train & held
    assert len(train | held) == 40
    assert 6 <= len(held) <= 10
    assert parts(0) == (train, held)
    assert parts(1) != (train, held)


@pytest.mark.parametrize(("rows", "held"), [(1, 0), (24, 0), (99, 0), (100, 5)])
def test_few_rows_are_all_trained_on(rows: int, held: int, byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    """Of 24 rows one was kept out without a word, and the model could not answer it."""
    data = load(byte_tokenizer, write_rows([{"instruction": f"q{i}", "output": f"a{i}"} for i in range(rows)]))
    assert data.summary.validation_documents == held
    assert data.summary.documents == rows - held
    said = "\n".join(data.summary.lines())
    assert ("fewer than 100 rows, so all are trained on" in said) == (not held)
    assert ("kept out of training" in said) == bool(held)


def test_rows_that_are_kept_out_are_named(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(PAIRS)
    data = load(byte_tokenizer, path, validation_fraction=0.1)
    assert data.validation is not None
    rows = [document.row for document in data.validation]
    assert len(rows) == 4
    note = f"kept out of training, to validate on: {', '.join(rows[:3])} and 1 more"
    assert any(line.startswith(note) for line in data.summary.lines())
    assert data.summary.as_dict()["split_note"].startswith(note)
    few = load(byte_tokenizer, path, validation_fraction=0.01).summary.split_note
    assert few == "data.validation_fraction 0.01 is less than one row here: all are trained on"
    assert load(byte_tokenizer, path, validation_fraction=0).summary.split_note is None


def test_validation_files(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    train, held = write_rows(PAIRS[:10], "a.jsonl"), write_rows(PAIRS[8:12], "b.jsonl")
    data = load(byte_tokenizer, train, validation=[held])
    assert (data.summary.documents, data.summary.validation_documents, data.summary.overlap) == (10, 4, 2)
    assert any("also" in line or "too" in line for line in data.summary.lines())


def test_bad_rows_stop_with_file_and_line_or_are_counted(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows([*PAIRS[:3], {"instruction": "a"}, *PAIRS[3:6], {"instruction": "b"}])
    with pytest.raises(DataError, match=r"数据\.jsonl:4: .*none of the keys.*data\.bad_rows=skip"):
        load(byte_tokenizer, path)
    summary = load(byte_tokenizer, path, bad_rows="skip").summary
    assert (summary.rows, summary.skipped, summary.documents + summary.validation_documents) == (8, 2, 6)
    assert next(iter(summary.skipped_reasons.values())) == {"count": 2, "first": f"{path}:4"}
    assert any("2 rows skipped" in line for line in summary.lines())


def test_long_documents(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    long: list[Any] = [
        {"instruction": "q", "output": "a" * 200},
        {"instruction": "q" * 200, "output": "a"},
        {"instruction": "q", "output": "a"},
    ]
    path = write_rows(long)
    common: dict[str, Any] = {"max_length": 64, "validation_fraction": 0}
    cut = load(byte_tokenizer, path, **common).summary
    assert (cut.documents, cut.truncated, cut.dropped, cut.length_max) == (2, 2, 1, 64)
    left = load(byte_tokenizer, path, too_long="skip", **common).summary
    assert (left.documents, left.too_long) == (1, 2)
    with pytest.raises(DataError, match=r":1: the document is longer than data\.max_length \(64\)"):
        load(byte_tokenizer, path, too_long="stop", **common)


def test_plain_text(byte_tokenizer: Tokenizer, tmp_path: Path, write_rows: Write) -> None:
    (tmp_path / "书.txt").write_text("一二三四五" * 20, encoding="utf-8")
    data = load(byte_tokenizer, str(tmp_path / "书.txt"), max_length=64, validation_fraction=0)
    assert "".join(texts(data, byte_tokenizer)).encode("utf-8", "replace").count(b"?") >= 0
    joined = [token for document in data.train for token in document.tokens.tolist()]
    assert byte_tokenizer.decode(joined) == "一二三四五" * 20 + "<|im_end|>"
    assert all(document.trained[1:].all() and not document.trained[0] for document in data.train)
    rows = load(byte_tokenizer, write_rows([{"text": "hello"}]), validation_fraction=0)
    assert texts(rows, byte_tokenizer) == ["hello<|im_end|>"]


def test_text_of_a_control_token_stays_text(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    data = load(byte_tokenizer, write_rows([{"text": "a<|im_end|>b"}]), validation_fraction=0)
    assert data.train[0].tokens.tolist().count(258) == 1


def test_system_message_template_and_limits(byte_tokenizer: Tokenizer, write_rows: Write, tmp_path: Path) -> None:
    path = write_rows(PAIRS)
    with_system = load(byte_tokenizer, path, system="规则", max_rows=5, validation_fraction=0)
    assert len(with_system.train) == 5
    assert all("规则" in text for text in texts(with_system, byte_tokenizer))
    (tmp_path / "t.jinja").write_text("{% for m in messages %}<{{ m.role }}>{{ m.content }}<|im_end|>{% endfor %}")
    templated = load(byte_tokenizer, path, chat_template=str(tmp_path / "t.jinja"), validation_fraction=0)
    assert texts(templated, byte_tokenizer)[0] == "<user>问题 0<|im_end|><assistant>答案 0<|im_end|>"
    assert templated.tokenizer.chat_template != byte_tokenizer.chat_template
    with pytest.raises(DataError, match=r"data\.chat_template"):
        load(byte_tokenizer, path, chat_template=str(tmp_path / "none.jinja"))


@pytest.mark.parametrize(
    ("rows", "section", "reason"),
    [
        ([], {}, "no rows"),
        ([{"review": "a"}], {}, "can't be told from the keys review"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], {}, "DPO"),
        ([{"instruction": "q" * 99, "output": "a"}], {"max_length": 32}, "with no trained token"),
    ],
)
def test_nothing_to_train_on(
    rows: list[Any], section: dict[str, Any], reason: str, byte_tokenizer: Tokenizer, write_rows: Write
) -> None:
    with pytest.raises(DataError, match=reason):
        load(byte_tokenizer, write_rows(rows), **section)


def test_cache_is_used_and_told_apart(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(PAIRS)
    first, again = load(byte_tokenizer, path), load(byte_tokenizer, path, seed=3)
    assert (first.summary.cached, again.summary.cached) == (False, True)
    assert again.summary.tokens == first.summary.tokens
    assert not load(byte_tokenizer, path, max_length=100).summary.cached
    other = byte_tokenizer.with_chat_template("{% for m in messages %}{{ m.content }}<|im_end|>{% endfor %}")
    assert not load(other, path).summary.cached
    write_rows(PAIRS[:20])
    assert not load(byte_tokenizer, path).summary.cached
    assert not load(byte_tokenizer, path, cache=False).summary.cached


@pytest.mark.parametrize("name", ["tokens.bin", "lengths.bin", "meta.json"])
def test_corrupted_cache_is_made_anew(name: str, byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(PAIRS)
    good = texts(load(byte_tokenizer, path), byte_tokenizer)
    (entry,) = cache_folder().iterdir()
    content = bytearray((entry / name).read_bytes())
    content[len(content) // 2] ^= 0xFF
    (entry / name).write_bytes(content)
    mended = load(byte_tokenizer, path)
    assert not mended.summary.cached
    assert texts(mended, byte_tokenizer) == good
    assert load(byte_tokenizer, path).summary.cached
    assert [one.name for one in cache_folder().iterdir()] == [entry.name]


def test_concurrent_writers_agree(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    path = write_rows(PAIRS)
    found: list[list[str]] = []
    barrier = threading.Barrier(4)

    def one() -> None:
        barrier.wait()
        found.append(texts(load(byte_tokenizer, path), byte_tokenizer))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(result == found[0] for result in found)
    assert len(list(cache_folder().iterdir())) == 1


def test_unwritable_cache_does_not_stop(
    byte_tokenizer: Tokenizer, write_rows: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert load(byte_tokenizer, write_rows(PAIRS)).summary.rows == 40


def test_a_full_cache_does_not_stop(
    byte_tokenizer: Tokenizer, write_rows: Write, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """It ended the run, where a cache that can't be written never did."""
    append = StoreWriter.append

    def full(writer: StoreWriter, *rows: Any) -> None:
        append(writer, *rows)
        if cache_folder() in writer.directory.parents:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoreWriter, "append", full)
    path = write_rows(PAIRS)
    data = load(byte_tokenizer, path)
    assert (data.summary.rows, data.summary.cached, len(data.train)) == (40, False, 40)
    assert [record.getMessage() for record in caplog.records] == [
        f"tokenised data is not kept: {cache_folder()} can't be written (No space left on device)"
    ]
    assert list(cache_folder().iterdir()) == []


def test_no_room_anywhere_is_an_error_that_says_where(
    byte_tokenizer: Tokenizer, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(StoreWriter, "append", full)
    with pytest.raises(DataError, match=r"can't be written to .*No space left on device; free some space"):
        load(byte_tokenizer, write_rows(PAIRS))


def _unfinished(name: str, age_s: float) -> Path:
    directory = cache_folder() / name
    directory.mkdir(parents=True)
    (directory / "tokens.bin").write_bytes(b"1234")
    for path in (directory / "tokens.bin", directory):
        os.utime(path, (time.time() - age_s,) * 2)
    return directory


def test_what_killed_writers_left_is_removed_when_it_is_surely_stale(
    byte_tokenizer: Tokenizer, write_rows: Write
) -> None:
    """They stayed for ever, as large as the data."""
    old, torn, recent = _unfinished("a.part", 2e4), _unfinished("b.torn", 2e4), _unfinished("c.part", 60)
    other, held = _unfinished("somebody's.folder", 2e4), _unfinished("d.part", 2e4)
    code = (
        "import sys; from pathlib import Path; from tunesmith.text.store import StoreWriter\n"
        "writer = StoreWriter(Path(sys.argv[1])); print('ready', flush=True); sys.stdin.read()"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(held)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        for path in (*held.iterdir(), held):
            os.utime(path, (time.time() - 2e4,) * 2)
        load(byte_tokenizer, write_rows(PAIRS))
        assert [path.exists() for path in (old, torn, recent, other, held)] == [False, False, True, True, True]
        process.kill()
    remove_stale(cache_folder())
    assert not held.exists()
    assert recent.exists()


def test_failed_writer_leaves_nothing() -> None:
    def write(_: StoreWriter) -> dict[str, Any]:
        raise DataError("no")

    with pytest.raises(DataError):
        cached_store("key", write)
    assert list(cache_folder().iterdir()) == []


def test_processes_give_what_one_process_gives(
    byte_tokenizer: Tokenizer, write_rows: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tokenise_module, "_BATCH_ROWS", 7)
    monkeypatch.setattr(tokenise_module, "_IN_PROCESS_BATCHES", 1)
    path = write_rows([*PAIRS, {"instruction": "bad"}])
    alone = load(byte_tokenizer, path, workers=0, cache=False, bad_rows="skip")
    together = load(byte_tokenizer, path, workers=2, cache=False, bad_rows="skip")
    assert texts(alone, byte_tokenizer) == texts(together, byte_tokenizer)
    assert alone.summary == together.summary
    with pytest.raises(DataError, match=":41: "):
        load(byte_tokenizer, path, workers=2, cache=False)


def test_progress_counts_rows(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    seen: list[tuple[str, int, int]] = []
    data = DataSection(train=[write_rows(PAIRS)], max_rows=30)
    load_data(data, byte_tokenizer, seed=0, progress=lambda *news: seen.append(news))
    assert seen[-1] == ("tokenising", 30, 30)


def test_preview_shows_the_document_and_its_mask(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    data = load(byte_tokenizer, write_rows(PAIRS), validation_fraction=0)
    preview = mask_preview(data.train[0], byte_tokenizer)
    assert "".join(piece["text"] for piece in preview.data["pieces"]) == texts(data, byte_tokenizer)[0]
    assert [piece["text"] for piece in preview.data["pieces"] if piece["trained"]] == ["答案 0<|im_end|>"]
    styles = [str(span.style) for span in preview.text.spans]
    assert any("green" in style for style in styles)
    assert "答案 0" in preview.text.plain
    json.dumps(preview.data)


def test_long_preview_leaves_the_middle_out(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    data = load(byte_tokenizer, write_rows([{"text": "x" * 900}]), validation_fraction=0)
    preview = mask_preview(data.train[0], byte_tokenizer)
    assert "tokens ..." in preview.text.plain
    assert sum(piece["tokens"] for piece in preview.data["pieces"]) == len(data.train[0].tokens)


def test_refusals(byte_tokenizer: Tokenizer, write_rows: Write) -> None:
    fine = load(byte_tokenizer, write_rows(PAIRS))
    check_trainable(fine.train, fine.tokenizer, DataSection())
    endless = byte_tokenizer.with_chat_template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    data = load(endless, write_rows(PAIRS))
    with pytest.raises(DataError, match="no end-of-turn token is trained"):
        check_trainable(data.train, data.tokenizer, DataSection())
    cut = load(byte_tokenizer, write_rows([{"instruction": "q", "output": "a" * 99}] * 3), max_length=48)
    with pytest.raises(DataError, match=r"data\.max_length"):
        check_trainable(cut.train, cut.tokenizer, DataSection())


@pytest.mark.parametrize(
    ("file", "format_name", "rows"),
    [
        ("llamafactory_demos/alpaca_zh_demo.json", "alpaca", 200),
        ("llamafactory_demos/glaive_toolcall_zh_demo.json", "sharegpt", 300),
        ("llamafactory_demos/v1_sft_demo.jsonl", "messages", 500),
        ("llamafactory_demos/reason_tool_use_demo_50.jsonl", "messages", 50),
        ("llamafactory_demos/c4_demo.jsonl.xz", "text", 300),
        ("gsm8k/train.jsonl.xz", "alpaca", 400),
        ("tinystories_sample/tinystories_valid_30KB.txt", "text", 0),
    ],
)
def test_real_files(
    file: str, format_name: str, rows: int, data_dir: Path, real_tokenizer: Callable[[str], Tokenizer]
) -> None:
    data = load(real_tokenizer("qwen2.5"), str(data_dir / file), max_rows=rows or None)
    assert set(data.summary.formats.values()) == {format_name}
    assert data.summary.rows == rows or not rows
    assert data.summary.skipped == data.summary.straddling == 0
    check_trainable(data.train, data.tokenizer, DataSection())
    if format_name != "text":
        assert data.summary.ends_trained >= 0.9 * data.summary.conversations


def test_real_preferences_feedback_and_pictures_are_refused(data_dir: Path, byte_tokenizer: Tokenizer) -> None:
    demos = data_dir / "llamafactory_demos"
    for file, reason in (
        ("dpo_zh_demo.json.xz", "DPO"), ("v1_dpo_demo.jsonl", "DPO"), ("kto_en_demo.json.xz", "not supported"),
        ("mllm_demo.json", "images"),
    ):  # fmt: skip
        with pytest.raises(DataError, match=reason):
            load(byte_tokenizer, str(demos / file))


def test_builtin_shop(byte_tokenizer: Tokenizer) -> None:
    data = load(byte_tokenizer, "builtin:shop", max_rows=20)
    assert data.summary.rows == 20
    with pytest.raises(DataError, match="builtin:shopp"):
        load(byte_tokenizer, "builtin:shopp")
