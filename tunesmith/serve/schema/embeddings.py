"""POST /v1/embeddings."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from tunesmith.serve.schema.common import WHOLE, Body, Name, User
from tunesmith.serve.schema.completions import Prompts


class EmbeddingRequest(Body):
    """Texts, or lists of token ids, to be turned into vectors of length 1."""

    model: Name | None = None
    input: Prompts
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: Annotated[int, Field(ge=1, lt=2**31), WHOLE] | None = Field(
        None, description="only the model's own hidden size"
    )
    user: User | None = Field(None, description="shown in the server's request log")
    timeout: Annotated[float, Field(gt=0)] | None = None

    def inputs(self) -> list[str | list[int]]:
        """The inputs one by one."""
        if isinstance(self.input, str) or isinstance(self.input[0], int):
            return [self.input]
        return list(self.input)
