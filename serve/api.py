"""The routes: OpenAI's completions and models, vLLM's token routes, health, metrics, and a WebSocket."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request, Response
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from starlette.responses import StreamingResponse
from starlette.websockets import WebSocket, WebSocketDisconnect

from jaxchat.chat import render, render_prompt
from jaxchat.errors import UsageError
from jaxchat.tokenizer import ASSISTANT_END, BOS

from . import schemas
from .completions import ChatCall, Completion, TextCall, check_ids, goes_on, token_name
from .responses import ResponsesCall, own_names
from .schemas import ERRORS, ApiError, ChatRequest, CompletionRequest, ResponsesRequest
from .service import Service, as_api_error, check_length, run_until_one_ends

log = logging.getLogger("jaxchat.serve")
MAX_WAITING = 8  # messages on a WebSocket that may come while an answer is generated
STREAMED: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "One object, or server-sent events where `stream` is true",
        "content": {"text/event-stream": {}},
    }
}


async def respond(call: Completion, request: Request) -> Response:
    """Begin to generate, then answer in one piece or as a stream. The middleware `Requests` closes the call."""
    request.state.call, headers = call, {"X-Request-ID": call.id}
    if call.body.stream:  # not by sse-starlette: that writes every event by itself, and hooks into uvicorn's shutdown
        await call.begin()
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(call.stream(), 200, headers, "text/event-stream")
    whole = await call.collect()
    return Response(whole.model_dump_json(exclude_unset=True), 200, headers, "application/json")


def routes(service: Service) -> APIRouter:
    """Return all routes of the API; those without `identified` or `admitted` ask for no key."""
    router, worker = APIRouter(), service.worker
    bearer = HTTPBearer(auto_error=False, description="One of serve.api_keys")
    documented = [Depends(bearer)] if service.clients.keys else []
    identified: Any = {"dependencies": [*documented, Depends(service.identify)], "responses": ERRORS}
    admitted: Any = {"dependencies": [*documented, Depends(service.admit)], "responses": ERRORS}
    card = schemas.ModelCard(id=service.model, created=int(time.time()), max_model_len=service.config.model.seq_len)

    def call(kind: type[ChatCall | TextCall], body: Any, request: Request) -> Completion:
        service.check_model(body.model)
        worker.check()
        return kind(service, request.state.client, request.state.log, body)

    @router.post(
        "/v1/chat/completions",
        response_model=schemas.ChatCompletion | schemas.ChatChunk,
        **admitted | {"responses": STREAMED},
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation that ends with a user's message."""
        return await respond(call(ChatCall, body, request), request)

    @router.post("/v1/completions", response_model=schemas.Completion, **admitted | {"responses": STREAMED})
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts as documents, without a chat around them."""
        return await respond(call(TextCall, body, request), request)

    @router.post(
        "/v1/responses", response_model=schemas.Response | schemas.ResponseEvent, **admitted | {"responses": STREAMED}
    )
    async def responses(body: ResponsesRequest, request: Request) -> Response:
        """Answer a text or the items of a conversation, in the form of OpenAI's Responses."""
        with own_names():
            return await respond(call(ResponsesCall, body, request), request)

    @router.post("/tokenize", **admitted)
    async def tokenize(body: schemas.TokenizeRequest) -> schemas.Tokens:
        """Return the token ids of a text, or of a conversation as the model sees it.

        Special tokens written in a text are ordinary characters; only a text that is the name of one is that token.
        """
        service.check_model(body.model)
        tokenizer = worker.engine.tokenizer
        if body.messages is not None:
            messages, prompt = service.conversation(body.messages), body.add_generation_prompt
            try:
                if prompt or body.continue_final_message:
                    ids = render_prompt(tokenizer, messages, goes_on(body))
                else:
                    ids = render(tokenizer, messages)[0]
            except UsageError as error:
                raise ApiError(400, str(error), "messages") from None
        else:
            text = body.prompt or ""
            check_length(service.limits.total_chars, "prompt", len(text))
            ids = [tokenizer.special[text]] if text in tokenizer.special else tokenizer.encode(text)
            if body.add_special_tokens and ids[:1] != [tokenizer.bos]:
                ids = [tokenizer.bos, *ids]
        names = [token_name(tokenizer, token) for token in ids] if body.return_token_strs else None
        return schemas.Tokens(count=len(ids), max_model_len=card.max_model_len, tokens=ids, token_strs=names)

    @router.post("/detokenize", **admitted)
    async def detokenize(body: schemas.DetokenizeRequest) -> schemas.Detokenized:
        """Return the text of token ids, special ones by their names."""
        service.check_model(body.model)
        tokenizer = worker.engine.tokenizer
        check_ids(tokenizer, body.tokens, "tokens")
        special = {number: name.encode() for name, number in tokenizer.special.items()}
        data = b"".join(special.get(token) or tokenizer.token_bytes(token) for token in body.tokens)
        return schemas.Detokenized(prompt=data.decode(errors="replace"))

    @router.get("/tokenizer_info", **admitted)
    async def tokenizer_info() -> schemas.TokenizerInfo:
        return schemas.TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=BOS,
            eos_token=ASSISTANT_END,
            vocab_size=worker.engine.tokenizer.vocab_size,
            model_max_length=card.max_model_len,
            special_tokens=worker.engine.tokenizer.special,
        )

    @router.get("/metrics", **identified | {"responses": ERRORS | {200: {"content": {"text/plain": {}}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus; no rate limit."""
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    @router.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        """Say that there are none: clients with documents try this route by themselves."""
        raise ApiError(400, "this model makes no embeddings; set up another service for them in the client")

    @router.get("/v1/models")
    async def models() -> schemas.ModelList:
        return schemas.ModelList(data=[card])

    @router.get("/v1/models/{name:path}", responses=ERRORS)
    async def model(name: str) -> schemas.ModelCard:
        service.check_model(name)
        return card

    @router.head("/health", include_in_schema=False)
    @router.get("/health", response_model_exclude_none=True, responses={503: {"model": schemas.Health}})
    async def health(response: Response) -> schemas.Health:
        """200 where a request would be answered, else 503."""
        state = worker.state
        response.status_code = 200 if state == "ready" else 503
        compiling = worker.engine.compiling if state == "ready" else 0
        progress = worker.progress if state == "loading" else None
        return schemas.Health(status=state, progress=progress, compiling=compiling or None, page=service.page)

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
    """One connection of WS /ws/chat: a user's text or a conversation in, pieces of the answer out.

    In: plain text (one user turn), or a JSON object with "messages" and optional fields of chat completions;
    `{"stop": true}` ends the newest answer. Out: `{"token": str, "done": false}` ..., then
    `{"done": true, "finish_reason": str}`, or `{"error": {...}, "done": true}`. One answer after the other.
    """

    def __init__(self, service: Service, socket: WebSocket):
        self._service, self._socket = service, socket
        self._messages: asyncio.Queue[tuple[str | bytes, asyncio.Future[None]]] = asyncio.Queue(MAX_WAITING)

    async def run(self) -> None:
        """Receive and answer until the client leaves, which also cancels the answer under way."""
        refusal = await run_until_one_ends(self._receive(), self._answer())
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
