"""POST /v1/completions: texts or token ids to continue, or to score (echo with logprobs, as lm-eval asks)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from fastapi import APIRouter, Depends, Request
from starlette.responses import Response

from jaxchat.engine import Request as Prompt
from jaxchat.engine import Token
from serve.errors import as_api_error, bad_request, too_long
from serve.limits import check_length
from serve.logprobs import CompletionLogprobs, Namer
from serve.replies import Completion, errors, streamed
from serve.schemas import CompletionRequest
from serve.service import Call, Service, seeds
from serve.sse import DONE, EventStream, event, until_gone
from serve.worker import Group

SCORED_AT_ONCE = 8  # prompts; between two such batches running answers go on


@dataclass
class Given:
    """A prompt: its ids, without the token that begins every document unless the client wrote it, and its text."""

    ids: list[int]
    text: str
    scores: list[Token | None] | None = None


def routes(service: Service) -> APIRouter:
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
