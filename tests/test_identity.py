"""Identity: the exam's wordings are not trained, every trained answer passes its own rule, wrong answers fail."""

import pytest

from jaxchat.tasks.base import Example
from jaxchat.tasks.identity import SMALL_TALK, TOPICS, Identity

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
    assert all(said.lower() in text for group, _ in SMALL_TALK for said in group)


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
