"""One table out of stored records: Markdown for people, JSON for programs. It reads the records and nothing else."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tunesmith.bench.peers.store import OURS, SCHEMA, TABLE, VERSION, load_records
from tunesmith.bench.peers.verdict import pooled, summarise, uses_fp8
from tunesmith.rundir.io import write_json_atomic, write_text_atomic

_HEADER = (
    "who", "tokens/s (min to max of steps)", "ours is", "peak allocated / reserved", "first step",
    "loss, gradient norm: step 1", "step 10", "rounds", "verdict",
)  # fmt: skip
_NOTE = (
    "How steps were timed stands in each heading. Continuous, as training runs: the timed steps are queued while the "
    "device works, its events mark where each ends, and no program is asked for a loss before the step is over. From "
    "idle to idle: the device is waited for before and after every step. Batches are moved to the device inside the "
    "steps, on a GPU from page-locked memory, by all. Tokens a second are the median over all timed steps of all "
    "rounds. Peaks are of all steps, since memory that CUDA graphs recorded in the first is held after it; in decimal "
    "GB (on a CPU: resident pages). A row whose first loss or gradient norm is more than 1 % from ours did not do "
    "equal work, and a peer that is missing or failed proves nothing. "
    "Random weights sit at the loss ln(vocabulary): such rows show speed and memory, not quality."
)


def write_table(out: Path) -> dict[str, Any]:
    """Render the records below `out` into `peers.md` and `peers.json` there. Returns: what the JSON holds.

    Raises: RunDirError where there is no record.
    """
    groups = [{**described(record), "rows": summarise(record)} for record in pooled(load_records(out))]
    table = {"schema": f"{SCHEMA}.table", "schema_version": VERSION, "groups": groups}
    write_json_atomic(out / f"{TABLE}.json", table)
    write_text_atomic(out / f"{TABLE}.md", markdown(groups))
    return table


def described(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record without its rows: what it is of."""
    return {
        "key": dict(record["key"]),
        "what": describe(record["resolved"], record["lengths"]),
        "timing": record["key"]["timing"],
        "runs": record.get("runs", 1),
        "last_started": record["started"],
        "command": record["command"],
    }


def describe(recipe: Mapping[str, Any], lengths: Sequence[int]) -> str:
    """A row in words: model, method, micro-batch, dtypes, checkpointing."""
    method, train, model = recipe["method"], recipe["train"], recipe["model"]
    words = [f"{Path(model['path']).name}{' (random weights)' if model['weights'] == 'random' else ''}"]
    words.append(_method(method) + (", our base in fp8" if uses_fp8(method) else ""))
    words.append(_batch(lengths, train["accumulation"]))
    words.append(f"{train['precision']}, trained in {_trained(train)}")
    spared = train.get("checkpointing_skip_last") or 0
    words.append(f"checkpointing {train['checkpointing']}{f', our last {spared} blocks spared' if spared else ''}")
    return "; ".join(words)


def _method(method: Mapping[str, Any]) -> str:
    if method["kind"] not in ("lora", "qlora"):
        return str(method["kind"])
    targets = method["targets"]
    return f"{method['kind']} r{method['rank']} on {targets if isinstance(targets, str) else '/'.join(targets)}"


def _batch(lengths: Sequence[int], accumulation: int) -> str:
    times = f" x {accumulation} micro-batches" if accumulation > 1 else ""
    if len(set(lengths)) == 1:
        return f"{len(lengths)} x {lengths[0]} tokens{times}"
    return f"{len(lengths)} documents of {min(lengths)} to {max(lengths)} tokens{times}"


def _trained(train: Mapping[str, Any]) -> str:
    return str(train["precision"] if train["master_weights"] == "compute" else "float32")


def markdown(groups: Sequence[Mapping[str, Any]]) -> str:
    """The page: a section for each row and machine."""
    parts = ["# tunesmith beside its peers", "", _NOTE]
    for group in groups:
        parts += ["", *_section(group)]
    return "\n".join(parts) + "\n"


def _section(group: Mapping[str, Any]) -> list[str]:
    key = group["key"]
    machine = [f"{name} {key[name]}" for name in ("driver", "torch", "commit") if key[name]]
    lines = [
        f"## {key['row']} (timing: {group['timing']})",
        "",
        f"{group['what']}. {', '.join([key['chip'], *machine])}.",
        "",
    ]
    lines += [_line(_HEADER), _line(["---"] * len(_HEADER))]
    lines += [_line(_cells(row)) for row in group["rows"]]
    return lines


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "/").replace("\n", " ") for cell in cells) + " |"


def _cells(row: Mapping[str, Any]) -> list[str]:
    rate = row["tokens_per_s"]
    return [
        f"**{row['peer']}**" if row["peer"] == OURS else row["peer"],
        "-" if rate is None else f"{rate['median']:,.0f} ({rate['min']:,.0f} to {rate['max']:,.0f})",
        "-" if row["ours_is_times"] is None else f"{row['ours_is_times']:.2f}x",
        _peak(row),
        "-" if row["first_step_s"] is None else f"{row['first_step_s']:.2f} s",
        _loss(row["step_1"]),
        _loss(row["step_10"]),
        str(row["rounds"]),
        "; ".join(text for text in (row["verdict"], row["waits"]) if text),
    ]


def _peak(row: Mapping[str, Any]) -> str:
    allocated, reserved = row["all_steps_allocated_peak_bytes"], row["all_steps_reserved_peak_bytes"]
    if allocated is not None:
        return f"{allocated / 1e9:.2f} / {reserved / 1e9:.2f} GB"
    resident = row["resident_peak_bytes"]
    return "-" if resident is None else f"{resident / 1e9:.2f} GB resident"


def _loss(step: Mapping[str, Any] | None) -> str:
    if step is None or step["loss"] is None or step["grad_norm"] is None:
        return "-"
    return f"{step['loss']:.4f}, {step['grad_norm']:.4g}"
