"""WS /ws/chat: a user's text or a conversation in, pieces of the answer out.

In: plain text (one user turn), or a JSON object with "messages" and optional fields of chat completions;
`{"stop": true}` ends the answer under way. Out: `{"token": str, "done": false}` ..., then
`{"done": true, "finish_reason": str}`, or `{"error": {...}, "done": true}`. One answer after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any
from urllib.parse import urlsplit

import orjson
from fastapi import APIRouter
from pydantic import ValidationError
from starlette.websockets import WebSocket, WebSocketDisconnect, WebSocketState

from jaxchat.engine import Event

from .api import Call, Service, as_api_error, chat_group, validation_error
from .schemas import ApiError, ChatRequest

log = logging.getLogger("jaxchat.serve")
MAX_WAITING = 8  # messages that may come while an answer is generated


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.websocket("/ws/chat")
    async def chat(socket: WebSocket) -> None:
        try:
            socket.state.client = identify(service, socket)
        except ApiError as error:
            response = error.response()
            del response.headers["content-length"]  # the server adds one; older versions add a second
            await socket.send_denial_response(response)
            return
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await Conversation(service, socket).run()

    return router


def identify(service: Service, socket: WebSocket) -> str:
    """Return the client's name. `ApiError` for a wrong key, and for a web page from another origin.

    Browsers let any page open a WebSocket to any address, this machine's own included.
    """
    origin = socket.headers.get("origin")
    if origin and origin not in service.limits.origins:
        try:
            host = urlsplit(origin).netloc
        except ValueError:
            host = ""
        if host != socket.headers.get("host"):
            raise ApiError(403, "web pages from other origins may not use this service (serve.origins)", code="origin")
    address = socket.client.host if socket.client else ""
    return service.keys.client(socket.headers.get("authorization"), address)


class Conversation:
    """One connection."""

    def __init__(self, service: Service, socket: WebSocket):
        self._service, self._socket = service, socket
        self._messages: asyncio.Queue[tuple[str | bytes, asyncio.Event]] = asyncio.Queue(MAX_WAITING)
        self._stop = asyncio.Event()  # of the newest message

    async def run(self) -> None:
        """Receive and answer until the client leaves, which also cancels the answer under way."""
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._answer_all())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    async def _receive(self) -> None:
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            text = message.get("text")
            data: str | bytes = message.get("bytes") or b"" if text is None else text
            if parse_object(data) == {"stop": True}:
                self._stop.set()
                continue
            self._stop = asyncio.Event()
            try:
                self._messages.put_nowait((data, self._stop))
            except asyncio.QueueFull:
                error = ApiError(429, f"{MAX_WAITING} messages wait already on this connection")
                await self._send(error.body().model_dump() | {"done": True})
                await self._socket.close(1008, error.detail)
                return

    async def _answer_all(self) -> None:
        while True:
            message, stop = await self._messages.get()
            begin, fields = time.perf_counter(), {"path": "/ws/chat", "status": 200}
            self._socket.state.log = fields
            self._service.answering += 1
            try:
                await self._answer(message, stop)
            except WebSocketDisconnect:
                raise
            except Exception as raised:
                error = as_api_error(raised)
                fields["status"] = error.status_code
                self._service.metrics.error(error.status_code)
                await self._send(error.body().model_dump() | {"done": True})
            finally:
                self._service.answering -= 1
                log.info("answer", extra={"fields": fields | {"seconds": round(time.perf_counter() - begin, 4)}})

    async def _answer(self, message: str | bytes, stop: asyncio.Event) -> None:
        self._service.rates.take(self._socket.state.client)
        self._service.worker.check()
        call = Call(self._service, self._socket, "ws")
        try:
            answers = await call.submit([chat_group(call, parse(message))])
            stopping = asyncio.create_task(stop.wait())
            stopping.add_done_callback(lambda task: None if task.cancelled() else answers.stop())
            try:
                async for events in answers:
                    for _, event in events:
                        await self._send(as_message(event))
            finally:
                stopping.cancel()
        finally:
            call.end()

    async def _send(self, data: dict[str, Any]) -> None:
        if self._socket.application_state == WebSocketState.CONNECTED:
            await self._socket.send_text(orjson.dumps(data).decode())


def parse(message: str | bytes) -> ChatRequest:
    """Return what a message asks for; `ApiError` for a malformed one."""
    if isinstance(message, bytes):
        raise ApiError(400, "send text, not bytes")
    data = parse_object(message)
    if data is None and message.lstrip().startswith("{") and '"messages"' in message:
        raise ApiError(400, "the message is no valid JSON", "messages")
    if data is None:
        data = {"messages": [{"role": "user", "content": message}]}
    for name, accepted in (("n", (None, 1)), ("logprobs", (None, False))):
        if data.get(name) not in accepted:
            raise ApiError(400, f"{name}: only over HTTP", name)
    try:
        return ChatRequest.model_validate({**data, "stream": True})
    except ValidationError as error:
        raise validation_error(error) from None


def parse_object(message: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object; None for anything else, which is plain text."""
    try:
        data = orjson.loads(message)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
    return data if isinstance(data, dict) else None


def as_message(event: Event) -> dict[str, Any]:
    """A calculator call stands in "part", beside an empty text."""
    if event.kind == "done":
        return {"done": True, "finish_reason": event.finish_reason}
    if event.kind == "text":
        return {"token": event.text, "done": False}
    return {"token": "", "done": False, "part": {"type": event.kind, "text": event.text}}
