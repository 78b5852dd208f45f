"""The small routes: models, tokens, health, metrics."""

from __future__ import annotations

from typing import Any

import orjson
from fastapi import APIRouter, Depends
from starlette.responses import Response

from jaxchat.errors import UsageError
from jaxchat.text.chat import render, render_prompt
from jaxchat.text.tokenizer import ASSISTANT_END, BOS
from serve.errors import ApiError, bad_request
from serve.limits import check_length, check_messages
from serve.logprobs import Namer
from serve.replies import Detokenized, Health, ModelCard, ModelList, TokenizerInfo, Tokens, errors
from serve.schemas import DetokenizeRequest, TokenizeRequest, conversation
from serve.service import Service


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


def routes(service: Service) -> APIRouter:
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
