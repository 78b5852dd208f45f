"""An answer as it comes out: ids to text that is safe to show, and the tool calls inside.

A call is the text between <|python_start|> and <|python_end|>. At its end the row waits on the device, the host runs
the calculator, and the result is forced in between <|output_start|> and <|output_end|>.
"""

from __future__ import annotations

import codecs
from typing import Any

from jaxchat.engine.decode import FORCED
from jaxchat.engine.request import Event
from jaxchat.text.tokenizer import OUTPUT_END, OUTPUT_START, PYTHON_END, PYTHON_START, Tokenizer
from jaxchat.tools.calculator import calculate

TOOL_ERROR = "error"  # the output of a call that the calculator refuses


class Turn:
    """Collects one answer. `add` takes every made id, in order, and returns the events that it completes."""

    def __init__(self, tokenizer: Tokenizer):
        special = tokenizer.special
        self._tokenizer = tokenizer
        self._special = set(special.values())
        self._opens = {special[PYTHON_START]: "python", special[OUTPUT_START]: "python_output"}
        self._closes = {special[PYTHON_END]: "python", special[OUTPUT_END]: "python_output"}
        self._output = special[OUTPUT_START], special[OUTPUT_END]
        self._kind = "text"
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._to_force = 0  # ids of a tool's output that are still to come
        self.tokens: list[int] = []
        self.forced: list[bool] = []  # of every token, whether it is of such an output
        self.parts: list[dict[str, str]] = []
        self.logprobs: list[Any] = []  # `request.Token`s, where asked for

    def add(self, token: int) -> list[Event]:
        """A special token never shows as text; one that opens or closes nothing is dropped."""
        self.tokens.append(token)
        self.forced.append(self._to_force > 0)
        self._to_force = max(0, self._to_force - 1)
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
        """Show what was held back as incomplete UTF-8 (as U+FFFD); at the end of a part or of the answer."""
        return self._show(self._decoder.decode(b"", final=True))

    def tool_output(self) -> list[int]:
        """Ids that answer the call that has just been closed, the next to be added; none where there was no call."""
        if not self.parts or self.parts[-1]["type"] != "python":
            return []
        result = calculate(self.parts[-1]["text"])
        ids = self._tokenizer.encode(TOOL_ERROR if result is None else result)
        start, end = self._output
        output = [start, *ids[: FORCED - 2], end]
        self._to_force = len(output)
        return output

    def _show(self, text: str) -> list[Event]:
        if not text:
            return []
        if not self.parts or self.parts[-1]["type"] != self._kind:
            self.parts.append({"type": self._kind, "text": ""})
        self.parts[-1]["text"] += text
        return [Event(self._kind, text)]
