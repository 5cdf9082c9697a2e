"""The other end of `text.workers`: reads jobs from stdin and writes answers to stdout until stdin ends."""

from __future__ import annotations

import os
import pickle
import sys


def main() -> None:
    """Answer jobs with (True, value) or (False, exception)."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a library prints must not get between the answers
    try:
        function, shared = pickle.load(sys.stdin.buffer)
        while True:
            job = pickle.load(sys.stdin.buffer)
            try:
                answer = (True, function(*shared, *job))
            except Exception as error:
                answer = (False, error)
            pickle.dump(answer, answers, protocol=pickle.HIGHEST_PROTOCOL)
            answers.flush()
    except (EOFError, KeyboardInterrupt):
        pass


if __name__ == "__main__":
    main()
