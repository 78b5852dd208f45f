"""WS /ws/chat: a user's text or a conversation in, pieces of the answer out.

In: plain text (one user turn), or a JSON object with "messages" and optional fields of chat completions;
`{"stop": true}` ends the newest answer. Out: `{"token": str, "done": false}` ..., then
`{"done": true, "finish_reason": str}`, or `{"error": {...}, "done": true}`. One answer after the other.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import orjson
from fastapi import APIRouter
from starlette.websockets import WebSocket, WebSocketDisconnect

from .api import ChatCall, Service, as_api_error
from .schemas import ApiError, ChatRequest

log = logging.getLogger("jaxchat.serve")
MAX_WAITING = 8  # messages that may come while an answer is generated


def routes(service: Service) -> APIRouter:
    router = APIRouter()

    @router.websocket("/ws/chat")
    async def chat(socket: WebSocket) -> None:
        try:
            origin = socket.headers.get("origin")  # a browser lets any page connect, and only says which one it is
            own = origin and origin.partition("//")[2] == socket.headers.get("host")
            if origin and not own and origin not in service.limits.origins:
                raise ApiError(403, "a page from another address may not connect (serve.origins)", code="origin")
            await service.identify(socket)
        except ApiError as error:
            response = error.response()
            del response.headers["content-length"]  # the server adds one; older versions add a second
            await socket.send_denial_response(response)
            return
        await socket.accept()
        with contextlib.suppress(WebSocketDisconnect):
            await Conversation(service, socket).run()

    return router


class Conversation:
    """One connection."""

    def __init__(self, service: Service, socket: WebSocket):
        self._service, self._socket = service, socket
        self._messages: asyncio.Queue[tuple[str | bytes, asyncio.Future[None]]] = asyncio.Queue(MAX_WAITING)

    async def run(self) -> None:
        """Receive and answer until the client leaves, which also cancels the answer under way."""
        tasks = [asyncio.create_task(self._receive()), asyncio.create_task(self._answer())]
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            refusal, _ = await asyncio.gather(*tasks, return_exceptions=True)
        if isinstance(refusal, ApiError):
            await self._socket.send_json(refusal.body().model_dump() | {"done": True})
            await self._socket.close(1008, refusal.detail)

    async def _receive(self) -> None:
        """Queue messages until the client leaves. `ApiError` 429 for one too many."""
        loop = asyncio.get_running_loop()
        stop = loop.create_future()  # done: the newest message's answer shall end
        while (message := await self._socket.receive())["type"] != "websocket.disconnect":
            data = message.get("text") or message.get("bytes") or ""
            if parse_object(data) == {"stop": True}:
                if not stop.done():
                    stop.set_result(None)
                continue
            if self._messages.full():
                raise ApiError(429, f"{MAX_WAITING} messages wait already on this connection")
            stop = loop.create_future()
            self._messages.put_nowait((data, stop))

    async def _answer(self) -> None:
        """Answer one message after the other."""
        service, client, send = self._service, self._socket.state.client, self._socket.send_json
        while True:
            message, stop = await self._messages.get()
            begin, fields = time.perf_counter(), {"path": "/ws/chat", "status": 200}
            service.answering += 1
            try:
                service.clients.count(client)
                service.worker.check()
                with contextlib.closing(ChatCall(service, client, fields, parse(message))) as call:
                    await call.begin()
                    stop.add_done_callback(call.answers.stop)
                    async for events in call.answers:
                        for _, event in events:
                            if event.kind == "done":
                                await send({"done": True, "finish_reason": event.finish_reason})
                            elif event.kind == "text":
                                await send({"token": event.text, "done": False})
                            else:  # a calculator call
                                part = {"type": event.kind, "text": event.text}
                                await send({"token": "", "done": False, "part": part})
            except WebSocketDisconnect:
                raise
            except Exception as raised:
                error = as_api_error(raised)
                fields["status"] = error.status_code
                service.metrics.error(error.status_code)
                await send(error.body().model_dump() | {"done": True})
            finally:
                service.answering -= 1
                log.info("answer", extra={"fields": fields | {"seconds": round(time.perf_counter() - begin, 4)}})


def parse(message: str | bytes) -> ChatRequest:
    """Return what a message asks for; raises as `ChatRequest` does, and `ApiError`."""
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
    return ChatRequest.model_validate({**data, "stream": True})


def parse_object(message: str | bytes) -> dict[str, Any] | None:
    """Return the JSON object; None for anything else, which is plain text."""
    try:
        data = orjson.loads(message)
    except (orjson.JSONDecodeError, UnicodeEncodeError):
        return None
    return data if isinstance(data, dict) else None
