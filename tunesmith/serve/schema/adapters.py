"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter, as vLLM has them."""

from __future__ import annotations

from typing import Annotated, ClassVar

from pydantic import Field

from tunesmith.serve.schema.common import Body, Name


class LoadAdapterRequest(Body):
    """An adapter directory on the server, and the model name that stands for it in requests."""

    only: ClassVar = {"load_inplace": (None, False), "is_3d_lora_weight": (None, False)}
    lora_name: Name
    lora_path: Annotated[str, Field(min_length=1, max_length=4096)]


class UnloadAdapterRequest(Body):
    """The name of an adapter that is loaded."""

    only: ClassVar = {"lora_int_id": (None,)}
    lora_name: Name
