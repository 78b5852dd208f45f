"""Limits on clients: API keys, requests a minute, sizes of bodies."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hmac
import math
import time
from collections.abc import Callable

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from jaxchat.config import ServeConfig
from jaxchat.errors import UsageError

from .schemas import ApiError

MAX_CLIENTS = 10_000  # whose rates are remembered; the longest silent ones are forgotten first
DRAIN_SECONDS = 10.0  # that the rest of a body that is too large is read and thrown away


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


class BodyLimit:
    """Middleware that refuses bodies of more than `limit` bytes, whether or not their length is announced."""

    def __init__(self, app: ASGIApp, limit: int):
        self._app, self._limit = app, limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        error = ApiError(413, f"the body is larger than {self._limit} bytes", headers={"Connection": "close"})
        seen = 0

        async def counted() -> Message:
            nonlocal seen
            message = await receive()
            seen += len(message.get("body", b""))
            if seen > self._limit:
                await self._drain(receive)
                raise error
            return message

        announced = dict(scope.get("headers", ())).get(b"content-length", b"")
        if announced.isdigit() and int(announced) > self._limit:
            await self._drain(receive)
            await error.response()(scope, receive, send)
        else:
            await self._app(scope, counted, send)

    async def _drain(self, receive: Receive) -> None:
        """Read up to ten times the limit: clients read the answer only after they have sent their body."""
        left = 10 * self._limit
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(DRAIN_SECONDS):
                while left > 0 and (message := await receive()).get("more_body"):
                    left -= len(message["body"])
