"""HTTP/1.1 as uvicorn speaks it, with an end to a client's patience test: heads have a size, requests a time."""

from __future__ import annotations

import asyncio
from typing import Any

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

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
