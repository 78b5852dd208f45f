"""What a chat model says freely, and whether it knows which answer belongs to a conversation."""

from __future__ import annotations

import random
import re
import tomllib
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from jaxchat.tasks.base import NO_FILES, Conversation, Example, Message, Task, TaskFiles, assistant, user
from jaxchat.tasks.identity import persona_of
from jaxchat.tokenizer import Tokenizer

WORD = re.compile(r"[^\W\d_]+(?:'[^\W\d_]+)*")
HANGUL = re.compile("[가-힣]")
KINDS = {"python_end": "python", "output_end": "python_output"}  # of the text before these tokens
OPTIONS = 10  # next turns to choose from, one of them true


class FreeAnswers(Task):
    """Answers to everyday questions in the model's language, judged by their words alone."""

    name, title, auto = "free_answers", "free answers", True
    each, max_tokens, temperature, top_k = 2, 64, 0.7, 50

    def __init__(self, files: TaskFiles = NO_FILES, kind: str = "judging"):
        super().__init__(files)
        texts = tomllib.loads(Path(__file__).with_name("everyday.toml").read_text(encoding="utf-8"))
        self._questions = [text for language in persona_of(files).languages for text in texts[language][kind]]

    def examples(self) -> list[Example]:
        return [Example([user(text)], None) for text in self._questions for _ in range(self.each)]


class NextTurn(Task):
    """Which of ten turns comes next in a held-out conversation of the SFT mixture.

    `conversations` come from the run; `expected` is (options, the true one). Asked are turns of text alone that occur
    once; the other nine are such turns of other conversations.
    """

    name, title, auto, chance = "next_turn", "true next turn", True, 1 / OPTIONS
    most = 128  # questions: seconds on a laptop
    conversations: Sequence[Conversation] = ()

    def examples(self) -> list[Example]:
        turns, counts = list[tuple[int, Conversation, str]](), dict[str, int]()
        for number, messages in enumerate(self.conversations):
            for i, message in enumerate(messages):
                text = "".join(part["text"] for part in message["content"] if message["role"] == "assistant")
                if i and text.strip() and all(part["type"] == "text" for part in message["content"]):
                    counts[text] = counts.get(text, 0) + 1
                    turns.append((number, list(messages[:i]), text))
        rng, examples = random.Random(0), list[Example]()
        turns = [turn for turn in turns if counts[turn[2]] == 1]
        for number, prompt, text in rng.sample(turns, min(self.most, len(turns))):
            others = [other for n, _, other in turns if n != number]
            if len(others) >= OPTIONS - 1:
                options = [text, *rng.sample(others, OPTIONS - 1)]
                rng.shuffle(options)
                examples.append(Example(prompt, (options, text)))
        return examples


def conversations_of(tokenizer: Tokenizer, rows: Iterable[Sequence[int]]) -> list[Conversation]:
    """Return the conversations in rows of ids, the reverse of `chat.render`."""
    names, conversations = {i: name[2:-2] for name, i in tokenizer.special.items()}, list[Conversation]()
    for row in rows:
        messages, ids = Conversation(), list[int]()
        for token in [*row, tokenizer.bos]:
            if (name := names.get(token)) is None:
                ids.append(token)
                continue
            text, ids = tokenizer.decode(ids), []
            if name == "bos":
                conversations += [messages] if messages else []
                messages = []
            elif name in ("user_start", "assistant_start"):
                messages.append(user("") if name == "user_start" else assistant())
            elif messages and name == "user_end":
                messages[-1]["content"] = text
            elif messages and text:
                messages[-1]["content"].append({"type": KINDS.get(name, "text"), "text": text})
    return conversations


def text_of(message: Message) -> str:
    """Return what is said in a message, without tool calls."""
    content = message["content"]
    return content if isinstance(content, str) else " ".join(p["text"] for p in content if p["type"] == "text")


def words(text: str) -> list[str]:
    """Return the words of a text in lower case: letters, with apostrophes inside."""
    return WORD.findall(unicodedata.normalize("NFC", text).lower().replace("’", "'"))


class Words:
    """The words of many texts.

    Korean joins particles and endings to its words, so most right words are in no text. A word of Hangul is known if
    each pair of neighbouring syllables is in some word.
    """

    def __init__(self, texts: Iterable[str]):
        self._words = {word for text in texts for word in words(text)}
        self._pairs = {pair for word in self._words if HANGUL.search(word) for pair in _pairs(word)}

    def __contains__(self, word: str) -> bool:
        return word in self._words or (bool(HANGUL.search(word)) and self._pairs.issuperset(_pairs(word)))


def _pairs(word: str) -> set[str]:
    return {word[i : i + 2] for i in range(len(word) - 1)} or {word}


def repeated(answers: Sequence[Sequence[str]], n: int = 3) -> tuple[int, int]:
    """Return how many n-grams came before in the same answer, and how many there are."""
    counts = [[tuple(words[i : i + n]) for i in range(len(words) - n + 1)] for words in answers]
    total = sum(map(len, counts))
    return total - sum(len(set(grams)) for grams in counts), total


def distinct(answers: Sequence[Sequence[str]], n: int = 2) -> tuple[int, int]:
    """Return how many different n-grams all answers have together, and how many there are (distinct-n, 1510.03055)."""
    grams = [tuple(words[i : i + n]) for words in answers for i in range(len(words) - n + 1)]
    return len(set(grams)), len(grams)
