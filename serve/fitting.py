"""Conversations that fit into the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxchat.engine import Engine, Request
from jaxchat.errors import UsageError

ANSWER_ROOM = 32  # tokens of the context kept for the answer where the conversation would fill it


def fitting_request(engine: Engine, messages: Sequence[dict[str, Any]], **settings: Any) -> tuple[Request, int]:
    """(request, dropped): the answer to a conversation, without as many of its oldest turns as do not fit; what the
    system says stays.

    `UsageError` where the last message alone is longer than the context.
    """
    first = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    messages = messages[len(first) :]
    room = engine.capacity - min(ANSWER_ROOM, engine.capacity // 2)

    def asked(turns: int) -> Request:
        """With so many turns before the last message."""
        return engine.chat_request([*first, *messages[max(0, len(messages) - 1 - 2 * turns) :]], **settings)

    most = len(messages) // 2  # turns before the last message
    low, high = 0, 1  # fits, or has to; perhaps fits
    while high < most and len(asked(high).tokens) <= room:  # however long the conversation is, no more is read of it
        low, high = high, 2 * high
    high = min(high, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(asked(middle).tokens) <= room else (low, middle - 1)
    request, dropped = asked(low), max(0, len(messages) - 1 - 2 * low)
    if len(request.tokens) > engine.capacity:
        raise UsageError(f"the message has {len(request.tokens)} tokens; this model's context holds {engine.capacity}")
    return request, dropped
