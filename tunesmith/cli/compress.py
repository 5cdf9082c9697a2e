"""`tunesmith compress MODEL --format int4 --output DIR`: a model with its weights in int8 or int4, ready to serve."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console
from tunesmith.errors import DataError, RunDirError

if TYPE_CHECKING:
    from tunesmith.compress.quantize import CompressReport

app = typer.Typer(add_completion=False)


class CalibrationName(StrEnum):
    """How int4 codes are chosen."""

    none = "none"
    gptq = "gptq"
    awq = "awq"


class HeadName(StrEnum):
    """What the output head is stored in."""

    stored = "stored"
    int8 = "int8"


@app.command()
def compress(
    model: Annotated[str, typer.Argument(metavar="MODEL", help="a model directory, a Hub id, or builtin:tiny")],
    output: Annotated[Path, typer.Option(help="the folder to write the compressed model to")],
    format: Annotated[str, typer.Option(help="int8, w8a8, int4, int4-g64, int4-g32; -sym: no zero points")] = "int4",
    calibration: Annotated[CalibrationName, typer.Option(help="choose int4 codes on a text")] = CalibrationName.none,
    calibration_text: Annotated[Path | None, typer.Option(help="a text file like what the model will read")] = None,
    calibration_tokens: Annotated[int, typer.Option(help="how much of it to use", min=1)] = 65536,
    head: Annotated[HeadName, typer.Option(help="int8 halves the output head too")] = HeadName.stored,
    dtype: Annotated[str, typer.Option(help="of what is not compressed; auto: the model's")] = "auto",
    revision: Annotated[str | None, typer.Option(help="of a Hub id")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    replace: Annotated[bool, typer.Option(help="write over an existing folder")] = False,
) -> None:
    """Make a model smaller and faster to answer, and report what that changed.

    Exit codes: 0 written, 2 a model or a combination that can't be compressed.
    """
    from tunesmith.compress.quantize import compress_to_directory

    _refuse_run(model)
    documents, held_out = None, None
    if calibration_text is not None:
        documents, held_out = _documents(calibration_text, model, revision, calibration_tokens)
    report = compress_to_directory(
        model,
        output,
        format,
        calibration=calibration.value,
        documents=documents,
        held_out=held_out,
        head=head.value,
        dtype=dtype,
        device=device,
        revision=revision,
        replace=replace,
    )
    _show(report)
    console.emit(asdict(report))


def _refuse_run(model: str) -> None:
    """Raises: RunDirError for a run directory, naming what of it can be compressed."""
    from tunesmith.rundir.layout import is_run

    path = Path(model).expanduser()
    if not is_run(path):
        return
    if (path / "final" / "config.json").is_file():
        raise RunDirError(f"{model} is a run: name the model that came out of it: {path / 'final'}")
    raise RunDirError(
        f"{model} is a run, and an adapter alone can't be compressed: first make one model of it and its base: "
        f"tunesmith merge {shlex.quote(model)} --output DIR"
    )


def _documents(path: Path, model: str, revision: str | None, limit: int) -> tuple[list[list[int]], list[list[int]]]:
    """Token ids of a text in pieces: to calibrate on, and up to eight more that come after, to measure on.

    A piece has 512 tokens, of a short text half of them. Raises: DataError for less than two pieces of 64 tokens.
    """
    from tunesmith.checkpoint.source import resolve_model
    from tunesmith.text.tokenizer import load_tokenizer

    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text: {error}") from None
    except OSError as error:
        raise DataError(f"the text {path} can't be read: {error.strerror}") from None
    ids = load_tokenizer(resolve_model(model, revision)).encode(text)
    if len(ids) < 128:
        raise DataError(f"{path} holds {len(ids)} tokens: calibration wants 128 at least, half of them to measure on")
    size = min(512, len(ids) // 2)
    pieces = [piece for start in range(0, len(ids), size) if len(piece := ids[start : start + size]) >= 64]
    num_held_out = min(8, max(1, len(pieces) // 4))
    used = pieces[: min(len(pieces) - num_held_out, max(1, limit // 512))]
    return used, pieces[len(used) : len(used) + num_held_out]


def _show(report: CompressReport) -> None:
    from tunesmith.units import format_bytes

    ratio = 100 * report.bytes_after / report.bytes_before
    console.err.print(
        f"{report.output}: {report.format}, {format_bytes(report.bytes_after)} "
        f"({ratio:.0f} % of {format_bytes(report.bytes_before)}), in {report.time_s:.1f} s",
        markup=False,
    )
    console.err.print(
        f"On {report.kl_text}: KL {report.kl:.2e} nats a token, the same best token for "
        f"{100 * report.same_best_token_ratio:.2f} %.  Try it: tunesmith chat {report.output}",
        markup=False,
    )
    if report.kl_text == "random tokens":
        console.err.print(
            "(Random tokens are a hard test: no next token is likely there, so small changes make another one the "
            "best. How it does on your text: --calibration-text FILE measures on a part of it.)",
            markup=False,
        )
