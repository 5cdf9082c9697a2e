"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tunesmith.serve.schema.common import Body, Name


class LoadAdapterRequest(Body):
    """An adapter directory on the server, and the model name that stands for it in requests."""

    only: ClassVar = {"is_3d_lora_weight": (None, False)}
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]
    load_inplace: bool | None = Field(None, description="replace an adapter of that name")
    follow: bool | None = Field(None, description="of a run that is training: newer checkpoints take its place")


class UnloadAdapterRequest(Body):
    """The name of an adapter that is loaded."""

    only: ClassVar = {"lora_int_id": (None,)}
    lora_name: Name
