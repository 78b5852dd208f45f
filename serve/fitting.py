"""Conversations that fit into the context."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxchat.engine import Engine, Request
from jaxchat.errors import UsageError

ANSWER_ROOM = 32  # tokens of the context kept for the answer where the conversation would fill it


def fitting_request(engine: Engine, messages: Sequence[dict[str, Any]], **settings: Any) -> tuple[Request, int]:
    """(request, dropped): the answer to a conversation, without as many of its oldest messages as do not fit.

    `UsageError` where the last message alone is longer than the context.
    """
    room, dropped = engine.capacity - min(ANSWER_ROOM, engine.capacity // 2), 0
    while True:
        request = engine.chat_request(messages[dropped:], **settings)
        if len(request.tokens) <= room or dropped + 2 >= len(messages):
            break
        dropped += 2
    if len(request.tokens) > engine.capacity:
        raise UsageError(f"the message has {len(request.tokens)} tokens; this model's context holds {engine.capacity}")
    return request, dropped
