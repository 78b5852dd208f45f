"""Conversations as token ids and a loss mask.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": ...}. A content is text; an
assistant's may also be a list of parts {"type": "text" | "python" | "python_output", "text": ...}. A system message
is merged into the first user message with an empty line between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxchat.errors import UsageError
from jaxchat.tokenizer import ASSISTANT_END, ASSISTANT_START, Tokenizer

Message = dict[str, Any]
PART_FRAMES = {"text": "", "python": "python", "python_output": "output"}  # <|python_start|> and so on


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return (ids, mask) of a whole conversation, `<|bos|>` first.

    mask is 1 on what the assistant must produce: its text, its framed tool calls and `<|assistant_end|>`; 0 on the
    user, on tool output and on what opens a turn. `UsageError` names a malformed message.
    """
    ids, mask, special = [tokenizer.bos], [0], tokenizer.special

    def add(tokens: list[int], target: int, frame: str = "") -> None:
        if frame:
            tokens = [special[f"<|{frame}_start|>"], *tokens, special[f"<|{frame}_end|>"]]
        ids.extend(tokens)
        mask.extend([target] * len(tokens))

    for message in normalize(messages):
        if message["role"] == "user":
            add(tokenizer.encode(message["content"]), 0, "user")
            continue
        add([special[ASSISTANT_START]], 0)
        for part in message["content"]:
            add(tokenizer.encode(part["text"]), int(part["type"] != "python_output"), PART_FRAMES[part["type"]])
        add([special[ASSISTANT_END]], 1)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """Return the ids of a conversation that ends with the user, and the `<|assistant_start|>` to continue from."""
    ids = render(tokenizer, messages)[0]
    if messages[-1]["role"] != "user":
        raise UsageError(f"messages[{len(messages) - 1}]: the last one must be the user's")
    return ids + [tokenizer.special[ASSISTANT_START]]


def continued(messages: Sequence[Message]) -> str:
    """Return a conversation as one text for a base model to continue: all contents in a row."""
    contents = (m["content"] if m["role"] == "assistant" else [{"text": m["content"]}] for m in normalize(messages))
    return "".join(part["text"] for content in contents for part in content)


def normalize(messages: Sequence[Message]) -> list[Message]:
    """Check form and order, merge the system message, and turn assistants' contents into parts."""
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError("messages: must be a list with at least one user message")
    first = messages[0]
    has_system = isinstance(first, dict) and first.get("role") == "system"
    if has_system and len(messages) == 1:
        raise UsageError("messages: only a system message; add a user message")
    result: list[Message] = []
    for i, message in enumerate(messages[has_system:], int(has_system)):
        expected = "assistant" if len(result) % 2 else "user"
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected:
            raise UsageError(f"messages[{i}]: role {role!r} where {expected!r} is due (user and assistant in turn)")
        system = f"{_text(first, 0)}\n\n" if has_system and not result else ""
        content = _parts(message, i) if role == "assistant" else system + _text(message, i)
        result.append({"role": role, "content": content})
    return result


def _text(message: Message, index: int) -> str:
    """Return the content of a system or user message."""
    parts = _parts(message, index)
    if any(part["type"] != "text" for part in parts):
        raise UsageError(f"messages[{index}]: only an assistant's content may hold tool calls")
    return "".join(part["text"] for part in parts)


def _parts(message: Message, index: int) -> list[dict[str, str]]:
    """Return the content of a message as parts; consecutive texts are joined."""
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UsageError(f"messages[{index}]: content must be text or a list of parts, not {type(content).__name__}")
    merged: list[dict[str, str]] = []
    for part in content:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in PART_FRAMES or not isinstance(part.get("text"), str):
            raise UsageError(f"messages[{index}]: a part needs a type of {', '.join(PART_FRAMES)} and a text")
        if merged and kind == merged[-1]["type"] == "text":
            merged[-1] = part | {"text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return merged
