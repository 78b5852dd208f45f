"""Conversations as token ids and a loss mask.

`normalize` is the one rule for messages: of SFT data, the HTTP API, the terminal, and (in Jinja) an exported template.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from jaxchat.errors import UsageError
from jaxchat.tokenizer import ASSISTANT_END, ASSISTANT_START, Tokenizer

Message = dict[str, Any]
PART_FRAMES = {"text": "", "python": "python", "python_output": "output"}  # <|python_start|> and so on
TEXT_PARTS = ("text", "input_text", "output_text")  # the last two: OpenAI's Responses
ROLES = {"assistant": "assistant"} | dict.fromkeys(("user", "system", "developer", "tool", "function"), "user")
RESULTS = ("tool", "function")  # roles that hold the result of a call
CALCULATORS = ("calculator", "calculate", "python")  # functions whose calls are our calculator's
EXAMPLES = ("hello", "who are you?", "Tom has 12 apples and buys 30 more. How many?", "what do you like to do?")
ARITHMETIC = set("0123456789+-*/()., ")


def render(tokenizer: Tokenizer, messages: Sequence[Message]) -> tuple[list[int], list[int]]:
    """Return (ids, mask) of a whole conversation, `<|bos|>` first.

    mask is 1 on what the assistant must produce: its text, its framed tool calls and `<|assistant_end|>`; 0 on the
    user, on tool output, on what opens a turn and on messages of weight 0. `UsageError` names a malformed message.
    """
    ids, mask, special = [tokenizer.bos], [0], tokenizer.special

    def add(tokens: list[int], target: int, frame: str = "") -> None:
        if frame:
            tokens = [special[f"<|{frame}_start|>"], *tokens, special[f"<|{frame}_end|>"]]
        ids.extend(tokens)
        mask.extend([target] * len(tokens))

    for message in normalize(messages):
        if message["role"] == "user":
            add(tokenizer.encode(message["content"]), int(message.get("weight") == 1), "user")
            continue
        add([special[ASSISTANT_START]], 0)
        learned = 1
        for part in message["content"]:
            learned = int(part.get("weight") != 0)
            target = learned if part["type"] != "python_output" else 0
            add(tokenizer.encode(part["text"]), target, PART_FRAMES[part["type"]])
        add([special[ASSISTANT_END]], learned)
    return ids, mask


def render_prompt(tokenizer: Tokenizer, messages: Sequence[Message], continue_final: bool = False) -> list[int]:
    """Return the ids of a conversation that ends with the user, and the `<|assistant_start|>` to continue from.

    The assistant's turn stays open behind the output of a calculator call; continue_final: behind an assistant's last
    message, which must be there.
    """
    ids = render(tokenizer, messages)[0]
    if normalize(messages)[-1]["role"] == "assistant" and (continue_final or messages[-1]["role"] in RESULTS):
        return ids[:-1]
    if continue_final or messages[-1]["role"] == "assistant":
        due = "assistant's" if continue_final else "user's, or continue_final_message be true"
        raise UsageError(f"messages[{len(messages) - 1}]: the last one must be the {due}")
    return ids + [tokenizer.special[ASSISTANT_START]]


def continued(messages: Sequence[Message]) -> str:
    """Return a conversation as one text for a base model to continue: all contents in a row."""
    contents = (m["content"] if m["role"] == "assistant" else [{"text": m["content"]}] for m in normalize(messages))
    return "".join(part["text"] for content in contents for part in content)


def normalize(messages: Sequence[Message]) -> list[Message]:
    """Return turns of user and assistant; `UsageError` names the message that cannot be used.

    A turn is {"role": "user", "content": text} or {"role": "assistant", "content": parts}. A part is {"type": "text" |
    "python" | "python_output", "text": text}, with "weight": 0 if it is not learned.
    - system, developer, tool and function messages are the user's text.
    - Neighbours of one role are joined, with an empty line between texts. An empty user turn precedes a greeting.
    - A calculator call that has its result becomes a calculator turn; other calls become text, in JSON.
    """
    if not isinstance(messages, list | tuple) or not messages:
        raise UsageError("messages: must be a list with at least one message")
    for i, message in enumerate(messages):
        role = message.get("role") if isinstance(message, dict) else None
        if not isinstance(role, str) or role not in ROLES:
            raise UsageError(f"messages[{i}]: role {role!r}; it must be {', '.join(ROLES)}")
    turns: list[Message] = []
    results = set()  # messages that are output of the calculator
    for i, message in enumerate(messages):
        if i in results:
            continue
        role, parts = ROLES[message["role"]], _parts(message, i)
        if role == "assistant":
            for number, (name, arguments) in enumerate(_calls(message, i), i + 1):
                expression = _expression(arguments) if name in CALCULATORS else ""
                if expression and number < len(messages) and messages[number]["role"] in RESULTS:
                    results.add(number)
                    output = _text(messages[number], number)
                    _join(parts, [{"type": "python", "text": expression}, {"type": "python_output", "text": output}])
                else:
                    call = f'{{"name": {_json(name)}, "arguments": {arguments}}}'
                    _join(parts, [{"type": "text", "text": call}])
            if message.get("weight") == 0:
                parts = [part | {"weight": 0} for part in parts]
        else:
            parts = [{"type": "text", "text": _text(message, i)}]
        if not turns and role == "assistant":
            turns.append({"role": "user", "content": [{"type": "text", "text": ""}]})
        if turns and turns[-1]["role"] == role:
            _join(turns[-1]["content"], parts)
        else:
            learned = {"weight": 1} if role == "user" and message.get("weight") == 1 else {}
            turns.append({"role": role, "content": parts} | learned)
    return [t if t["role"] == "assistant" else t | {"content": t["content"][0]["text"]} for t in turns]


def _join(parts: list[Message], more: list[Message]) -> None:
    """Append parts, with an empty line between two texts."""
    last = next((part for part in reversed(parts) if part["text"] or part["type"] != "text"), parts[-1])
    first = more[0]
    if last["type"] == first["type"] == "text" and last["text"] and first["text"]:
        more = [first | {"text": "\n\n" + first["text"]}, *more[1:]]
    for part in more:
        _append(parts, part)


def _append(parts: list[Message], part: Message) -> None:
    """Append a part; neighbouring texts of one weight become one."""
    if parts and parts[-1]["type"] == part["type"] == "text" and parts[-1].get("weight") == part.get("weight"):
        parts[-1] = part | {"text": parts[-1]["text"] + part["text"]}
    else:
        parts.append(part)


def _text(message: Message, index: int) -> str:
    """Return the content of a message that is not an assistant's."""
    parts = _parts(message, index)
    if any(part["type"] != "text" for part in parts):
        raise UsageError(f"messages[{index}]: only an assistant's content may hold calculator calls")
    return "".join(part["text"] for part in parts)


def _parts(message: Message, index: int) -> list[dict[str, Any]]:
    """Return the content of a message as at least one part."""
    content = message.get("content")
    if content is None and message["role"] in ("assistant", *RESULTS):
        content = ""
    if message["role"] in RESULTS and isinstance(content, dict | int | float):
        content = _json(content)
    if isinstance(content, str):
        return [{"type": "text", "text": content}]
    if not isinstance(content, list | tuple):
        raise UsageError(f"messages[{index}]: content must be text or a list of parts, not {type(content).__name__}")
    parts: list[Message] = []
    for part in content or [{"type": "text", "text": ""}]:
        kind = part.get("type") if isinstance(part, dict) else None
        if not isinstance(kind, str) or kind not in (*PART_FRAMES, *TEXT_PARTS):
            raise UsageError(f"messages[{index}]: this model reads text only, not a part of type {kind!r}")
        if not isinstance(part.get("text"), str):
            raise UsageError(f"messages[{index}]: a part of type {kind} needs a text")
        plain = {"type": "text" if kind in TEXT_PARTS else kind, "text": part["text"]}
        _append(parts, plain | {"weight": 0} if part.get("weight") == 0 else plain)
    return parts


def _calls(message: Message, index: int) -> list[tuple[str, str]]:
    """Return name and arguments, in JSON, of an assistant's calls: `tool_calls` or the older `function_call`."""
    calls = message.get("tool_calls") or [message.get("function_call") or None]
    if not isinstance(calls, list | tuple):
        raise UsageError(f"messages[{index}]: tool_calls must be a list, not {type(calls).__name__}")
    result = []
    for call in calls:
        function = call.get("function") or call if isinstance(call, dict) else call
        if function is None:  # no call
            continue
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise UsageError(f"messages[{index}]: a tool call needs a function with a name")
        arguments = function.get("arguments")
        result.append((function["name"], arguments if isinstance(arguments, str) else _json(arguments or {})))
    return result


def _expression(arguments: str) -> str:
    """Return the expression of arguments like {"expression": "2*(3+4)"}, "" where they are something else."""
    pieces = arguments.replace(r"\"", "\0").split('"')
    if "\\" in arguments.replace(r"\"", "") or [piece.strip() for piece in pieces[::2]] != ["{", ":", "}"]:
        return ""
    expression = pieces[3].replace("\0", '"')
    return expression if set(expression) <= ARITHMETIC or ".count(" in expression else ""


def _json(value: Any) -> str:
    """Return JSON as the chat templates of transformers write it."""
    return json.dumps(value, ensure_ascii=False, default=str)
