"""What fp8 and 8-bit states cost where they can: loss curves of models that have learnt, on real text, beside bfloat16.

    python benchmarks/quality_curves.py --models builtin:tiny runs/probe/final stories260K/hf --text FILE --out DIR

Every method is trained in bfloat16 and with its products in fp8, full fine-tuning also with AdamW's states in 8 bits:
the same text, seed, order and steps, by tunesmith's own session. Models of random
weights would prove nothing: their loss is ln(vocabulary), whatever is rounded.
Without --text, `builtin:pretrain-text` is made and validated on a different seed of it; --text takes files (.txt, also
.xz, .gz, .bz2) whose last share, `--held-out`, is kept for validation.

One JSON line every `--every` steps, {model, case, step, loss}, the loss averaged over the last `--window` steps; one
for the end of a case, with the validation loss (of an fp8 case in fp8 as trained, and as `validation_loss_of_weights`
with its weights' own products, which no verdict counts); one verdict for every such case: whether both losses at the
end are within `--tolerance` of those in bfloat16. All of it is in DIR/quality_curves.json too, with a plot a model.
Exits 1 where a verdict is no.
"""

from __future__ import annotations

import argparse
import bz2
import gc
import gzip
import json
import lzma
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from tunesmith.errors import TunesmithError
from tunesmith.hardware import pick_device
from tunesmith.kernels.fp8 import FAST_SUMS
from tunesmith.model.quant import set_compute
from tunesmith.recipe.load import recipe_from_mapping
from tunesmith.report.style import MUTED, SERIES, canvas, standalone, to_svg
from tunesmith.rundir.environment import environment_fingerprint
from tunesmith.rundir.io import write_json_atomic
from tunesmith.train.pending import Pending
from tunesmith.train.session import Session, build_session

CASES: dict[str, dict[str, Any]] = {
    "full": {"kind": "full"},
    "full fp8": {"kind": "full", "fp8_compute": True},
    "full adamw8bit": {"kind": "full"},
    "lora": {"kind": "lora"},
    "lora fp8": {"kind": "lora", "base": "fp8"},
    "lora fp8 all": {"kind": "lora", "base": "fp8", "fp8_blocks": "all"},
    "qlora": {"kind": "qlora"},
    "qlora fp8": {"kind": "qlora", "fp8_compute": True},
}
OPTIMIZERS = {"full adamw8bit": "adamw8bit"}
"""Cases that differ from the one beside them by their optimiser; AdamW's states in 32 bits elsewhere."""
FAST = {"both": (True, True), "forward": (True, False), "none": (False, False)}
BESIDE = {
    "full fp8": "full",
    "full adamw8bit": "full",
    "lora fp8": "lora",
    "lora fp8 all": "lora",
    "qlora fp8": "qlora",
}
OPENERS: dict[str, Callable[..., Any]] = {".xz": lzma.open, ".gz": gzip.open, ".bz2": bz2.open}
TRAINING_TEXT, HELD_OUT_TEXT = "builtin:pretrain-text?rows=60000&seed=21", "builtin:pretrain-text?rows=4000&seed=22"
Row = dict[str, Any]


def main(arguments: list[str] | None = None) -> int:
    """The exit code."""
    options = parse(arguments)
    FAST_SUMS.forward, FAST_SUMS.backward = FAST[options.fast_sums]
    options.out.mkdir(parents=True, exist_ok=True)
    sources = split_text(options) if options.text else ([TRAINING_TEXT], [HELD_OUT_TEXT])
    rows: list[Row] = []
    verdicts: list[Row] = []
    for number, model in enumerate(options.models):
        found = {name: run_case(options, model, name, sources) for name in CASES if name in options.cases}
        rows += found.values()
        verdicts += [say(verdict(options, found, name)) for name in BESIDE if {name, BESIDE[name]} <= found.keys()]
        plot(options.out / f"quality_curves_{number}.svg", model, list(found.values()))
    settings = {name: value for name, value in vars(options).items() if name != "out"}
    report = {"settings": settings, "environment": environment_fingerprint(), "cases": rows, "verdicts": verdicts}
    write_json_atomic(options.out / "quality_curves.json", json.loads(json.dumps(report, default=str)))
    return 0 if all(row["within"] for row in verdicts) else 1


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["builtin:tiny"], help="builtin:tiny or checkpoint directories")
    parser.add_argument("--text", nargs="*", type=Path, default=[], help="text files; none: builtin text")
    parser.add_argument("--cases", nargs="+", choices=list(CASES), default=list(CASES))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--window", type=int, default=50, help="steps that a loss is averaged over")
    parser.add_argument("--every", type=int, default=50, help="steps between two lines")
    parser.add_argument("--tolerance", type=float, default=0.005)
    parser.add_argument("--held-out", type=float, default=0.05, help="share of the text that is kept for validation")
    parser.add_argument("--micro-batch-tokens", type=int, default=4096)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--validation-batches", type=int, default=16, help="at most so many micro-batches")
    parser.add_argument("--learning-rate", type=float, default=None, help="of every case; none: a recipe's own")
    parser.add_argument(
        "--fast-sums", choices=list(FAST), default="both", help="the passes whose fp8 products sum in short registers"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("quality-curves"))
    return parser.parse_args(arguments)


def split_text(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """Every file cut in two: the files to train on and those held out."""
    training: list[str] = []
    held_out: list[str] = []
    for number, path in enumerate(options.text):
        with OPENERS.get(path.suffix, open)(path, "rt", encoding="utf-8") as file:
            text = file.read()
        cut = int(len(text) * (1 - options.held_out))
        for name, part, into in (("train", text[:cut], training), ("held-out", text[cut:], held_out)):
            target = options.out / f"text-{number}-{name}.txt"
            target.write_text(part, encoding="utf-8")
            into.append(str(target))
    return training, held_out


def recipe_of(options: argparse.Namespace, model: str, case: str, sources: tuple[list[str], list[str]]) -> Row:
    """The recipe: but for the method the same for every case."""
    data = {"train": sources[0], "validation": sources[1], "max_length": options.max_length, "train_on": "all"}
    return {
        "model": {"path": model, "device": str(pick_device(options.device))},
        "method": {"rank": 16, **CASES[case]},
        "data": {**data, "workers": 0},
        "train": {
            "max_steps": options.steps,
            "micro_batch_tokens": options.micro_batch_tokens,
            "learning_rate": options.learning_rate,
            "optimizer": OPTIMIZERS.get(case, "adamw"),
            "precision": "bfloat16",
            "seed": options.seed,
        },
        "evaluation": {"max_batches": options.validation_batches},
    }


def run_case(options: argparse.Namespace, model: str, case: str, sources: tuple[list[str], list[str]]) -> Row:
    """One curve: the losses of every step, their averages, the validation loss; or the error that ended it."""
    row: Row = {"model": model, "case": case, "losses": []}
    began = time.perf_counter()
    session: Session | None = None
    try:
        session = build_session(recipe_from_mapping(recipe_of(options, model, case, sources)))
        row["learning_rate"] = session.recipe.train.learning_rate
        take_steps(options, session, row)
        validation = session.evaluate()
        assert validation is not None
        row |= {"end_loss": smoothed(row["losses"], options.window), "validation_loss": validation.loss}
        row |= {"validation_tokens": validation.tokens}
        if case in BESIDE:
            row["validation_loss_of_weights"] = loss_of_weights(session)
    except TunesmithError as error:
        row["error"] = str(error)
    finally:
        if session is not None:
            session.close()
    row["duration_s"] = round(time.perf_counter() - began, 2)
    say({name: value for name, value in row.items() if name != "losses"})
    del session
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return row


def loss_of_weights(session: Session) -> float:
    """The validation loss with the weights' own products in place of those in fp8: how such a model may be served."""
    set_compute(session.module, "weights")
    validation = session.evaluate()
    assert validation is not None
    return validation.loss


def take_steps(options: argparse.Namespace, session: Session, row: Row) -> None:
    """All steps, each loss read when the next step is queued, so that the device does not wait for the host."""
    pending: Pending[Any] | None = None
    for step in range(options.steps + 1):
        following = session.submit() if step < options.steps else None
        if pending is not None:
            row["losses"].append(pending.read().loss)
            if step % options.every == 0 or step == options.steps:
                loss = smoothed(row["losses"], options.window)
                say({"model": row["model"], "case": row["case"], "step": step, "loss": loss})
        pending = following


def smoothed(losses: list[float], window: int) -> float:
    """The mean of the last `window` losses."""
    return statistics.fmean(losses[-window:])


def verdict(options: argparse.Namespace, found: dict[str, Row], case: str) -> Row:
    """A case beside its twin, in bfloat16 with states in 32 bits: the relative differences at the end."""
    mine, theirs = found[case], found[BESIDE[case]]
    row: Row = {"model": mine["model"], "verdict": case, "beside": BESIDE[case], "tolerance": options.tolerance}
    if "error" in mine or "error" in theirs:
        return row | {"within": False, "words": f"{case}: not measured"}
    ends = {name: mine[name] / theirs[name] - 1 for name in ("end_loss", "validation_loss")}
    within = max(map(abs, ends.values())) <= options.tolerance
    told = ", ".join(f"{name.replace('_', ' ')} {100 * value:+.2f} %" for name, value in ends.items())
    words = f"{case} is {'' if within else 'not '}within {100 * options.tolerance:g} % of {BESIDE[case]}: {told}"
    return (
        row
        | {"end_loss": ends["end_loss"], "validation_loss": ends["validation_loss"]}
        | {
            "within": within,
            "words": words,
        }
    )


def plot(path: Path, model: str, rows: list[Row]) -> None:
    """The averaged losses over steps, a curve for each case; dashed in the colour of its twin."""
    shown = [row for row in rows if len(row["losses"]) > 1]
    if not shown:
        return
    colours = {name: SERIES[number] for number, name in enumerate(sorted({twin(row["case"]) for row in shown}))}
    with canvas(1016, 420) as (figure, axes):
        for row in shown:
            curve = [smoothed(row["losses"][: end + 1], 20) for end in range(len(row["losses"]))]
            style = "--" if row["case"] in BESIDE else "-"
            axes.plot(range(1, len(curve) + 1), curve, style, color=colours[twin(row["case"])], label=row["case"])
        axes.grid(axis="y")
        axes.set_xlabel("steps", loc="right")
        axes.set_title(f"training loss, {Path(model).name}", loc="left", fontsize=13, color=MUTED)
        axes.legend(frameon=False)
        ends = "; ".join(f"{row['case']} {row['losses'][0]:.3f} to {row['losses'][-1]:.3f}" for row in shown)
        svg = to_svg(figure, title=f"Training loss, {Path(model).name}", description=ends, key="quality-curves")
    path.write_text(standalone(svg), encoding="utf-8")


def twin(case: str) -> str:
    """The case in bfloat16 that a case stands beside."""
    return BESIDE.get(case, case)


def say(row: Row) -> Row:
    """Print one JSON line; returns it."""
    print(json.dumps(row), flush=True)
    return row


if __name__ == "__main__":
    sys.exit(main())
