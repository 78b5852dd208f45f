"""OpenAI's Responses for text: a chat completion in another form, whole or as events. Nothing is stored."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any

from pydantic import ValidationError

from . import schemas
from .completions import ChatCall
from .schemas import ApiError, ChatRequest, ResponsesRequest, Sampling, bad_request
from .service import Service, as_api_error


class ResponsesCall(ChatCall):
    """An answer to the items of a conversation."""

    def __init__(self, service: Service, client: str, log_fields: dict[str, Any] | None, body: ResponsesRequest):
        super().__init__(service, client, log_fields, chat_request(body))
        self.id = self.id.replace("chatcmpl-", "resp_")
        self.log["id"], self._asked, self._events = self.id, body, 0
        self._status: Any = "in_progress"  # as far as the client knows: the engine is ahead of the stream
        try:
            self._response().model_dump_json()
        except ValueError:  # before a stream has begun
            fields = "metadata, instructions, tools or text"
            raise ApiError(400, f"{fields}: nested too deeply, or with half a character") from None

    async def collect(self) -> schemas.Response:
        """Return the answer, once it is finished."""
        await self.begin()
        async for _ in self.answers:
            pass
        self._finish()
        return self._response()

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield the events that OpenAI's client reads; the request is submitted already."""
        part = {"output_index": 0, "content_index": 0, "item_id": f"msg_{self.id}"}
        try:
            yield self._event("response.created", response=self._response())
            yield self._event("response.in_progress", response=self._response())
            yield self._event("response.output_item.added", output_index=0, item=self._message())
            yield self._event("response.content_part.added", **part, part=output_text(""))
            async for events in self.answers:
                texts = (event.text for _, event in events if event.kind == "text")
                delta = "response.output_text.delta"
                yield b"".join(self._event(delta, **part, delta=text, logprobs=[]) for text in texts)
            self._finish()
            message = self._message()
            text = message.content[0]
            yield self._event("response.output_text.done", **part, text=text.text, logprobs=[])
            yield self._event("response.content_part.done", **part, part=text)
            yield self._event("response.output_item.done", output_index=0, item=message)
            response = self._response()
            yield self._event(f"response.{response.status}", response=response)
        except Exception as error:  # the status has been sent; `error` makes OpenAI's client raise it
            detail = as_api_error(error).body().error
            yield self._event("error", message=detail.message, code=detail.code, param=detail.param, error=detail)

    def _event(self, kind: str, **fields: Any) -> bytes:
        event = schemas.ResponseEvent(type=kind, sequence_number=self._events, **fields)
        self._events += 1
        return f"event: {kind}\ndata: {event.model_dump_json(exclude_unset=True)}\n\n".encode()

    def _finish(self) -> None:
        self._status = "incomplete" if self.answers.handles[0].finish_reason == "length" else "completed"

    def _message(self) -> schemas.OutputMessage:
        """Return the answer as an item; it has no content yet where it is announced."""
        handle, status = self.answers.handles[0], self._status
        ended = status != "in_progress"
        content = [output_text(handle.text)] if ended else []
        more: dict[str, Any] = {"parts": parts} if ended and (parts := self.calculator_parts(handle)) else {}
        head: dict[str, Any] = {"id": f"msg_{self.id}", "type": "message", "role": "assistant"}
        return schemas.OutputMessage(**head, status=status, content=content, **more)

    def _response(self) -> schemas.Response:
        asked, limits, status, usage = self._asked, self.service.limits, self._status, None
        if status != "in_progress":
            made, cached = self.usage(), self.answers.handles[0].reused
            usage = schemas.ResponseUsage(
                input_tokens=made.prompt_tokens, output_tokens=made.completion_tokens, total_tokens=made.total_tokens,
                input_tokens_details={"cached_tokens": cached, "cache_write_tokens": 0},
                output_tokens_details={"reasoning_tokens": 0},
            )  # fmt: skip
        return schemas.Response(
            id=self.id, object="response", created_at=self.created, model=self.service.model, status=status, error=None,
            incomplete_details={"reason": "max_output_tokens"} if status == "incomplete" else None,
            output=[self._message()] if usage else [], usage=usage, instructions=asked.instructions,
            max_output_tokens=asked.max_output_tokens, metadata=asked.metadata, text={"format": asked.format()},
            temperature=limits.temperature if asked.temperature is None else asked.temperature,
            top_p=1.0 if asked.top_p is None else asked.top_p, tools=asked.tools or [],
            tool_choice=asked.tool_choice or "auto", parallel_tool_calls=True, store=False,
        )  # fmt: skip


@contextlib.contextmanager
def own_names() -> Iterator[None]:
    """Let errors name the fields of a response, not those of the chat completion that it becomes."""
    try:
        yield
    except (ApiError, ValidationError) as raised:
        error = as_api_error(raised)
        for of_chat, own in (("messages", "input"), ("response_format", "text.format")):
            error.param = own if (error.param or "").startswith(of_chat) else error.param
        error.detail = error.detail.replace("response_format", "text.format", 1)
        raise error from None


def output_text(text: str) -> schemas.OutputText:
    return schemas.OutputText(type="output_text", text=text, annotations=[], logprobs=[])


def chat_request(body: ResponsesRequest) -> ChatRequest:
    """Return the same request as a chat completion. `ApiError` 400 names the item that cannot be used."""
    messages: list[dict[str, Any]] = []
    if body.instructions:
        messages.append({"role": "system", "content": body.instructions})
    items = [{"role": "user", "content": body.input}] if isinstance(body.input, str) else body.input
    for number, item in enumerate(items):
        match item.get("type") or "message":
            case "message":
                messages.append({"role": item.get("role"), "content": item.get("content")})
            case "function_call":
                call = {"name": item.get("name"), "arguments": item.get("arguments")}
                messages.append({"role": "assistant", "tool_calls": [{"function": call}]})
            case "function_call_output":
                messages.append({"role": "tool", "content": item.get("output")})
            case "reasoning":  # of another model; nothing that was said
                pass
            case "item_reference":
                raise bad_request(f"input[{number}]", "no item is stored here; send the item itself")
            case kind:
                raise bad_request(f"input[{number}]", f"this model reads text only, not an item of type {kind!r}")
    if not messages:
        raise bad_request("input", "no message")
    fields = body.model_dump(include=set(Sampling.model_fields), exclude_none=True, by_alias=True)
    form = body.format()
    if form.get("type") == "json_schema":
        form = {"type": "json_schema", "json_schema": {name: form.get(name) for name in ("name", "schema")}}
    if form.get("type") != "text":
        fields["response_format"] = form
    return ChatRequest.model_validate(
        fields | {"messages": messages, "max_completion_tokens": body.max_output_tokens, "n": 1}
    )
