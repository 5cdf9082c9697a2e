"""`tunesmith merge RUN_OR_ADAPTER --output DIR`: an adapter folded into its base, and what that changed."""

from __future__ import annotations

import shlex
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from tunesmith.cli import console
from tunesmith.cli.unfinished import use_checkpoint
from tunesmith.errors import AdapterError
from tunesmith.rundir.layout import is_run

if TYPE_CHECKING:
    import torch

    from tunesmith.compress.merge import MergeReport

app = typer.Typer(add_completion=False)


class DTypeName(StrEnum):
    """What weights can be stored in."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantisation(StrEnum):
    """What a merged model can be quantised to."""

    nf4 = "nf4"
    nf4_double = "nf4-double"


@app.command()
def merge(
    source: Annotated[Path, typer.Argument(metavar="RUN_OR_ADAPTER", help="a run directory, or an adapter's folder")],
    output: Annotated[Path, typer.Option(help="the folder to write the merged model to")],
    base: Annotated[str | None, typer.Option(help="the base model; left out: the one the adapter names")] = None,
    dtype: Annotated[DTypeName | None, typer.Option(help="dtype to store; left out: the base's")] = None,
    quantize: Annotated[Quantisation | None, typer.Option(help="store NF4, in bitsandbytes' format")] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="a text file, a prompt a line, to measure the divergence on; else random tokens")
    ] = None,
    kl_limit: Annotated[float | None, typer.Option(help="refuse a step that moves predictions by more nats")] = None,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N")] = "auto",
    force: Annotated[bool, typer.Option(help="merge into another base, keep a result over the limit")] = False,
    replace: Annotated[bool, typer.Option(help="write over an existing folder")] = False,
) -> None:
    """Fold an adapter into the base it was trained on, and report what that changed.

    Exit codes: 0 merged, 1 the result diverges too far, 2 the adapter does not fit the base.
    """
    from tunesmith.compress.merge import KL_LIMIT, merge_to_directory

    adapter = adapter_directory(use_checkpoint(source) or source)
    report = merge_to_directory(
        base,
        adapter,
        output,
        _torch_dtype(dtype),
        None if quantize is None else ("nf4-double" if quantize is Quantisation.nf4_double else "nf4"),
        prompts=None if prompts is None else _tokens(prompts, adapter, base),
        kl_limit=KL_LIMIT if kl_limit is None else kl_limit,
        device=device,
        force=force,
        replace=replace,
    )
    show(report)
    if dtype is None and report.dtype != "float32":
        console.err.print(
            f"Stored in {report.dtype}, as the base's files are, whatever training computed in; "
            f"--dtype float32 keeps every digit, in twice the space.",
            markup=False,
        )
    console.emit(asdict(report))


def adapter_directory(source: Path) -> Path:
    """The adapter that `source` is, or that came out of the run it is. Raises: AdapterError."""
    for candidate in (source, source / "final"):
        if (candidate / "adapter_config.json").is_file():
            return candidate
    if is_run(source) and not (source / "final").is_dir():
        raise AdapterError(
            f"the run {source} has not finished, and has no checkpoint yet: go on with: "
            f"tunesmith train --resume {shlex.quote(str(source))}"
        )
    for candidate in (source, source / "final"):
        if (candidate / "config.json").is_file():
            raise AdapterError(f"{candidate} is a whole model already, without an adapter: there is nothing to merge")
    raise AdapterError(f"{source} is neither an adapter (adapter_config.json) nor a run that made one (final/)")


def show(report: MergeReport) -> None:
    """Print what was merged, and a line for each hop."""
    from rich.table import Table

    table = Table(box=None)
    for column in ("step", "KL, nats/token", "mean logit change", "largest", "same best token"):
        table.add_column(column, no_wrap=True)
    for hop in report.hops:
        d = hop.divergence
        agreement = f"{100 * d.argmax_agreement_ratio:.2f} % of {d.num_tokens}"
        table.add_row(hop.name, f"{d.kl_mean:.2e}", f"{d.mean_difference:.2e}", f"{d.max_difference:.2e}", agreement)
    console.print_table(table)
    console.err.print("(KL: how far the predictions of the merged model are from those of base + adapter; 0: the same)")
    console.err.print(f"{report.adapter} + {report.base} -> {report.output}", markup=False)
    console.err.print(f"talk to it: tunesmith chat {shlex.quote(str(report.output))}", markup=False)
    if report.base_checked is None:
        console.err.print("The adapter does not record its base: that it is the right one was not checked.")
    elif not report.base_checked:
        console.err.print("Merged into another base than the adapter was trained on.", style="yellow")


def _torch_dtype(dtype: DTypeName | None) -> torch.dtype | None:
    import torch

    return None if dtype is None else getattr(torch, dtype.value)


def _tokens(path: Path, adapter: Path, base: str | None) -> list[list[int]]:
    """The prompts of a file as token ids, by the tokenizer beside the adapter or the base's."""
    from tunesmith.checkpoint.source import resolve_model
    from tunesmith.compress.merge import named_base
    from tunesmith.errors import DataError
    from tunesmith.text.tokenizer import load_tokenizer

    beside = (adapter / "tokenizer.json").is_file()
    named = (base, None) if base else named_base(adapter)
    tokenizer = load_tokenizer(adapter if beside else resolve_model(*named))
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"the prompts in {path} can't be read: {error}") from None
    prompts = [tokens for line in lines if (tokens := tokenizer.encode(line))]
    if not prompts:
        raise DataError(f"{path} holds no prompt: write one a line")
    return prompts
