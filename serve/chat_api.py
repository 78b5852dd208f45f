"""POST /v1/chat/completions: a conversation in, answers out, whole or as they are made."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from jaxchat.engine import Event, Token
from jaxchat.errors import UsageError
from serve.errors import ApiError, as_api_error, too_long
from serve.limits import check_messages
from serve.logprobs import Namer, chat_logprobs
from serve.replies import ChatChunk, ChatCompletion, errors, streamed
from serve.schemas import ChatRequest, conversation
from serve.service import Call, Service, seeds
from serve.sse import DONE, EventStream, event, until_gone
from serve.worker import Group


def routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], dependencies=[Depends(service.allow)])

    @router.post(
        "/v1/chat/completions",
        response_model=ChatCompletion,
        responses=errors(400, 401, 404, 413, 429, 503) | streamed(ChatChunk),
    )
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation that ends with a user's message."""
        service.check_model(body.model)
        service.worker.check()
        call = service.call(request, "chatcmpl")
        groups = [prepare(service, body, call)]
        chat = Chat(service, call, body)
        headers = {"X-Request-ID": call.id}
        if body.stream:
            await until_gone(request.receive, call.submit(groups))
            return EventStream(chat.stream(), call.end, headers)
        whole = await until_gone(request.receive, chat.whole(groups))
        return Response(orjson.dumps(whole), 200, headers, "application/json")

    return router


def prepare(service: Service, body: ChatRequest, call: Call) -> Group:
    """The conversation as the engine takes it, and a seed for each answer. `ApiError` for one that it cannot take."""
    messages = [message.plain() for message in body.messages]
    check_messages(service.limits, messages)
    call.note_text(lambda: messages)
    wanted = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    settings = service.settings(body, wanted, call.client)
    if body.ignore_eos:
        settings["stop"] = ()
    if body.logprobs:
        settings["logprobs"] = body.top_logprobs or 0
    try:
        request = service.worker.engine.chat_request(conversation(messages), **settings)
    except UsageError as error:
        raise ApiError(400, str(error), "messages") from None
    if len(request.tokens) > service.worker.engine.capacity:
        raise too_long("messages", len(request.tokens), service.worker.engine.capacity)
    return request, seeds(body.seed, body.n or 1)


class Chat:
    """The answers to one request as OpenAI writes them.

    A calculator call is no text: it and its output stand in `parts`, which OpenAI's clients pass over.
    """

    def __init__(self, service: Service, call: Call, body: ChatRequest):
        self._service, self._call = service, call
        self._namer = Namer(service.worker.engine.tokenizer)
        self._count = (body.top_logprobs or 0) if body.logprobs else None
        self._usage = bool(body.stream_options and body.stream_options.include_usage)

    def _logprobs(self, tokens: Sequence[Token]) -> dict[str, Any] | None:
        return None if self._count is None else chat_logprobs(self._namer, tokens, self._count)

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._call.id, "object": kind, "created": self._call.created, "model": self._service.model}

    async def whole(self, groups: Sequence[Group]) -> dict[str, Any]:
        """All answers, once all are done."""
        try:
            answers = await self._call.submit(groups)
            tokens: list[list[Token]] = [[] for _ in answers.handles]
            async for pieces in answers:
                for number, piece in pieces:
                    tokens[number] += piece.tokens
            choices = []
            for number, handle in enumerate(answers.handles):
                result = handle.result()
                self._call.note_text(lambda: result.text)  # noqa: B023  # asked at once
                message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
                if any(part["type"] != "text" for part in result.parts):
                    message["parts"] = result.parts
                choice = {"index": number, "message": message, "logprobs": self._logprobs(tokens[number])}
                choices.append(choice | {"finish_reason": result.finish_reason})
            return self._head("chat.completion") | {"choices": choices, "usage": self._call.usage()}
        finally:
            self._call.end()

    async def stream(self) -> AsyncIterator[bytes]:
        """Events, those of one chunk of the engine in one block; the request is submitted already."""
        head, begun = self._head("chat.completion.chunk"), set[int]()
        if self._usage:
            head["usage"] = None
        try:
            assert self._call.answers
            async for pieces in self._call.answers:
                block = []
                for number, piece in pieces:
                    if number not in begun:
                        begun.add(number)
                        role = {"role": "assistant", "content": ""}
                        block.append(self._event(head, number, role, None, None))
                    block.append(self._piece(head, number, piece))
                yield b"".join(block)
            if self._usage:
                yield event(head | {"choices": [], "usage": self._call.usage()})
        except Exception as error:  # the answer has begun: an error can only be one of its events
            yield event(as_api_error(error).body())
        finally:
            self._call.note_text(lambda: [handle.result().text for handle in self._call.handles])
            self._call.end()
        yield DONE

    def _piece(self, head: dict[str, Any], number: int, piece: Event) -> bytes:
        logprobs = self._logprobs(piece.tokens)
        if piece.kind == "done":
            return self._event(head, number, {}, logprobs if piece.tokens else None, piece.finish_reason)
        if piece.kind == "text":
            return self._event(head, number, {"content": piece.text}, logprobs, None)
        parts = [{"type": piece.kind, "text": piece.text}]
        return self._event(head, number, {"parts": parts}, logprobs, None)

    @staticmethod
    def _event(head: dict[str, Any], number: int, delta: dict[str, Any], logprobs: Any, reason: str | None) -> bytes:
        choice = {"index": number, "delta": delta, "logprobs": logprobs, "finish_reason": reason}
        return event(head | {"choices": [choice]})
