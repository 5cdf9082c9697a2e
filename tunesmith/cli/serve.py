"""`tunesmith serve`: an OpenAI-compatible server for a model, or for what came out of a training run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Annotated, Any

import typer

from tunesmith.cli.console import emit, err, is_debug
from tunesmith.cli.served_adapters import check_modules
from tunesmith.cli.unfinished import use_checkpoint
from tunesmith.errors import RequestError, nearest
from tunesmith.rundir.layout import is_run
from tunesmith.serve.auth import check_address, read_keys
from tunesmith.serve.options import EngineOptions, ServerOptions
from tunesmith.units import format_seconds

app = typer.Typer(add_completion=False)
_SHOWN_KEY = "$TUNESMITH_API_KEY"


@app.command()
def serve(
    model: Annotated[str, typer.Argument(help="a model directory, builtin:tiny, a Hub id, or a run directory")],
    adapter: Annotated[Path | None, typer.Option(help="an adapter directory, put on top of the model")] = None,
    host: Annotated[
        str, typer.Option(help="the address to listen on; others than loopback want API keys")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="the port; 0: any that is free", min=0, max=65535)] = 8000,
    uds: Annotated[Path | None, typer.Option(help="listen on this Unix socket instead")] = None,
    served_model_name: Annotated[
        list[str] | None,
        typer.Option(help="what the model is called in requests (repeat for several names); a run: its folder's name"),
    ] = None,
    dtype: Annotated[str, typer.Option(help="auto, float32, bfloat16, float16")] = "auto",
    quantization: Annotated[
        str | None,
        typer.Option(
            "--quantization",
            "--quantize",
            help="hold the weights in int8, w8a8, int4 (-g128, -g64, -g32; -sym), nf4, nf4-double, fp8; else as stored",
        ),
    ] = None,
    head: Annotated[
        str, typer.Option(help="the output head: auto, stored, int8, or copy (both, int8 where few answer)")
    ] = "auto",
    kv_cache_dtype: Annotated[str, typer.Option(help="auto, fp8")] = "auto",
    max_model_len: Annotated[int | None, typer.Option(help="context in tokens, prompt and answer together")] = None,
    max_num_seqs: Annotated[int | None, typer.Option(help="answers that are made at the same time")] = None,
    max_num_batched_tokens: Annotated[int | None, typer.Option(help="tokens of one step of the engine")] = None,
    gpu_memory_utilization: Annotated[float, typer.Option(help="share of the GPU's memory, 0 to 1")] = 0.9,
    tensor_parallel_size: Annotated[int, typer.Option(help="GPUs that share the model", min=1)] = 1,
    enforce_eager: Annotated[bool, typer.Option("--enforce-eager", help="no CUDA graphs")] = False,
    attention_backend: Annotated[
        str, typer.Option(help="on a GPU: auto (what was measured fastest), triton (ours), flash-attn-3, flashinfer")
    ] = "auto",
    enable_prefix_caching: Annotated[bool, typer.Option(help="compute equal beginnings of prompts once")] = True,
    batch_invariant: Annotated[
        bool, typer.Option("--batch-invariant", help="greedy answers don't depend on what else is served")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:N")] = "auto",
    backend: Annotated[str, typer.Option(help="auto, native, transformers")] = "auto",
    revision: Annotated[str | None, typer.Option(help="of a Hub model")] = None,
    api_key: Annotated[
        list[str] | None, typer.Option(help="a key that clients must send (seen by all users of this machine in `ps`)")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="a file of such keys, one a line (or set TUNESMITH_API_KEYS)")
    ] = None,
    allow_unauthenticated: Annotated[
        bool, typer.Option("--allow-unauthenticated", help="no keys, though other machines may reach the server")
    ] = False,
    max_waiting: Annotated[
        int, typer.Option(help="answers that may wait for a place before others get 429", min=0)
    ] = 1024,
    key_share: Annotated[float, typer.Option(help="of all places, the share that one of several keys may take")] = 0.5,
    request_timeout: Annotated[float, typer.Option(help="seconds that a request may take")] = 600.0,
    shutdown_timeout: Annotated[float, typer.Option(help="seconds that running requests have after SIGTERM")] = 30.0,
    engine_timeout: Annotated[
        float, typer.Option(help="seconds without progress after which the engine is started anew")
    ] = 300.0,
    max_body_mb: Annotated[int, typer.Option(help="longest request in MiB", min=1, max=1024)] = 16,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="a web page's origin that may call the server (repeat for several)")
    ] = None,
    chat_template: Annotated[Path | None, typer.Option(help="a Jinja file instead of the model's own template")] = None,
    tool_call_parser: Annotated[
        str, typer.Option(help="how the model writes tool calls: auto, none, hermes, llama3, mistral, ...")
    ] = "auto",
    reasoning_parser: Annotated[
        str, typer.Option(help="give thoughts as reasoning_content: none, auto, think")
    ] = "none",
    served_check: Annotated[
        str, typer.Option(help="of a run: refuse what is not what was trained, report it, or off")
    ] = "refuse",
    generation_config: Annotated[
        str, typer.Option(help="defaults of sampling: auto (the model's generation_config.json), none (OpenAI's)")
    ] = "auto",
    pooling: Annotated[str, typer.Option(help="embeddings: mean of all tokens, or the last one's")] = "mean",
    metrics_prefix: Annotated[
        str, typer.Option(help="of Prometheus names: tunesmith, or vllm for its dashboards")
    ] = "tunesmith",
    allow_adapter_loading: Annotated[
        bool, typer.Option("--allow-adapter-loading", help="clients may load and unload LoRA adapters")
    ] = False,
    enable_lora: Annotated[
        bool, typer.Option("--enable-lora", help="make places for LoRA adapters, which requests name as their model")
    ] = False,
    max_loras: Annotated[int, typer.Option(help="adapters at the same time", min=1)] = 8,
    max_lora_rank: Annotated[int, typer.Option(help="the highest rank of any adapter", min=1)] = 16,
    lora_modules: Annotated[
        list[str] | None, typer.Option(help="NAME=DIRECTORY of an adapter to load at start (repeat for several)")
    ] = None,
    follow_lora: Annotated[
        list[str] | None,
        typer.Option(
            help="NAME=RUN: the adapter that a run trains; its newest checkpoint answers (repeat for several)"
        ),
    ] = None,
    speculative_config: Annotated[
        str | None, typer.Option(help='guess tokens, as JSON: {"method": "ngram", "num_tokens": 4}')
    ] = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="log every request")] = False,
) -> None:
    """Serve a model with OpenAI's interface: chat, completions, responses, embeddings, tokens, metrics.

    Ctrl-C or SIGTERM ends it when the requests under way are answered; a second one ends it at once.
    """
    keys = read_keys(api_key or [], api_key_file)
    check_address(host, None if uds is None else str(uds), keys, allow_unauthenticated)
    _check_choices(head, kv_cache_dtype, attention_backend, pooling, metrics_prefix, generation_config, served_check)
    _check_shares(key_share, request_timeout, shutdown_timeout, engine_timeout)
    names = tuple(served_model_name or default_names(model))
    loaded, followed = check_modules(lora_modules or [], follow_lora or [], names)
    use_checkpoint(model, adapter)
    engine = EngineOptions(
        model=model,
        adapter=None if adapter is None else str(adapter),
        revision=revision,
        dtype={"half": "float16", "float": "float32"}.get(dtype, dtype),
        quantization=quantization,
        head=head,
        kv_cache_dtype=kv_cache_dtype,
        device=device,
        backend=backend,
        max_model_len=max_model_len,
        max_num_seqs=max_num_seqs,
        max_num_batched_tokens=max_num_batched_tokens,
        gpu_memory_utilization=gpu_memory_utilization,
        enforce_eager=enforce_eager,
        attention_backend=attention_backend,
        enable_prefix_caching=enable_prefix_caching,
        tensor_parallel_size=tensor_parallel_size,
        batch_invariant=batch_invariant,
        debug=is_debug(),
        more={
            **_lora(enable_lora or bool(loaded or followed) or allow_adapter_loading, max_loras, max_lora_rank),
            **_speculation(speculative_config),
        },
        served_check=served_check,
        chat_template=None if chat_template is None else str(chat_template),
    )
    options = ServerOptions(
        names=names,
        host=host,
        port=port,
        uds=None if uds is None else str(uds),
        api_keys=keys,
        max_waiting=max_waiting,
        key_share_ratio=key_share,
        max_timeout_s=request_timeout,
        grace_s=shutdown_timeout,
        hang_s=engine_timeout,
        max_body_bytes=max_body_mb * 2**20,
        cors_origins=tuple(cors_origin or ()),
        pooling=pooling,
        metrics_prefix=metrics_prefix,
        allow_adapter_loading=allow_adapter_loading,
        adapters=loaded,
        followed=followed,
        chat_template=None if chat_template is None else str(chat_template),
        generation_config=generation_config,
        tool_call_parser=tool_call_parser,
        reasoning_parser=reasoning_parser,
        debug=is_debug(),
        access_log=access_log,
    )
    run(options, engine)


def default_names(model: str) -> list[str]:
    """What a model is called: as it was typed; a run by the name of its folder first."""
    path = Path(model).expanduser()
    run = next((p for p in (path, path.resolve().parent) if path.is_dir() and is_run(p)), None)
    return list(dict.fromkeys([run.resolve().name, model])) if run is not None else [model]


def _lora(is_enabled: bool, max_loras: int, max_lora_rank: int) -> dict[str, Any]:
    if not is_enabled:
        return {}
    return {"enable_lora": True, "max_loras": max_loras, "max_lora_rank": max_lora_rank}


def _speculation(text: str | None) -> dict[str, Any]:
    if text is None:
        return {}
    try:
        wanted = json.loads(text)
    except ValueError as error:
        raise RequestError(f"--speculative-config must be JSON: {error}") from None
    if not isinstance(wanted, dict):
        raise RequestError(f"--speculative-config must be a JSON object, got {text[:60]}")
    return {"speculative": wanted}


def run(options: ServerOptions, engine: EngineOptions) -> None:
    """Serve, and say so."""
    from tunesmith.serve.run import run_server

    err.print(f"loading {engine.model} ...", markup=False)
    stopped = run_server(options, engine, lambda news: _announce(options, news))
    waited = ": the requests under way were answered" if stopped.has_waited else ""
    err.print(f"stopped{': requests under way were cut off' if stopped.has_cut else waited}")
    emit({"stopped_by": stopped.signal, "has_cut": stopped.has_cut})


def _announce(options: ServerOptions, news: dict[str, Any]) -> None:
    """What is served where, and a line to try it with."""
    facts = news["facts"]
    url, curl = _address(options, news["address"])
    err.print(
        f"ready after {format_seconds(news['start_s'])}: {url}  (model {options.names[0]}, {facts['weights']} of "
        f"{facts['dtype']}{'' if facts['quantization'] is None else ' as ' + facts['quantization']} on "
        f"{facts['device']}, context {facts['max_model_len']}, {facts['max_num_seqs']} answers at a time, "
        f"{'API keys are asked for' if options.api_keys else 'no API keys'})",
        markup=False,
    )
    if "served" in facts:
        err.print(facts["served"], markup=False)
    if facts["has_own_adapter"] and facts["device"] == "cpu":
        # Small models most: 6.7 ms a token instead of 1.3 with builtin:tiny on two cores.
        err.print(
            "Its adapter is beside the base's weights, which makes answers on a CPU slower: faster is what "
            "tunesmith merge makes of it.",
            markup=False,
        )
    if not facts["is_native"]:
        err.print("This model runs by transformers' own code: slower, and one request after the other.", style="yellow")
    body = f'{{"model": "{options.names[0]}", "messages": [{{"role": "user", "content": "Hello!"}}]}}'
    route = "v1/chat/completions"
    if not facts["has_chat_template"]:
        body, route = f'{{"model": "{options.names[0]}", "prompt": "Once upon a time"}}', "v1/completions"
    key = f' -H "Authorization: Bearer {_SHOWN_KEY}"' if options.api_keys else ""
    err.print(f"try it: {curl}/{route} -H 'Content-Type: application/json'{key} -d {shlex.quote(body)}", markup=False)
    emit({"url": url, "model": options.names[0], "start_s": news["start_s"], **facts})


def _address(options: ServerOptions, address: Any) -> tuple[str, str]:
    """The URL for people, and the beginning of a curl command."""
    if options.uds is not None:
        return f"unix:{options.uds}", f"curl --unix-socket {shlex.quote(options.uds)} http://localhost"
    host, port = address[0], address[1]
    host = "127.0.0.1" if host in ("0.0.0.0", "::") else host
    url = f"http://{f'[{host}]' if ':' in host else host}:{port}"
    return f"{url}/v1", f"curl {url}"


def _check_choices(
    head: str,
    kv_cache_dtype: str,
    attention_backend: str,
    pooling: str,
    metrics_prefix: str,
    generation_config: str,
    served_check: str,
) -> None:
    choices = {
        "--head": (head, ("auto", "stored", "int8", "copy")),
        "--kv-cache-dtype": (kv_cache_dtype, ("auto", "fp8")),
        "--attention-backend": (attention_backend, ("auto", "triton", "flash-attn-3", "flashinfer")),
        "--pooling": (pooling, ("mean", "last")),
        "--metrics-prefix": (metrics_prefix, ("tunesmith", "vllm")),
        "--generation-config": (generation_config, ("auto", "none")),
        "--served-check": (served_check, ("refuse", "report", "off")),
    }
    for option, (value, allowed) in choices.items():
        if value not in allowed:
            raise RequestError(f"{option} must be {' or '.join(allowed)}, got {value!r}{nearest(value, allowed)}")


def _check_shares(key_share: float, request_timeout: float, shutdown_timeout: float, engine_timeout: float) -> None:
    if not 0 < key_share <= 1:
        raise RequestError(f"--key-share must be above 0 and at most 1, got {key_share}")
    if not request_timeout > 0:
        raise RequestError(f"--request-timeout must be seconds above 0, got {request_timeout}")
    if shutdown_timeout < 0:
        raise RequestError(f"--shutdown-timeout must be 0 seconds or more, got {shutdown_timeout}")
    if engine_timeout < 5:
        raise RequestError(f"--engine-timeout must be at least 5 seconds, got {engine_timeout}")
