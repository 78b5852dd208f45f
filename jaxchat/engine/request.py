"""Requests, events and results of the engine. Plain data, no JAX."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from jaxchat.errors import JaxchatError


class QueueFull(JaxchatError):
    """The engine's waiting queue is full; try again later."""

    exit_code = 1


@dataclass(frozen=True)
class Request:
    """One sequence to continue; `tokens` is the whole prompt."""

    tokens: list[int]
    max_tokens: int | None = None  # a tool's forced output counts; None: to the end of the context
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # share of the likeliest token's probability that another one must have; 0: off
    # divides the positive logits of all ids in prompt and answer, multiplies the negative ones (CTRL, 1909.05858)
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None  # None: a fresh random one
    stop: tuple[int, ...] = ()  # ids that end the answer and are not part of it
    stop_texts: tuple[str, ...] = ()  # the answer ends before the first of them in its text
    tools: bool = True  # whether calculator calls are answered
    logprobs: int | None = None  # report log-probabilities with 0 to 20 alternatives; None: none
    client: str = ""  # waiting clients take turns


@dataclass(frozen=True)
class Token:
    """A token with its log-probability (nats, before temperature and cuts) and the likeliest ids with theirs."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """A piece of an answer: kind "text", "python" (a tool call), "python_output" or, last, "done".

    `tokens`: those of the text, where `Request.logprobs` asks for them. Tokens without text come with the next event.
    """

    kind: str
    text: str = ""
    finish_reason: str | None = None  # of "done": "stop", "length" or "cancelled"
    tokens: tuple[Token, ...] = ()


@dataclass
class Result:
    """A finished answer. `tokens` holds all ids, also tool calls and their forced output, but not the stop id."""

    tokens: list[int]
    parts: list[dict[str, str]]  # an assistant's content, as in `jaxchat.chat`
    finish_reason: str
    prompt_tokens: int
    seed: int
    forced: list[bool] = field(default_factory=list)  # of each token: whether it is forced tool output
    stop_id: int | None = None  # at which the model stopped
    completion_tokens: int = 0  # the stop id among them
    logprobs: list[Token] | None = None  # of `tokens`, where asked for

    @property
    def text(self) -> str:
        """The text for people, without tool calls and their output."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


@dataclass(eq=False)
class Handle:
    """A submitted request, updated by the engine. Times are `time.perf_counter` seconds."""

    request: Request
    seed: int
    limit: int  # tokens that may be generated
    turn: Any  # `turn.Turn`
    prompt: Any = None  # `scheduler.Prompt`, until the answer has its slot
    made: int = 0  # tokens generated
    finish_reason: str | None = None
    stop_id: int | None = None
    reused: int = 0  # prompt tokens from the prefix cache
    advanced: int = 0  # tokens that its slot has generated, also behind a stop text
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None  # when its prefill began
    first_token: float | None = None
    finished: float | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    @property
    def prompt_tokens(self) -> int:
        return len(self.request.tokens)

    def finish(self, reason: str) -> None:
        self.finish_reason, self.finished = reason, time.perf_counter()

    def result(self) -> Result:
        """The answer so far."""
        turn = self.turn
        return Result(
            tokens=turn.tokens,
            parts=turn.parts,
            finish_reason=self.finish_reason or "cancelled",
            prompt_tokens=self.prompt_tokens,
            seed=self.seed,
            forced=turn.forced,
            stop_id=self.stop_id,
            completion_tokens=self.made,
            logprobs=None if self.request.logprobs is None else turn.logprobs,
        )
