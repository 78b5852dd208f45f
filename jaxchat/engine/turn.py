"""Turn generated ids into text that is safe to show, and run the tool calls among them.

A call is the text between <|python_start|> and <|python_end|>. At its end the row pauses on the device, the host runs
the calculator, and the result is forced in between <|output_start|> and <|output_end|>.
"""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from jaxchat.engine.device import FORCED
from jaxchat.engine.request import Event, Token
from jaxchat.tokenizer import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START, Tokenizer
from jaxchat.tools.calculator import calculate

TOOL_ERROR = "error"  # the output of a call that the calculator refuses


class Turn:
    """One answer. `add` takes every id in order and returns the events that it completes.

    The answer ends before the first of `stop_texts` in its text; then `stopped` is true, and nothing more may be added.
    Text that may be the beginning of a stop text is held back.
    """

    def __init__(self, tokenizer: Tokenizer, stop_texts: Sequence[str] = ()):
        special = tokenizer.special
        self._tokenizer = tokenizer
        self._special = set(special.values())
        self._opens = {special[PYTHON_START]: "python", special[OUTPUT_START]: "python_output"}
        self._closes = {special[PYTHON_END]: "python", special[OUTPUT_END]: "python_output"}
        self._kind = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = tuple(text for text in stop_texts if text)
        self._held_back = ""
        self._to_force = 0  # ids of a tool's output that are still to come
        self._unshown: list[tuple[Token, int]] = []  # with the number of characters before each
        self._chars = self._shown_chars = 0
        self.tokens: list[int] = []
        self.forced: list[bool] = []  # of every token, whether it is forced tool output
        self.parts: list[dict[str, str]] = []
        self.logprobs: list[Token] = []  # of every token, where they are reported
        self.stopped = False

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
        if self._stops and self._kind == "text":
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
