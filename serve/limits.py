"""Limits on clients: API keys, requests a minute, sizes of messages and bodies."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import math
import time
from collections.abc import Callable, Sequence

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.config import ServeConfig
from jaxchat.errors import UsageError

from .schemas import ApiError, ChatMessage, bad_request

MAX_MESSAGES = 500  # of one conversation
MAX_CLIENTS = 10_000  # whose rates are remembered; the longest silent ones are forgotten first
DRAIN_SECONDS = 10.0  # that the rest of a body that is too large is read and thrown away


class Keys:
    """The keys of `serve.api_keys`, compared in constant time."""

    def __init__(self, keys: Sequence[str]):
        if not all(key.strip() for key in keys):
            raise UsageError("serve.api_keys: a key is empty")
        self._keys = [key.encode() for key in keys]

    def __bool__(self) -> bool:
        return bool(self._keys)

    def find(self, key: str | bytes) -> str | None:
        """The name under which the client with this key is known; None for a wrong key."""
        given = key.encode("utf-8", "replace") if isinstance(key, str) else key
        numbers = [i for i, known in enumerate(self._keys) if hmac.compare_digest(known, given)]
        return f"key {numbers[0]}" if numbers else None

    def client(self, authorization: str | None, address: str) -> str:
        """The client's name for rates and logs. `ApiError` 401 without a valid key."""
        if not self._keys:
            return address
        scheme, _, key = (authorization or "").partition(" ")
        client = self.find(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else None
        if client is None:
            message = "this API key is not valid" if key else "send an API key: Authorization: Bearer KEY"
            raise ApiError(401, message, headers={"WWW-Authenticate": "Bearer"})
        return client


class Rates:
    """Token buckets of `per_minute` requests, one for each client; 0: no limit."""

    def __init__(self, per_minute: int, clock: Callable[[], float] = time.monotonic):
        self._limit, self._clock = per_minute, clock
        self._buckets: collections.OrderedDict[str, tuple[float, float]] = collections.OrderedDict()  # (left, time)

    def take(self, client: str) -> None:
        """Count a request. `ApiError` 429 says when to come again."""
        if not self._limit:
            return
        now, per_second = self._clock(), self._limit / 60
        left, before = self._buckets.pop(client, (float(self._limit), now))
        left = min(self._limit, left + (now - before) * per_second)
        self._buckets[client] = (left - 1 if left >= 1 else left), now
        if len(self._buckets) > MAX_CLIENTS:
            self._buckets.popitem(last=False)
        if left < 1:
            seconds = (1 - left) / per_second
            message = f"more than {self._limit} requests a minute; try again in {math.ceil(seconds)} s"
            raise ApiError(429, message, retry_seconds=seconds)


def check_messages(limits: ServeConfig, messages: Sequence[ChatMessage]) -> None:
    """Raise `ApiError` 400 that names the first limit a conversation exceeds."""
    if len(messages) > MAX_MESSAGES:
        text = f"{len(messages)} messages; at most {MAX_MESSAGES}"
        raise bad_request("messages", text, "array_above_max_length")
    sizes = [sum(len(part["text"]) for part in message.parts()) for message in messages]
    for i, size in enumerate(sizes):
        check_length(limits.message_chars, f"messages[{i}].content", size)
    check_length(limits.total_chars, "messages", sum(sizes))


def check_length(limit: int, param: str, chars: int) -> None:
    if chars > limit:
        raise bad_request(param, f"{chars} characters; at most {limit}", "string_above_max_length")


class BodyLimit:
    """Middleware that refuses bodies of more than `limit` bytes, whether or not their length is announced."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        error = ApiError(413, f"the body is larger than {self._limit} bytes", headers={"Connection": "close"})
        announced = next((value for name, value in scope["headers"] if name == b"content-length"), b"")
        if announced.isdigit() and int(announced) > self._limit:
            await self._drain(receive)
            await error.response()(scope, receive, send)
            return
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                await self._drain(receive)
                raise error
            return message

        await self._app(scope, counted, send)

    async def _drain(self, receive: Receive) -> None:
        """Read up to ten times the limit: clients read the answer only after they have sent their body."""
        left = 10 * self._limit
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0 and (message := await receive()).get("more_body"):
                    left -= len(message["body"])
