"""Samples for a person to read: the same prompts at temperature 0 and 0.8, as Markdown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from jaxchat.data.rows import Rows
from jaxchat.engine import Engine, Request, Result
from jaxchat.engine.turn import Turn
from jaxchat.text.tokenizer import Tokenizer
from train.report_markdown import code

TEMPERATURES = (0.0, 0.8)
SEED = 1234
CHAT_PROMPTS = (
    "hello",
    "who are you?",
    "how are you?",
    "Tom has 12 apples and buys 30 more. How many?",
    "what do you like to do on weekends?",
)
PROMPT_TOKENS = 8  # of a held-out text


def samples(
    engine: Engine,
    prompts: Sequence[str],
    chat: bool,
    max_tokens: int = 64,
    temperatures: Sequence[float] = TEMPERATURES,
) -> str:
    """Markdown with every prompt's continuations (`chat`: answers), one per temperature; always the same.

    Prompts that are longer than the context are left out.
    """
    prompts = [p for p in prompts if len(_request(engine, p, chat).tokens) <= engine.capacity]
    requests = [
        _request(engine, prompt, chat, max_tokens=max_tokens, temperature=temperature, seed=SEED + i)
        for i, prompt in enumerate(prompts)
        for temperature in temperatures
    ]
    results = iter(engine.generate(requests))
    lines: list[str] = []
    for prompt in prompts:
        lines += [quote(prompt), ""]
        lines += [f"- **{temperature:g}**: {_shown(next(results))}" for temperature in temperatures]
        lines.append("")
    return "\n".join(lines)


def written(engine: Engine, openings: Sequence[str], temperature: float = 0.8) -> list[str]:
    """What a base model goes on with after each opening, to the end of its context; always the same."""
    requests = [
        engine.text_request(text, temperature=temperature, seed=SEED + i, stop=()) for i, text in enumerate(openings)
    ]
    return [result.text for result in engine.generate(requests)]


def held_out_openings(rows: Rows, tokenizer: Tokenizer, count: int = 5) -> list[str]:
    """First words of held-out texts, in whatever language they are."""
    openings = [tokenizer.decode(rows[i][0][1 : 1 + PROMPT_TOKENS].tolist()) for i in range(min(count, len(rows)))]
    return [text.lstrip("\ufffd").rstrip("\ufffd ") for text in openings]  # a piece may begin inside a character


def _request(engine: Engine, prompt: str, chat: bool, **settings: Any) -> Request:
    if chat:
        return engine.chat_request([{"role": "user", "content": prompt}], **settings)
    return engine.text_request(prompt, **settings)


def _shown(result: Result) -> str:
    """One line, tool calls visible, nothing interpreted as Markdown."""
    frames = {"text": "{}", "python": "[{} =", "python_output": " {}] "}
    text = "".join(frames[part["type"]].format(part["text"]) for part in result.parts)
    text = text.rstrip("\ufffd") + " ..." if result.finish_reason == "length" else text  # cut inside a character
    return code(text) if text.strip() else "(nothing)"


def answer_line(tokenizer: Tokenizer, tokens: Sequence[int]) -> str:
    """One line of an answer's ids, shown as in samples."""
    turn = Turn(tokenizer)
    for token in tokens:
        turn.add(token)
    turn.flush()
    return _shown(Result(turn.tokens, turn.parts, "stop", 0, 0))


def quote(prompt: str) -> str:
    """A question as a quotation of one line."""
    return f"> {code(prompt)}"
