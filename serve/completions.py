"""Answers in OpenAI's forms: chat completions and text completions, whole or as server-sent events."""

from __future__ import annotations

import asyncio
import codecs
import hashlib
import math
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace
from typing import Any, ClassVar, cast

from pydantic import BaseModel

from jaxchat.engine import Event, Handle, Token
from jaxchat.engine import Request as Prompt
from jaxchat.errors import UsageError
from jaxchat.tokenizer import Tokenizer

from . import schemas
from .schemas import ApiError, ChatRequest, CompletionRequest, Sampling, bad_request
from .service import Call, Service, as_api_error, check_fits, check_length
from .worker import Group

SCORED_AT_ONCE = 8  # prompts; running answers go on between two such batches
DONE = b"data: [DONE]\n\n"


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
        """Return a whole answer, or the part of its stream for these events; without events the first part."""
        raise NotImplementedError

    def settings(self, max_tokens: int | None) -> dict[str, Any]:
        """Return fields of the engine's `Request`, with `serve.max_tokens` tokens at most."""
        body, limits = self.body, self.service.limits
        asked = limits.max_tokens if max_tokens is None or max_tokens < 0 else max_tokens
        if (body.min_tokens or 0) > asked:
            raise bad_request("min_tokens", f"{body.min_tokens} is more than max_tokens, {asked}")
        bias, stop = {int(token): value for token, value in (body.logit_bias or {}).items()}, body.stop_token_ids or []
        check_ids(self.engine.tokenizer, list(bias), "logit_bias")
        check_ids(self.engine.tokenizer, stop, "stop_token_ids")
        return {
            "max_tokens": min(asked, limits.max_tokens),
            "temperature": limits.temperature if body.temperature is None else body.temperature,
            "top_k": limits.top_k if body.top_k is None else max(body.top_k, 0),
            "top_p": 1.0 if body.top_p is None else body.top_p,
            "min_p": limits.min_p if body.min_p is None else body.min_p,
            "repetition_penalty": body.repetition_penalty or 1.0,
            "frequency_penalty": body.frequency_penalty or 0.0,
            "presence_penalty": body.presence_penalty or 0.0,
            "logit_bias": bias,
            "min_tokens": body.min_tokens or 0,
            "seed": body.seed,
            "stop_texts": tuple(filter(None, [body.stop] if isinstance(body.stop, str) else body.stop or ())),
            "stop": (*(() if body.ignore_eos else self.engine.ends), *stop),
            "client": self.client,
        }

    async def submit(self, groups: Sequence[Group]) -> None:
        """Queue the answers, with the constraint that the request asks for. A new one is prepared beside the engine."""
        if wanted := self.body.constraint():
            field, kind, value = wanted
            try:
                async with self.service.constraints.turn():
                    constraint = await asyncio.to_thread(self.engine.constraint, **{kind: value})
            except UsageError as error:
                raise bad_request(field, str(error)) from None
            groups = [(replace(request, constraint=constraint), seeds) for request, seeds in groups]
        await super().submit(groups)

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
            self._request = self.engine.chat_request(
                messages, continue_final=goes_on(body), **settings, logprobs=self._alternatives
            )
        except UsageError as error:
            raise ApiError(400, str(error), "messages") from None
        check_fits(self.engine, self._request.tokens, "messages")

    async def begin(self) -> None:
        await self.submit([(self._request, self.seeds())])

    def choice(self, number: int, events: Sequence[Event], whole: bool) -> BaseModel:
        logprobs = self._logprobs(events)
        if whole:
            result = self.answers.handles[number]
            reason: Any = result.finish_reason
            message = schemas.AnswerMessage(role="assistant", content=result.text, refusal=None)
            if parts := self.calculator_parts(result):
                message.parts = parts
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

    def calculator_parts(self, answer: Handle) -> list[schemas.TextPart]:
        """Return the parts of an answer that has calculator calls, [] for another one."""
        called = any(part["type"] != "text" for part in answer.parts)
        return [schemas.TextPart.model_validate(part) for part in answer.parts] if called else []

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
        settings = self.settings(self.body.max_tokens)
        if scores and self.body.max_tokens == 1:
            settings["stop"] = ()  # lm-eval scores a text with one token more, which must come, whatever it is
        settings |= {"logprobs": self.body.logprobs, "tools": False}
        await self.submit([(Prompt(prompt, **settings), self.seeds()) for prompt in self.prompts])

    async def _score(self) -> None:
        """Give the echoed prompts their log-probabilities."""
        async with self.service.scores.turn():
            for i in range(0, len(self.prompts), SCORED_AT_ONCE):
                batch = self.prompts[i : i + SCORED_AT_ONCE]
                scores = await self.service.worker.call(lambda engine: engine.score(batch))  # noqa: B023
                for j, own in enumerate(scores, i):
                    tokens = [score or Token(id, math.nan) for id, score in zip(self.prompts[j], own, strict=True)]
                    echo, skipped = self._echo[j], len(tokens) - len(self.ids[j])
                    self._echo[j] = Event("text", echo.text, echo.finish_reason, tuple(tokens[skipped:]))

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


def goes_on(body: ChatRequest | schemas.TokenizeRequest) -> bool:
    """Return whether the answer goes on with the last message: as asked, or else with an assistant's.

    llama.cpp and Ollama do the latter, too.
    """
    asked = body.continue_final_message
    return (body.messages or [])[-1].role == "assistant" if asked is None else asked


def token_name(tokenizer: Tokenizer, token: int) -> str:
    r"""Return a token's text; a special one's name; `bytes:\xe2\x80` for part of a character, as OpenAI writes it.

    Two tokens never share a name, so that alternatives can be told apart.
    """
    data = tokenizer.token_bytes(token)
    try:
        return data.decode() or next((name for name, number in tokenizer.special.items() if number == token), "")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)


def check_ids(tokenizer: Tokenizer, ids: Sequence[int], param: str) -> None:
    if max(ids, default=0) >= tokenizer.vocab_size:
        raise bad_request(param, f"token ids lie below {tokenizer.vocab_size}")


def server_sent(data: BaseModel) -> bytes:
    return f"data: {data.model_dump_json(exclude_unset=True)}\n\n".encode()
