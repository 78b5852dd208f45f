"""WS /ws/chat: a user's text or a conversation in, pieces of the answer out.

In: plain text (one user turn), or a JSON object with "messages" and, if wanted, temperature, top_k, top_p,
max_tokens, seed; `{"stop": true}` ends the answer under way. Out: `{"token": str, "done": false}` ..., then
`{"done": true, "finish_reason": str}`, or `{"error": {...}, "done": true}`. One answer after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from typing import Any
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.responses import Response
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from jaxchat.engine import Event

from .api import Service, prepare
from .errors import ApiError, as_api_error, log
from .schemas import ChatRequest

WAITING = 8  # messages that may come while an answer is made


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.websocket("/ws/chat")
    async def chat(socket: WebSocket) -> None:
        try:
            client = enter(service, socket)
        except ApiError as error:
            response: Response = error.response()
            del response.headers["content-length"]  # the server writes one, which older versions do not notice
            await socket.send_denial_response(response)
            return
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await Conversation(service, socket, client).run()

    return router


def enter(service: Service, socket: WebSocket) -> str:
    """Who wants to talk. `ApiError` for a wrong key, and for a web page from elsewhere: browsers let any page open a
    WebSocket to any address, this machine's own included."""
    origin = socket.headers.get("origin")
    if origin and origin not in service.limits.origins and _host(origin) != socket.headers.get("host"):
        raise ApiError(403, "web pages from elsewhere may not use this service (serve.origins)", code="origin")
    address = socket.client.host if socket.client else ""
    return service.keys.client(socket.headers.get("authorization"), address)


def _host(origin: str) -> str | None:
    try:
        return urlsplit(origin).netloc
    except ValueError:
        return None


class Conversation:
    """One connection."""

    def __init__(self, service: Service, socket: WebSocket, client: str):
        self._service, self._socket = service, socket
        socket.state.client = client
        self._asked: asyncio.Queue[tuple[str | bytes, asyncio.Event]] = asyncio.Queue(WAITING)  # and what stops it
        self._newest = asyncio.Event()

    async def run(self) -> None:
        """Listen and answer until the client leaves, which also ends the answer under way."""
        listening = asyncio.create_task(self._listen())
        answering = asyncio.create_task(self._answer_all())
        try:
            await asyncio.wait((listening, answering), return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in (listening, answering):
                task.cancel()
            for outcome in await asyncio.gather(listening, answering, return_exceptions=True):
                if isinstance(outcome, Exception) and not isinstance(outcome, WebSocketDisconnect):
                    log.error("internal error", exc_info=outcome, extra={"fields": {"path": "/ws/chat"}})

    async def _listen(self) -> None:
        while True:
            message = await self._socket.receive()
            if message["type"] == "websocket.disconnect":
                return
            said = message.get("text")
            said = message.get("bytes") or b"" if said is None else said
            if isinstance(said, str) and _read(said) == {"stop": True}:
                self._newest.set()
                continue
            try:
                self._asked.put_nowait((said, stop := asyncio.Event()))
                self._newest = stop
            except asyncio.QueueFull:
                await self._close(ApiError(429, f"{WAITING} messages wait already on this connection"))
                return

    async def _answer_all(self) -> None:
        while True:
            said, stop = await self._asked.get()
            begun, fields = time.perf_counter(), {"path": "/ws/chat", "status": 200}
            self._socket.state.log = fields
            self._service.answering += 1
            try:
                await self._answer(said, stop)
            except WebSocketDisconnect:
                raise
            except Exception as error:
                shown = as_api_error(error)
                fields["status"] = shown.status_code
                self._service.metrics.error(shown.status_code)
                if shown.status_code == 500:
                    log.error("internal error", exc_info=error, extra={"fields": {"path": "/ws/chat"}})
                await self._send(shown.body() | {"done": True})
            finally:
                self._service.answering -= 1
                log.info("answer", extra={"fields": fields | {"seconds": round(time.perf_counter() - begun, 4)}})

    async def _answer(self, said: str | bytes, stop: asyncio.Event) -> None:
        service = self._service
        service.rates.take(self._socket.state.client)
        service.worker.check()
        call = service.call(self._socket, "ws")
        try:
            answers = await call.submit([prepare(service, understand(said), call)])
            stopping = asyncio.create_task(stop.wait())
            stopping.add_done_callback(lambda task: None if task.cancelled() else answers.stop())
            try:
                async for pieces in answers:
                    for _, piece in pieces:
                        await self._send(shown(piece))
            finally:
                stopping.cancel()
        finally:
            call.end()

    async def _send(self, data: dict[str, Any]) -> None:
        if self._socket.application_state == WebSocketState.CONNECTED:
            await self._socket.send_text(orjson.dumps(data).decode())

    async def _close(self, error: ApiError) -> None:
        await self._send(error.body() | {"done": True})
        await self._socket.close(1008, error.detail)


def understand(said: str | bytes) -> ChatRequest:
    """What a message asks for. `ApiError` for one that is out of form."""
    if isinstance(said, bytes):
        raise ApiError(400, "send text, not bytes")
    data = _read(said)
    if data is None and said.lstrip().startswith("{") and '"messages"' in said:
        raise ApiError(400, "the message is no valid JSON", "messages")
    if data is None:
        return ChatRequest.model_validate({"messages": [{"role": "user", "content": said}]})
    for name, nothing in (("n", (None, 1)), ("logprobs", (None, False))):
        if data.get(name) not in nothing:
            raise ApiError(400, f"{name}: only over HTTP", name)
    try:
        return ChatRequest.model_validate({**data, "stream": True})
    except ValidationError as error:
        raise as_api_error(error) from None


def shown(piece: Event) -> dict[str, Any]:
    """An event as it goes out; a calculator call is no text and stands beside an empty one."""
    if piece.kind == "done":
        return {"done": True, "finish_reason": piece.finish_reason}
    if piece.kind == "text":
        return {"token": piece.text, "done": False}
    return {"token": "", "done": False, "part": {"type": piece.kind, "text": piece.text}}


def _read(said: str) -> dict[str, Any] | None:
    """A JSON object; None for anything else, which is plain text."""
    if not said.lstrip().startswith("{"):
        return None
    try:
        data = orjson.loads(said)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
    return data if isinstance(data, dict) else None
