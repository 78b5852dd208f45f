"""What every route needs: the engine behind its worker, the limits, the books."""

from __future__ import annotations

import hashlib
import logging
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.requests import HTTPConnection

from jaxchat.config import Config
from jaxchat.engine import Handle
from serve.errors import ApiError, bad_request
from serve.limits import Keys, Rates
from serve.metrics import Metrics
from serve.schemas import Sampling
from serve.worker import Answers, Group, Worker

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
