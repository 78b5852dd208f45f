"""Requests, and their answers as the ids come in. No JAX.

A tool call is the text between <|python_start|> and <|python_end|>. At its end the row pauses on the device, the host
runs the calculator, and the result is forced in between <|output_start|> and <|output_end|>.
"""

from __future__ import annotations

import codecs
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jaxchat.errors import JaxchatError
from jaxchat.tokenizer import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START, Tokenizer
from jaxchat.tools.calculator import calculate

if TYPE_CHECKING:
    from jaxchat.engine.constraint import Constraint

FORCED = 64  # tokens that a tool's result may have, its two marks included
NO_TOKEN = -1
EVERY_TOKEN = -2  # stands for any id
MAX_STOP_IDS = 16
TOOL_ERROR = "error"  # the output of a call that the calculator refuses


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
    frequency_penalty: float = 0.0  # taken from an id's logit for each time that the answer has it already
    presence_penalty: float = 0.0  # taken once from the logits of all ids in the answer
    logit_bias: Mapping[int, float] = field(default_factory=dict)  # added to the logits of ids; at most -100: banned
    seed: int | None = None  # None: a fresh random one
    stop: tuple[int, ...] = ()  # ids that end the answer and are not part of it
    stop_texts: tuple[str, ...] = ()  # the answer ends before the first of them in its text
    min_tokens: int = 0  # before which no stop id comes and no stop text counts
    constraint: Constraint | None = None  # from `Engine.constraint`; then there are no tools
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


class Turn:
    """An answer. `add` takes every id in order and returns the events that it completes.

    The answer ends before the first of `stop_texts` in its text behind the first `min_tokens` tokens; then `stopped` is
    true, and nothing more may be added. Text that may be the beginning of a stop text is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = (), min_tokens: int = 0):
        special = tokenizer.special
        self._tokenizer = tokenizer
        self._special = set(special.values())
        self._opens = {special[PYTHON_START]: "python", special[OUTPUT_START]: "python_output"}
        self._closes = {special[PYTHON_END]: "python", special[OUTPUT_END]: "python_output"}
        self._kind = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops, self._min_tokens = tuple(text for text in stop_texts if text), min_tokens
        self._held_back = ""
        self._to_force = 0  # ids of a tool's output that are still to come
        self._unshown: list[tuple[Token, int]] = []  # with the number of characters before each
        self._chars = self._shown_chars = 0
        self.tokens: list[int] = []  # also of tool calls and their forced output, but not the stop id
        self.forced: list[bool] = []  # of every token, whether it is forced tool output
        self.parts: list[dict[str, str]] = []  # an assistant's content, as in `jaxchat.chat`
        self.logprobs: list[Token] = []  # of every token, where they are reported
        self.stopped = False
        self.finish_reason: str | None = None

    @property
    def text(self) -> str:
        """The text for people, without tool calls and their output."""
        return "".join(part["text"] for part in self.parts if part["type"] == "text")

    def add(self, token: int, report: Token | None = None) -> list[Event]:
        """Add an id. A special token never shows as text; one that opens or closes nothing is dropped."""
        self.tokens.append(token)
        self.forced.append(self._to_force > 0)
        self._to_force = max(0, self._to_force - 1)
        if report:
            self.logprobs.append(report)
            self._unshown.append((report, self._chars))
        if token not in self._special:
            return self._show(self._decoder.decode(self._tokenizer.token_bytes(token)))
        events = []
        if token in self._opens:
            events = self.flush()
            self._kind = self._opens[token]
            self.parts.append({"type": self._kind, "text": ""})
        elif self._closes.get(token) == self._kind:
            events = self.flush()
            self._kind = "text"
        return events

    def flush(self) -> list[Event]:
        """Show held-back text, incomplete UTF-8 as U+FFFD; at the end of a part or of the answer."""
        return self._show(self._decoder.decode(b"", final=True), final=True)

    def rest(self) -> tuple[Token, ...]:
        """Return the tokens that no event has shown."""
        rest = tuple(token for token, begin in self._unshown if not self.stopped or begin < self._shown_chars)
        self._unshown = []
        return rest

    def tool_output(self) -> list[int]:
        """Return the ids that answer the call just closed, to be added next; [] where there was no call."""
        if not self.parts or self.parts[-1]["type"] != "python":
            return []
        result = calculate(self.parts[-1]["text"])
        ids = self._tokenizer.encode(TOOL_ERROR if result is None else result)
        special = self._tokenizer.special
        output = [special[OUTPUT_START], *ids[: FORCED - 2], special[OUTPUT_END]]
        self._to_force = len(output)
        return output

    def _show(self, text: str, final: bool = False) -> list[Event]:
        self._chars += len(text)
        if self._stops and self._kind == "text" and len(self.tokens) > self._min_tokens:
            text = self._before_stop(self._held_back + text, final)
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self._kind:
            self.parts.append({"type": self._kind, "text": ""})
        self.parts[-1]["text"] += text
        self._shown_chars += len(text)
        shown = tuple(token for token, begin in self._unshown if begin < self._shown_chars)
        self._unshown = self._unshown[len(shown) :]
        return [Event(self._kind, text, tokens=shown)]

    def _before_stop(self, text: str, final: bool) -> str:
        """Return what may be shown of the text; hold back the rest, or drop it where it begins with a stop text."""
        self._held_back = ""
        places = [place for place in map(text.find, self._stops) if place >= 0]
        if places:
            self.stopped = True
            return text[: min(places)]
        if final:
            return text
        longest = max(map(len, self._stops)) - 1
        for begin in range(max(0, len(text) - longest), len(text)):
            if any(stop.startswith(text[begin:]) for stop in self._stops):
                self._held_back = text[begin:]
                return text[:begin]
        return text


class Handle(Turn):
    """A submitted request and its answer, updated by the engine. Times are `time.perf_counter` seconds.

    Args:
      seed: of this answer; limit: tokens that may be generated; prompt: `scheduler.Prompt`.
    """

    def __init__(self, request: Request, seed: int, limit: int, tokenizer: Tokenizer, prompt: Any):
        super().__init__(tokenizer, request.stop_texts, request.min_tokens)
        self.request, self.seed, self.limit, self.prompt_tokens = request, seed, limit, len(request.tokens)
        self.prompt = prompt  # None as soon as its prefill is done
        self.constraint = request.constraint and request.constraint.start()  # at this answer's end
        self.order = 0  # among the waiting requests
        self.slot = -1  # -1: none yet
        self.reused = 0  # prompt tokens from the prefix cache
        self.made = 0  # tokens generated, the stop id among them
        self.advanced = 0  # tokens that its slot has generated, also after a stop text
        self.in_flight = 0  # decoding steps dispatched whose tokens are not read yet
        self.stop_id: int | None = None  # at which the model stopped
        self.submitted = time.perf_counter()
        self.started: float | None = None  # when its prefill began
        self.first_token: float | None = None
        self.finished: float | None = None

    @property
    def done(self) -> bool:
        return self.finish_reason is not None

    def finish(self, reason: str) -> None:
        self.finish_reason, self.finished = reason, time.perf_counter()
