"""Who may ask, how often and how much: API keys, requests a minute, sizes."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.config import ServeConfig
from jaxchat.errors import UsageError

from .errors import ApiError, bad_request, retry

MAX_MESSAGES = 500  # of one conversation
REMEMBERED = 10_000  # clients whose rate is known at once; who asks more than a minute later is new anyway
DRAINED = 10  # times the largest body is read and thrown away before a client hears that its body is too large ...
DRAIN_SECONDS = 10.0  # ... or for so long


class Keys:
    """Of those set, the number of the one that a client brought; compared in constant time."""

    def __init__(self, keys: Sequence[str]):
        if not all(key.strip() for key in keys):
            raise UsageError("serve.api_keys: a key is empty")
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, key: str | bytes) -> int | None:
        given = key.encode("utf-8", "replace") if isinstance(key, str) else key
        found = [i for i, known in enumerate(self._keys) if hmac.compare_digest(known, given)]
        return found[0] if found else None

    def client(self, authorization: str | None, address: str) -> str:
        """Name under which a client's requests are counted. `ApiError` 401 for one without a valid key."""
        if not self._keys:
            return address
        scheme, _, key = (authorization or "").partition(" ")
        if scheme.lower() != "bearer" or not key:
            raise ApiError(401, "send an API key: Authorization: Bearer KEY", headers={"WWW-Authenticate": "Bearer"})
        number = self.find(key.strip().encode("latin-1"))  # the bytes that came
        if number is None:
            raise ApiError(401, "this API key is not valid", headers={"WWW-Authenticate": "Bearer"})
        return key_name(number)


def key_name(number: int) -> str:
    """Of the client that brought a key."""
    return f"key {number}"


class Rates:
    """A bucket of `per_minute` requests for each client, which fills again evenly."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._limit, self._clock = per_minute, clock
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()  # left, when

    def take(self, client: str) -> None:
        """`ApiError` 429 that says when to come again."""
        if not self._limit:
            return
        now, per_second = self._clock(), self._limit / 60
        left, then = self._buckets.pop(client, (float(self._limit), now))
        left = min(self._limit, left + (now - then) * per_second)
        self._buckets[client] = (left - 1 if left >= 1 else left), now
        while len(self._buckets) > REMEMBERED:
            self._buckets.popitem(last=False)
        if left < 1:
            seconds = (1 - left) / per_second
            message = f"more than {self._limit} requests a minute; try again in {math.ceil(seconds)} s"
            raise ApiError(429, message, headers=retry(seconds))


def check_messages(limits: ServeConfig, messages: Sequence[dict[str, Any]]) -> None:
    """`ApiError` 400 names the first limit that a conversation goes over."""
    if len(messages) > MAX_MESSAGES:
        advice = f"{len(messages)} messages; at most {MAX_MESSAGES}"
        raise bad_request("messages", advice, "array_above_max_length")
    total = 0
    for i, message in enumerate(messages):
        content = message["content"]
        count = len(content) if isinstance(content, str) else sum(len(part["text"]) for part in content)
        if count > limits.message_chars:
            text = f"{count} characters; at most {limits.message_chars} in one message"
            raise bad_request(f"messages[{i}].content", text, "string_above_max_length")
        total += count
    check_length(limits, "messages", total)


def check_length(limits: ServeConfig, param: str, chars: int) -> None:
    if chars > limits.total_chars:
        raise bad_request(param, f"{chars} characters; at most {limits.total_chars}", "string_above_max_length")


class BodyLimit:
    """Refuses bodies of more than `limit` bytes, whether their length is announced or not."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if announced.isdigit() and int(announced) > self._limit:
            await self._drain(receive)
            await self._error().response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                await self._drain(receive)
                raise self._error()
            return message

        await self._app(scope, counted, send)

    def _error(self) -> ApiError:
        return ApiError(413, f"the body is larger than {self._limit} bytes", headers={"Connection": "close"})

    async def _drain(self, receive: Receive) -> None:
        """Take in what is still coming, within reason: a client that is sending does not read an answer, and closing
        the connection under it would lose the answer."""
        seen = 0
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while seen < DRAINED * self._limit:
                    message = await receive()
                    seen += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
