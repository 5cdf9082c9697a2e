"""One process of a launch: `python -m tunesmith.cli.rank LOGS ARGUMENTS...`, which `tunesmith launch` starts.

ARGUMENTS are a verb of tunesmith and what follows it, or a Python script and what follows it. The output goes to
LOGS/rank-N.log (rank 0's to the screen too), and how it ended to LOGS/rank-N.end.json.
"""

from __future__ import annotations

import faulthandler
import runpy
import sys
from pathlib import Path

from tunesmith.cli import console, main
from tunesmith.errors import ParallelError
from tunesmith.launch.causes import ending_path, write_ending
from tunesmith.launch.output import die_with_parent, send_to_log
from tunesmith.launch.plan import is_script
from tunesmith.parallel.told import ON_HANG


def run_rank(logs: Path, arguments: list[str]) -> int:
    """Run the verb or the script as one rank. Returns its exit code; nothing escapes."""
    die_with_parent()
    rank = console.launched_rank()
    send_to_log(logs, rank)
    faulthandler.enable()
    ON_HANG.append(lambda line: write_ending(ending_path(logs, rank), rank, 1, ParallelError(line)))
    seen: list[BaseException] = []
    sys.argv = ["tunesmith", *arguments]  # what a run directory of this process's own records
    try:
        code = run_script(arguments, seen) if is_script(arguments[0]) else main.run(arguments, seen.append)
    except SystemExit as stop:
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    if code != 0:
        write_ending(ending_path(logs, rank), rank, code, seen[-1] if seen else None)
    return code


def run_script(arguments: list[str], seen: list[BaseException]) -> int:
    """Run a script as `python SCRIPT ...` would. Returns its exit code; what it raised is added to `seen`."""
    sys.argv = arguments
    sys.path[0] = str(Path(arguments[0]).resolve().parent)
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    except SystemExit:
        raise
    except BaseException as error:
        import traceback

        traceback.print_exception(error)
        seen.append(error)
        return 130 if isinstance(error, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    code = run_rank(Path(sys.argv[1]), sys.argv[2:])
    sys.stdout.flush()
    sys.stderr.flush()
    sys.exit(code)
