"""Constrained decoding: which tokens may come next in an answer that must be JSON, match a regex or be a choice.

By llguidance, whose grammars are over bytes, so any byte-level vocabulary will do.
"""

from __future__ import annotations

import functools
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import llguidance
import numpy as np
from llguidance import LLMatcher

from jaxchat.errors import UsageError
from jaxchat.tokenizer import Tokenizer

MAX_CHARS = 50_000  # of a schema, a pattern, or all choices together
JSON_FORM: Any = {"whitespace_pattern": " ?", "lenient": False}  # with more of it a small model would never end
# what a step may cost: some 5 ms of a core
LIMITS: dict[str, Any] = {"step_lexer_fuel": 70_000, "max_lexer_states": 20_000, "max_grammar_size": 100_000}
# Building a grammar can take any time and memory, and the library aborts where there is none left. So a new one is
# built in a process of its own first.
MEMORY, PROCESSOR_SECONDS, SECONDS = 2**30, 2, 10
TRIAL = """
import json, sys
limits, packages, memory, seconds, grammar = json.load(sys.stdin)
sys.path.append(packages)
try:
    import resource
    for kind, most in (("AS", memory), ("CPU", seconds), ("CORE", 0)):
        resource.setrlimit(getattr(resource, "RLIMIT_" + kind), (most, most))
except ImportError:  # Windows: the time alone is limited
    pass
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
limits = LLParserLimits(**limits, verbose_errors=False)
matcher = LLMatcher(LLTokenizer("byte"), grammar, log_level=0, limits=limits)
matcher.compute_bitmask()
print(matcher.get_error())
"""


class Vocabulary:
    """A tokenizer as llguidance reads it."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int], size: int):
        tokens = [tokenizer.token_bytes(i) for i in range(size)]
        self.special_token_ids = [i for i, token in enumerate(tokens) if not token]
        self.tokens = [token or b"\xff<%d>" % i for i, token in enumerate(tokens)]  # \xff marks the special ones
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos
        self._tokenizer = tokenizer

    def __call__(self, text: str) -> list[int]:
        return self._tokenizer.encode(text)


def vocabulary(tokenizer: Tokenizer, ends: Sequence[int], size: int) -> llguidance.LLTokenizer:
    """Return what `constrain` needs of a tokenizer, for `size` ids; an answer ends with one of the ids `ends`."""
    return llguidance.LLTokenizer(llguidance.TokenizerWrapper(Vocabulary(tokenizer, ends, size)), eos_token=list(ends))


class Constraint:
    """What an answer must be, and how far an answer has come in it; `words`: of 32 bits, one for each id."""

    def __init__(self, matcher: LLMatcher, words: int):
        self._matcher, self._words = matcher, words

    def start(self) -> Constraint:
        """Return the same constraint for one answer."""
        return Constraint(self._matcher.deep_copy(), self._words)

    def allowed(self) -> np.ndarray:
        """Return (words,) uint32: a bit for each id, whether it may come next."""
        return np.frombuffer(self._matcher.compute_bitmask(), np.uint32)[: self._words]  # it may have one more

    def accept(self, token: int) -> bool:
        """Take a token of the answer. False where the library gave up: then the answer can only be cut off."""
        return self._matcher.consume_token(token) and not self._matcher.is_error()


def constrain(vocabulary: llguidance.LLTokenizer, kind: str, value: Any) -> Constraint:
    """Return the constraint of a JSON Schema ("json"; an object, or its text), a "regex" or a list of texts ("choice").

    It takes a tenth of a second, and seconds at most. `UsageError` says what is wrong, in the library's words.
    """
    grammar = _grammar(kind, value)
    if error := _error(grammar):
        raise UsageError(f"{kind}: {error}")
    matcher = LLMatcher(
        vocabulary, grammar, log_level=0, limits=llguidance.LLParserLimits(**LIMITS, verbose_errors=False)
    )
    return Constraint(matcher, -(-vocabulary.vocab_size // 32))


def _grammar(kind: str, value: Any) -> str:
    try:
        text = value if isinstance(value, str) else json.dumps(value)
        if len(text) > MAX_CHARS:
            raise UsageError(f"{kind}: {len(text):,} characters; at most {MAX_CHARS:,}")
        match kind:
            case "json":
                return LLMatcher.grammar_from_json_schema(text, overrides=JSON_FORM)
            case "regex":
                return LLMatcher.grammar_from_regex(text)
            case "choice" if value and all(isinstance(choice, str) for choice in value):
                cases = " | ".join(json.dumps(choice, ensure_ascii=False) for choice in value)
                return LLMatcher.grammar_from_lark("start: CHOICE\nCHOICE: " + cases)  # a rule may have fewer cases
            case "choice":
                raise ValueError("must be a list of texts")
    except (ValueError, TypeError, RecursionError) as error:
        raise UsageError(f"{kind}: {error}") from None
    raise UsageError(f"constraint: json, regex or choice, not {kind!r}")


@functools.lru_cache(256)
def _error(grammar: str) -> str:
    """Return what is wrong with a grammar, "" where it can be used."""
    packages = str(Path(llguidance.__file__).parents[1])
    settings = json.dumps([LIMITS, packages, MEMORY, PROCESSOR_SECONDS, grammar])
    command = [sys.executable, "-I", "-S", "-c", TRIAL]
    try:
        trial = subprocess.run(command, input=settings, capture_output=True, text=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return f"takes longer than {SECONDS} s to prepare; simplify it"
    if trial.returncode:
        return "takes too much time or memory to prepare; simplify it"
    error = " ".join(trial.stdout.split())[:300]
    return "no text can match it" if error.startswith("NoExtensionBias") else error
