"""The small routes: models, tokens, health, metrics."""

from __future__ import annotations

import codecs
import hashlib
import logging
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection
from starlette.responses import Response

from jaxchat.chat import render, render_prompt
from jaxchat.config import Config
from jaxchat.engine import Event, Handle, Token
from jaxchat.engine import Request as Prompt
from jaxchat.errors import UsageError
from jaxchat.tokenizer import ASSISTANT_END, BOS, Tokenizer

from .errors import ApiError, as_api_error, bad_request, too_long
from .limits import Keys, Rates, check_length, check_messages
from .metrics import Metrics
from .schemas import (
    ChatChunk,
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    Detokenized,
    DetokenizeRequest,
    Health,
    ModelCard,
    ModelList,
    Sampling,
    TokenizeRequest,
    TokenizerInfo,
    Tokens,
    conversation,
    errors,
    streamed,
)
from .sse import DONE, EventStream, event, until_gone
from .worker import Answers, Group, Worker

# Tokens and their probabilities as the two APIs show them.


class Namer:
    """Names tokens. Two tokens never have the same name, so that alternatives can be told apart."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {number: name for name, number in tokenizer.special.items()}
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Its text; a special token's name; `bytes:\\xe2\\x80` for a part of a character, as OpenAI writes it."""
        if token not in self._known:
            data = self._tokenizer.token_bytes(token)
            try:
                text = self._special.get(token) or data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._known[token] = text
        return self._known[token]

    def bytes(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token))

    def shown(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones by their names."""
        parts: list[str] = []
        ordinary: list[int] = []
        for token in [*tokens, None]:
            if token is None or token in self._special:
                parts.append(self._tokenizer.decode(ordinary))
                parts.append(self._special[token] if token is not None else "")
                ordinary = []
            else:
                ordinary.append(token)
        return "".join(parts)


def chat_logprobs(namer: Namer, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    """`count` alternatives for each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": namer(token), "logprob": logprob, "bytes": namer.bytes(token)}

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top[:count]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Arrays over the tokens of one completion, the prompt's first where it is echoed. `take` gives what is new."""

    def __init__(self, namer: Namer, tokenizer: Tokenizer, count: int):
        self._namer, self._tokenizer, self._count = namer, tokenizer, count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the text before the next token
        self._new = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, tokens: Sequence[Token]) -> None:
        """The chosen token stands among the alternatives, whether it is one of the likeliest or not."""
        for token in tokens:
            top = {self._namer(number): logprob for number, logprob in token.top[: self._count]}
            self._append(token.id, token.logprob, {self._namer(token.id): token.logprob} | top)

    def add_prompt(self, ids: Sequence[int], scores: Sequence[Token | None]) -> None:
        for number, score in zip(ids, scores, strict=True):
            if score is None:  # nothing stands before it
                self._append(number, None, None)
            else:
                self.add([score])

    def take(self) -> dict[str, list[Any]]:
        new, self._new = self._new, self._empty()
        return new

    def _append(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        values = {"tokens": self._namer(token), "token_logprobs": logprob, "top_logprobs": top}
        for name, value in (values | {"text_offset": self._offset}).items():
            self._new[name].append(value)
        self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))


# What every route needs: the engine behind its worker, the limits, the books.


log = logging.getLogger("jaxchat.serve")
bearer = HTTPBearer(auto_error=False, description="One of serve.api_keys, where any are set")


class Service:
    """One model, served."""

    def __init__(self, config: Config, worker: Worker):
        self.config, self.limits, self.worker = config, config.serve, worker
        self.model = config.serve.model_name or config.tier
        self.context = config.model.seq_len
        self.created = int(time.time())
        self.keys, self.rates = Keys(config.serve.api_keys), Rates(config.serve.requests_per_minute)
        self.metrics = Metrics(worker, self.model)
        self.answering = 0  # requests of the API under way

    async def identify(
        self, request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> None:
        """The key of a request, as a dependency of its route; `request.state.client` is who asks."""
        address = request.client.host if request.client else ""
        request.state.client = self.keys.client(request.headers.get("authorization"), address)

    async def allow(
        self, request: Request, given: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)]
    ) -> None:
        """Key and rate of a request."""
        await self.identify(request, given)
        self.rates.take(request.state.client)

    def check_model(self, name: str | None) -> None:
        if name is not None and name != self.model:
            shown = name[:100].encode("utf-8", "replace").decode()
            raise ApiError(404, f"the model {shown!r} is not here; {self.model!r} is", "model", "model_not_found")

    def settings(self, body: Sampling, max_tokens: int | None, client: str) -> dict[str, Any]:
        """Fields of the engine's `Request`. `ApiError` 400 for more tokens than `serve.max_tokens`."""
        limits = self.limits
        if max_tokens is not None and max_tokens > limits.max_tokens:
            raise bad_request("max_tokens", f"at most {limits.max_tokens}, not {max_tokens}")
        top_k = limits.top_k if body.top_k is None else max(body.top_k, 0)
        chosen: dict[str, Any] = {
            "max_tokens": limits.max_tokens if max_tokens is None else max_tokens,
            "temperature": limits.temperature if body.temperature is None else body.temperature,
            "top_k": top_k,
            "seed": body.seed,
            "stop_texts": body.stops(),
            "client": client,
        }
        given = {"top_p": body.top_p, "min_p": body.min_p, "repetition_penalty": body.repetition_penalty}
        return chosen | {name: value for name, value in given.items() if value is not None}

    def call(self, request: HTTPConnection, kind: str) -> Call:
        return Call(self, request, f"{kind}-{secrets.token_hex(12)}")


class Call:
    """One request for answers: its name, its figures, its line in the log."""

    def __init__(self, service: Service, request: HTTPConnection, name: str):
        self.id, self.created = name, int(time.time())
        self.service, self.client = service, request.state.client
        self.answers: Answers | None = None
        self.prompt_tokens, self._ended = 0, False
        self.fields: dict[str, Any] = getattr(request.state, "log", {})
        self.fields |= {"id": name, "client": self.client}

    async def submit(self, groups: Sequence[Group]) -> Answers:
        """`ApiError` 400 for more answers than could ever wait at once, and what the engine raises."""
        limits, count = self.service.limits, sum(len(seeds) for _, seeds in groups)
        if count > (most := limits.queue_length + limits.slots):
            raise bad_request("n", f"{count} answers in one request; at most {most} (serve.queue_length, serve.slots)")
        self.answers = await self.service.worker.submit(groups)
        self.prompt_tokens = sum(len(request.tokens) for request, _ in groups)
        return self.answers

    @property
    def handles(self) -> list[Handle]:
        return self.answers.handles if self.answers else []

    def usage(self) -> dict[str, int]:
        prompt = self.prompt_tokens
        made = sum(handle.made for handle in self.handles)
        return {"prompt_tokens": prompt, "completion_tokens": made, "total_tokens": prompt + made}

    def note_text(self, what: Callable[[], Any]) -> None:
        """For the log, where texts are wanted in it."""
        if self.service.limits.log_text:
            self.fields.setdefault("text", []).append(what())

    def end(self) -> None:
        """The books, once: also where the client has gone before the end."""
        if self._ended:
            return
        self._ended = True
        if self.answers:
            self.answers.close()
        self.service.metrics.finished(self.handles, self.prompt_tokens)
        first = min((h.first_token for h in self.handles if h.first_token), default=None)
        self.fields |= {
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": sum(handle.made for handle in self.handles),
            "finish": [handle.finish_reason or "cancelled" for handle in self.handles],
            "first_token_seconds": round(first - self.handles[0].submitted, 4) if first else None,
        }


def seeds(seed: int | None, n: int) -> list[int | None]:
    """A seed for each of n answers; the first is the one given, so that more answers leave it as it was."""
    if seed is None:
        return [None] * n
    more = (hashlib.blake2b(f"{seed}/{i}".encode(), digest_size=4).digest() for i in range(1, n))
    return [seed % 2**32, *(int.from_bytes(digest) for digest in more)]


# POST /v1/chat/completions: a conversation in, answers out, whole or as they are made.


def chat_routes(service: Service) -> APIRouter:
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


# POST /v1/completions: texts or token ids to continue, or to score (echo with logprobs, as lm-eval asks).


SCORED_AT_ONCE = 8  # prompts; between two such batches running answers go on


@dataclass
class Given:
    """A prompt: its ids, without the token that begins every document unless the client wrote it, and its text."""

    ids: list[int]
    text: str
    scores: list[Token | None] | None = None


def completion_routes(service: Service) -> APIRouter:
    router = APIRouter(tags=["OpenAI"], dependencies=[Depends(service.allow)])

    @router.post(
        "/v1/completions",
        response_model=Completion,
        responses=errors(400, 401, 404, 413, 429, 503) | streamed(Completion),
    )
    async def completions(body: CompletionRequest, request: Request) -> Response:
        """Continue texts as documents, without a chat around them."""
        service.check_model(body.model)
        service.worker.check()
        call = service.call(request, "cmpl")
        prompts = read_prompts(service, body)
        call.note_text(lambda: [prompt.text for prompt in prompts])
        completing = Completing(service, call, body, prompts)
        headers = {"X-Request-ID": call.id}
        if body.stream:
            await until_gone(request.receive, completing.begin())
            return EventStream(completing.stream(), call.end, headers)
        whole = await until_gone(request.receive, completing.whole())
        return Response(orjson.dumps(whole), 200, headers, "application/json")

    return router


def read_prompts(service: Service, body: CompletionRequest) -> list[Given]:
    """The prompts in order. `ApiError` for ids that no token has and for prompts that do not fit."""
    engine, given = service.worker.engine, body.prompt
    many: list[Any] = given if isinstance(given, list) and isinstance(given[0], (str, list)) else [given]
    prompts = []
    for i, prompt in enumerate(many):
        param = "prompt" if many[0] is given else f"prompt[{i}]"
        if isinstance(prompt, str):
            check_length(service.limits, param, len(prompt))
            ids = engine.tokenizer.encode(prompt)
        else:
            if max(prompt) >= engine.tokenizer.vocab_size:
                raise bad_request(param, f"token ids lie below {engine.tokenizer.vocab_size}")
            ids = prompt
        prompts.append(Given(ids, engine.tokenizer.decode(ids)))  # without lone surrogates, which no answer could hold
        tokens = len(whole_ids(prompts[-1], engine.tokenizer.bos))
        if tokens > engine.capacity:
            raise too_long(param, tokens, engine.capacity)
    return prompts


def whole_ids(prompt: Given, bos: int) -> list[int]:
    return prompt.ids if prompt.ids[:1] == [bos] else [bos, *prompt.ids]


class Completing:
    """The continuations of one request's prompts as OpenAI writes them."""

    def __init__(self, service: Service, call: Call, body: CompletionRequest, prompts: list[Given]):
        self._service, self._call, self._body, self._prompts = service, call, body, prompts
        self._engine = service.worker.engine
        self._n = body.n or 1
        self._make = body.max_tokens != 0
        self._usage = bool(body.stream_options and body.stream_options.include_usage)
        namer = Namer(self._engine.tokenizer)
        self._logprobs = [
            None if body.logprobs is None else CompletionLogprobs(namer, self._engine.tokenizer, body.logprobs)
            for _ in range(self._n * len(prompts))
        ]

    async def begin(self) -> None:
        """Score the prompts where that is wanted, then hand them to the engine."""
        self._service.worker.check()
        body, bos = self._body, self._engine.tokenizer.bos
        wholes = [whole_ids(prompt, bos) for prompt in self._prompts]
        if body.echo and body.logprobs is not None:
            await self._score(wholes)
        if not self._make:
            self._call.prompt_tokens = sum(map(len, wholes))
            return
        settings = self._service.settings(body, body.max_tokens, self._call.client)
        if body.logprobs is not None:
            settings["logprobs"] = body.logprobs
        # who scores a text asks for one token more and reckons with it, so there it is whatever it is
        scoring = body.echo and body.logprobs is not None and body.max_tokens == 1
        stop = () if scoring or body.ignore_eos else self._engine.ends
        groups: list[Group] = [
            (Prompt(tokens, stop=stop, tools=False, **settings), seeds(body.seed, self._n)) for tokens in wholes
        ]
        await self._call.submit(groups)

    async def _score(self, wholes: list[list[int]]) -> None:
        for i in range(0, len(wholes), SCORED_AT_ONCE):
            batch = wholes[i : i + SCORED_AT_ONCE]
            found = await self._service.worker.call(lambda engine: engine.score(batch))  # noqa: B023  # awaited here
            for prompt, scores in zip(self._prompts[i:], found, strict=False):
                prompt.scores = scores[len(scores) - len(prompt.ids) :]

    def _head(self) -> dict[str, Any]:
        call = self._call
        return {"id": call.id, "object": "text_completion", "created": call.created, "model": self._service.model}

    def _echo(self, number: int) -> str:
        """What a completion begins with; its tokens' logprobs are added on the way."""
        prompt, logprobs = self._prompts[number // self._n], self._logprobs[number]
        if not self._body.echo:
            return ""
        if logprobs and prompt.scores is not None:
            logprobs.add_prompt(prompt.ids, prompt.scores)
        return prompt.text

    def _choice(self, number: int, text: str, reason: str | None) -> dict[str, Any]:
        logprobs = self._logprobs[number]
        taken = logprobs.take() if logprobs else None
        return {"index": number, "text": text, "logprobs": taken, "finish_reason": reason}

    async def whole(self) -> dict[str, Any]:
        """All completions, once all are done."""
        try:
            await self.begin()
            texts = [self._echo(number) for number in range(len(self._logprobs))]
            reasons = ["length"] * len(texts)
            async for number, text, tokens, reason in self._pieces():
                texts[number] += text
                self._add(number, tokens)
                reasons[number] = reason or reasons[number]
            self._call.note_text(lambda: texts)
            choices = [self._choice(i, text, reasons[i]) for i, text in enumerate(texts)]
            return self._head() | {"choices": choices, "usage": self._call.usage()}
        finally:
            self._call.end()

    async def stream(self) -> AsyncIterator[bytes]:
        """Events; `begin` has been awaited already."""
        head = self._head() | ({"usage": None} if self._usage else {})
        try:
            if self._body.echo:
                reason = None if self._make else "length"
                echoed = range(len(self._logprobs))
                yield b"".join(event(head | {"choices": [self._choice(i, self._echo(i), reason)]}) for i in echoed)
            async for number, text, tokens, reason in self._pieces():
                self._add(number, tokens)
                yield event(head | {"choices": [self._choice(number, text, reason)]})
            if self._usage:
                yield event(head | {"choices": [], "usage": self._call.usage()})
        except Exception as error:  # the answer has begun: an error can only be one of its events
            yield event(as_api_error(error).body())
        finally:
            self._call.note_text(lambda: [handle.result().text for handle in self._call.handles])
            self._call.end()
        yield DONE

    async def _pieces(self) -> AsyncIterator[tuple[int, str, Sequence[Token], str | None]]:
        """(number, text, tokens, finish reason) as they are made."""
        if self._call.answers:
            async for pieces in self._call.answers:
                for number, piece in pieces:
                    yield number, piece.text, piece.tokens, piece.finish_reason

    def _add(self, number: int, tokens: Sequence[Token]) -> None:
        if logprobs := self._logprobs[number]:
            logprobs.add(tokens)


def open_routes(service: Service) -> APIRouter:
    """What anybody may ask, key or not."""
    router = APIRouter()

    def card() -> dict[str, Any]:
        names = {"id": service.model, "object": "model", "created": service.created, "owned_by": "jaxchat"}
        return names | {"max_model_len": service.context}

    @router.get("/v1/models", response_model=ModelList, tags=["OpenAI"])
    async def models() -> Response:
        """The one model that is served."""
        return _json({"object": "list", "data": [card()]})

    @router.get("/v1/models/{name:path}", response_model=ModelCard, responses=errors(404), tags=["OpenAI"])
    async def model(name: str) -> Response:
        service.check_model(name)
        return _json(card())

    @router.head("/health", include_in_schema=False)
    @router.get("/health", response_model=Health, responses={503: {"model": Health}}, tags=["operation"])
    async def health() -> Response:
        """200 where a request would be answered; 503 while loading or draining, and when the engine is dead.

        `compiling`: programs that still compile behind; a request that needs one of them waits for it.
        """
        state = service.worker.state
        worker = service.worker
        body: dict[str, Any] = {"status": state}
        if state == "loading":
            body["progress"] = worker.progress
        elif state == "ready" and (left := worker.compiling):
            body["compiling"] = left
        return _json(body, 200 if state == "ready" else 503)

    @router.get(
        "/metrics",
        responses={200: {"content": {"text/plain": {}}}, **errors(401)},
        tags=["operation"],
        dependencies=[Depends(service.identify)],
    )
    async def metrics() -> Response:
        """For Prometheus, as often as it likes."""
        return Response(service.metrics.text(), media_type=service.metrics.content_type)

    return router


def info_routes(service: Service) -> APIRouter:
    """What asks for a key where keys are set."""
    router = APIRouter(dependencies=[Depends(service.allow)])
    wrong = errors(400, 401, 404, 413, 429, 503)

    @router.post("/tokenize", response_model=Tokens, responses=wrong, tags=["tokens"])
    async def tokenize(body: TokenizeRequest) -> Response:
        """Token ids of a text, or of a conversation as the model is shown it.

        A text is a text: special tokens written in it are ordinary characters. Only a text that is nothing but the name
        of one is that token, which is how clients ask for its id.
        """
        service.check_model(body.model)
        tokenizer = service.worker.engine.tokenizer
        if body.messages is not None:
            messages = [message.plain() for message in body.messages]
            check_messages(service.limits, messages)
            try:
                talk = conversation(messages)
                ids = render_prompt(tokenizer, talk) if body.add_generation_prompt else render(tokenizer, talk)[0]
            except UsageError as error:
                raise ApiError(400, str(error), "messages") from None
        else:
            text = body.prompt or ""
            check_length(service.limits, "prompt", len(text))
            ids = [tokenizer.special[text]] if text in tokenizer.special else tokenizer.encode(text)
            if body.add_special_tokens and ids[:1] != [tokenizer.bos]:
                ids = [tokenizer.bos, *ids]
        namer = Namer(tokenizer)
        names = [namer(token) for token in ids] if body.return_token_strs else None
        counts = {"count": len(ids), "max_model_len": service.context}
        return _json(counts | {"tokens": ids, "token_strs": names})

    @router.post("/detokenize", response_model=Detokenized, responses=wrong, tags=["tokens"])
    async def detokenize(body: DetokenizeRequest) -> Response:
        """The text of token ids, special ones by their names."""
        service.check_model(body.model)
        tokenizer = service.worker.engine.tokenizer
        if max(body.tokens, default=0) >= tokenizer.vocab_size:
            raise bad_request("tokens", f"token ids lie below {tokenizer.vocab_size}")
        return _json({"prompt": Namer(tokenizer).shown(body.tokens)})

    @router.get("/tokenizer_info", response_model=TokenizerInfo, responses=errors(401, 429, 503), tags=["tokens"])
    async def tokenizer_info() -> Response:
        tokenizer = service.worker.engine.tokenizer
        names = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": BOS, "eos_token": ASSISTANT_END}
        sizes = {"vocab_size": tokenizer.vocab_size, "model_max_length": service.context}
        return _json({**names, **sizes, "special_tokens": tokenizer.special})

    return router


def _json(data: dict[str, Any], status: int = 200) -> Response:
    return Response(orjson.dumps(data), status, media_type="application/json")
