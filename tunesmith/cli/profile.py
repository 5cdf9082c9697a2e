"""`tunesmith profile RECIPE`: operators by device time, the trace, memory over time."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from tunesmith.cli import console

app = typer.Typer(add_completion=False)
SHOWN = 16
"""Lines of each table, its head among them."""

FILES = {
    "operators.txt": "what is above, longer; operators.json is all of it",
    "trace.json.gz": "every operator in time: open it in https://ui.perfetto.dev (it stays on this machine) or in "
    "Chrome at chrome://tracing",
    "memory.svg": "allocated bytes over one step: open it in a browser; memory.json is its numbers",
}


def files_text(folder: Path) -> str:
    """What the profile's files are and how to open them, a line each."""
    lines = [f"  {name:<14} {what}" for name, what in FILES.items() if (folder / name).is_file()]
    return "\n".join(["", "Written:", *lines, "all in the folder:"])


@app.command()
def profile(
    recipe: Annotated[Path, typer.Argument(help="the recipe to profile")],
    overrides: Annotated[list[str] | None, typer.Option("--set", help="KEY=VALUE over the recipe")] = None,
    steps: Annotated[int, typer.Option(help="steps to profile")] = 3,
    warmup: Annotated[int, typer.Option(help="steps before them")] = 2,
    nvtx: Annotated[bool, typer.Option(help="NVTX ranges for Nsight Systems (CUDA only)")] = False,
    output: Annotated[Path | None, typer.Option(help="the run directory (new or empty)")] = None,
) -> None:
    """Profile a few training steps: operators and kernels, a trace for Perfetto, and a memory timeline."""
    from tunesmith.bench.profile import profile as run_profile
    from tunesmith.recipe.load import load_recipe
    from tunesmith.report.load import Node
    from tunesmith.report.strings import words_for
    from tunesmith.report.timeline import timeline_svg
    from tunesmith.rundir.io import read_json, write_text_atomic

    loaded = load_recipe(recipe, overrides or [])
    result = run_profile(loaded, steps=steps, warmup_steps=warmup, nvtx=nvtx, run_dir=output)
    folder = result.run_dir / "profile"
    svg = timeline_svg(Node(read_json(folder / "memory.json")), words_for("en"))
    if svg is not None:
        write_text_atomic(folder / "memory.svg", svg)
    tables = (folder / "operators.txt").read_text(encoding="utf-8").split("\n\n")
    console.err.print("\n\n".join("\n".join(table.splitlines()[:SHOWN]) for table in tables), markup=False)
    console.err.print(files_text(folder), markup=False)
    console.out.print(str(folder), markup=False)
    console.emit({"run_dir": result.run_dir, "profile": folder, "operators": list(result.operators[:10])})
