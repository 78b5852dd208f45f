"""Tokens and their probabilities as the two APIs show them."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any

from jaxchat.engine import Token
from jaxchat.text.tokenizer import Tokenizer


class Namer:
    """Names tokens. Two tokens never have the same name, so that alternatives can be told apart."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._special = {number: name for name, number in tokenizer.special.items()}
        self._known: dict[int, str] = {}

    def __call__(self, token: int) -> str:
        """Its text; a special token's name; `bytes:\\xe2\\x80` for a part of a character, as OpenAI writes it."""
        if token not in self._known:
            data = self._tokenizer.token_bytes(token)
            try:
                text = self._special.get(token) or data.decode()
            except UnicodeDecodeError:
                text = "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
            self._known[token] = text
        return self._known[token]

    def bytes(self, token: int) -> list[int]:
        return list(self._tokenizer.token_bytes(token))

    def shown(self, tokens: Sequence[int]) -> str:
        """The text of tokens, special ones by their names."""
        parts: list[str] = []
        ordinary: list[int] = []
        for token in [*tokens, None]:
            if token is None or token in self._special:
                parts.append(self._tokenizer.decode(ordinary))
                parts.append(self._special[token] if token is not None else "")
                ordinary = []
            else:
                ordinary.append(token)
        return "".join(parts)


def chat_logprobs(namer: Namer, tokens: Sequence[Token], count: int) -> dict[str, Any]:
    """`count` alternatives for each token."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        return {"token": namer(token), "logprob": logprob, "bytes": namer.bytes(token)}

    content = [
        entry(token.id, token.logprob) | {"top_logprobs": [entry(*pair) for pair in token.top[:count]]}
        for token in tokens
    ]
    return {"content": content, "refusal": None}


class CompletionLogprobs:
    """Arrays over the tokens of one completion, the prompt's first where it is echoed. `take` gives what is new."""

    def __init__(self, namer: Namer, tokenizer: Tokenizer, count: int):
        self._namer, self._tokenizer, self._count = namer, tokenizer, count
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._offset = 0  # characters of the text before the next token
        self._new = self._empty()

    @staticmethod
    def _empty() -> dict[str, list[Any]]:
        return {"tokens": [], "token_logprobs": [], "top_logprobs": [], "text_offset": []}

    def add(self, tokens: Sequence[Token]) -> None:
        """The chosen token stands among the alternatives, whether it is one of the likeliest or not."""
        for token in tokens:
            top = {self._namer(number): logprob for number, logprob in token.top[: self._count]}
            self._append(token.id, token.logprob, {self._namer(token.id): token.logprob} | top)

    def add_prompt(self, ids: Sequence[int], scores: Sequence[Token | None]) -> None:
        for number, score in zip(ids, scores, strict=True):
            if score is None:  # nothing stands before it
                self._append(number, None, None)
            else:
                self.add([score])

    def take(self) -> dict[str, list[Any]]:
        new, self._new = self._new, self._empty()
        return new

    def _append(self, token: int, logprob: float | None, top: dict[str, float] | None) -> None:
        values = {"tokens": self._namer(token), "token_logprobs": logprob, "top_logprobs": top}
        for name, value in (values | {"text_offset": self._offset}).items():
            self._new[name].append(value)
        self._offset += len(self._decoder.decode(self._tokenizer.token_bytes(token)))
