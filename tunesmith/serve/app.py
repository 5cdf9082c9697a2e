"""The ASGI application: routes, gates before them, and every error in OpenAI's shape."""

from __future__ import annotations

import logging

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tunesmith import __version__
from tunesmith.errors import TunesmithError
from tunesmith.serve import openapi
from tunesmith.serve.auth import Auth, is_loopback
from tunesmith.serve.chat import chat_completions
from tunesmith.serve.completions import completions
from tunesmith.serve.embeddings import embeddings
from tunesmith.serve.errors import ApiError, JsonResponse, engine_down
from tunesmith.serve.limits import Guard
from tunesmith.serve.metrics import CONTENT_TYPE
from tunesmith.serve.models import list_models, load_adapter, one_model, unload_adapter
from tunesmith.serve.responses import responses
from tunesmith.serve.schema import answers
from tunesmith.serve.schema.adapters import LoadAdapterRequest, UnloadAdapterRequest
from tunesmith.serve.schema.chat import ChatRequest
from tunesmith.serve.schema.completions import CompletionRequest
from tunesmith.serve.schema.embeddings import EmbeddingRequest
from tunesmith.serve.schema.responses import ResponsesRequest
from tunesmith.serve.schema.tokens import DetokenizeRequest, TokenizeRequest
from tunesmith.serve.state import Server
from tunesmith.serve.stream import DIRECT_SEND, ClientGoneError
from tunesmith.serve.tokens import detokenize, tokenize
from tunesmith.serve.validation import validation_error

log = logging.getLogger(__name__)
# Routes that take places in the queue: a full one answers before the request is read.
QUEUED = frozenset({"/v1/chat/completions", "/v1/completions", "/v1/responses", "/v1/embeddings"})
_CLIENT_GONE = 499


def build_app(server: Server) -> ASGIApp:
    """The application around a server's state."""
    app = FastAPI(
        title="tunesmith", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False,
        middleware=_middleware(server),
    )  # fmt: skip
    _generation_routes(app, server)
    _token_routes(app, server)
    _model_routes(app, server)
    _state_routes(app, server)
    _handle_errors(app)
    openapi.install(app, has_keys=bool(server.options.api_keys))
    return Counted(app, server)


def _middleware(server: Server) -> list[Middleware]:
    options = server.options

    def precheck(scope: Scope) -> None:
        if scope["path"] in QUEUED and scope["method"] == "POST":
            server.admission.check(scope["state"]["key"])

    cors = Middleware(
        CORSMiddleware, allow_origins=list(options.cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
    )
    is_local = options.uds is None and is_loopback(options.host)
    gates = [
        Middleware(Auth, keys=options.api_keys, origins=options.cors_origins if is_local else None),
        Middleware(
            Guard, max_body_bytes=options.max_body_bytes, max_header_bytes=options.max_header_bytes,
            max_depth=options.max_json_depth, precheck=precheck,
        ),
    ]  # fmt: skip
    return [cors, *gates] if options.cors_origins else gates


def _generation_routes(app: FastAPI, server: Server) -> None:
    @app.post("/v1/chat/completions", **openapi.route(answers.ChatAnswer, streams=True))
    async def chat(request: Request, body: ChatRequest) -> Response:
        """The assistant's turn in a conversation."""
        return await chat_completions(server, request, body)

    @app.post("/v1/completions", **openapi.route(answers.CompletionAnswer, streams=True))
    async def complete(request: Request, body: CompletionRequest) -> Response:
        """Texts or token ids, continued."""
        return await completions(server, request, body)

    @app.post("/v1/responses", **openapi.route(answers.ResponsesAnswer, streams=True))
    async def respond(request: Request, body: ResponsesRequest) -> Response:
        """Text in, text out; nothing is stored."""
        return await responses(server, request, body)

    @app.post("/v1/embeddings", **openapi.route(answers.EmbeddingAnswer))
    async def embed(request: Request, body: EmbeddingRequest) -> Response:
        """Vectors of length 1, pooled from the last hidden states."""
        return await embeddings(server, request, body)


def _token_routes(app: FastAPI, server: Server) -> None:
    @app.post("/tokenize", **openapi.route(answers.TokenizeAnswer))
    async def to_tokens(body: TokenizeRequest) -> Response:
        """The token ids that the model reads for a text or a conversation."""
        return await tokenize(server, body)

    @app.post("/detokenize", **openapi.route(answers.DetokenizeAnswer))
    async def to_text(body: DetokenizeRequest) -> Response:
        """The text of token ids."""
        return await detokenize(server, body)


def _model_routes(app: FastAPI, server: Server) -> None:
    @app.get("/v1/models", **openapi.route(answers.ModelsAnswer))
    async def models() -> Response:
        """The model by all its names, and the adapters that are loaded."""
        return await list_models(server)

    @app.get("/v1/models/{name:path}", **openapi.route(answers.ModelAnswer))
    async def model(name: str) -> Response:
        """One model."""
        return await one_model(server, name)

    @app.post("/v1/load_lora_adapter", **openapi.route(answers.AdapterAnswer))
    async def load(request: Request, body: LoadAdapterRequest) -> Response:
        """Load a LoRA adapter that lies on the server (only with --allow-adapter-loading)."""
        return await load_adapter(server, request, body)

    @app.post("/v1/unload_lora_adapter", **openapi.route(answers.AdapterAnswer))
    async def unload(body: UnloadAdapterRequest) -> Response:
        """Drop a LoRA adapter (only with --allow-adapter-loading)."""
        return await unload_adapter(server, body)


def _state_routes(app: FastAPI, server: Server) -> None:
    @app.get("/health", **openapi.route(answers.HealthAnswer, is_open=True))
    async def health() -> Response:
        """200 only while the engine makes progress."""
        if server.is_draining:
            raise engine_down("the server is shutting down")
        if server.engine.is_healthy:
            return JsonResponse({"status": "ok"})
        server.engine.check_up()
        raise engine_down(f"the engine has got nowhere for {server.engine.pulse.silent_s():.1f} s")

    @app.get("/ready", **openapi.route(answers.HealthAnswer, is_open=True))
    async def ready() -> Response:
        """200 while requests are taken, to the model and to every adapter that was named at the start."""
        server.check_ready()
        return JsonResponse({"status": "ok"})

    @app.get("/metrics", **openapi.route(None, text=True))
    async def metrics() -> Response:
        """Numbers for Prometheus."""
        return Response(server.metrics.render(), headers={"content-type": CONTENT_TYPE})

    @app.get("/version", **openapi.route(answers.VersionAnswer))
    async def version() -> Response:
        """The version of tunesmith."""
        return JsonResponse({"version": __version__})

    if server.options.debug:

        @app.get("/debug/stats", **openapi.route(None))
        async def stats() -> Response:
            """The engine's numbers as they are now, and the queue's."""
            return JsonResponse(
                {
                    "engine": await server.engine.ask_stats(),
                    "facts": server.engine.facts,
                    "places_taken": server.admission.num_taken,
                    "places": server.admission.max_places,
                    "rejected": server.admission.num_rejected,
                    "restarts": server.engine.num_restarts,
                }
            )


def _handle_errors(app: FastAPI) -> None:
    @app.exception_handler(ApiError)
    async def api(request: Request, error: ApiError) -> Response:
        return error.response()

    @app.exception_handler(TunesmithError)
    async def own(request: Request, error: TunesmithError) -> Response:
        if isinstance(error, ValueError):
            return ApiError(400, str(error)).response()
        log.error("%s failed", request.url.path, exc_info=error)
        return ApiError(500, str(error)).response()

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return validation_error(error.errors()).response()

    @app.exception_handler(HTTPException)
    async def http(request: Request, error: HTTPException) -> Response:
        return ApiError(error.status_code, _http_message(request, error), headers=error.headers).response()

    @app.exception_handler(ClientGoneError)
    async def gone(request: Request, error: ClientGoneError) -> Response:
        return ApiError(_CLIENT_GONE, "the client closed the connection").response()

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        return ApiError(500, f"internal error: {type(error).__name__}; the server's log says more").response()


def _http_message(request: Request, error: HTTPException) -> str:
    if error.status_code == 404 and request.url.path == "/":
        return "nothing is here: the routes begin with /v1 (/v1/models names the model), and /openapi.json has all"
    if error.status_code == 404:
        return f"there is no route {request.url.path[:200]}; /openapi.json has all"
    if error.status_code == 405:
        return f"{request.url.path} doesn't take {request.method}"
    return str(error.detail)


class Counted:
    """Outermost: counts answers by status, and logs requests where that was asked for."""

    def __init__(self, app: FastAPI, server: Server) -> None:
        self.app = app
        self.server = server

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass on."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                self.server.metrics.responded(message["status"])
                if self.server.options.access_log:
                    said = scope["state"].get("said", "")
                    log.info("%s %r %d %s", scope["method"], scope["path"], message["status"], said)
            await send(message)

        # Streams send their tens of thousands of pieces a second past the layers, which only look at beginnings.
        scope.setdefault("state", {})[DIRECT_SEND] = send
        await self.app(scope, receive, counted)
