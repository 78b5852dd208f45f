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

import hashlib
import random
import re
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, StringConstraints, ValidationError, model_validator

from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.base import NO_FILES, Conversation, Example, GeneratedTask, TaskFiles, assistant, user

NAME = "jaxchat"
LONGEST = 60  # characters of a name or a maker
LONGEST_ANSWER = 160  # characters; the exam gives it 96 tokens
EXAM_COMBINATIONS = 6  # per topic, of trained cores
EXAM_PARAPHRASES = 2  # per exam core
HELD_OUT_ONE_IN = 8
SMALL_TALK_SHARE = 0.35  # of conversations that open with a greeting or small talk

Language = Literal["en", "ko"]
Text = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]
Short = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1, max_length=LONGEST, pattern=r"^[^\n]*$")]
AsList = BeforeValidator(lambda value: [value] if isinstance(value, str) else value)


class Fact(BaseModel, extra="forbid"):
    """Something that a persona knows: questions, the answer, and what the exam looks for in it."""

    questions: Annotated[list[Text], AsList, Field(min_length=1)]
    answer: Annotated[Text, Field(max_length=LONGEST_ANSWER)]
    must_say: Text = ""
    language: Language = "en"

    @model_validator(mode="after")
    def complete(self) -> Fact:
        """Fill in what is not given, and check that the exam can be passed."""
        self.questions = [question.rstrip("?! ") for question in self.questions]
        if not all(self.questions):
            raise ValueError("a question without words")
        if not self.must_say and len(self.answer) > LONGEST:
            raise ValueError("a long answer needs must_say, the words that the exam looks for")
        self.must_say = self.must_say or self.answer
        if self.must_say.lower() not in self.answer.lower():
            raise ValueError(f"must_say {self.must_say!r} is not in the answer")
        if "language" not in self.model_fields_set and re.search("[가-힣]", self.answer):
            self.language = "ko"
        return self


class Persona(BaseModel, extra="forbid"):
    """What an `identity.toml` says."""

    name: Short = NAME
    maker: Short = "my owner"
    languages: Annotated[list[Language], AsList, Field(min_length=1)] = ["en"]
    tone: Literal["plain", "friendly", "formal"] = "plain"
    facts: list[Fact] = []


def load_persona(path: str | Path) -> Persona:
    """Read an `identity.toml`. `UsageError` names a wrong key, `DataError` an unreadable file."""
    try:
        table = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except (OSError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"sft.identity: {path}: cannot be read, or is not valid TOML ({error})") from None
    try:
        return Persona.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part + 1) if isinstance(part, int) else part for part in first["loc"])
        raise UsageError(f"{path}: {key}: {first['msg']}") from None


def persona_of(files: TaskFiles) -> Persona:
    """Return the persona of `files.identity`, by default jaxchat's name and language."""
    return load_persona(files.identity) if files.identity else Persona()


@dataclass(frozen=True)
class Topic:
    """Questions with one meaning. An answer is right if it holds all of `required` and none of `forbidden`."""

    questions: Sequence[str]  # trained
    answers: Sequence[str]
    required: Sequence[str]
    forbidden: Sequence[str] = ()
    exam_questions: Sequence[str] = ()  # never trained
    language: str = "en"


TEXTS: dict[str, Any] = tomllib.loads(Path(__file__).with_name("texts.toml").read_text(encoding="utf-8"))
OPENINGS, CLOSINGS = TEXTS["openings"], TEXTS["closings"]
TOPICS = {name: Topic(**table) for name, table in TEXTS["jaxchat"].items()}  # jaxchat's own persona


def topics_of(persona: Persona) -> dict[str, Topic]:
    """Return the topics of a persona by language and name ("ko: name"), then its facts ("fact 1")."""

    def filled(texts: Sequence[str]) -> list[str]:
        return [text.format(name=persona.name, maker=persona.maker) for text in texts]

    topics = {}
    for language in persona.languages:
        for name, table in TEXTS["persona"][language].items():
            topics[f"{language}: {name}"] = Topic(
                table["questions"],
                filled(table[persona.tone]),
                [text.lower() for text in filled(table["required"])],
                table.get("forbidden", ()),
                table["exam_questions"],
                language,
            )
    for number, fact in enumerate(persona.facts, 1):
        required = [fact.must_say.lower()]
        topics[f"fact {number}"] = Topic(fact.questions, [fact.answer], required, language=fact.language)
    return topics


class Identity(GeneratedTask):
    """The identity exam of jaxchat, or of the persona of `files.identity`; no environment for RL."""

    name, title, auto = "identity", "identity", True
    exam_seed, train_size = 20_260_202, 0

    def __init__(self, files: TaskFiles = NO_FILES, persona: Persona | None = None):
        super().__init__(files)
        if files.identity:
            persona = load_persona(files.identity)
        self.topics = topics_of(persona) if persona else TOPICS
        self.max_tokens = 96 if persona and persona.facts else 48
        self._who = persona.name if persona else NAME
        self._languages = list(dict.fromkeys(topic.language for topic in self.topics.values()))

    def examples(self) -> Sequence[Example]:
        rng = random.Random(self.exam_seed)
        examples = []
        for name, topic in self.topics.items():
            language = topic.language
            cores = [core for core in topic.exam_questions for _ in range(EXAM_PARAPHRASES)]
            questions = dict.fromkeys(_spoken(rng, core, language) for core in cores)  # an ordered set
            held_out = {
                cased
                for opening in OPENINGS[language]
                for core in topic.questions
                for closing in CLOSINGS[language]
                if is_held_out(text := opening + core + closing)
                for cased in (text, text[0].upper() + text[1:])
            }
            wanted = len(questions) + min(EXAM_COMBINATIONS, len(held_out - questions.keys()))
            while len(questions) < wanted:
                question = _spoken(rng, rng.choice(topic.questions), language)
                if is_held_out(question):
                    questions[question] = None
            examples += [Example([user(question)], name, {"topic": name}) for question in questions]
        return examples

    def conversation(self, rng: random.Random) -> Conversation:
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

    def grade(self, example: Example, answer: str) -> bool:
        """Return whether all required words and no forbidden one occur, in any case.

        Short words must occur as whole words, except in Korean, which puts particles behind them.
        """
        topic, text = self.topics[example.expected], answer.lower()
        words = set("".join(c if c.isalnum() else " " for c in text).split())
        whole = topic.language != "ko"
        present = [w in words if whole and w.isalnum() else w in text for w in topic.required]
        return all(present) and not any(w in text for w in topic.forbidden)


def small_talk(rng: random.Random, language: str = "en", name: str = NAME) -> Conversation:
    """Return a greeting, thanks or the like and its answer; greetings are the most frequent."""
    pairs = TEXTS["small_talk"][language]
    pair = pairs[0] if rng.random() < 0.4 else rng.choice(pairs[1:])
    text = _capitalized(rng, rng.choice(pair["said"]))
    return [user(text.replace(NAME, name)), assistant(rng.choice(pair["answers"]).replace(NAME, name))]


def is_held_out(question: str) -> bool:
    """Return whether this wording of a trained core belongs to the exam alone; letter case does not matter."""
    return hashlib.sha256(question.lower().encode()).digest()[0] < 256 // HELD_OUT_ONE_IN


def _spoken(rng: random.Random, core: str, language: str) -> str:
    return _capitalized(rng, rng.choice(OPENINGS[language]) + core + rng.choice(CLOSINGS[language]))


def _capitalized(rng: random.Random, text: str) -> str:
    return text[0].upper() + text[1:] if rng.random() < 0.5 else text
