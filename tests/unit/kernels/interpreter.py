"""Runs scripts under Triton's CPU interpreter, each in a fork of this process, which has everything imported.

Started with TRITON_INTERPRET=1 (the interpreter is chosen when Triton is imported). A line of standard input is the
path of a script; the answer is a line of JSON with its exit status and the end of what it printed.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import tempfile
import traceback
from types import SimpleNamespace
from typing import IO

import torch
import triton.language as tl
from triton.runtime import interpreter

from tunesmith.kernels.column_dot_triton import column_dot_operator

SHOWN = 3000


def patch_once() -> None:
    """Triton's language is interpreted from here on. Triton patches it anew for each call, milliseconds every time."""
    interpreter._patch_lang(SimpleNamespace(__globals__={"tl": tl, "core": tl.core}))
    interpreter._patch_lang = lambda _: SimpleNamespace(restore=lambda: None)


def warm_up() -> None:
    """Imports what the first call of an operator and the first check of one import."""
    patch_once()
    torch.set_num_threads(1)  # a fork has no threads but its own
    x = torch.ones(1, 1)
    torch.library.opcheck(column_dot_operator, (x, x), test_utils=("test_schema", "test_faketensor"))


def run_in_child(script: str, output: IO[bytes]) -> None:
    """Never returns: the process ends with the script."""
    status = 1
    try:
        os.dup2(output.fileno(), 1)
        os.dup2(output.fileno(), 2)
        runpy.run_path(script, run_name="__main__")
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Answer until the input ends."""
    warm_up()
    for line in sys.stdin:
        with tempfile.TemporaryFile() as output:
            child = os.fork()
            if child == 0:
                run_in_child(line.rstrip("\n"), output)
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            output.seek(0)
            shown = output.read().decode(errors="replace")[-SHOWN:]
        print(json.dumps([status, shown]), flush=True)


if __name__ == "__main__":
    main()
