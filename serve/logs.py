"""One JSON object a line on standard error: what happened, never what was said (unless `serve.log_text`)."""

from __future__ import annotations

import asyncio
import datetime
import json
import logging
import sys
import time
from collections.abc import Sequence
from typing import Any

import orjson
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serve.service import Service

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
