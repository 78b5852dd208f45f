"""Identity: conversations of the model about itself for SFT, and the exam on them.

A question is an opening, a core and a closing ("hey, " + "what is your name" + "?"). The exam asks paraphrases that
training never shows: cores of its own, and trained cores in combinations that a hash holds out. Greetings and small
talk are trained too, since most chats begin with "hello"; they are not graded.

`sft.identity` names an `identity.toml` for a persona of your own:

    name = "Mina"
    maker = "the robotics club"
    languages = ["en", "ko"]      # it is asked and answers in these
    tone = "friendly"             # "plain" | "friendly" | "formal"

    [[facts]]
    questions = ["where do you live", "where is your home"]
    answer = "I live in the club room, on the shelf by the window."
    must_say = "club room"        # what the exam looks for in the answer
"""

from __future__ import annotations

import dataclasses
import hashlib
import random
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.config import nearest
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.base import (
    DEFAULT_COUNT,
    NO_FILES,
    Conversation,
    Example,
    TaskFiles,
    WrittenTask,
    assistant,
    user,
)

NAME = "jaxchat"
LANGUAGES = ("en", "ko")
TONES = ("plain", "friendly", "formal")
LONGEST = 60  # characters of a name or a maker
LONGEST_ANSWER = 160  # characters; the exam gives it 96 tokens
EXAM_SEED = 20_260_202
EXAM_COMBINATIONS = 6  # per topic, of trained cores
EXAM_PARAPHRASES = 2  # per exam core
HELD_OUT_ONE_IN = 8
SMALL_TALK_SHARE = 0.35  # of conversations that open with a greeting or small talk


@dataclass(frozen=True)
class Topic:
    """Questions with one meaning. An answer is right if it holds all of `required` and none of `forbidden`."""

    questions: tuple[str, ...]  # trained
    exam_questions: tuple[str, ...]  # never trained
    answers: tuple[str, ...]
    required: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    language: str = "en"


def _topic(table: Mapping[str, Any], language: str = "en") -> Topic:
    fields = {name: tuple(table.get(name, ())) for name in TOPIC_FIELDS}
    return Topic(**fields, language=language)


TOPIC_FIELDS = ("questions", "exam_questions", "answers", "required", "forbidden")
TEXTS = tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))
TOPICS = {name: _topic(table) for name, table in TEXTS["jaxchat"].items()}  # jaxchat's own persona
OPENINGS, CLOSINGS = TEXTS["openings"], TEXTS["closings"]


@dataclass(frozen=True)
class Fact:
    questions: tuple[str, ...]
    answer: str
    must_say: str
    language: str


@dataclass(frozen=True)
class Persona:
    name: str = NAME
    maker: str = "my owner"
    languages: tuple[str, ...] = ("en",)
    tone: str = "plain"
    facts: tuple[Fact, ...] = ()


def load_persona(path: str | Path) -> Persona:
    """Read an `identity.toml`. `UsageError` names a wrong key, `DataError` an unreadable file."""
    try:
        table = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"sft.identity: {path}: cannot be read, or is not valid TOML ({error})") from None

    def check(good: object, key: str, advice: str) -> None:
        if not good:
            raise UsageError(f"{path}: {key}: {advice}")

    def texts(key: str, value: Any) -> list[str]:
        values = [value] if isinstance(value, str) else value
        good = isinstance(values, list) and values and all(isinstance(v, str) and v.strip() for v in values)
        check(good, key, f"needs a list of texts, at least one, not {value!r}")
        return [v.strip() for v in values]

    def choice(key: str, value: Any, known: Sequence[str]) -> str:
        check(value in known, key, f"{value!r} is unknown; choose from {', '.join(known)}")
        return value

    def short(key: str, value: Any) -> str:
        good = isinstance(value, str) and 0 < len(value.strip()) <= LONGEST and "\n" not in value
        check(good, key, f"needs a text of 1 to {LONGEST} characters in one line, not {value!r}")
        return value.strip()

    def fact(key: str, table: Any) -> Fact:
        keys = set(table) if isinstance(table, dict) else set()
        good = {"questions", "answer"} <= keys <= {"questions", "answer", "must_say", "language"}
        check(good, key, "needs `questions` and `answer`; may have `must_say` and `language`")
        questions = tuple(q.rstrip("?! ") for q in texts(f"{key}, questions", table["questions"]))
        answer = " ".join(texts(f"{key}, answer", table["answer"]))
        must_say = " ".join(texts(f"{key}, must_say", table.get("must_say", answer)))
        check(all(questions), key, "a question without words")
        check(len(answer) <= LONGEST_ANSWER, key, f"the answer has {len(answer)} characters; at most {LONGEST_ANSWER}")
        check(len(answer) <= LONGEST or "must_say" in table, key, "name the words that the exam looks for, must_say")
        check(must_say.lower() in answer.lower(), key, f"must_say {must_say!r} is not in the answer")
        korean = any("가" <= c <= "힣" for c in answer)
        language = choice(f"{key}: language", table.get("language", "ko" if korean else "en"), LANGUAGES)
        return Fact(questions, answer, must_say, language)

    defaults = dataclasses.asdict(Persona())
    for key in table:
        check(key in defaults, key, f"unknown key{nearest(key, defaults)}")
    values = defaults | table
    check(isinstance(values["facts"], list | tuple), "facts", "write each as a table of its own, [[facts]]")
    return Persona(
        short("name", values["name"]),
        short("maker", values["maker"]),
        tuple(
            choice("languages", language, LANGUAGES)
            for language in texts("languages", table.get("languages", list(defaults["languages"])))
        ),
        choice("tone", values["tone"], TONES),
        tuple(fact(f"facts, number {number}", table) for number, table in enumerate(values["facts"], 1)),
    )


def topics_of(persona: Persona) -> dict[str, Topic]:
    """Return the topics of a persona by language and name ("ko: name"), then its facts ("fact 1")."""

    def fill(texts: Sequence[str]) -> list[str]:
        return [text.format(name=persona.name, maker=persona.maker) for text in texts]

    topics = {}
    for language in persona.languages:
        for name, table in TEXTS["persona"][language].items():
            must = [text.lower() for text in fill(table["required"])]
            own = table | {"answers": fill(table[persona.tone]), "required": must}
            topics[f"{language}: {name}"] = _topic(own, language)
    for number, fact in enumerate(persona.facts, 1):
        topics[f"fact {number}"] = Topic(
            fact.questions, (), (fact.answer,), (fact.must_say.lower(),), (), fact.language
        )
    return topics


class Identity(WrittenTask):
    """The identity exam of jaxchat, or of the persona of `files.identity`."""

    name, title, auto = "identity", "identity", True

    def __init__(self, files: TaskFiles = NO_FILES, persona: Persona | None = None):
        super().__init__(files)
        if files.identity:
            persona = load_persona(files.identity)
        self.topics = topics_of(persona) if persona else TOPICS
        self.max_tokens = 96 if persona and persona.facts else 48
        self._who = persona.name if persona else NAME
        self._languages = list(dict.fromkeys(topic.language for topic in self.topics.values()))

    def train_conversations(self, count: int | None, seed: int) -> list[Conversation]:
        rng = random.Random(f"{self.name} {seed}")
        return [self._conversation(rng) for _ in range(count or DEFAULT_COUNT)]

    def examples(self) -> Sequence[Example]:
        rng = random.Random(EXAM_SEED)
        examples = []
        for name, topic in self.topics.items():
            questions: dict[str, None] = {}  # an ordered set
            for core in topic.exam_questions:
                for _ in range(EXAM_PARAPHRASES):
                    questions[_spoken(rng, core, topic.language)] = None
            wanted = len(questions) + min(EXAM_COMBINATIONS, len(_held_out_wordings(topic) - questions.keys()))
            while len(questions) < wanted:
                question = _spoken(rng, rng.choice(topic.questions), topic.language)
                if is_held_out(question):
                    questions[question] = None
            examples += [Example([user(q)], name, {"topic": name}) for q in questions]
        return examples

    def grade(self, example: Example, answer: str) -> bool:
        """Return whether all required words and no forbidden one occur, in any case.

        Short words must occur as whole words, except in Korean, which puts particles behind them.
        """
        topic = self.topics[example.expected]
        text = answer.lower()
        words = set("".join(c if c.isalnum() else " " for c in text).split())
        whole = topic.language != "ko"
        present = [w in words if whole and w.isalnum() else w in text for w in topic.required]
        return all(present) and not any(w in text for w in topic.forbidden)

    def _conversation(self, rng: random.Random) -> Conversation:
        language = self._languages[0] if len(self._languages) == 1 else rng.choice(self._languages)
        names = [name for name, topic in self.topics.items() if topic.language == language]
        messages: Conversation = []
        if rng.random() < SMALL_TALK_SHARE:
            messages += small_talk(rng, language, self._who)
            if rng.random() < 0.5:
                return messages
        for _ in range(1 if rng.random() < 0.7 else 2):
            topic = self.topics[rng.choice(names)]
            question = _spoken(rng, rng.choice(topic.questions), topic.language)
            while is_held_out(question):
                question = _spoken(rng, rng.choice(topic.questions), topic.language)
            messages += [user(question), assistant(rng.choice(topic.answers))]
        return messages


def small_talk(rng: random.Random, language: str = "en", name: str = NAME) -> Conversation:
    """Return a greeting, thanks or the like and its answer; greetings are the most frequent."""
    pairs = TEXTS["small_talk"][language]
    pair = pairs[0] if rng.random() < 0.4 else rng.choice(pairs[1:])
    text = _capitalized(rng, rng.choice(pair["said"]))
    return [user(text.replace(NAME, name)), assistant(rng.choice(pair["answers"]).replace(NAME, name))]


def is_held_out(question: str) -> bool:
    """Return whether this wording of a trained core belongs to the exam alone; letter case does not matter."""
    return hashlib.sha256(question.lower().encode()).digest()[0] < 256 // HELD_OUT_ONE_IN


def _held_out_wordings(topic: Topic) -> set[str]:
    """Return every wording of a topic's trained cores that belongs to the exam."""
    wordings = {
        opening + core + closing
        for opening in OPENINGS[topic.language]
        for core in topic.questions
        for closing in CLOSINGS[topic.language]
    }
    return {t for text in wordings if is_held_out(text) for t in (text, text[0].upper() + text[1:])}


def _spoken(rng: random.Random, core: str, language: str = "en") -> str:
    return _capitalized(rng, rng.choice(OPENINGS[language]) + core + rng.choice(CLOSINGS[language]))


def _capitalized(rng: random.Random, text: str) -> str:
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
