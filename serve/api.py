"""The HTTP routes: OpenAI's completions and models, vLLM's token routes, health and metrics."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import logging
import math
import secrets
import time
from collections.abc import AsyncIterator, Sequence
from typing import Any, ClassVar, cast

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.responses import StreamingResponse

from jaxchat.chat import render, render_prompt
from jaxchat.config import Config
from jaxchat.engine import Engine, Event, QueueFull, Token
from jaxchat.engine import Request as Prompt
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.tokenizer import ASSISTANT_END, BOS, Tokenizer

from . import schemas
from .limits import Clients
from .metrics import Metrics
from .schemas import ERRORS, ApiError, ChatMessage, ChatRequest, CompletionRequest, Sampling, bad_request
from .worker import Answers, ContextExceeded, Group, Unavailable, Worker

log = logging.getLogger("jaxchat.serve")
MAX_SCORING = 64  # requests whose texts wait to be scored
SCORED_AT_ONCE = 8  # prompts; running answers go on between two such batches
RETRY_SECONDS = 1  # after which a client may try again where the queue is full or the model still loads
DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "One object, or server-sent events where `stream` is true",
        "content": {"text/event-stream": {}},
    }
}


class Service:
    """One model with everything the routes and the page need: engine, clients, metrics."""

    def __init__(self, config: Config, worker: Worker):
        self.config, self.limits, self.worker = config, config.serve, worker
        self.model = config.serve.model_name or config.tier
        self.clients, self.metrics = Clients(config.serve), Metrics(worker, self.model)
        self.answering = 0  # requests under way
        self.scoring = 0  # requests whose texts are scored or wait for it
        self.scores = asyncio.Lock()  # one batch at a time

    async def identify(self, connection: HTTPConnection) -> None:
        """Check the key; `connection.state.client` is the client's name."""
        address = connection.client.host if connection.client else ""
        connection.state.client = self.clients.identify(connection.headers.get("authorization"), address)

    async def admit(self, connection: HTTPConnection) -> None:
        """Check the key and the rate."""
        await self.identify(connection)
        self.clients.count(connection.state.client)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            shown = name[:100].encode("utf-8", "replace").decode()  # no lone surrogates
            raise ApiError(404, f"the model {shown!r} is not here; {self.model!r} is", "model", "model_not_found")

    def conversation(self, messages: Sequence[ChatMessage]) -> list[dict[str, Any]]:
        """Return messages as `jaxchat.chat` takes them: user and assistant in turn, system only at the start.

        Neighbours of one role become one message with an empty line between; a later system message becomes the
        user's. `ApiError` 400 names the first limit that the conversation exceeds.
        """
        merged: list[dict[str, Any]] = []
        total = 0
        for i, message in enumerate(messages):
            parts = message.parts()
            size = sum(len(part["text"]) for part in parts)
            total += size
            check_length(self.limits.message_chars, f"messages[{i}].content", size)
            role = "system" if message.role == "developer" else message.role
            if role == "system" and any(before["role"] != "system" for before in merged):
                role = "user"
            if merged and merged[-1]["role"] == role:
                merged[-1]["content"] += [{"type": "text", "text": "\n\n"}, *parts]
            else:
                merged.append({"role": role, "content": parts})
        check_length(self.limits.total_chars, "messages", total)
        return merged


class Call:
    """One request for answers: its id, its answers, its log line and its share of the metrics.

    It must be closed, whatever happens.
    """

    def __init__(self, service: Service, client: str, kind: str, log_fields: dict[str, Any] | None = None):
        self.service, self.client = service, client
        self.engine: Engine = service.worker.engine
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.answers, self.prompt_tokens = Answers(), 0
        self.log = {} if log_fields is None else log_fields
        self.log |= {"id": self.id, "client": client}

    async def submit(self, groups: Sequence[Group]) -> None:
        """Queue the answers. Raises what the engine raises, and `ApiError` 400 for more than could ever wait."""
        limits, count = self.service.limits, sum(len(seeds) for _, seeds in groups)
        if count > (most := limits.queue_length + limits.slots):
            raise bad_request("n", f"{count} answers in one request; at most {most} (serve.queue_length, serve.slots)")
        self.answers = await self.service.worker.submit(groups)
        self.prompt_tokens = sum(len(request.tokens) for request, _ in groups)

    def log_text(self, text: Any) -> None:
        if self.service.limits.log_text:
            self.log.setdefault("text", []).append(text)

    def close(self) -> None:
        """Free the slots and record the figures."""
        handles = self.answers.handles
        self.service.worker.cancel(self.answers)
        self.log_text([handle.result().text for handle in handles])
        self.service.metrics.finished(handles, self.prompt_tokens)
        first = min((h.first_token for h in handles if h.first_token), default=None)
        self.log |= {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(handle.made for handle in handles),
            "finish": [handle.finish_reason or "cancelled" for handle in handles],
            "first_token_seconds": round(first - handles[0].submitted, 4) if first else None,
        }


class Completion(Call):
    """A call that is answered in one of OpenAI's forms: `collect` writes one object, `stream` server-sent events."""

    kind: ClassVar[str]
    chunk_kind: ClassVar[str]
    whole: ClassVar[Any]  # the model of the object
    chunk: ClassVar[Any]  # the model of an event
    body: Sampling
    count: int  # answers

    async def begin(self) -> None:
        """Submit the request."""
        raise NotImplementedError

    def choice(self, number: int, events: Sequence[Event], whole: bool) -> BaseModel | None:
        """Return an answer or, unless `whole`, the part of its stream for these events; none of them: its opening."""
        raise NotImplementedError

    def settings(self, max_tokens: int | None) -> dict[str, Any]:
        """Return fields of the engine's `Request`. `ApiError` 400 for more tokens than `serve.max_tokens`."""
        body, limits = self.body, self.service.limits
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise bad_request("max_tokens", f"at most {limits.max_tokens}, not {max_tokens}")
        return {
            "max_tokens": limits.max_tokens if max_tokens is None else max_tokens,
            "temperature": limits.temperature if body.temperature is None else body.temperature,
            "top_k": limits.top_k if body.top_k is None else max(body.top_k, 0),
            "top_p": body.top_p or 1.0,
            "min_p": body.min_p or 0.0,
            "repetition_penalty": body.repetition_penalty or 1.0,
            "seed": body.seed,
            "stop_texts": (body.stop,) if isinstance(body.stop, str) else tuple(body.stop or ()),
            "client": self.client,
        } | ({"stop": ()} if body.ignore_eos else {})

    def seeds(self) -> list[int | None]:
        """Return a seed for each answer to a prompt. The first is the given one, whatever n is."""
        seed, n = self.body.seed, self.body.n or 1
        if seed is None:
            return [None] * n
        more = (hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=4).digest() for i in range(1, n))
        return [seed % 2**32, *(int.from_bytes(digest) for digest in more)]

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.model}

    def usage(self) -> schemas.Usage:
        made = sum(handle.made for handle in self.answers.handles)
        total = self.prompt_tokens + made
        return schemas.Usage(prompt_tokens=self.prompt_tokens, completion_tokens=made, total_tokens=total)

    async def collect(self) -> BaseModel:
        """Return all answers, once all are finished."""
        await self.begin()
        answers: list[list[Event]] = [[] for _ in range(self.count)]
        async for events in self.answers:
            for number, event in events:
                answers[number].append(event)
        choices = [self.choice(number, events, True) for number, events in enumerate(answers)]
        return self.whole(**self.head(self.kind), choices=choices, usage=self.usage())

    async def stream(self) -> AsyncIterator[bytes]:
        """Yield server-sent events, those of one decoded chunk in one block; the request is submitted already."""
        include_usage = self.body.stream_options and self.body.stream_options.include_usage
        head = self.head(self.chunk_kind) | ({"usage": None} if include_usage else {})

        def chunk(number: int, events: Sequence[Event]) -> bytes:
            choice = self.choice(number, events, False)
            return server_sent(self.chunk(**head, choices=[choice])) if choice else b""

        try:
            if openings := b"".join(chunk(number, []) for number in range(self.count)):
                yield openings
            async for events in self.answers:
                yield b"".join(chunk(number, [event]) for number, event in events)
            if include_usage:
                yield server_sent(self.chunk(**head | {"usage": self.usage()}, choices=[]))
        except Exception as error:  # the status has been sent; the error can only be an event
            yield server_sent(as_api_error(error).body())
        yield DONE


class ChatCall(Completion):
    """Answers to a conversation. Calculator calls stand in `parts`, which OpenAI's clients ignore."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    whole, chunk = schemas.ChatCompletion, schemas.ChatChunk
    body: ChatRequest

    def __init__(self, service: Service, client: str, log_fields: dict[str, Any] | None, body: ChatRequest):
        super().__init__(service, client, "chatcmpl", log_fields)
        self.body, self.count = body, body.n or 1
        self._alternatives = (body.top_logprobs or 0) if body.logprobs else None
        messages = service.conversation(body.messages)
        self.log_text(messages)
        settings = self.settings(body.max_completion_tokens if body.max_tokens is None else body.max_tokens)
        try:
            self._request = self.engine.chat_request(messages, **settings, logprobs=self._alternatives)
        except UsageError as error:
            raise ApiError(400, str(error), "messages") from None
        check_fits(self.engine, self._request.tokens, "messages")

    async def begin(self) -> None:
        await self.submit([(self._request, self.seeds())])

    def choice(self, number: int, events: Sequence[Event], whole: bool) -> BaseModel:
        logprobs = self._logprobs(events)
        if whole:
            result = self.answers.handles[number].result()
            reason: Any = result.finish_reason
            message = schemas.AnswerMessage(role="assistant", content=result.text, refusal=None)
            if any(part["type"] != "text" for part in result.parts):
                message.parts = [schemas.TextPart.model_validate(part) for part in result.parts]
            return schemas.ChatChoice(index=number, message=message, logprobs=logprobs, finish_reason=reason)
        delta, reason = schemas.Delta(), None
        if not events:
            delta = schemas.Delta(role="assistant", content="")
        for event in events:
            reason = event.finish_reason
            if event.kind == "text":
                delta.content = event.text
            elif event.kind != "done":
                delta.parts = [schemas.TextPart(type=event.kind, text=event.text)]  # type: ignore[arg-type]
        logprobs = logprobs if any(event.tokens or event.text for event in events) else None
        return schemas.ChatChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, events: Sequence[Event]) -> schemas.ChatLogprobs | None:
        if self._alternatives is None:
            return None
        tokenizer = self.engine.tokenizer

        def entry(token: int, logprob: float) -> dict[str, Any]:
            name, data = token_name(tokenizer, token), tokenizer.token_bytes(token)
            return {"token": name, "logprob": logprob, "bytes": list(data)}

        def entries(token: Token) -> schemas.TokenLogprob:
            top = [schemas.TopLogprob(**entry(*pair)) for pair in token.top[: self._alternatives]]
            return schemas.TokenLogprob(**entry(token.id, token.logprob), top_logprobs=top)

        return schemas.ChatLogprobs(content=[entries(t) for event in events for t in event.tokens], refusal=None)


class TextCall(Completion):
    """Continuations of texts, `n` of each prompt, and scores of the prompts themselves (`echo` with `logprobs`)."""

    kind = chunk_kind = "text_completion"
    whole = chunk = schemas.Completion
    body: CompletionRequest

    def __init__(self, service: Service, client: str, log_fields: dict[str, Any] | None, body: CompletionRequest):
        super().__init__(service, client, "cmpl", log_fields)
        self.body, tokenizer = body, self.engine.tokenizer
        several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
        given: Any = body.prompt if several else [body.prompt]
        self.ids: list[list[int]] = []  # as they were given
        self.prompts: list[list[int]] = []  # beginning with the token that begins a document
        for i, prompt in enumerate(given):
            param = f"prompt[{i}]" if several else "prompt"
            if isinstance(prompt, str):
                check_length(service.limits.total_chars, param, len(prompt))
                prompt = tokenizer.encode(prompt)
            check_ids(tokenizer, prompt, param)
            self.ids.append(prompt)
            self.prompts.append(prompt if prompt[:1] == [tokenizer.bos] else [tokenizer.bos, *prompt])
            check_fits(self.engine, self.prompts[-1], param)
        self.count = len(given) * (body.n or 1)
        texts = [tokenizer.decode(ids) for ids in self.ids]  # decoded: without lone surrogates
        self.log_text(texts)
        reason = "length" if body.max_tokens == 0 else None
        self._echo = [Event("text", text, reason) for text in texts]
        self._offsets = [0] * self.count  # characters of each text before its next token
        self._decoders = [codecs.getincrementaldecoder("utf-8")("replace") for _ in range(self.count)]

    async def begin(self) -> None:
        """Score the prompts where that is asked for, then queue their continuations."""
        scores = bool(self.body.echo) and self.body.logprobs is not None
        if scores:
            await self._score()
        if self.body.max_tokens == 0:
            self.prompt_tokens = sum(map(len, self.prompts))
            return
        settings = {"stop": self.engine.ends, **self.settings(self.body.max_tokens)}
        if scores and self.body.max_tokens == 1:
            settings["stop"] = ()  # lm-eval scores a text with one token more, which must come, whatever it is
        settings |= {"logprobs": self.body.logprobs, "tools": False}
        await self.submit([(Prompt(prompt, **settings), self.seeds()) for prompt in self.prompts])

    async def _score(self) -> None:
        """Give the echoed prompts their log-probabilities. `QueueFull` where too many clients wait for theirs."""
        service = self.service
        if service.scoring >= MAX_SCORING:
            raise QueueFull(f"{MAX_SCORING} requests wait for scores already; try again later")
        service.scoring += 1
        try:
            for i in range(0, len(self.prompts), SCORED_AT_ONCE):
                batch = self.prompts[i : i + SCORED_AT_ONCE]
                async with service.scores:
                    scores = await service.worker.call(lambda engine: engine.score(batch))  # noqa: B023
                for j, own in enumerate(scores, i):
                    tokens = [score or Token(id, math.nan) for id, score in zip(self.prompts[j], own, strict=True)]
                    echo, skipped = self._echo[j], len(tokens) - len(self.ids[j])
                    self._echo[j] = Event("text", echo.text, echo.finish_reason, tuple(tokens[skipped:]))
        finally:
            service.scoring -= 1

    def choice(self, number: int, events: Sequence[Event], whole: bool) -> BaseModel | None:
        if self.body.echo and (whole or not events):
            events = [self._echo[number // (self.body.n or 1)], *events]
        if not events:
            return None
        arrays, tokenizer = None, self.engine.tokenizer
        if self.body.logprobs is not None:
            arrays = schemas.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
            for token in (token for event in events for token in event.tokens):
                name, scored = token_name(tokenizer, token.id), not math.isnan(token.logprob)
                best = {token_name(tokenizer, other): logprob for other, logprob in token.top[: self.body.logprobs]}
                arrays.tokens.append(name)  # the chosen token is among its alternatives, likely or not
                arrays.token_logprobs.append(token.logprob if scored else None)
                arrays.top_logprobs.append({name: token.logprob} | best if scored else None)
                arrays.text_offset.append(self._offsets[number])
                self._offsets[number] += len(self._decoders[number].decode(tokenizer.token_bytes(token.id)))
        text, reason = "".join(event.text for event in events), cast(Any, events[-1].finish_reason)
        return schemas.CompletionChoice(index=number, text=text, logprobs=arrays, finish_reason=reason)


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token's text; a special one's name; `bytes:\xe2\x80` for part of a character, as OpenAI writes it.

    Two tokens never share a name, so that alternatives can be told apart.
    """
    data = tokenizer.token_bytes(token)
    try:
        return data.decode() or next((name for name, number in tokenizer.special.items() if number == token), "")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def check_length(limit: int, param: str, chars: int) -> None:
    if chars > limit:
        raise bad_request(param, f"{chars} characters; at most {limit}", "string_above_max_length")


def check_fits(engine: Engine, tokens: Sequence[int], param: str) -> None:
    if len(tokens) > engine.capacity:
        message = str(ContextExceeded(len(tokens), engine.capacity))
        raise ApiError(400, message, param, "context_length_exceeded")


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> None:
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise bad_request(param, f"token ids lie below {tokenizer.vocab_size}")


async def respond(call: Completion, request: Request) -> Response:
    """Begin to generate, then answer in one piece or as a stream. The middleware `Requests` closes the call."""
    request.state.call, headers = call, {"X-Request-ID": call.id}
    if call.body.stream:  # not by sse-starlette: that writes every event by itself, and hooks into uvicorn's shutdown
        await call.begin()
        headers |= {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        return StreamingResponse(call.stream(), 200, headers, "text/event-stream")
    whole = await call.collect()
    return Response(whole.model_dump_json(exclude_unset=True), 200, headers, "application/json")


def server_sent(data: BaseModel) -> bytes:
    return f"data: {data.model_dump_json(exclude_unset=True)}\n\n".encode()


def routes(service: Service) -> APIRouter:
    """Return all routes of the API; those without `identified` or `admitted` ask for no key."""
    router, worker = APIRouter(), service.worker
    bearer = HTTPBearer(auto_error=False, description="One of serve.api_keys")
    documented = [Depends(bearer)] if service.clients.keys else []
    identified: Any = {"dependencies": [*documented, Depends(service.identify)], "responses": ERRORS}
    admitted: Any = {"dependencies": [*documented, Depends(service.admit)], "responses": ERRORS}
    card = schemas.ModelCard(id=service.model, created=int(time.time()), max_model_len=service.config.model.seq_len)

    def call(kind: type[ChatCall] | type[TextCall], body: Any, request: Request) -> Completion:
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
                ids = render_prompt(tokenizer, messages) if prompt else render(tokenizer, messages)[0]
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
        return schemas.Health(status=state, progress=progress, compiling=compiling or None)

    return router


def as_api_error(error: Exception) -> ApiError:
    """Convert an error to an API error; no trace, no path."""
    match error:
        case ApiError():
            return error
        case QueueFull():
            return ApiError(429, str(error), code="queue_full", retry_seconds=RETRY_SECONDS)
        case Unavailable(state="dead"):
            return ApiError(503, str(error), code="engine_dead")
        case Unavailable():
            return ApiError(503, str(error), code=error.state, retry_seconds=RETRY_SECONDS)
        case JaxchatError():
            return ApiError(400, str(error))
        case HTTPException():  # from routing, or from a body that cannot be read
            return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
        case RequestValidationError() | ValidationError():
            return validation_error(error)
    log.error("internal error", exc_info=error)
    return ApiError(500, "an internal error; the service's log has more", code="internal_error")


def validation_error(error: RequestValidationError | ValidationError) -> ApiError:
    """Return the first thing that is wrong with a body, without what was sent."""
    errors = error.errors()  # of a field with several allowed types, one for each type
    first = next((e for e in errors if e["type"] not in ("string_type", "list_type", "int_type")), errors[0])
    message = first["msg"].removeprefix("Value error, ")
    if first["type"] == "json_invalid":
        return ApiError(400, f"the body is no valid JSON: {first.get('ctx', {}).get('error', message)}")
    names = [part for part in first["loc"] if isinstance(part, int) or part in schemas.FIELDS]
    if first["type"] == "value_error" and not names:  # the message names the field
        return ApiError(400, message, message.split(":")[0])
    if not names:
        return ApiError(400, "the body must be a JSON object, sent as Content-Type: application/json")
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in names).lstrip(".")
    return bad_request(param, message, "array_above_max_length" if first["type"] == "too_long" else None)
