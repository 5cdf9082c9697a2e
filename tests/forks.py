"""Runs code, each time in a fork of this process, which has imported torch and nothing else: see `torch_forks`.

For tests of what a fresh process imports or holds: torch's own import is most of such a process's time. A line of
standard input is JSON with code, arguments and variables of the environment; so is the answer, with the exit status,
what was printed and what went to standard error.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import traceback
from typing import Any

import torch


def _run_in_child(request: dict[str, Any], outputs: list[int]) -> None:
    """Never returns: the process ends with the code."""
    status = 1
    try:
        for descriptor, output in zip((1, 2), outputs, strict=True):
            os.dup2(output, descriptor)
        os.environ.update(request["environment"])
        sys.argv[:] = ["-c", *request["arguments"]]
        exec(compile(request["code"], "<fork>", "exec"), {"__name__": "__main__"})
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def main() -> None:
    """Answer until the input ends."""
    torch.set_num_threads(1)  # a fork has no threads but its own
    for line in sys.stdin:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = os.fork()
            if child == 0:
                _run_in_child(json.loads(line), [out.fileno(), err.fileno()])
            status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            texts = []
            for output in (out, err):
                output.seek(0)
                texts.append(output.read().decode(errors="replace"))
        print(json.dumps([status, *texts]), flush=True)


if __name__ == "__main__":
    main()
