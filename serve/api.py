"""The HTTP routes: OpenAI's completions and models, vLLM's token routes, health and metrics."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from pydantic import BaseModel, ValidationError
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, HTTPConnection
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from jaxchat.chat import render, render_prompt
from jaxchat.config import Config
from jaxchat.engine import Engine, Event, Handle, QueueFull, Token
from jaxchat.engine import Request as Prompt
from jaxchat.errors import JaxchatError, UsageError
from jaxchat.tokenizer import ASSISTANT_END, BOS, Tokenizer

from . import schemas
from .limits import Keys, Rates, check_length, check_messages
from .metrics import Metrics
from .schemas import ERRORS, ApiError, ChatRequest, CompletionRequest, Sampling, bad_request, conversation
from .worker import Answers, EngineStopped, Group, Unavailable, Worker

T = TypeVar("T")
log = logging.getLogger("jaxchat.serve")
bearer = HTTPBearer(auto_error=False, description="One of serve.api_keys")
RETRY_SECONDS = 1  # after which a client may try again where the queue is full or the model still loads
SCORED_AT_ONCE = 8  # prompts; running answers go on between two such batches
DONE = b"data: [DONE]\n\n"
STREAMED: dict[int | str, dict[str, Any]] = ERRORS | {
    200: {
        "description": "One object, or server-sent events where `stream` is true",
        "content": {"text/event-stream": {}},
    }
}


class Service:
    """One model with everything the routes need: engine, limits, metrics."""

    def __init__(self, config: Config, worker: Worker):
        self.config, self.limits, self.worker = config, config.serve, worker
        self.model = config.serve.model_name or config.tier
        self.context = config.model.seq_len
        self.created = int(time.time())
        self.keys, self.rates = Keys(config.serve.api_keys), Rates(config.serve.requests_per_minute)
        self.metrics = Metrics(worker, self.model)
        self.answering = 0  # requests under way

    def router(self, *checks: Callable[..., Any]) -> APIRouter:
        """A router whose requests pass these checks."""
        documented = [Depends(bearer)] if self.keys and checks else []
        return APIRouter(dependencies=[*documented, *map(Depends, checks)])

    async def identify(self, request: Request) -> None:
        """Check the key; `request.state.client` is the client's name."""
        address = request.client.host if request.client else ""
        request.state.client = self.keys.client(request.headers.get("authorization"), address)

    async def admit(self, request: Request) -> None:
        """Check the key and the rate."""
        await self.identify(request)
        self.rates.take(request.state.client)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            shown = name[:100].encode("utf-8", "replace").decode()  # no lone surrogates
            raise ApiError(404, f"the model {shown!r} is not here; {self.model!r} is", "model", "model_not_found")

    def settings(self, body: Sampling, max_tokens: int | None, client: str) -> dict[str, Any]:
        """Fields of the engine's `Request`. `ApiError` 400 for more tokens than `serve.max_tokens`."""
        limits = self.limits
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
            "client": client,
        }


class Call:
    """One request for answers: its id, its answers, its log line and its share of the metrics."""

    def __init__(self, service: Service, connection: HTTPConnection, kind: str):
        self.service, self.client = service, connection.state.client
        self.id, self.created = f"{kind}-{secrets.token_hex(12)}", int(time.time())
        self.answers: Answers | None = None
        self.prompt_tokens, self._ended = 0, False
        self.log: dict[str, Any] = getattr(connection.state, "log", {})
        self.log |= {"id": self.id, "client": self.client}

    async def submit(self, groups: Sequence[Group]) -> Answers:
        """Raises what the engine raises, and `ApiError` 400 for more answers than could ever wait."""
        limits, count = self.service.limits, sum(len(seeds) for _, seeds in groups)
        if count > (most := limits.queue_length + limits.slots):
            raise bad_request("n", f"{count} answers in one request; at most {most} (serve.queue_length, serve.slots)")
        self.answers = await self.service.worker.submit(groups)
        self.prompt_tokens = sum(len(request.tokens) for request, _ in groups)
        return self.answers

    def head(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.service.model}

    @property
    def handles(self) -> list[Handle]:
        return self.answers.handles if self.answers else []

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        if self.answers:
            async for events in self.answers:
                yield events

    def usage(self) -> schemas.Usage:
        made = sum(handle.made for handle in self.handles)
        total = self.prompt_tokens + made
        return schemas.Usage(prompt_tokens=self.prompt_tokens, completion_tokens=made, total_tokens=total)

    def log_text(self, text: Any) -> None:
        if self.service.limits.log_text:
            self.log.setdefault("text", []).append(text)

    def end(self) -> None:
        """Free the slots and record the figures, once; also where the client has gone."""
        if self._ended:
            return
        self._ended = True
        if self.answers:
            self.answers.close()
        self.log_text([handle.result().text for handle in self.handles])
        self.service.metrics.finished(self.handles, self.prompt_tokens)
        first = min((h.first_token for h in self.handles if h.first_token), default=None)
        self.log |= {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(handle.made for handle in self.handles),
            "finish": [handle.finish_reason or "cancelled" for handle in self.handles],
            "first_token_seconds": round(first - self.handles[0].submitted, 4) if first else None,
        }


class ChatForm:
    """Writes answers as chat completions. Calculator calls stand in `parts`, which OpenAI's clients ignore."""

    kind, chunk_kind = "chat.completion", "chat.completion.chunk"
    completion: Any = schemas.ChatCompletion
    chunk: Any = schemas.ChatChunk

    def __init__(self, call: Call, body: ChatRequest):
        self._call, self.count = call, body.n or 1
        self._namer = Namer(call.service.worker.engine.tokenizer)
        self._alternatives = (body.top_logprobs or 0) if body.logprobs else None

    def opening(self, number: int) -> schemas.ChatChunkChoice:
        """The first chunk of a streamed answer."""
        delta = schemas.Delta(role="assistant", content="")
        return schemas.ChatChunkChoice(index=number, delta=delta, logprobs=None, finish_reason=None)

    def chunk_choice(self, number: int, event: Event) -> schemas.ChatChunkChoice:
        delta, logprobs = schemas.Delta(), self._logprobs(event.tokens)
        if event.kind == "text":
            delta.content = event.text
        elif event.kind != "done":
            delta.parts = [schemas.TextPart(type=event.kind, text=event.text)]  # type: ignore[arg-type]
        elif not event.tokens:
            logprobs = None
        reason: Any = event.finish_reason
        return schemas.ChatChunkChoice(index=number, delta=delta, logprobs=logprobs, finish_reason=reason)

    def choice(self, number: int, events: Sequence[Event]) -> schemas.ChatChoice:
        result = self._call.handles[number].result()
        message = schemas.AnswerMessage(role="assistant", content=result.text, refusal=None)
        if any(part["type"] != "text" for part in result.parts):
            message.parts = [schemas.TextPart(**part) for part in result.parts]  # type: ignore[arg-type]
        logprobs = self._logprobs([token for event in events for token in event.tokens])
        reason: Any = result.finish_reason
        return schemas.ChatChoice(index=number, message=message, logprobs=logprobs, finish_reason=reason)

    def _logprobs(self, tokens: Sequence[Token]) -> schemas.ChatLogprobs | None:
        if self._alternatives is None:
            return None

        def entry(token: int, logprob: float) -> dict[str, Any]:
            return {"token": self._namer(token), "logprob": logprob, "bytes": list(self._namer.bytes(token))}

        def entries(token: Token) -> schemas.TokenLogprob:
            top = [schemas.TopLogprob(**entry(*pair)) for pair in token.top[: self._alternatives]]
            return schemas.TokenLogprob(**entry(token.id, token.logprob), top_logprobs=top)

        return schemas.ChatLogprobs(content=[entries(token) for token in tokens], refusal=None)


@dataclass
class TextPrompt:
    """A prompt as `ids` without the token that begins a document, unless the client wrote it; `whole` with it."""

    ids: list[int]
    whole: list[int]
    text: str
    scores: Sequence[Token | None] = ()


class TextForm:
    """Writes answers as text completions."""

    kind = chunk_kind = "text_completion"
    completion: Any = schemas.Completion
    chunk: Any = schemas.Completion

    def __init__(self, call: Call, body: CompletionRequest, prompts: Sequence[TextPrompt]):
        tokenizer = call.service.worker.engine.tokenizer
        self._n, self._prompts, self._echo = body.n or 1, prompts, bool(body.echo)
        self._generates = body.max_tokens != 0
        self.count = self._n * len(prompts)
        namer = Namer(tokenizer)
        self._logprobs = [
            None if body.logprobs is None else LogprobArrays(namer, body.logprobs) for _ in range(self.count)
        ]

    def opening(self, number: int) -> schemas.CompletionChoice | None:
        """The echoed prompt."""
        text, scores = self._echoed(number)
        return self._choice(number, text, scores, None if self._generates else "length") if self._echo else None

    def chunk_choice(self, number: int, event: Event) -> schemas.CompletionChoice:
        return self._choice(number, event.text, [(token.id, token) for token in event.tokens], event.finish_reason)

    def choice(self, number: int, events: Sequence[Event]) -> schemas.CompletionChoice:
        text, scores = self._echoed(number)
        text += "".join(event.text for event in events)
        scores += [(token.id, token) for event in events for token in event.tokens]
        return self._choice(number, text, scores, events[-1].finish_reason if events else "length")

    def _echoed(self, number: int) -> tuple[str, list[tuple[int, Token | None]]]:
        prompt = self._prompts[number // self._n]
        return (prompt.text, list(zip(prompt.ids, prompt.scores, strict=False))) if self._echo else ("", [])

    def _choice(
        self, number: int, text: str, scores: Sequence[tuple[int, Token | None]], finish_reason: Any
    ) -> schemas.CompletionChoice:
        arrays = self._logprobs[number]
        logprobs = arrays.of(scores) if arrays else None
        return schemas.CompletionChoice(index=number, text=text, logprobs=logprobs, finish_reason=finish_reason)


class LogprobArrays:
    """Log-probabilities of one completion, with the place of each token in its text."""

    def __init__(self, namer: Namer, count: int):
        self._namer, self._count = namer, count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the text before the next token

    def of(self, scores: Sequence[tuple[int, Token | None]]) -> schemas.CompletionLogprobs:
        """The next tokens' arrays; a token without a score is the first of a document.

        The chosen token stands among the alternatives, whether or not it is one of the likeliest.
        """
        arrays = schemas.CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
        for token, score in scores:
            name, top = self._namer(token), None
            if score:
                best = {self._namer(number): logprob for number, logprob in score.top[: self._count]}
                top = {name: score.logprob} | best
            arrays.tokens.append(name)
            arrays.token_logprobs.append(score.logprob if score else None)
            arrays.top_logprobs.append(top)
            arrays.text_offset.append(self._offset)
            self._offset += len(self._decoder.decode(self._namer.bytes(token)))
        return arrays


class Namer:
    """Names tokens. Two tokens never share a name, so that alternatives can be told apart."""

    def __init__(self, tokenizer: Tokenizer):
        self.bytes = tokenizer.token_bytes
        self._special = {number: name for name, number in tokenizer.special.items()}

    def __call__(self, token: int) -> str:
        """Return the text; a special token's name; `bytes:\\xe2\\x80` for part of a character, as OpenAI writes it."""
        data = self.bytes(token)
        try:
            return self._special.get(token) or data.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


class EventStream(StreamingResponse):
    """Server-sent events. Cancels generation when the client disconnects, also before the first event.

    Not sse-starlette: that writes every event by itself and hooks into uvicorn's shutdown, where we drain.
    """

    media_type = "text/event-stream"

    def __init__(self, events: AsyncIterator[bytes], end: Callable[[], None], headers: dict[str, str]):
        super().__init__(events, headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"} | headers)
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await unless_gone(receive, self.stream_response(send))
        except ClientDisconnect:
            pass
        finally:
            await self.body_iterator.aclose()  # type: ignore[attr-defined]
            self._end()


async def unless_gone(receive: Receive, work: Coroutine[Any, Any, T]) -> T:
    """Return what `work` returns; cancel it and raise `ClientDisconnect` as soon as the client has gone.

    The body must have been read. The disconnect message is awaited; nothing is polled.
    """

    async def disconnected() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass

    tasks = working, _ = asyncio.ensure_future(work), asyncio.ensure_future(disconnected())
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if working.done():
            return working.result()
        raise ClientDisconnect
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def respond(
    call: Call, request: Request, body: Sampling, form: ChatForm | TextForm, begin: Coroutine[Any, Any, Any]
) -> Response:
    """Begin to generate, then answer in one piece or as a stream."""
    headers = {"X-Request-ID": call.id}
    if body.stream:
        await unless_gone(request.receive, begin)
        return EventStream(stream(call, form, body.include_usage), call.end, headers)
    try:
        whole = await unless_gone(request.receive, collect(call, form, begin))
    finally:
        call.end()
    return Response(whole.model_dump_json(exclude_unset=True), 200, headers, "application/json")


async def collect(call: Call, form: ChatForm | TextForm, begin: Coroutine[Any, Any, Any]) -> BaseModel:
    """All answers, once all are finished."""
    await begin
    pieces: list[list[Event]] = [[] for _ in range(form.count)]
    async for events in call.events():
        for number, event in events:
            pieces[number].append(event)
    choices = [form.choice(number, events) for number, events in enumerate(pieces)]
    return form.completion(**call.head(form.kind), choices=choices, usage=call.usage())


async def stream(call: Call, form: ChatForm | TextForm, include_usage: bool) -> AsyncIterator[bytes]:
    """Server-sent events, those of one decoded chunk in one block; the request is submitted already."""
    head = call.head(form.chunk_kind) | ({"usage": None} if include_usage else {})

    def event(*choices: BaseModel, **more: Any) -> bytes:
        return server_sent(form.chunk(**head | more, choices=choices))

    try:
        openings = [form.opening(number) for number in range(form.count)]
        if any(openings):
            yield b"".join(event(choice) for choice in openings if choice)
        async for events in call.events():
            yield b"".join(event(form.chunk_choice(number, piece)) for number, piece in events)
        if include_usage:
            yield event(usage=call.usage())
    except Exception as error:  # the status has been sent; the error can only be an event
        yield server_sent(as_api_error(error).body())
    finally:
        call.end()
    yield DONE


def server_sent(data: BaseModel) -> bytes:
    return f"data: {data.model_dump_json(exclude_unset=True)}\n\n".encode()


def seeds(seed: int | None, n: int) -> list[int | None]:
    """A seed for each of n answers. The first is the given one, whatever n is."""
    if seed is None:
        return [None] * n
    more = (hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=4).digest() for i in range(1, n))
    return [seed % 2**32, *(int.from_bytes(digest) for digest in more)]


def chat_group(call: Call, body: ChatRequest) -> Group:
    """The conversation as a prompt, with a seed for each answer. `ApiError` for one that cannot be answered."""
    service, engine = call.service, call.service.worker.engine
    check_messages(service.limits, body.messages)
    messages = conversation(body.messages)
    call.log_text(messages)
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    settings = service.settings(body, max_tokens, call.client)
    settings["logprobs"] = (body.top_logprobs or 0) if body.logprobs else None
    if body.ignore_eos:
        settings["stop"] = ()
    try:
        request = engine.chat_request(messages, **settings)
    except UsageError as error:
        raise ApiError(400, str(error), "messages") from None
    check_fits(engine, request.tokens, "messages")
    return request, seeds(body.seed, body.n or 1)


def check_fits(engine: Engine, tokens: Sequence[int], param: str) -> None:
    if len(tokens) > engine.capacity:
        message = f"the prompt has {len(tokens)} tokens; this model's context holds {engine.capacity}"
        raise ApiError(400, message, param, "context_length_exceeded")


def text_prompts(service: Service, body: CompletionRequest) -> list[TextPrompt]:
    """The prompts in order. `ApiError` for token ids that do not exist and for prompts that do not fit."""
    engine, tokenizer = service.worker.engine, service.worker.engine.tokenizer
    several = isinstance(body.prompt, list) and not isinstance(body.prompt[0], int)
    many: Any = body.prompt if several else [body.prompt]
    prompts = []
    for i, prompt in enumerate(many):
        param = f"prompt[{i}]" if several else "prompt"
        if isinstance(prompt, str):
            check_length(service.limits.total_chars, param, len(prompt))
            ids = tokenizer.encode(prompt)
        else:
            ids = prompt
            check_ids(tokenizer, ids, param)
        whole = ids if ids[:1] == [tokenizer.bos] else [tokenizer.bos, *ids]
        check_fits(engine, whole, param)
        prompts.append(TextPrompt(ids, whole, tokenizer.decode(ids)))  # decoded: without lone surrogates
    return prompts


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> None:
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise bad_request(param, f"token ids lie below {tokenizer.vocab_size}")


async def complete(call: Call, body: CompletionRequest, prompts: Sequence[TextPrompt]) -> None:
    """Score the prompts where that is asked for, then queue their continuations."""
    service, engine = call.service, call.service.worker.engine
    scoring = body.echo and body.logprobs is not None
    if scoring:
        for i in range(0, len(prompts), SCORED_AT_ONCE):
            part = prompts[i : i + SCORED_AT_ONCE]
            scores = await service.worker.call(lambda engine: engine.score([p.whole for p in part]))  # noqa: B023
            for prompt, own in zip(part, scores, strict=True):
                prompt.scores = own[len(own) - len(prompt.ids) :]
    if body.max_tokens == 0:
        call.prompt_tokens = sum(len(prompt.whole) for prompt in prompts)
        return
    settings = service.settings(body, body.max_tokens, call.client) | {"logprobs": body.logprobs, "tools": False}
    # lm-eval scores a text with one token more, which must come, whatever it is
    settings["stop"] = () if body.ignore_eos or (scoring and body.max_tokens == 1) else engine.ends
    await call.submit([(Prompt(prompt.whole, **settings), seeds(body.seed, body.n or 1)) for prompt in prompts])


def completion_routes(service: Service) -> APIRouter:
    router = service.router(service.admit)

    def call(body: Sampling, request: Request, kind: str) -> Call:
        service.check_model(body.model)
        service.worker.check()
        return Call(service, request, kind)

    @router.post("/v1/chat/completions", response_model=schemas.ChatCompletion | schemas.ChatChunk, responses=STREAMED)
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        """Answer a conversation that ends with a user's message."""
        own = call(body, request, "chatcmpl")
        group = chat_group(own, body)
        return await respond(own, request, body, ChatForm(own, body), own.submit([group]))

    @router.post("/v1/completions", response_model=schemas.Completion, responses=STREAMED)
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts as documents, without a chat around them."""
        own = call(body, request, "cmpl")
        prompts = text_prompts(service, body)
        own.log_text([prompt.text for prompt in prompts])
        return await respond(own, request, body, TextForm(own, body, prompts), complete(own, body, prompts))

    return router


def operation_routes(service: Service) -> APIRouter:
    router = service.router(service.identify)

    @router.get("/metrics", responses=ERRORS | {200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics for Prometheus; no rate limit."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return router


def token_routes(service: Service) -> APIRouter:
    router = service.router(service.admit)

    @router.post("/tokenize", responses=ERRORS)
    async def tokenize(body: schemas.TokenizeRequest) -> schemas.Tokens:
        """Return the token ids of a text, or of a conversation as the model sees it.

        Special tokens written in a text are ordinary characters; only a text that is the name of one is that token.
        """
        service.check_model(body.model)
        tokenizer = service.worker.engine.tokenizer
        if body.messages is not None:
            check_messages(service.limits, body.messages)
            try:
                messages = conversation(body.messages)
                prompt = body.add_generation_prompt
                ids = render_prompt(tokenizer, messages) if prompt else render(tokenizer, messages)[0]
            except UsageError as error:
                raise ApiError(400, str(error), "messages") from None
        else:
            text = body.prompt or ""
            check_length(service.limits.total_chars, "prompt", len(text))
            ids = [tokenizer.special[text]] if text in tokenizer.special else tokenizer.encode(text)
            if body.add_special_tokens and ids[:1] != [tokenizer.bos]:
                ids = [tokenizer.bos, *ids]
        names = list(map(Namer(tokenizer), ids)) if body.return_token_strs else None
        return schemas.Tokens(count=len(ids), max_model_len=service.context, tokens=ids, token_strs=names)

    @router.post("/detokenize", responses=ERRORS)
    async def detokenize(body: schemas.DetokenizeRequest) -> schemas.Detokenized:
        """Return the text of token ids, special ones by their names."""
        service.check_model(body.model)
        tokenizer = service.worker.engine.tokenizer
        check_ids(tokenizer, body.tokens, "tokens")
        special = {number: name.encode() for name, number in tokenizer.special.items()}
        data = b"".join(special.get(token) or tokenizer.token_bytes(token) for token in body.tokens)
        return schemas.Detokenized(prompt=data.decode(errors="replace"))

    @router.get("/tokenizer_info", responses=ERRORS)
    async def tokenizer_info() -> schemas.TokenizerInfo:
        tokenizer = service.worker.engine.tokenizer
        return schemas.TokenizerInfo(
            tokenizer_class="PreTrainedTokenizerFast",
            bos_token=BOS,
            eos_token=ASSISTANT_END,
            vocab_size=tokenizer.vocab_size,
            model_max_length=service.context,
            special_tokens=tokenizer.special,
        )

    return router


def open_routes(service: Service) -> APIRouter:
    """Routes that ask for no key."""
    router = service.router()
    card = schemas.ModelCard(id=service.model, created=service.created, max_model_len=service.context)

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
        worker, state = service.worker, service.worker.state
        response.status_code = 200 if state == "ready" else 503
        compiling = worker.engine.compiling if state == "ready" else 0
        progress = worker.progress if state == "loading" else None
        return schemas.Health(status=state, progress=progress, compiling=compiling or None)

    return router


def as_api_error(error: Exception) -> ApiError:
    """Convert an error to an API error; no trace, no path."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, QueueFull):
        return ApiError(429, str(error), code="queue_full", retry_seconds=RETRY_SECONDS)
    if isinstance(error, EngineStopped):
        return ApiError(503, "the engine has stopped", code="engine_dead")  # the log has the reason
    if isinstance(error, Unavailable):
        return ApiError(503, str(error), code=error.state, retry_seconds=RETRY_SECONDS)
    if isinstance(error, JaxchatError):
        return ApiError(400, str(error))
    if isinstance(error, HTTPException):  # from routing, or from a body that cannot be read
        return ApiError(error.status_code, str(error.detail), headers=dict(error.headers or {}))
    if isinstance(error, RequestValidationError):
        return validation_error(error)
    log.error("internal error", exc_info=error)
    return ApiError(500, "an internal error; the service's log has more", code="internal_error")


def validation_error(error: RequestValidationError | ValidationError) -> ApiError:
    """The first thing that is wrong with a body, without what was sent."""
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
    return bad_request(param, message)
