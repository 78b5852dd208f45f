"""The service: `python launch.py --run-dir runs/nano --serve`. API, WebSocket and page in one process.

The port is open at once; until the engine's thread has loaded the model and compiled what a first request needs,
/health says 503 "loading".
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import Any

import orjson
import uvicorn
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from jaxchat.config import Config
from jaxchat.engine import Engine
from jaxchat.engine.loading import trained_stages
from jaxchat.errors import UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir

from . import api as chat_api
from . import api as completions_api
from . import api as info_api
from . import errors, websocket
from .api import Service
from .errors import ApiError
from .limits import BodyLimit, Keys
from .schemas import ChatChunk
from .texts import wait_page
from .worker import Worker

# One JSON object a line on standard error: what happened, never what was said (unless `serve.log_text`).


log = logging.getLogger("jaxchat.serve")
LEVELS = {"WARNING": "warn"}


def told(record: logging.LogRecord) -> bool:
    """Not what an open page leaves at the end: its connection is cut, and uvicorn shows where, at length."""
    raised = record.exc_info and record.exc_info[0]
    cut = "timeout graceful shutdown exceeded" in record.getMessage()
    return not cut and not (raised and issubclass(raised, asyncio.CancelledError))


class JsonLines(logging.Formatter):
    """time, level and event, then the record's own fields; a traceback under "traceback"."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC)
        line: dict[str, Any] = {
            "time": when.isoformat(timespec="milliseconds"),
            "level": LEVELS.get(record.levelname, record.levelname.lower()),
            "event": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        try:
            return orjson.dumps(line, default=str).decode()
        except orjson.JSONEncodeError:  # a lone surrogate in somebody's text
            return json.dumps(line, default=str)


def to_standard_error() -> None:
    """Our own records from INFO on, and uvicorn's from WARNING on."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(told)
    for name, level in (("jaxchat.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


class RequestLog:
    """A line for each request of the API: who, what, how it ended, how long it took; the page's own traffic has none.

    Routes add fields to `request.state.log`. Counts the requests under way in `service.answering`.
    """

    def __init__(self, app: ASGIApp, service: Service, paths: Sequence[str]):
        self._app, self._service, self._paths = app, service, tuple(paths)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not scope["path"].startswith(self._paths):
            await self._app(scope, receive, send)
            return
        fields: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": 500}
        scope.setdefault("state", {})["log"] = fields
        begun = time.perf_counter()

        async def noted(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
            await send(message)

        answering = scope["method"] == "POST"
        self._service.answering += answering
        try:
            await self._app(scope, receive, noted)
        finally:
            self._service.answering -= answering
            failed = fields["status"] >= 400 and scope["path"] != "/health"
            if failed:
                self._service.metrics.error(fields["status"])
            if answering or failed:
                log.info("request", extra={"fields": fields | {"seconds": round(time.perf_counter() - begun, 4)}})


# HTTP/1.1 as uvicorn speaks it, with an end to a client's patience test: heads have a size, requests a time.


HEAD_BYTES = 64 << 10  # of request line and headers
REQUEST_SECONDS = 60.0  # from a connection's start, or a request's first byte, to the end of its body


class PatientProtocol(HttpToolsProtocol):
    """Closes connections that send a head without end (431) or never finish a request (408)."""

    def connection_made(self, transport: Any) -> None:
        self._head: int | None = 0  # bytes of the head so far; None behind it
        self._timer: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        self._wait()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if self._head is not None:
            self._head += len(data)
            if self._head > HEAD_BYTES:
                self._refuse("431 Request Header Fields Too Large")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head = 0
        self._wait()

    def on_headers_complete(self) -> None:
        self._head = None
        super().on_headers_complete()

    def on_message_complete(self) -> None:
        self._done()
        super().on_message_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        self._done()
        super().connection_lost(exc)

    def _wait(self) -> None:
        self._done()
        self._timer = self.loop.call_later(REQUEST_SECONDS, self._refuse, "408 Request Timeout")

    def _done(self) -> None:
        if self._timer:
            self._timer.cancel()
            self._timer = None

    def _refuse(self, status: str) -> None:
        if self.transport.is_closing() or self.transport.get_protocol() is not self:  # gone, or a WebSocket by now
            return
        if self._head:  # no answer of ours is under way
            self.transport.write(f"HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n".encode())
        self.transport.close()


CLOSE_SECONDS = 1  # for connections to end after the answers have; an open page keeps one for good
KEEP_ALIVE = 65  # seconds; longer than the minute after which clients and proxies drop an idle connection
API = ("/v1/", "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/metrics")
PageMaker = Callable[[Worker], Any]  # FastAPI app with the page mounted


def make_app(service: Service, make_page: PageMaker | None = None) -> FastAPI:
    """The API, and the page for every other path once `make_page` has made it (in a thread: importing Gradio
    takes seconds)."""
    page = Page(service, make_page)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with page.running():
            yield

    app = FastAPI(
        title="jaxchat",
        version="1",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        summary="A chat model of one's own, behind the API that OpenAI's clients speak",
    )
    app.state.service = service
    errors.install(app)
    for router in (
        info_api.open_routes(service), chat_api.chat_routes(service), completions_api.completion_routes(service),
        info_api.info_routes(service), websocket.routes(service),
    ):  # fmt: skip
        app.include_router(router)
    _answer_other_methods(app)
    app.router.routes.append(Mount("/", page))
    app.add_middleware(BodyLimit, limit=service.limits.body_bytes)
    app.add_middleware(RequestLog, service=service, paths=API)
    if service.limits.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=service.limits.origins, allow_methods=["*"], allow_headers=["*"]
        )
    _correct_document(app, service)
    return app


def _answer_other_methods(app: FastAPI) -> None:
    """405 and 404 below the API's paths, which would else be the page's to answer."""
    other = ApiError(404, "there is no such route")
    for path, methods in _paths(app):
        names = ", ".join(sorted(methods))
        wrong = ApiError(405, f"only {names} is for this route", headers={"Allow": names})
        refusal = Refusal(wrong, dict.fromkeys(methods, other))  # a name with a line break is no name to the route
        app.router.routes.append(Route(path, refusal, include_in_schema=False))
    app.router.routes.append(Route("/v1/{rest:path}", Refusal(other), include_in_schema=False))


class Refusal:
    """An error for every method (to Starlette a function would be for GET alone), for some an own one."""

    def __init__(self, error: ApiError, own: Mapping[str, ApiError] = MappingProxyType({})):
        self._error, self._own = error, own

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self._own.get(scope.get("method", ""), self._error).response()(scope, receive, send)


def _paths(app: FastAPI) -> list[tuple[str, set[str]]]:
    return [(template, {method.upper() for method in methods}) for template, methods in app.openapi()["paths"].items()]


def _correct_document(app: FastAPI, service: Service) -> None:
    """The OpenAPI document without FastAPI's 422, which never leaves, with the chunks of streams, and asking for a key
    only where the service does."""
    app.openapi_schema = None
    document = app.openapi()
    for methods in document["paths"].values():
        for operation in methods.values():
            operation["responses"].pop("422", None)
            if not service.keys:
                operation.pop("security", None)
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    chunk = ChatChunk.model_json_schema(ref_template="#/components/schemas/{model}")
    schemas.update({name: schema for name, schema in chunk.pop("$defs").items() if name not in schemas})
    schemas["ChatChunk"] = chunk


class Page:
    """The page, and what stands in its place while it or the model loads."""

    def __init__(self, service: Service, make: PageMaker | None):
        self._service, self._make = service, make
        self._app: ASGIApp | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        state = self._service.worker.state
        if self._app and (state != "loading" or scope["path"] != "/"):
            await self._app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif scope["path"] != "/" or not self._make:
            await ApiError(404, "there is no such route").response()(scope, receive, send)
        else:
            text = wait_page(state, Headers(scope=scope).get("accept-language", ""), self._service.limits.language)
            await HTMLResponse(text, 503, {"Retry-After": "2"})(scope, receive, send)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Within, the page is made and runs: in one task of its own, from Gradio's start to its end."""
        end = asyncio.Event()

        async def run() -> None:
            assert self._make
            app = await asyncio.to_thread(self._make, self._service.worker)
            async with app.router.lifespan_context(app):
                self._app = app
                await end.wait()

        task = asyncio.create_task(run()) if self._make else None
        if task:
            task.add_done_callback(_complain)
        try:
            yield
        finally:
            end.set()
            if task:
                await asyncio.wait([task], timeout=CLOSE_SECONDS)
                task.cancel()


def _complain(task: asyncio.Task[None]) -> None:
    if not task.cancelled() and (error := task.exception()):
        log.error("the page cannot be shown", exc_info=error)


DEAD_SECONDS = 30.0  # that a service without its engine still answers 503


class Server(uvicorn.Server):
    """Uvicorn that, told to stop, first lets running answers finish, and returns instead of dying of the signal."""

    def __init__(self, config: uvicorn.Config, service: Service):
        super().__init__(config)
        self._service = service
        self._until = 0.0  # when draining ends, at the latest
        self._died = 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.worker.draining:
            self.should_exit = self.force_exit = sig == signal.SIGINT or self.should_exit  # Ctrl-C again: at once
            return
        self._service.worker.draining = True
        log.info("draining", extra={"fields": {"answers": self._service.worker.busy}})

    async def on_tick(self, counter: int) -> bool:
        service, worker = self._service, self._service.worker
        if worker.loaded.done() and worker.loaded.exception():
            self.should_exit = True
        elif worker.failure and not self._died:
            self._died = time.monotonic()  # its clients hear of it; then whoever started the process shall again
            log.error("engine dead", exc_info=worker.failure)
        elif self._died and time.monotonic() > self._died + DEAD_SECONDS:
            self.should_exit = True
        if worker.draining:
            self._until = self._until or time.monotonic() + service.limits.drain_seconds
            idle = not worker.busy and not service.answering
            if worker.state in ("loading", "dead") or idle or time.monotonic() >= self._until:
                self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.worker.close(wait=0)  # what still runs ends with an error that its client can read
        await super().shutdown(sockets)


def serve(run: RunDir, config: Config) -> None:
    """Serve a finished run until the process is told to stop. `UsageError` if the port is taken, `DataError` if the
    run is not there or not finished."""
    trained_stages(run)  # an error of its own before the port is opened
    Keys(config.serve.api_keys)  # an empty one is refused before the port is opened
    listening = bind(config.serve.host, config.serve.port)
    to_standard_error()
    worker = Worker(lambda worker: load(run, config, worker))
    service = Service(config, worker)

    def make_page(worker: Worker) -> Any:
        from .page import mounted_page

        return mounted_page(run, config, worker, service.keys, service.rates, service.metrics.finished)

    address = f"http://{config.serve.host}:{listening.getsockname()[1]}"
    ready = f"chat page: {address}   API: {address}/v1 (model {service.model!r})   (Ctrl-C stops it)"
    say(f"loading {config.tier}; {address}/health tells when it is ready")
    worker.loaded.add_done_callback(lambda future: None if future.exception() else say(ready))
    server = Server(uvicorn_config(make_app(service, make_page), config), service)
    try:
        server.run(sockets=[listening])
    finally:
        worker.close()
        listening.close()
    log.info("stopped")
    if (error := worker.loaded.exception() or worker.failure) and not worker.draining:
        raise error


def uvicorn_config(app: FastAPI, config: Config) -> uvicorn.Config:
    limits = config.serve
    return uvicorn.Config(
        app,
        log_config=None,
        access_log=False,
        lifespan="on",
        http=PatientProtocol,
        ws="websockets-sansio",
        ws_max_size=limits.body_bytes,
        ws_per_message_deflate=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=CLOSE_SECONDS,
        server_header=False,
        proxy_headers=bool(limits.trusted_proxies),
        forwarded_allow_ips=list(limits.trusted_proxies),
    )


def load(run: RunDir, config: Config, worker: Worker) -> Engine:
    """The engine, compiled for a short request; what longer ones and several at once need compiles meanwhile."""
    begun = time.perf_counter()
    serve = config.serve
    engine = Engine.from_pretrained(run.root, slots=serve.slots, queue_limit=serve.queue_length, weights=serve.weights)
    loaded = time.perf_counter()

    with progress("compiling", None) as bar:

        def heard(done: int, total: int) -> None:
            worker.progress = f"{done} of {total} programs compiled"
            bar.reach(done, total)
            if worker.closing or worker.draining:
                raise UsageError("stopped while loading")

        engine.warm_up(heard, background=True)
    seconds = {"load_seconds": loaded - begun, "compile_seconds": time.perf_counter() - loaded}
    log.info("ready", extra={"fields": {name: round(value, 2) for name, value in seconds.items()}})
    return engine


def bind(host: str, port: int) -> socket.socket:
    """A socket that listens; `UsageError` where the address cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    try:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind((host, port))
        listening.listen(2048)
    except (OSError, OverflowError) as error:
        listening.close()
        reason = getattr(error, "strerror", None) or str(error)
        raise UsageError(f"{host}:{port}: cannot be served on ({reason}); choose another --port or --host") from None
    return listening
