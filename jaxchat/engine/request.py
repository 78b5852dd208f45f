"""What goes into the engine and what comes out. Plain data, no JAX."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from jaxchat.errors import JaxchatError


class QueueFull(JaxchatError):
    """As many requests wait as the engine lets wait; come again later."""

    exit_code = 1


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    `tokens` is the whole prompt as ids. `seed` None takes a fresh random one. `max_tokens` None goes on to the end of
    the context; forced tool output counts. With `tools` a calculator call inside the answer is answered.

    `repetition_penalty` divides the positive logits of all ids that prompt and answer already hold, and multiplies
    the negative ones (CTRL, 1909.05858). `stop_texts` end the answer before the first of them that its text holds.
    `logprobs`: report every token's log-probability with so many of the likeliest alternatives.
    """

    tokens: list[int]
    max_tokens: int | None = None
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    min_p: float = 0.0  # share of the likeliest token's probability that another one must have; 0: off
    repetition_penalty: float = 1.0  # 1: off
    seed: int | None = None
    stop: tuple[int, ...] = ()  # ids that end the answer and are not part of it
    stop_texts: tuple[str, ...] = ()
    tools: bool = True
    logprobs: int | None = None  # 0 to 20 alternatives; None: nothing is reported
    client: str = ""  # who asks: waiting clients take turns


@dataclass(frozen=True)
class Token:
    """An id, how likely the model found it (nats, of its own distribution, whatever the sampling settings), and the
    likeliest ids there with theirs, best first."""

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Event:
    """A piece of an answer: kind "text", "python" (a tool call), "python_output" or, last, "done".

    `tokens`: where `Request.logprobs` asked for them, the tokens that this piece's text came from; those that show
    nothing come with the next piece, or with "done".
    """

    kind: str
    text: str = ""
    finish_reason: str | None = None  # of "done": "stop", "length" or "cancelled"
    tokens: tuple[Token, ...] = ()


@dataclass
class Result:
    """A finished answer. `tokens` holds all made ids, tool calls and their forced output included, not the stop id.

    `forced`: for every id, whether the engine put it there instead of the model; `stop_id`: the id, sampled like any
    other, at which the model stopped.
    """

    tokens: list[int]
    parts: list[dict[str, str]]  # as the assistant's content in `text/chat.py`
    finish_reason: str
    prompt_tokens: int
    seed: int
    forced: list[bool] = field(default_factory=list)
    stop_id: int | None = None
    completion_tokens: int = 0  # that the model made or was given, the stop id among them
    logprobs: list[Token] | None = None  # of `tokens`, where asked for

    @property
    def text(self) -> str:
        """What the person reads: without tool calls and their output."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


@dataclass(eq=False)
class Handle:
    """A submitted request; the engine fills it as it goes. Times are `time.perf_counter` seconds."""

    request: Request
    seed: int
    limit: int  # tokens that may be made
    turn: Any  # `turn.Turn`
    prompt: Any = None  # `admission.SharedPrompt`, until the answer has its slot
    made: int = 0
    finish_reason: str | None = None
    stop_id: int | None = None
    reused: int = 0  # tokens of the prompt that a slot still held
    advanced: int = 0  # tokens that its slot has made, also behind a stop text
    submitted: float = field(default_factory=time.perf_counter)
    started: float | None = None  # its prompt's first part was given to the device
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
            turn.tokens,
            turn.parts,
            self.finish_reason or "cancelled",
            self.prompt_tokens,
            self.seed,
            turn.forced,
            self.stop_id,
            self.made,
            None if self.request.logprobs is None else turn.logprobs,
        )
