"""What the chat page shows of a conversation: lines of the chatbot, tool calls, tokens with their probabilities.

A conversation is a list of messages as the engine takes it; a part of an answer may carry `html` besides: its text as
token spans, made while it came, so that what the browser has shown stays as it is.
"""

from __future__ import annotations

import codecs
import html
import json
import math
import re
import unicodedata
from collections.abc import Sequence
from typing import Any

import gradio as gr

from jaxchat.engine.request import Token
from jaxchat.text.tokenizer import Tokenizer

Messages = list[dict[str, Any]]

BREAK = "\u2060"  # word joiner: no width, no meaning
VISIBLE = str.maketrans({" ": "␣", "\n": "⏎", "\t": "⇥"})


def turn(text: str, parts: list[dict[str, str]] | None = None) -> Messages:
    return [{"role": "user", "content": text}, {"role": "assistant", "content": parts or []}]


def spoken(messages: Messages) -> Messages:
    """The conversation as the engine takes it."""
    return [
        message
        if message["role"] == "user"
        else {
            "role": "assistant",
            "content": [{"type": part["type"], "text": part["text"]} for part in message["content"]],
        }
        for message in messages
    ]


def next_turn(messages: Messages, text: str, event: gr.EventData) -> tuple[Messages, str]:
    """(conversation to go on from, what the person says): typed, an example, a message edited or asked again."""
    data = event._data
    if data is None:
        return messages, text
    if isinstance(data["value"], dict):
        return messages, data["value"]["text"]
    before = messages[: 2 * turns_before(messages, data["index"])]
    if "previous_value" in data:
        edited = data["value"].replace(BREAK, "")
        return (before, edited) if edited.strip() else (messages, "")
    return before, messages[len(before)]["content"]


def show(messages: Messages) -> list[dict[str, Any]]:
    """A conversation as lines of the chatbot. A tool call is a line of its own: `12+30 = 42`."""
    lines: list[dict[str, Any]] = []
    for message in messages:
        if message["role"] == "user":
            lines.append({"role": "user", "content": plain(message["content"])})
            continue
        parts = message["content"]
        for i, part in enumerate(parts):
            if part["type"] == "python":
                output = parts[i + 1]["text"] if parts[i + 1 :] and parts[i + 1]["type"] == "python_output" else None
                lines.append({"role": "assistant", "content": gr.HTML(tool_call(part["text"], output))})
            elif part["type"] == "text":
                content = gr.HTML(part["html"]) if part.get("html") else plain(part["text"])
                lines.append({"role": "assistant", "content": content})
        if not any(part["type"] != "python_output" for part in parts):
            lines.append({"role": "assistant", "content": "…"})  # nothing has come yet, or it was stopped before
    return lines


def turns_before(messages: Messages, index: int) -> int:
    """Number of the turn to which line `index` of the shown conversation belongs."""
    return max(sum(line["role"] == "user" for line in show(messages)[: index + 1]) - 1, 0)


def plain(text: str) -> str:
    """Text in which a browser finds no tag and no entity, and Gradio no indentation to remove.

    Every sign stands as it was written: escaped signs would show in the box where a message is edited.
    """
    return re.sub(r"(?<=[<&])(?=[A-Za-z/!?#])|^(?=[ \t])", BREAK, text, flags=re.M)


def tool_call(call: str, output: str | None) -> str:
    return f"<code>{html.escape(call if output is None else f'{call} = {output}')}</code>"


class TokenSpans:
    """HTML of an answer's tokens as they come: a span for each, tinted by its probability.

    Tokens that make a character only together share a span. `data-steps` holds, for every token of a span, [its text,
    its probability, [[text, probability] of each alternative]] as JSON, which `page.js` shows beside it. The first span
    can be reached by Tab, the others by the arrow keys.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {number: name for name, number in tokenizer.special.items()}
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._group: list[Token] = []
        self._held, self._any = "", False  # text of the group so far; whether there has been a span

    def add(self, tokens: Sequence[Token]) -> str:
        """The spans that these complete; a special token is none."""
        spans = []
        for token in tokens:
            if token.id in self._special:
                spans.append(self.end())
                continue
            self._group.append(token)
            text = self._decoder.decode(self._tokenizer.token_bytes(token.id))
            self._held = text if len(self._group) == 1 else self._held + text
            if not self._decoder.getstate()[0]:
                spans.append(self._close(self._held))
        return "".join(spans)

    def end(self) -> str:
        """The span of what will not be completed any more."""
        return self._close(self._held + self._decoder.decode(b"", final=True)) if self._group else ""

    def _close(self, text: str) -> str:
        steps = [
            [self.readable(token.id), probability(token.logprob),
             [[self.readable(number), probability(logprob)] for number, logprob in token.top]]
            for token in self._group
        ]  # fmt: skip
        likely = probability(sum(token.logprob for token in self._group))
        data = html.escape(json.dumps(steps, ensure_ascii=False, separators=(",", ":")))
        index, self._any, self._group = -self._any, True, []
        attributes = f'class="token" tabindex="{index}" style="--p:{likely}" data-steps="{data}"'
        return f"<span {attributes}>{html.escape(text)}</span>"

    def readable(self, token: int) -> str:
        """A token by itself, so that a person sees what it is: spaces as signs, half a character as its bytes."""
        if token in self._special:
            return self._special[token]
        raw = self._tokenizer.token_bytes(token)
        try:
            text = raw.decode()
        except UnicodeDecodeError:
            return " ".join(f"{byte:02X}" for byte in raw)
        return "".join(c if unicodedata.category(c)[0] != "C" else f"U+{ord(c):04X}" for c in text.translate(VISIBLE))


def probability(logprob: float) -> float:
    return round(math.exp(min(logprob, 0.0)), 4)
