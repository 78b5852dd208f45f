"""What clients get: the shapes of the answers, for the OpenAPI document. The routes write them as plain dicts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

# What clients send: OpenAI's requests, with top_k, min_p and repetition_penalty as vLLM knows them.
#
# Numbers are checked here and lengths in `limits.py`. A field that would change the answer and is not there to be had
# is refused, not ignored; other unknown fields are ignored, as other servers do.


MAX_ALTERNATIVES = 20  # of one token's probabilities
MAX_ANSWERS = 128  # to one prompt
MAX_PROMPTS = 256  # of one request
MAX_STOPS = 16
# fields of OpenAI's that are understood only where they ask for nothing
NOTHING: dict[str, tuple[Any, ...]] = {
    "tools": (None, []),
    "functions": (None, []),
    "tool_choice": (None, "none", "auto"),
    "response_format": (None, {"type": "text"}),
    "logit_bias": (None, {}),
    "presence_penalty": (None, 0),
    "frequency_penalty": (None, 0),
    "modalities": (None, ["text"]),
    "audio": (None,),
    "suffix": (None, ""),
    "best_of": (None, 1),
}

StopText = Annotated[str, Field(min_length=1, max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
Strict = ConfigDict(strict=True, allow_inf_nan=False)


class TextPart(BaseModel):
    """A piece of a message: text, or (an assistant's) a call of the calculator and its output."""

    model_config = Strict
    type: Literal["text", "python", "python_output"]
    text: str


class ChatMessage(BaseModel):
    model_config = Strict
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[TextPart] | None = Field(description="null, an empty text, is for the assistant alone")

    @model_validator(mode="after")
    def _said(self) -> ChatMessage:
        if self.content is None and self.role != "assistant":
            raise ValueError("content: must be text")
        return self

    def plain(self) -> dict[str, Any]:
        """Role (system, user or assistant) and parts."""
        parts = self.content if isinstance(self.content, list) else [TextPart(type="text", text=self.content or "")]
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": [part.model_dump() for part in parts]}


def conversation(messages: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Plain messages as `text/chat.py` takes them: user and assistant in turn, a system message at the start alone.

    Neighbours of one role become one message with an empty line between; a later system message is said by the user.
    """
    found: list[dict[str, Any]] = []
    for role, parts in ((message["role"], message["content"]) for message in messages):
        if role == "system" and any(before["role"] != "system" for before in found):
            role = "user"
        if found and found[-1]["role"] == role:
            found[-1]["content"] += [{"type": "text", "text": "\n\n"}, *parts]
        else:
            found.append({"role": role, "content": list(parts)})
    return found


class StreamOptions(BaseModel):
    model_config = Strict
    include_usage: bool = False


class Sampling(BaseModel):
    """How tokens are chosen; what chat and completions share."""

    model_config = Strict
    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=10, description="0: the likeliest token each time")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: among all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="least probability, as a share of the likeliest token's")
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="answers to each prompt")
    ignore_eos: bool | None = Field(None, description="go on to max_tokens; for benchmarks")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, description="taken and not used")

    @model_validator(mode="before")
    @classmethod
    def _nothing_unheard(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for name, empty in NOTHING.items():
                if name in data and name not in cls.model_fields and data[name] not in empty:
                    raise ValueError(f"{name}: not supported by this service")
            if data.get("stream_options") is not None and not data.get("stream"):
                raise ValueError("stream_options: only where stream is true")
        return data

    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)

    @model_validator(mode="after")
    def _whole(self) -> ChatRequest:
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only where logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        return self


class CompletionRequest(Sampling):
    prompt: (
        str
        | Annotated[list[TokenId], Field(min_length=1)]
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[Annotated[list[TokenId], Field(min_length=1)]], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="a text, several texts, token ids, or several lists of them")
    max_tokens: int | None = Field(None, ge=0, description="0, together with echo, only scores the prompt")
    echo: bool | None = Field(None, description="give the prompt back before the answer, with its logprobs")
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES, description="alternatives reported with each token")

    @model_validator(mode="after")
    def _whole(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only together with echo")
        return self


class TokenizeRequest(BaseModel):
    """A text, or a conversation as the model is shown it."""

    model_config = Strict
    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1)
    add_special_tokens: bool = Field(True, description="begin with the token that begins every document")
    add_generation_prompt: bool = Field(True, description="end a conversation with what opens the answer")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _one_of_both(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(BaseModel):
    model_config = Strict
    model: str | None = None
    tokens: list[TokenId]


FIELDS = {
    name
    for model in (
        TextPart, ChatMessage, StreamOptions, ChatRequest, CompletionRequest, TokenizeRequest, DetokenizeRequest,
    )
    for name in model.model_fields
}  # fmt: skip


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
