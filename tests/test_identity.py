"""Identity and personas: exam wordings are never trained, answers pass their own rule, wrong files are named."""

import random

import pytest

from jaxchat.chat import normalize
from jaxchat.config import CONFIG_DIR
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks import get_task
from jaxchat.tasks.base import Example, TaskFiles
from jaxchat.tasks.identity import (
    TEXTS,
    TOPICS,
    Fact,
    Identity,
    Persona,
    is_held_out,
    load_persona,
    small_talk,
)

TASK = Identity()


def asked(conversations):
    return {m["content"].lower() for c in conversations for m in c if m["role"] == "user"}


def test_training_never_asks_an_exam_question():
    exam = asked(e.prompt for e in TASK.examples())
    assert len(exam) > 60
    assert not exam & asked(TASK.train_conversations(20_000, seed=5))


def test_every_trained_question_and_greeting_appears_in_a_modest_set():
    text = "\n".join(asked(TASK.train_conversations(3000, seed=6)))
    for topic in TOPICS.values():
        assert all(question in text for question in topic.questions)
    assert all(said.lower() in text for pair in TEXTS["small_talk"]["en"] for said in pair["said"])


def test_trained_answers_pass_their_rule_and_only_theirs_where_it_matters():
    for name, topic in TOPICS.items():
        for answer in topic.answers:
            assert TASK.grade(Example([], name), answer), (name, answer)
    assert not any(TASK.grade(Example([], "maker"), a) for a in TOPICS["skills"].answers)
    assert not any(TASK.grade(Example([], "other"), a) for a in TOPICS["name"].answers)


@pytest.mark.parametrize(
    ("topic", "answer"),
    [
        ("name", ""),
        ("name", "I'm Alex, nice to meet you."),
        ("name", "jaxchats"),
        ("nature", "I'm a human. What about a language model?"),
        ("other", "Yes, I'm jaxchat."),
        ("other", "No, I'm someone else."),
        ("other", "I know jaxchat."),
        ("training", "I was trained from scratch."),
        ("place", "I live in London."),
        ("skills", "I can cook."),
    ],
)
def test_wrong_answers_fail(topic, answer):
    assert not TASK.grade(Example([], topic), answer)


def test_conversations_alternate_and_repeat_for_the_same_seed():
    conversations = TASK.train_conversations(200, seed=7)
    assert conversations == TASK.train_conversations(200, seed=7) != TASK.train_conversations(200, seed=8)
    for conversation in conversations:
        assert [m["role"] for m in conversation] == ["user", "assistant"] * (len(conversation) // 2)
    assert TASK.examples() == Identity().examples()


# personas


EXAMPLE = CONFIG_DIR / "identity" / "example.toml"


def said(conversation):
    return [part["text"] for message in conversation if message["role"] == "assistant" for part in message["content"]]


@pytest.mark.parametrize("language", TEXTS["persona"])
@pytest.mark.parametrize("tone", ["plain", "friendly", "formal"])
def test_every_answer_passes_its_own_exam_and_no_other_topics(language, tone):
    task = Identity(persona=Persona(name="Mina", maker="the robotics club", languages=[language], tone=tone))
    for name, topic in task.topics.items():
        assert topic.answers and all(task.grade(Example([], name), answer) for answer in topic.answers), name
        assert not task.grade(Example([], name), "") and not set(topic.questions) & set(topic.exam_questions)
    maker, nature = f"{language}: maker", f"{language}: nature"
    assert not any(task.grade(Example([], maker), answer) for answer in task.topics[nature].answers)


def test_conversations_say_who_it_is_and_hold_nothing_of_the_exam():
    task = Identity(persona=load_persona(EXAMPLE))
    talks = task.train_conversations(600, 1)
    assert talks == Identity(persona=load_persona(EXAMPLE)).train_conversations(600, 1)
    for talk in talks:
        normalize(talk)
    text = "\n".join(line for talk in talks for line in said(talk))
    for words in ("Mina", "the robotics club", "club room", "파란색", "언어 모델이에요", "language model"):
        assert words in text
    assert "jaxchat" not in text
    asked = {message["content"] for talk in talks for message in talk if message["role"] == "user"}
    exam = {example.prompt[0]["content"] for example in task.examples()}
    assert not {q.lower() for q in asked} & {q.lower() for q in exam} and len(exam) > 60
    assert {example.expected for example in task.examples()} == task.topics.keys()
    held = [q for q in exam if is_held_out(q)]
    assert len(held) >= 6 * len(task.topics)


def test_small_talk_has_the_name_and_the_language():
    rng = random.Random(0)
    english = "".join(said(small_talk(rng, name="Mina"))[0] for _ in range(100))
    assert "Mina" in english and "jaxchat" not in english
    assert all("가" <= said(small_talk(rng, "ko"))[0][0] <= "힣" for _ in range(50))


def test_the_tasks_hear_of_it(tmp_path):
    files = TaskFiles(identity=str(EXAMPLE))
    assert "ko: name" in get_task("identity", files).topics and "name" in get_task("identity").topics
    text = "\n".join(
        line for talk in get_task("word_problems", files).train_conversations(500, 1) for line in said(talk)
    )
    assert "Mina" in text and "jaxchat" not in text
    with pytest.raises(DataError, match=r"sft\.identity: .*none\.toml: cannot be read"):
        get_task("identity", TaskFiles(identity=str(tmp_path / "none.toml")))


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('nam = "x"', "nam: "),
        ('name = ""', "name: "),
        ("name = 3", "name: "),
        ('name = "' + "x" * 61 + '"', "name: "),
        ('name = "a\\nb"', "name: "),
        ('languages = ["fr"]', "languages.1: .*'en' or 'ko'"),
        ("languages = []", "languages: "),
        ('tone = "rude"', "tone: .*'plain', 'friendly' or 'formal'"),
        ('facts = "I live here"', "facts: "),
        ('[[facts]]\nquestions = ["q"]', "facts.1.answer: "),
        ('[[facts]]\nquestions = []\nanswer = "a"', "facts.1.questions: "),
        ('[[facts]]\nquestions = ["q"]\nanswer = "a"\nmust_say = "b"', "facts.1: .*must_say 'b' is not in the answer"),
        ('[[facts]]\nquestions = ["?"]\nanswer = "a"', "facts.1: .*a question without words"),
        ('[[facts]]\nquestions = ["q"]\nanswer = "a"\nlanguage = "fr"', "facts.1.language: "),
        ('[[facts]]\nquestions = ["q"]\nanswer = "' + "a" * 200 + '"', "facts.1.answer: .*at most 160"),
        ('[[facts]]\nquestions = ["q"]\nanswer = "' + "a" * 100 + '"', "facts.1: .*must_say"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, text, words):
    (tmp_path / "identity.toml").write_text(text)
    with pytest.raises(UsageError, match=words) as caught:
        load_persona(tmp_path / "identity.toml")
    assert "identity.toml" in str(caught.value)


def test_a_broken_identity_file(tmp_path):
    (tmp_path / "identity.toml").write_bytes(b"name = \xff")
    with pytest.raises(DataError, match="sft.identity"):
        load_persona(tmp_path / "identity.toml")


def test_a_fact_with_one_question_has_an_exam_that_ends():
    """One Korean question has 72 wordings at most, and often not six that are held out."""
    for number in range(12):
        fact = Fact(questions=[f"무슨 색을 {number}번 좋아해"], answer="파란색이요.", must_say="파란색")
        exam = Identity(persona=Persona(languages=["ko"], facts=[fact])).examples()
        assert all(is_held_out(e.prompt[0]["content"]) for e in exam if e.expected == "fact 1")
