"""What clients get: the shapes of the answers, for the OpenAPI document. The routes write them as plain dicts."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel

FinishReason = Literal["stop", "length"]


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class ErrorBody(BaseModel):
    error: ErrorDetail


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class Part(BaseModel):
    type: Literal["text", "python", "python_output"]
    text: str


class TopLogprob(BaseModel):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(TopLogprob):
    top_logprobs: list[TopLogprob]


class ChatLogprobs(BaseModel):
    content: list[TokenLogprob]
    refusal: None


class AnswerMessage(BaseModel):
    role: Literal["assistant"]
    content: str
    refusal: None
    parts: list[Part] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(BaseModel):
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    parts: list[Part] | None = None


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


class ChatChunk(BaseModel):
    """What follows `data: ` in a stream; after the last one comes `data: [DONE]`."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class CompletionLogprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: FinishReason | None


class Completion(BaseModel):
    """An answer; in a stream each chunk has this form too, and its usage is null but in the last."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Tokens(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class Detokenized(BaseModel):
    prompt: str


class TokenizerInfo(BaseModel):
    tokenizer_class: str
    vocab_size: int
    bos_token: str
    eos_token: str
    special_tokens: dict[str, int]
    model_max_length: int


class Health(BaseModel):
    status: Literal["ready", "loading", "draining", "dead"]
    progress: str | None = None
    compiling: int | None = None


def errors(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for the OpenAPI document."""
    words = {
        400: "Something in the request is wrong; `param` names it",
        401: "No valid API key",
        404: "No such model",
        413: "The body is too large",
        429: "The queue is full, or too many requests a minute; Retry-After says when to come again",
        503: "Loading, draining or stopped",
    }
    return {status: {"model": ErrorBody, "description": words[status]} for status in statuses}


def streamed(model: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The two forms of a 200: one object, or events."""
    parts = [{"$ref": f"#/components/schemas/{name}"} for name in (model.__name__, "ErrorBody")]
    # an error where the engine fails in the middle of an answer
    text = {"type": "string", "contentMediaType": "application/json", "contentSchema": {"anyOf": parts}}
    data = {"anyOf": [{"const": "[DONE]"}, text]}
    event = {"itemSchema": {"type": "object", "properties": {"data": data}, "required": ["data"]}}
    return {
        200: {"description": "One object, or with `stream` server-sent events", "content": {"text/event-stream": event}}
    }
