"""An answer's text as it is read: piece by piece, to its end or until it is closed."""

from __future__ import annotations

from collections.abc import Iterator

from tunesmith.engine.engine import Engine
from tunesmith.engine.prompts import checked
from tunesmith.engine.request import Completion


class TextStream(Iterator[str]):
    """Pieces of whole characters. `completion` is there once the answer has ended; `close` ends it early."""

    def __init__(self, engine: Engine, request_id: int) -> None:
        self.engine = engine
        self.request_id = request_id
        self.completion: Completion | None = None
        self._closed = False

    def __next__(self) -> str:
        while not self._closed:
            try:
                outputs = self.engine.collect([self.request_id])
            except BaseException:
                self.close()
                raise
            if outputs and outputs[-1].completion is not None:
                self.completion, self._closed = outputs[-1].completion, True
                checked([self.completion])
            if piece := "".join(output.piece for output in outputs):
                return piece
        raise StopIteration

    def close(self) -> None:
        """End the answer here. `completion` then holds what was said, with finish_reason "abort"."""
        if not self._closed:
            self._closed = True
            self.completion = self.engine.abort(self.request_id)

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()
