"""What goes into the engine and what comes out. Plain data, no JAX."""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

_numbers = itertools.count(1)


@dataclass(frozen=True)
class Request:
    """One sequence to continue.

    `tokens` is the whole prompt as ids. `seed` None takes a fresh random one. `max_tokens` None goes on to the end of
    the context; forced tool output counts. With `tools` a calculator call inside the answer is answered.
    """

    tokens: list[int]
    max_tokens: int | None = None
    temperature: float = 0.0  # 0: the likeliest token
    top_k: int = 0  # 0: off
    top_p: float = 1.0  # 1: off
    seed: int | None = None
    stop: tuple[int, ...] = ()  # ids that end the answer and are not part of it
    tools: bool = True


@dataclass(frozen=True)
class Event:
    """A piece of an answer: kind "text", "python" (a tool call), "python_output" or, last, "done"."""

    kind: str
    text: str = ""
    finish_reason: str | None = None  # of "done": "stop", "length" or "cancelled"


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

    @property
    def text(self) -> str:
        """What the person reads: without tool calls and their output."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")


@dataclass(eq=False)
class Handle:
    """A submitted request; the engine fills it as it goes."""

    request: Request
    seed: int
    limit: int  # tokens that may be made
    turn: Any  # `turn.Turn`
    prompt: Any = None  # `admission.SharedPrompt`, until the answer has its slot
    number: int = field(default_factory=lambda: next(_numbers))
    made: int = 0
    finish_reason: str | None = None
    stop_id: int | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def result(self) -> Result:
        """The answer so far."""
        reason, turn = self.finish_reason or "cancelled", self.turn
        return Result(turn.tokens, turn.parts, reason, len(self.request.tokens), self.seed, turn.forced, self.stop_id)
