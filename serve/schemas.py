"""Requests and answers of the HTTP API as pydantic models: OpenAI's forms, with vLLM's extra fields.

The OpenAPI document is made from these models. A field of OpenAI's that would change the answer and is not supported is
refused; other unknown fields are ignored.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, field_validator, model_validator
from starlette.exceptions import HTTPException
from starlette.responses import Response as HttpResponse

MAX_ALTERNATIVES = 20  # of one token's log-probabilities
MAX_ANSWERS = 128  # to one prompt
MAX_MESSAGES = 500  # of one conversation
MAX_PROMPTS = 256  # in one request
MAX_STOPS = 16
MAX_STOP_TOKENS = 12
MAX_BIASES = 300
# Fields of OpenAI, vLLM and llama.cpp that would change the answer and are refused, each with the values that ask for
# nothing. `NOTHING` asks for nothing in all of them.
Refused = dict[str, tuple[Any, ...]]
NOTHING: tuple[Any, ...] = (None, False, "", [], {})
# fmt: off
UNSUPPORTED: Refused = dict.fromkeys((
    "audio", "web_search_options", "moderation", "suffix", "background", "conversation", "previous_response_id",
    "use_beam_search", "prompt_logprobs", "prompt_embeds", "truncate_prompt_tokens", "allowed_token_ids", "bad_words",
    "logits_processors", "include_stop_str_in_output", "return_tokens_as_token_ids", "return_token_ids",
    "repetition_detection", "vllm_xargs", "documents", "chat_template", "guided_grammar", "guided_whitespace_pattern",
    "json_schema", "regex", "grammar",
), ()) | {
    "tool_choice": ("none", "auto"), "function_call": ("none", "auto"), "modalities": (["text"],),
    "verbosity": ("medium",), "truncation": ("disabled",), "best_of": (1,), "repeat_penalty": (1,), "tfs_z": (1,),
    "top_a": (0,), "typical_p": (1,), "mirostat": (0,), "xtc_probability": (0,), "dry_multiplier": (0,),
    "dynatemp_range": (0,), "n_predict": (-1,), "num_predict": (-1,),
}
UNSUPPORTED_RESPONSES = UNSUPPORTED | {
    "prompt": (), "max_tokens": (), "max_completion_tokens": (), "logprobs": (), "top_logprobs": (0,), "n": (1,),
}
# fmt: on
NO_CALLS = "this model calls no functions and answers in text; leave it out, or set it to auto or none"
NOT_STORED = "nothing is stored here; send the whole conversation"
OTHER_NAME = "here its name is max_output_tokens"
REASONS = {  # why a field is refused, and what to do
    "tool_choice": NO_CALLS, "function_call": NO_CALLS, "conversation": NOT_STORED, "previous_response_id": NOT_STORED,
    "prompt": NOT_STORED, "max_tokens": OTHER_NAME, "max_completion_tokens": OTHER_NAME,
}  # fmt: skip


def not_zero(tokens: int) -> int:
    if tokens == 0:
        raise ValueError("at least 1, or -1 for as many as there may be")
    return tokens


StopText = Annotated[str, Field(max_length=256)]
TokenId = Annotated[int, Field(ge=0)]
TokenText = Annotated[str, Field(pattern="^[0-9]{1,9}$")]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Bias = Annotated[float, Field(ge=-100, le=100)]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
MaxTokens = Annotated[int, Field(ge=-1, description="-1: as many as there may be; never more than serve.max_tokens")]
AnswerTokens = Annotated[MaxTokens, AfterValidator(not_zero)]
PageState = Literal["loading", "ready", "failed"]
FinishReason = Literal["stop", "length"]


class Input(BaseModel):
    """Base of what clients send. Strings are not converted to numbers, and numbers must be finite."""

    model_config = ConfigDict(strict=True, allow_inf_nan=False)
    unsupported: ClassVar[Refused] = {}  # fields that are refused, with values that ask for nothing

    @model_validator(mode="before")
    @classmethod
    def _refuse_unsupported(cls, data: Any) -> Any:
        for name, accepted in cls.unsupported.items() if isinstance(data, dict) else ():
            if name in data and data[name] not in (*NOTHING, *accepted):
                raise ValueError(f"{name}: {REASONS.get(name, 'not supported by this service; leave it out')}")
        return data

    @field_validator("*", mode="before")
    @classmethod
    def _whole(cls, value: Any) -> Any:
        return int(value) if isinstance(value, float) and value.is_integer() else value  # 512.0, as Java and Lua write


class TextPart(Input):
    """Part of a message: text, or (an assistant's) a calculator call or its output."""

    type: Literal["text", "python", "python_output"]
    text: str


class ChatMessage(Input):
    """A message; `jaxchat.chat.normalize` says what becomes of it."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[dict[str, Any]] | None = Field(
        None, description="text, or parts of type text (an assistant's also python and python_output)"
    )
    tool_calls: list[dict[str, Any]] | None = None
    function_call: dict[str, Any] | None = None


JSON_OBJECT = {"type": "object"}


class StreamOptions(Input):
    include_usage: bool = False


class JsonSchema(Input):
    name: str | None = None
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(Input):
    """`text` constrains nothing, `json_object` asks for any JSON object."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: JsonSchema | None = None

    @model_validator(mode="after")
    def _check(self) -> ResponseFormat:
        if self.type == "json_schema" and not self.json_schema:
            raise ValueError("json_schema is missing")
        return self


class StructuredOutputs(Input):
    """What an answer must be, in vLLM's form: one of these four."""

    unsupported: ClassVar[Refused] = dict.fromkeys(
        ("grammar", "structural_tag", "whitespace_pattern", "disable_any_whitespace", "disable_additional_properties"),
        (),
    )
    json_: dict[str, Any] | str | None = Field(None, alias="json", description="a JSON Schema")
    json_object: bool | None = None
    regex: str | None = None
    choice: list[str] | None = None


class Sampling(Input):
    """Fields that chat, completions and responses share."""

    unsupported = UNSUPPORTED

    model: str | None = None
    temperature: float | None = Field(None, ge=0, le=10, description="0: the likeliest token each time")
    top_p: float | None = Field(None, ge=0, le=1, description="0: the likeliest token each time")
    top_k: int | None = Field(None, ge=-1, le=2**31 - 1, description="0 or -1: among all tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="least probability, as a share of the likeliest token's")
    repetition_penalty: float | None = Field(None, gt=0, le=10, description="of tokens in prompt and answer")
    frequency_penalty: Penalty | None = Field(None, description="taken from a token's logit each time it was generated")
    presence_penalty: Penalty | None = Field(None, description="taken from the logit of each token generated before")
    logit_bias: dict[TokenText, Bias] | None = Field(
        None, max_length=MAX_BIASES, description="added to the logits of token ids; -100 bans a token"
    )
    min_tokens: int | None = Field(None, ge=0, description="no end and no stop before")
    stop_token_ids: list[TokenId] | None = Field(None, max_length=MAX_STOP_TOKENS)
    response_format: ResponseFormat | None = None
    structured_outputs: StructuredOutputs | None = None
    guided_json: dict[str, Any] | str | None = Field(None, description="older name of structured_outputs.json")
    guided_regex: str | None = None
    guided_choice: list[str] | None = None
    skip_special_tokens: Literal[True] | None = None
    seed: int | None = Field(None, ge=-(2**63), le=2**63 - 1)
    stop: StopText | Annotated[list[StopText], Field(max_length=MAX_STOPS)] | None = None
    n: int | None = Field(None, ge=1, le=MAX_ANSWERS, description="answers to each prompt")
    ignore_eos: bool | None = Field(None, description="go on to max_tokens; for benchmarks")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @model_validator(mode="after")
    def _check_sampling(self) -> Sampling:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options: only where stream is true")
        self.constraint()
        return self

    def constraint(self) -> tuple[str, str, Any] | None:
        """Return (field, kind, value) of what the answer must be; kind and value as `Engine.constraint` takes them."""
        format = self.response_format or ResponseFormat(type="text")
        schemas = {"json_object": JSON_OBJECT, "json_schema": format.json_schema and format.json_schema.schema_}
        other = self.structured_outputs or StructuredOutputs(json=None)
        wanted = [
            ("response_format", "json", schemas.get(format.type)),
            ("structured_outputs", "json", JSON_OBJECT if other.json_object else other.json_),
            ("structured_outputs", "regex", other.regex),
            ("structured_outputs", "choice", other.choice),
            ("guided_json", "json", self.guided_json),
            ("guided_regex", "regex", self.guided_regex),
            ("guided_choice", "choice", self.guided_choice),
        ]
        given = [one for one in wanted if one[2] is not None]
        if len(given) > 1:
            raise ValueError(f"{given[1][0]}: an answer can have one constraint, and {given[0][0]} gives one already")
        return given[0] if given else None


class ChatRequest(Sampling):
    messages: list[ChatMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_tokens: AnswerTokens | None = None
    max_completion_tokens: AnswerTokens | None = Field(None, description="the newer name of max_tokens")
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES)
    continue_final_message: bool | None = Field(
        None, description="go on with the last message; without it, where that is an assistant's"
    )
    add_generation_prompt: bool | None = Field(None, description="the opposite of continue_final_message")
    echo: Literal[False] | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="accepted; the model answers in text")
    functions: list[dict[str, Any]] | None = Field(None, description="the older form of tools")

    @model_validator(mode="after")
    def _check(self) -> ChatRequest:
        last, asked = self.messages[-1].role, self.continue_final_message
        if self.add_generation_prompt == (last == "assistant" if asked is None else asked):
            raise ValueError("add_generation_prompt: must be the opposite of continue_final_message")
        if self.top_logprobs and not self.logprobs:
            raise ValueError("top_logprobs: only where logprobs is true")
        if None not in (self.max_tokens, self.max_completion_tokens) and self.max_tokens != self.max_completion_tokens:
            raise ValueError("max_tokens: differs from max_completion_tokens; give one of them")
        return self


class CompletionRequest(Sampling):
    prompt: (
        str
        | TokenIds
        | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS)]
        | Annotated[list[list[TokenId]], Field(min_length=1, max_length=MAX_PROMPTS)]
    ) = Field(description="a text, several texts, token ids, or several lists of them")
    max_tokens: MaxTokens | None = Field(None, description="0, together with echo, only scores the prompt")
    echo: bool | None = Field(None, description="return the prompt before the answer, with its logprobs")
    logprobs: int | None = Field(None, ge=0, le=MAX_ALTERNATIVES, description="alternatives reported with each token")

    @model_validator(mode="after")
    def _check(self) -> CompletionRequest:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 only together with echo")
        return self


class TextConfig(Input):
    unsupported = {"verbosity": ("medium",)}
    format: dict[str, Any] | None = Field(None, description="as response_format: text, json_object or json_schema")


class ResponsesRequest(Sampling):
    """OpenAI's Responses for text, with the sampling fields of chat completions."""

    unsupported = UNSUPPORTED_RESPONSES

    input: str | Annotated[list[dict[str, Any]], Field(min_length=1, max_length=MAX_MESSAGES)] = Field(
        description="a user's text, or items: messages, function_call, function_call_output"
    )
    instructions: str | None = Field(None, description="a system message before the input")
    max_output_tokens: AnswerTokens | None = None
    text: TextConfig | None = None
    tools: list[dict[str, Any]] | None = Field(None, description="accepted; the model answers in text")
    tool_choice: Literal["none", "auto"] | None = None
    metadata: dict[str, str] | None = Field(None, description="returned with the answer")
    include: list[str] | None = None
    store: bool | None = Field(None, description="nothing is stored")

    @model_validator(mode="after")
    def _check(self) -> ResponsesRequest:
        if "message.output_text.logprobs" in (self.include or ()):
            raise ValueError("include: log-probabilities are to be had from /v1/chat/completions")
        return self

    def format(self) -> dict[str, Any]:
        """Return the form of the answer's text, {"type": "text"} where nothing else is asked for."""
        return self.text.format if self.text and self.text.format else {"type": "text"}


class TokenizeRequest(Input):
    """A text, or a conversation as the model sees it."""

    model: str | None = None
    prompt: str | None = None
    messages: list[ChatMessage] | None = Field(None, min_length=1, max_length=MAX_MESSAGES)
    add_special_tokens: bool = Field(True, description="begin with the token that begins every document")
    add_generation_prompt: bool = Field(True, description="end a conversation with what opens the answer")
    continue_final_message: bool | None = Field(None, description="leave the assistant's message at the end open")
    return_token_strs: bool | None = None

    @model_validator(mode="after")
    def _check(self) -> TokenizeRequest:
        if (self.prompt is None) == (self.messages is None):
            raise ValueError("prompt: give either prompt or messages")
        return self


class DetokenizeRequest(Input):
    model: str | None = None
    tokens: list[TokenId]


REQUESTS = (
    TextPart, ChatMessage, StreamOptions, JsonSchema, ResponseFormat, StructuredOutputs, ChatRequest, CompletionRequest,
    TextConfig, ResponsesRequest, TokenizeRequest, DetokenizeRequest,
)  # fmt: skip
FIELDS = {field.alias or name for model in REQUESTS for name, field in model.model_fields.items()}


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


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
    parts: list[TextPart] | None = None


class Delta(BaseModel):
    role: Literal["assistant"] | None = None
    content: str | None = None
    parts: list[TextPart] | None = None


class ChatChoice(BaseModel):
    index: int
    message: AnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatChunkChoice(BaseModel):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason | None


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


class Answer(BaseModel):
    """What all forms of an answer share."""

    id: str
    created: int
    model: str


class ChatCompletion(Answer):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]
    usage: Usage


class ChatChunk(Answer):
    """One event of a stream; after the last one comes `data: [DONE]`."""

    object: Literal["chat.completion.chunk"]
    choices: list[ChatChunkChoice]
    usage: Usage | None = None


class Completion(Answer):
    """An answer, and one event of a stream; the events' usage is null but in the last."""

    object: Literal["text_completion"]
    choices: list[CompletionChoice]
    usage: Usage | None = None


class ErrorDetail(BaseModel):
    message: str
    type: str
    param: str | None
    code: str | None


class OutputText(BaseModel):
    type: Literal["output_text"]
    text: str
    annotations: list[Any]
    logprobs: list[Any]


class OutputMessage(BaseModel):
    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    status: Literal["in_progress", "completed", "incomplete"]
    content: list[OutputText]
    parts: list[TextPart] | None = None


class ResponseUsage(BaseModel):
    input_tokens: int
    input_tokens_details: dict[str, int]
    output_tokens: int
    output_tokens_details: dict[str, int]
    total_tokens: int


class Response(BaseModel):
    """An answer in the form of OpenAI's Responses, with what was asked for."""

    id: str
    object: Literal["response"]
    created_at: int
    model: str
    status: Literal["in_progress", "completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    output: list[OutputMessage]
    usage: ResponseUsage | None
    instructions: str | None
    max_output_tokens: int | None
    metadata: dict[str, str] | None
    temperature: float
    top_p: float
    text: dict[str, Any]
    tools: list[dict[str, Any]]
    tool_choice: str
    parallel_tool_calls: bool
    store: Literal[False]


class ResponseEvent(BaseModel):
    """One event of a stream. `type` says which of OpenAI's fields it has besides."""

    model_config = ConfigDict(extra="allow")

    type: str
    sequence_number: int


class ModelCard(BaseModel):
    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "jaxchat"
    max_model_len: int


class ModelList(BaseModel):
    object: Literal["list"] = "list"
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
    progress: str | None = Field(None, description="of loading")
    compiling: int | None = Field(None, description="programs left; a request that needs one of them waits for it")
    page: PageState = Field(description="the chat page; failed: the console says why, the API answers")


class ErrorBody(BaseModel):
    error: ErrorDetail


ERRORS: dict[int | str, dict[str, Any]] = {
    "4XX": {"model": ErrorBody, "description": "`param` names the field that is wrong; 429 has Retry-After"},
    503: {"model": ErrorBody, "description": "Loading, draining or stopped"},
}
ERROR_TYPES = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
ERROR_CODES = {
    401: "invalid_api_key", 404: "not_found", 405: "method_not_allowed", 413: "body_too_large",
    429: "rate_limit_exceeded",
}  # fmt: skip


class ApiError(HTTPException):
    """An error answer. An HTTPException, so that FastAPI passes it on wherever it is raised."""

    def __init__(
        self, status: int, message: str, param: str | None = None, code: str | None = None, *,
        retry_seconds: float | None = None, headers: dict[str, str] | None = None,
    ):  # fmt: skip
        if retry_seconds is not None:
            headers = {"Retry-After": str(math.ceil(retry_seconds))}
        super().__init__(status, message, headers)
        self.param, self.code = param, code or ERROR_CODES.get(status)

    def body(self) -> ErrorBody:
        kind = ERROR_TYPES.get(self.status_code, "invalid_request_error" if self.status_code < 500 else "server_error")
        return ErrorBody(error=ErrorDetail(message=self.detail, type=kind, param=self.param, code=self.code))

    def response(self) -> HttpResponse:
        return HttpResponse(self.body().model_dump_json(), self.status_code, self.headers, "application/json")


def bad_request(param: str | None, message: str, code: str | None = None) -> ApiError:
    return ApiError(400, f"{param}: {message}" if param else message, param, code)
