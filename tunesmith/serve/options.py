"""What a server is told: the engine's options, and the HTTP side's."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from tunesmith.engine.asked import Asked


@dataclass(frozen=True)
class EngineOptions:
    """What the engine process loads, and how. The names are vLLM's.

    served_check: of a run's outcome: "refuse" what is not what was trained, "report" it, or "off".
    chat_template: the server's own (it renders; here it is only compared with the run's).
    """

    model: str
    adapter: str | None = None
    revision: str | None = None
    dtype: str = "auto"
    quantization: str | None = None
    head: str = "auto"
    kv_cache_dtype: str = "auto"
    device: str = "auto"
    backend: str = "auto"
    max_model_len: int | None = None
    max_num_seqs: int | None = None
    max_num_batched_tokens: int | None = None
    gpu_memory_utilization: float = 0.9
    enforce_eager: bool = False
    attention_backend: str = "auto"
    enable_prefix_caching: bool = True
    tensor_parallel_size: int = 1
    batch_invariant: bool = False
    debug: bool = False
    served_check: str = "refuse"
    chat_template: str | None = None
    more: dict[str, Any] = field(default_factory=dict)

    def kernels(self) -> Asked:
        """What decides which kernels the engine launches."""
        return Asked.of({**vars(self), "quantize": self.quantization, **self.more})


@dataclass(frozen=True)
class ServerOptions:
    """The HTTP side.

    names: what the model is called in requests; the first is what answers say.
    api_keys: any of them opens every route but health; none: open to all who reach the address.
    max_waiting: requests that may wait beyond those that run, before 429.
    key_share_ratio: of all places, how many one key may hold; 1 where there is one key or none.
    adapters: names and directories of LoRA adapters that are loaded at start; followed: of runs, whose newest
        checkpoints are.
    max_timeout_s: seconds a request may take at most.
    grace_s: seconds that running requests have after SIGTERM.
    stall_s: seconds without a sign of the engine's loop after which /health says no; hang_s: after which it is killed.
    """

    names: tuple[str, ...]
    host: str = "127.0.0.1"
    port: int = 8000
    uds: str | None = None
    api_keys: tuple[str, ...] = ()
    max_waiting: int = 1024
    key_share_ratio: float = 0.5
    max_timeout_s: float = 600.0
    grace_s: float = 30.0
    stall_s: float = 30.0
    hang_s: float = 300.0
    max_body_bytes: int = 32 * 2**20
    max_header_bytes: int = 32 * 2**10
    max_json_depth: int = 64
    max_choices: int = 256
    cors_origins: tuple[str, ...] = ()
    pooling: str = "mean"
    metrics_prefix: str = "tunesmith"
    allow_adapter_loading: bool = False
    adapters: tuple[tuple[str, str], ...] = ()
    followed: tuple[tuple[str, str], ...] = ()
    chat_template: str | None = None
    generation_config: str = "auto"
    tool_call_parser: str = "auto"
    reasoning_parser: str = "none"
    debug: bool = False
    access_log: bool = False
