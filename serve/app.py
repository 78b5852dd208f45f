"""The service: API, WebSocket and chat page in one process.

The port is open at once. /health says 503 "loading" until the engine's thread has loaded the model and compiled what a
first request needs.
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import logging
import math
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import HTMLResponse, Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.config import Config
from jaxchat.engine import Engine, trained_stages
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.log import progress, say
from jaxchat.run_dir import RunDir

from . import api, bind
from .schemas import ApiError
from .service import TEXTS, Clients, Service, as_api_error, run_until_one_ends
from .worker import Worker

log = logging.getLogger("jaxchat.serve")
HEAD_BYTES = 64 << 10  # of request line and headers
CLOSE_SECONDS = 1  # for connections to end after the answers have; an open page never closes its own
KEEP_ALIVE = 65  # seconds; longer than the minute after which clients and proxies drop an idle connection
DRAIN_SECONDS = 10.0  # to read and discard the rest of a body that is too large
DEAD_SECONDS = 30.0  # the service answers 503 after its engine failed, then it ends
GONE = 499  # nginx's number for a request whose client has gone
API = ("/v1", "/tokenize", "/detokenize", "/tokenizer_info", "/health", "/metrics")
NO_ROUTE = """there is no such route. A client's base URL ends with /v1: POST /v1/chat/completions, /v1/responses, \
/v1/completions; GET /v1/models. All routes: GET /openapi.json"""
# instead of the page: while it or the model loads (then it reloads itself), and where it cannot be shown
WAIT = """<!doctype html><meta charset=utf-8>%s<meta name=color-scheme
content="light dark"><meta name=viewport content="width=device-width"><title>jaxchat</title>
<div style="font: 1rem system-ui, sans-serif; margin: 4rem auto; max-width: 40rem; padding: 0 1rem">
<p>%s
<p lang=ko>%s"""


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level and event, then the record's own fields and a traceback."""

    def format(self, record: logging.LogRecord) -> str:
        when = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        line: dict[str, Any] = {"time": when, "level": record.levelname.lower(), "event": record.getMessage()}
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str, ensure_ascii=False, separators=(",", ":"))


def log_to_standard_error() -> None:
    """Log our own records from INFO on, those of uvicorn and asyncio from WARNING on."""

    def is_news(record: logging.LogRecord) -> bool:
        # uvicorn repeats errors that we log ourselves, and tells of pages that are open at the end
        silent = ("Exception in ASGI application", "timeout graceful shutdown", "asyncio.exceptions.CancelledError")
        return not any(text in record.getMessage() for text in silent)

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    handler.addFilter(is_news)
    for name, level in (("jaxchat.serve", logging.INFO), ("uvicorn", logging.WARNING), ("asyncio", logging.WARNING)):
        logger = logging.getLogger(name)
        logger.handlers[:] = [handler]
        logger.setLevel(level)
        logger.propagate = False


def tell(text: str, style: str | None = None) -> None:
    """Print a line; a console or log that cannot be written (a full disk, a closed pipe) keeps nobody from serving."""
    with contextlib.suppress(OSError, SystemExit):  # rich makes the latter of a closed pipe
        say(text, style)


class Requests:
    """Middleware around HTTP requests: a limit on bodies, an end for clients that leave, and lines in the log.

    A request is cancelled when its client disconnects after sending its body. Each POST and each error of the API has a
    log line. Routes add fields in `request.state.log`, and may leave a `request.state.call` to be closed.
    `service.answering` counts the POSTs under way.
    """

    def __init__(self, app: ASGIApp, service: Service):
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        path = "/" + "/".join(filter(None, scope["path"].split("/")))  # a slash too many in a base URL does no harm
        if path.startswith(API):
            scope["path"] = path
        service, most, begin = self._service, self._service.limits.body_bytes, time.perf_counter()
        ours = scope["path"].startswith(API)
        posted = ours and scope["method"] == "POST"
        fields: dict[str, Any] = {"method": scope["method"], "path": scope["path"], "status": 0}
        state = scope.setdefault("state", {})
        state["log"], body_read, seen = fields, asyncio.Event(), 0
        too_large = ApiError(413, f"the body is larger than {most} bytes", headers={"Connection": "close"})

        async def drain() -> None:
            """Read up to ten times the limit: clients read the answer only after they have sent their body."""
            left = 10 * most
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(DRAIN_SECONDS):
                    while left > 0 and (message := await receive()).get("more_body"):
                        left -= len(message["body"])

        async def receive_body() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > most:
                await drain()
                raise too_large
            if not message.get("more_body"):
                body_read.set()
            return message

        async def send_and_note(message: Message) -> None:
            if message["type"] == "http.response.start":
                fields["status"] = message["status"]
            await send(message)

        async def respond() -> None:
            announced = dict(scope["headers"]).get(b"content-length", b"")
            if announced.isdigit() and int(announced) > most:
                await drain()
                await too_large.response()(scope, receive, send_and_note)
            else:
                await self._app(scope, receive_body, send_and_note)

        async def leave() -> None:
            await body_read.wait()
            while (await receive())["type"] != "http.disconnect":
                pass

        service.answering += posted
        error = None
        try:
            error = await run_until_one_ends(respond(), leave())
        finally:
            if call := state.get("call"):
                call.close()
            service.answering -= posted
            fields["status"] = fields["status"] or (500 if error else GONE)
            failed = ours and fields["status"] >= 400 and scope["path"] != "/health"
            if failed:
                service.metrics.error(fields["status"])
            if posted or failed:
                log.info("request", extra={"fields": fields | {"seconds": round(time.perf_counter() - begin, 4)}})
        if error:
            raise error


class Page:
    """The chat page, for every path that is not the API's; while page or model loads, a page that says so."""

    def __init__(self, service: Service, make: Callable[[], FastAPI]):
        self._service, self._make = service, make
        self._page: FastAPI | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, path, unknown = self._service, scope["path"], False
        state = service.worker.state

        async def send_known(message: Message) -> None:
            """Keep back what Gradio says of routes that it does not know: a page, or an error in another form."""
            nonlocal unknown
            unknown = unknown or message.get("status") in (404, 405)
            if not unknown:
                await send(message)

        if self._page and not path.startswith(API) and (state != "loading" or path != "/"):
            await self._page(scope, receive, send_known)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 1008})
        elif path == "/":
            why = "page_failed" if service.page == "failed" else "engine_dead" if state == "dead" else "loading"
            status, headers = (503, {"Retry-After": "2"}) if why == "loading" else (500, {})
            refresh = "<meta http-equiv=refresh content=2>" if why == "loading" else ""
            html = WAIT % (refresh, TEXTS["en"][why], TEXTS["ko"][why])
            await HTMLResponse(html, status, headers)(scope, receive, send)
        else:
            unknown = True
        if unknown:
            await ApiError(404, NO_ROUTE).response()(scope, receive, send)

    @contextlib.asynccontextmanager
    async def lifespan(self, app: FastAPI) -> AsyncIterator[None]:
        """Make the page in a thread (importing Gradio takes seconds), and run it in a task of its own."""
        end = asyncio.Event()

        async def run() -> None:
            try:
                try:
                    page = await asyncio.to_thread(self._make)
                except SystemError:  # Python 3.11 may fail to parse in two threads at once ("AST constructor ...")
                    page = await asyncio.to_thread(self._make)
                async with page.router.lifespan_context(page):
                    self._page, self._service.page = page, "ready"
                    await end.wait()
            except (Exception, SystemExit) as error:  # whatever it is, the API goes on
                self._page, self._service.page = None, "failed"
                log.error("the page cannot be shown", exc_info=error)
                reason = " ".join(str(error).split())[:300]
                tell(f"the chat page cannot be shown ({type(error).__name__}: {reason}); the API answers", "yellow")

        task = asyncio.create_task(run())
        yield
        end.set()
        await asyncio.wait([task], timeout=CLOSE_SECONDS)
        task.cancel()


def make_app(service: Service, make_page: Callable[[], FastAPI]) -> FastAPI:
    """Return the API, and the page for every other path once `make_page` has made it."""
    page = Page(service, make_page)
    app = FastAPI(
        title="jaxchat",
        version="1",
        docs_url=None,  # its page would load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=page.lifespan,
        summary="A chat model of one's own, behind the API that OpenAI's clients speak",
    )
    app.include_router(api.routes(service))

    async def answer_error(request: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    app.router.default = page
    for kind in (HTTPException, RequestValidationError, ValidationError, JaxchatError, Exception):
        app.add_exception_handler(kind, answer_error)
    app.add_middleware(Requests, service=service)
    if origins := service.limits.origins:
        app.add_middleware(CORSMiddleware, allow_origins=origins, allow_methods=["*"], allow_headers=["*"])
    return app


class Server(uvicorn.Server):
    """Uvicorn that lets running answers finish when told to stop, and returns instead of dying of the signal."""

    def __init__(self, app: FastAPI, service: Service):
        limits = service.limits
        config = uvicorn.Config(
            app,
            log_config=None,
            access_log=False,
            lifespan="on",
            http="h11",
            h11_max_incomplete_event_size=HEAD_BYTES,
            ws="websockets-sansio",
            ws_max_size=limits.body_bytes,
            ws_per_message_deflate=False,
            timeout_keep_alive=KEEP_ALIVE,
            timeout_graceful_shutdown=CLOSE_SECONDS,
            server_header=False,
            proxy_headers=bool(limits.trusted_proxies),
            forwarded_allow_ips=list(limits.trusted_proxies),
        )
        super().__init__(config)
        self._service = service
        self._end = math.inf  # when the process ends at the latest, by `time.monotonic`

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        worker = self._service.worker
        if worker.draining:
            self.should_exit = self.force_exit = sig == signal.SIGINT or self.should_exit  # Ctrl-C again: at once
            return
        worker.draining = True
        self._end = min(self._end, time.monotonic() + self._service.limits.drain_seconds)
        log.info("draining", extra={"fields": {"answers": worker.busy}})

    async def on_tick(self, counter: int) -> bool:
        worker, now = self._service.worker, time.monotonic()
        failed_to_load = worker.loaded.done() and worker.loaded.exception()
        if worker.failure and not failed_to_load and self._end == math.inf:
            self._end = now + DEAD_SECONDS  # clients are told; then whoever started the process shall do so again
            log.error("engine dead", exc_info=worker.failure)
        if failed_to_load or now >= self._end or (worker.draining and not (worker.busy or self._service.answering)):
            self.should_exit = True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._service.worker.close(wait=0)  # what still runs ends with an error that its client can read
        await super().shutdown(sockets)


def make_service(run: RunDir, config: Config) -> tuple[FastAPI, Service]:
    """Return the app of a finished run with its page, and its service, whose worker loads the model."""
    service = Service(config, Worker(lambda worker: load(run, config, worker)))

    def make_page() -> FastAPI:
        from .page import mounted_page

        return mounted_page(run, service)

    return make_app(service, make_page), service


def serve(run: RunDir, config: Config) -> None:
    """Serve a finished run until told to stop.

    `UsageError` if the port is taken, `DataError` without a trained stage.
    """
    trained_stages(run)  # raises before the port is opened, as `Clients` does
    Clients(config.serve)
    listening = bind(config.serve.host, config.serve.port)
    log_to_standard_error()
    app, service = make_service(run, config)
    worker, address = service.worker, f"http://{config.serve.host}:{listening.getsockname()[1]}"
    ready = f"chat page: {address}   API: {address}/v1 (model {service.model!r})   (Ctrl-C stops it)"
    tell(f"loading {config.tier}; {address}/health tells when it is ready")
    worker.loaded.add_done_callback(lambda future: None if future.exception() else tell(ready))
    try:
        Server(app, service).run(sockets=[listening])
    finally:
        worker.close()
        listening.close()
    log.info("stopped")
    if (failure := worker.loaded.exception() or worker.failure) and not worker.draining:
        raise failure


def load(run: RunDir, config: Config, worker: Worker) -> Engine:
    """Return the engine, compiled for a short request; programs for longer ones compile in the background."""
    serve = config.serve
    engine = Engine.from_pretrained(run.root, slots=serve.slots, queue_limit=serve.queue_length, weights=serve.weights)
    with progress("compiling", None) as bar:

        def report(done: int, total: int) -> None:
            worker.progress = f"{done} of {total} programs compiled"
            bar.reach(done, total)
            if worker.closing or worker.draining:
                raise UsageError("stopped while loading")

        engine.programs.warm_up(report, background=True)
    log.info("ready")
    return engine
