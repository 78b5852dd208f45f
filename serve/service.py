"""What the routes and the page share: clients and their limits, the metrics, and a request for answers."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import logging
import math
import secrets
import time
import tomllib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from pathlib import Path
from typing import Any

import prometheus_client as prometheus
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection

from jaxchat.config import Config, ServeConfig
from jaxchat.engine import Engine, Handle, QueueFull
from jaxchat.errors import JaxchatError, UsageError

from .schemas import FIELDS, ApiError, ChatMessage, PageState, bad_request
from .worker import Answers, ContextExceeded, Group, Unavailable, Worker

log = logging.getLogger("jaxchat.serve")
WORDS = tomllib.loads(Path(__file__).with_name("page.toml").read_text(encoding="utf-8"))
TEXTS = {  # of the page: language -> name -> text
    language: {name: texts[language] for name, texts in WORDS.items() if language in texts} for language in ("en", "ko")
}
MAX_CLIENTS = 10_000  # whose rates are remembered; the longest silent ones are forgotten first
MAX_WAITING = 64  # requests in a `Line`
RETRY_SECONDS = 1  # after which a client may try again where the queue is full or the model still loads
# bounds of histograms, in seconds
LATENCY = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1, 2.5, 5, 7.5, 10, 20, 40, 80)
BETWEEN = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.5, 1)
WHOLE = (0.1, 0.3, 0.5, 0.8, 1, 1.5, 2, 2.5, 5, 10, 15, 20, 30, 40, 60, 120, 240)


class Metrics:
    """The metrics of one service, in their own registry."""

    def __init__(self, worker: Worker, model: str):
        prometheus.disable_created_metrics()
        self._registry = prometheus.CollectorRegistry()
        prometheus.ProcessCollector(registry=self._registry)

        def metric(kind: Any, name: str, text: str, *labels: str, **options: Any) -> Any:
            own = kind(f"jaxchat:{name}", text, ["model_name", *labels], registry=self._registry, **options)
            return own if labels else own.labels(model)

        def gauge(name: str, text: str, value: str) -> None:
            def read() -> float:
                return getattr(worker.engine, value) if worker.state in ("ready", "draining") else 0.0

            metric(prometheus.Gauge, name, text).set_function(read)

        gauge("num_requests_running", "Answers in slots", "running")
        gauge("num_requests_waiting", "Answers waiting for a slot", "waiting")
        gauge("kv_cache_usage_perc", "Share of the slots' cache positions in use, 0 to 1", "cache_usage")
        gauge("programs_compiling", "Programs that still compile since the start", "compiling")
        self._model = model
        self._prompt = metric(prometheus.Counter, "prompt_tokens", "Prompt tokens")
        self._generated = metric(prometheus.Counter, "generation_tokens", "Generated tokens")
        self._success = metric(prometheus.Counter, "request_success", "Answers by finish reason", "finished_reason")
        self._errors = metric(prometheus.Counter, "request_errors", "Requests answered with an error", "status")
        for reason in ("stop", "length", "abort"):  # abort: the client went away or stopped the answer
            self._success.labels(model, reason)

        def seconds(name: str, text: str, buckets: Sequence[float]) -> Any:
            return metric(prometheus.Histogram, f"{name}_seconds", text, buckets=buckets)

        self._first = seconds("time_to_first_token", "From the request to its first token", LATENCY)
        self._between = seconds("inter_token_latency", "Mean time between an answer's tokens", BETWEEN)
        self._whole = seconds("e2e_request_latency", "From the request to its last token", WHOLE)
        self._queue = seconds("request_queue_time", "From the request to its slot", WHOLE)

    def finished(self, handles: Sequence[Handle], prompt_tokens: int) -> None:
        """Count answers that are finished or cancelled."""
        self._prompt.inc(prompt_tokens)
        for handle in handles:
            self._generated.inc(handle.made)
            cancelled = handle.finish_reason in (None, "cancelled")
            self._success.labels(self._model, "abort" if cancelled else handle.finish_reason).inc()
            if handle.started:
                self._queue.observe(handle.started - handle.submitted)
            if handle.first_token:
                self._first.observe(handle.first_token - handle.submitted)
            if handle.finished and not cancelled:
                self._whole.observe(handle.finished - handle.submitted)
                if handle.made > 1 and handle.first_token:
                    self._between.observe((handle.finished - handle.first_token) / (handle.made - 1))

    def error(self, status: int) -> None:
        self._errors.labels(self._model, str(status)).inc()

    def text(self) -> bytes:
        return prometheus.generate_latest(self._registry)


class Clients:
    """Identifies clients by `serve.api_keys` or address, and limits the requests of each to a rate."""

    def __init__(self, limits: ServeConfig, clock: Callable[[], float] = time.monotonic):
        if not all(key.strip() for key in limits.api_keys):
            raise UsageError("serve.api_keys: a key is empty")
        self.keys = [key.encode() for key in limits.api_keys]
        self._per_minute, self._clock = limits.requests_per_minute, clock
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()  # (left, time)

    def find(self, key: bytes) -> str | None:
        """Return the name of the client with this key, which is compared in constant time; None for a wrong key."""
        numbers = [i for i, known in enumerate(self.keys) if hmac.compare_digest(known, key)]
        return f"key {numbers[0]}" if numbers else None

    def identify(self, authorization: str | None, address: str) -> str:
        """Return the client's name for rates and logs. `ApiError` 401 without a valid key."""
        if not self.keys:
            return address
        scheme, _, key = (authorization or "").partition(" ")
        client = self.find(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        if client is None:
            message = "this API key is not valid" if key else "send an API key: Authorization: Bearer KEY"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        return client

    def count(self, client: str) -> None:
        """Count a request in the client's token bucket. `ApiError` 429 says when to come again."""
        if not self._per_minute:
            return
        now, per_second = self._clock(), self._per_minute / 60
        left, before = self._buckets.pop(client, (float(self._per_minute), now))
        left = min(self._per_minute, left + (now - before) * per_second)
        self._buckets[client] = (left - 1 if left >= 1 else left), now
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            seconds = (1 - left) / per_second
            message = f"more than {self._per_minute} requests a minute; try again in {math.ceil(seconds)} s"
            raise ApiError(429, message, retry_seconds=seconds)


class Line:
    """Requests for work that is done for one at a time, in the order in which they came."""

    def __init__(self, work: str):
        self._work, self._lock = work, asyncio.Lock()
        self.waiting = 0  # those whose turn it is included

    @contextlib.asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """Wait for a turn and hold it. `QueueFull` where too many wait."""
        if self.waiting >= MAX_WAITING:
            raise QueueFull(f"{MAX_WAITING} requests wait for {self._work} already; try again later")
        self.waiting += 1
        try:
            async with self._lock:
                yield
        finally:
            self.waiting -= 1


class Service:
    """One model with everything the routes and the page need: engine, clients, metrics."""

    def __init__(self, config: Config, worker: Worker):
        self.config, self.limits, self.worker = config, config.serve, worker
        self.model = config.serve.model_name or config.tier
        self.clients, self.metrics = Clients(config.serve), Metrics(worker, self.model)
        self.page: PageState = "loading"
        self.answering = 0  # requests under way
        self.scores, self.constraints = Line("scores"), Line("their constraints")

    async def identify(self, connection: HTTPConnection) -> None:
        """Check the key; `connection.state.client` is the client's name."""
        address = connection.client.host if connection.client else ""
        connection.state.client = self.clients.identify(connection.headers.get("authorization"), address)

    async def admit(self, connection: HTTPConnection) -> None:
        """Check the key and the rate."""
        await self.identify(connection)
        self.clients.count(connection.state.client)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            shown = name[:100].encode("utf-8", "replace").decode()  # no lone surrogates
            raise ApiError(404, f"no model {shown!r}; the model here is {self.model!r}", "model", "model_not_found")

    def conversation(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """Return the messages as they were sent; `ApiError` 400 names the first limit that they exceed."""
        sent = [message.model_dump(exclude_none=True) for message in messages]
        total = 0
        for i, message in enumerate(sent):
            parts = message.get("content", "")
            size = len(parts) if isinstance(parts, str) else sum(len(str(part.get("text", ""))) for part in parts)
            size += sum(len(str(message[key])) for key in ("tool_calls", "function_call") if key in message)
            check_length(self.limits.message_chars, f"messages[{i}].content", size)
            total += size
        check_length(self.limits.total_chars, "messages", total)
        return sent


class Call:
    """One request for answers: its id, its answers, its log line and its share of the metrics.

    It must be closed, whatever happens.
    """

    def __init__(self, service: Service, client: str, kind: str, log_fields: dict[str, Any] | None = None):
        self.service, self.client = service, client
        self.engine: Engine = service.worker.engine
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.answers, self.prompt_tokens = Answers(), 0
        self.log = {} if log_fields is None else log_fields
        self.log |= {"id": self.id, "client": client}

    async def submit(self, groups: Sequence[Group]) -> None:
        """Queue the answers. Raises what the engine raises, and `ApiError` 400 for more than could ever wait."""
        limits, count = self.service.limits, sum(len(seeds) for _, seeds in groups)
        if count > (most := limits.queue_length + limits.slots):
            raise bad_request("n", f"{count} answers in one request; at most {most} (serve.queue_length, serve.slots)")
        self.answers = await self.service.worker.submit(groups)
        self.prompt_tokens = sum(len(request.tokens) for request, _ in groups)

    def log_text(self, text: Any) -> None:
        if self.service.limits.log_text:
            self.log.setdefault("text", []).append(text)

    def close(self) -> None:
        """Free the slots and record the figures."""
        handles = self.answers.handles
        self.service.worker.cancel(self.answers)
        self.log_text([handle.text for handle in handles])
        self.service.metrics.finished(handles, self.prompt_tokens)
        first = min((h.first_token for h in handles if h.first_token), default=None)
        self.log |= {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(handle.made for handle in handles),
            "finish": [handle.finish_reason or "cancelled" for handle in handles],
            "first_token_seconds": round(first - handles[0].submitted, 4) if first else None,
        }


async def run_until_one_ends(main: Coroutine[Any, Any, None], other: Coroutine[Any, Any, None]) -> Exception | None:
    """Run both until one of them ends, then cancel the other one; return what `main` raised."""
    tasks = [asyncio.create_task(main), asyncio.create_task(other)]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        error, _ = await asyncio.gather(*tasks, return_exceptions=True)
    return error if isinstance(error, Exception) else None


def check_length(limit: int, param: str, chars: int) -> None:
    if chars > limit:
        raise bad_request(param, f"{chars} characters; at most {limit}", "string_above_max_length")


def check_fits(engine: Engine, tokens: Sequence[int], param: str) -> None:
    if len(tokens) > engine.capacity:
        message = str(ContextExceeded(len(tokens), engine.capacity))
        raise ApiError(400, message, param, "context_length_exceeded")


def as_api_error(error: Exception) -> ApiError:
    """Convert an error to an API error; no trace, no path."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_seconds=RETRY_SECONDS)
        case Unavailable(state="dead"):
            return ApiError(503, str(error), code="engine_dead")
        case Unavailable():
            return ApiError(503, str(error), code=error.state, retry_seconds=RETRY_SECONDS)
        case JaxchatError():
            return ApiError(400, str(error))
        case HTTPException():  # from routing, or from a body that cannot be read
            headers = dict(error.headers or {})
            allowed = f"this route takes {headers.get('Allow')} only"
            return ApiError(error.status_code, allowed if error.status_code == 405 else error.detail, headers=headers)
        case RequestValidationError() | ValidationError():
            return validation_error(error)
    log.error("internal error", exc_info=error)
    return ApiError(500, "an internal error; the service's log has more", code="internal_error")


def validation_error(error: RequestValidationError | ValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, without what was sent."""
    errors = error.errors()  # of a field with several allowed types, one for each type
    first = next((e for e in errors if e["type"] not in ("string_type", "list_type", "int_type")), errors[0])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', message)}")
    names = [part for part in first["loc"] if isinstance(part, int) or part in FIELDS]
    if first["type"] == "value_error" and not names:  # the message names the field
        return ApiError(400, message, message.split(":")[0])
    if not names:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    return bad_request(param, message, "array_above_max_length" if first["type"] == "too_long" else None)
