"""Conversations as token ids and a loss mask.

A conversation is a list of messages {"role": "system" | "user" | "assistant", "content": ...}. A content is text; an
assistant's may also be a list of parts {"type": "text" | "python" | "python_output", "text": ...}. A system message
is merged into the first user message with an empty line between.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxchat.errors import UsageError
from jaxchat.tokenizer import (
    ASSISTANT_END,
    ASSISTANT_START,
    OUTPUT_END,
    OUTPUT_START,
    PYTHON_END,
    PYTHON_START,
    USER_END,
    USER_START,
    Tokenizer,
)

Message = dict[str, Any]
PART_FRAMES = {"text": None, "python": (PYTHON_START, PYTHON_END), "python_output": (OUTPUT_START, OUTPUT_END)}


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """(ids, mask) of a whole conversation, `<|bos|>` first.

    mask is 1 on what the assistant must say: its text, its calls with their frame, its `<|assistant_end|>`; 0 on the
    user, on tool output and on what opens a turn. `UsageError` names a message that is out of form.
    """
    ids, mask = [tokenizer.bos], [0]

    def add(tokens: list[int], learn: int) -> None:
        ids.extend(tokens)
        mask.extend([learn] * len(tokens))

    special = tokenizer.special
    for message in normalize(messages):
        if message["role"] == "user":
            add([special[USER_START], *tokenizer.encode(message["content"]), special[USER_END]], 0)
            continue
        add([special[ASSISTANT_START]], 0)
        for part in message["content"]:
            frame, tokens = PART_FRAMES[part["type"]], tokenizer.encode(part["text"])
            if frame:
                tokens = [special[frame[0]], *tokens, special[frame[1]]]
            add(tokens, 0 if part["type"] == "python_output" else 1)
        add([special[ASSISTANT_END]], 1)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message]) -> list[int]:
    """ids of a conversation that ends with the user, up to and with the `<|assistant_start|>` to go on from."""
    ids = render(tokenizer, messages)[0]
    if messages[-1]["role"] != "user":
        raise UsageError(f"messages[{len(messages) - 1}]: the last one must be the user's")
    return ids + [tokenizer.special[ASSISTANT_START]]


def continued(messages: Sequence[Message]) -> str:
    """A conversation as one text, for a base model to go on with: every content behind the one before."""
    checked = normalize(messages)
    contents = [[{"text": m["content"]}] if m["role"] == "user" else m["content"] for m in checked]
    return "".join(part["text"] for content in contents for part in content)


def normalize(messages: Sequence[Message]) -> list[Message]:
    """Check form and order, merge the system message, and turn assistants' contents into parts."""
    if not isinstance(messages, (list, tuple)):
        raise UsageError(f"messages: must be a list of messages, not {type(messages).__name__}")
    if not messages:
        raise UsageError("messages: empty; give at least one user message")
    messages = list(messages)
    system = None
    if isinstance(messages[0], dict) and messages[0].get("role") == "system":
        system = _text(messages.pop(0), 0)
        if not messages:
            raise UsageError("messages: only a system message; add a user message")
    offset = 0 if system is None else 1
    result: list[Message] = []
    for i, message in enumerate(messages):
        expected = "assistant" if i % 2 else "user"
        role = message.get("role") if isinstance(message, dict) else None
        if role != expected:
            raise UsageError(
                f"messages[{i + offset}]: role {role!r} where {expected!r} is due (user and assistant in turn)"
            )
        if role == "user":
            text = _text(message, i + offset)
            result.append({"role": role, "content": f"{system}\n\n{text}" if i == 0 and system is not None else text})
        else:
            result.append({"role": role, "content": _parts(message, i + offset)})
    return result


def _text(message: Message, index: int) -> str:
    content = message.get("content")
    if isinstance(content, list):
        parts = _checked_parts(content, index)
        if any(part["type"] != "text" for part in parts):
            raise UsageError(f"messages[{index}]: only an assistant's content may hold tool calls")
        return "".join(part["text"] for part in parts)
    if not isinstance(content, str):
        raise UsageError(f"messages[{index}]: content must be text, not {type(content).__name__}")
    return content


def _parts(message: Message, index: int) -> list[dict[str, str]]:
    content = message.get("content")
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list):
        raise UsageError(f"messages[{index}]: content must be text or a list of parts, not {type(content).__name__}")
    merged: list[dict[str, str]] = []
    for part in _checked_parts(content, index):
        if merged and part["type"] == merged[-1]["type"] == "text":  # one text, however it came in pieces
            merged[-1] = part | {"text": merged[-1]["text"] + part["text"]}
        else:
            merged.append(part)
    return merged


def _checked_parts(parts: list[Any], index: int) -> list[dict[str, str]]:
    kinds = tuple(PART_FRAMES)
    for part in parts:
        if not isinstance(part, dict) or part.get("type") not in kinds or not isinstance(part.get("text"), str):
            raise UsageError(f"messages[{index}]: a part needs a type of {', '.join(kinds)} and a text")
    return parts
