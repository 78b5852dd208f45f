"""Who a model of one's own says it is: `identity.toml` read and checked, and the topics that follow from it.

name = "Mina"
maker = "the robotics club"
languages = ["en", "ko"]      # what it is asked and answers in
tone = "friendly"             # "plain" | "friendly" | "formal"

[[facts]]
questions = ["where do you live", "where is your home"]
answer = "I live in the club room, on the shelf by the window."
must_say = "club room"        # what the exam looks for in the answer
"""

from __future__ import annotations

import dataclasses
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.persona_texts import CORES, TONES, WORDINGS
from jaxchat.toml import nearest

LANGUAGES = ("en", "ko")
LONGEST = 60  # characters of a name or a maker
LONGEST_ANSWER = 160  # characters; the exam gives it 96 tokens


@dataclass(frozen=True)
class Topic:
    """Questions with one meaning. An answer is right if it holds all of `required` and none of `forbidden`."""

    questions: tuple[str, ...]  # trained
    exam_questions: tuple[str, ...]  # never trained
    answers: tuple[str, ...]
    required: tuple[str, ...]
    forbidden: tuple[str, ...] = ()
    language: str = "en"


@dataclass(frozen=True)
class Fact:
    questions: tuple[str, ...]
    answer: str
    must_say: str
    language: str


@dataclass(frozen=True)
class Persona:
    name: str = "jaxchat"
    maker: str = "my owner"
    languages: tuple[str, ...] = ("en",)
    tone: str = "plain"
    facts: tuple[Fact, ...] = ()


def load_persona(path: str | Path) -> Persona:
    """From an `identity.toml`; `UsageError` names an unknown, missing or wrong key, `DataError` a file that is none."""
    try:
        table = tomllib.loads(Path(path).expanduser().read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"sft.identity: {path}: cannot be read ({error.strerror})") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"sft.identity: {path}: not valid TOML ({error})") from None
    known = {f.name for f in dataclasses.fields(Persona)}
    for key in table:
        if key not in known:
            raise UsageError(f"{path}: unknown key {key!r}{nearest(key, known)}")
    default = Persona()
    persona = Persona(
        _short(path, table, "name", default.name),
        _short(path, table, "maker", default.maker),
        tuple(_texts(path, table.get("languages", list(default.languages)), "languages")),
        table.get("tone", default.tone),
    )
    for language in persona.languages:
        if language not in LANGUAGES:
            raise UsageError(f"{path}: languages: {language!r} is unknown; choose from {', '.join(LANGUAGES)}")
    if persona.tone not in TONES:
        raise UsageError(f"{path}: tone: {persona.tone!r} is unknown; choose from {', '.join(TONES)}")
    facts = table.get("facts", [])
    if not isinstance(facts, list):
        raise UsageError(f"{path}: facts: write each as a table of its own, [[facts]]")
    return dataclasses.replace(persona, facts=tuple(_fact(path, i, fact) for i, fact in enumerate(facts, 1)))


def _short(path: Any, table: Mapping[str, Any], key: str, default: str) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or not value.strip() or len(value) > LONGEST or "\n" in value:
        raise UsageError(f"{path}: {key}: needs a text of 1 to {LONGEST} characters in one line, not {value!r}")
    return value.strip()


def _texts(path: Any, value: Any, key: str) -> list[str]:
    values = [value] if isinstance(value, str) else value
    if not isinstance(values, list) or not values or any(not isinstance(v, str) or not v.strip() for v in values):
        raise UsageError(f"{path}: {key}: needs a list of texts, at least one, not {value!r}")
    return [v.strip() for v in values]


def _fact(path: Any, number: int, table: Any) -> Fact:
    where = f"facts, number {number}"
    known = {f.name for f in dataclasses.fields(Fact)}
    if not isinstance(table, dict) or not {"questions", "answer"} <= table.keys() or table.keys() - known:
        raise UsageError(f"{path}: {where}: needs `questions` and `answer`; may have `must_say` and `language`")
    (answer,) = _texts(path, table["answer"], f"{where}, answer")
    questions = tuple(q.rstrip("?! ") for q in _texts(path, table["questions"], f"{where}, questions"))
    if not all(questions):
        raise UsageError(f"{path}: {where}: a question without words")
    if len(answer) > LONGEST_ANSWER:
        raise UsageError(f"{path}: {where}: the answer has {len(answer)} characters; at most {LONGEST_ANSWER}")
    if len(answer) > LONGEST and "must_say" not in table:
        raise UsageError(f"{path}: {where}: name the words that the exam looks for, must_say")
    (must_say,) = _texts(path, table.get("must_say", answer), f"{where}, must_say")
    if must_say.lower() not in answer.lower():
        raise UsageError(f"{path}: {where}: must_say {must_say!r} does not stand in the answer")
    korean = any("가" <= c <= "힣" for c in answer)
    language = table.get("language", "ko" if korean else "en")
    if language not in LANGUAGES:
        raise UsageError(f"{path}: {where}: language: {language!r} is unknown; choose from {', '.join(LANGUAGES)}")
    return Fact(questions, answer, must_say, language)


def topics_of(persona: Persona) -> dict[str, Topic]:
    """What this persona is asked, by language and topic ("ko: name"), and the facts ("fact 1")."""
    found = {}
    names = {"name": persona.name, "maker": persona.maker}
    for language in persona.languages:
        for topic, (questions, exam_questions) in CORES[language].items():
            answers, required, forbidden = WORDINGS[language][topic]
            found[f"{language}: {topic}"] = Topic(
                questions,
                exam_questions,
                tuple(answer.format(**names) for answer in answers[persona.tone]),
                tuple(word.format(**names).lower() for word in required),
                forbidden,
                language,
            )
    for number, fact in enumerate(persona.facts, 1):
        found[f"fact {number}"] = Topic(fact.questions, (), (fact.answer,), (fact.must_say.lower(),), (), fact.language)
    return found
