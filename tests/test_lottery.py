"""The lottery machine: its rules, its exam, and that nothing of the exam is trained."""

import itertools
import random

import pytest

from jaxchat.chat import normalize, render, render_prompt
from jaxchat.config import load_config
from jaxchat.data import lottery
from jaxchat.data.lottery import FIELDS, Session, documents, random_session, read_answer, sessions
from jaxchat.tasks import get_task
from jaxchat.tasks.base import assistant, user
from jaxchat.tasks.generated import Lottery
from jaxchat.tokenizer import train_tokenizer

WINNING, BONUS = (1, 2, 3, 4, 5, 6), 7
TICKETS = {
    "0": (11, 12, 13, 14, 15, 7),
    "3": (1, 2, 3, 14, 15, 7),
    "4": (4, 3, 2, 1, 40, 41),
    "5": (1, 2, 3, 4, 5, 8),
    "5+bonus": (7, 1, 2, 3, 4, 5),
    "6": (6, 5, 4, 3, 2, 1),
}


def test_the_exercises_own_example():
    """Eight tickets for 8,000, one with three hits: 62.5 %."""
    tickets = (
        (8, 21, 23, 41, 42, 43), (3, 5, 11, 16, 32, 38), (7, 11, 16, 35, 36, 44), (1, 8, 11, 31, 41, 42),
        (13, 14, 16, 38, 42, 45), (7, 11, 30, 40, 42, 43), (2, 13, 22, 32, 38, 45), (1, 3, 5, 14, 22, 45),
    )  # fmt: skip
    fields = Session(tickets, WINNING, BONUS).fields()
    assert fields == {"tickets": "8", "3": "1", "4": "0", "5": "0", "5+bonus": "0", "6": "0", "yield": "62.5%"}


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        (("0",), "0.0%"),
        (("3",), "500.0%"),
        (("3", "0", "0"), "166.7%"),  # 166.66
        (("3", "3", "0"), "333.3%"),
        (("3",) + ("0",) * 5, "83.3%"),
        (("3",) + ("0",) * 7, "62.5%"),
        (("3", "0", "0", "0", "0", "0", "0"), "71.4%"),  # 71.43
        (("5+bonus", "5", "4", "3"), "788,875.0%"),
        (("6", "6", "5"), "133,383,333.3%"),
    ],
)
def test_the_yield_is_the_prize_over_the_price_rounded_to_a_tenth(ranks, expected):
    session = Session(tuple(TICKETS[r] for r in ranks), WINNING, BONUS)
    fields = session.fields()
    assert fields["yield"] == expected and fields["tickets"] == str(len(ranks))
    assert {r: int(fields[r]) for r in lottery.PRIZES} == {r: ranks.count(r) for r in lottery.PRIZES}


def test_halves_are_rounded_up():
    """A prize of 500 for 16 tickets would be 3.125 %: no float may make 3.1 or 3.2 of a tie by chance."""
    for count in range(1, 9):
        for ranks in itertools.combinations_with_replacement(TICKETS, count):
            session = Session(tuple(TICKETS[r] for r in ranks), WINNING, BONUS)
            prize = sum(lottery.PRIZES.get(r, 0) for r in ranks)
            whole, tenth = session.fields()["yield"][:-1].replace(",", "").split(".")
            tenths = int(whole) * 10 + int(tenth)
            assert -count < 2 * (tenths * count - prize) <= count, ranks  # nearest, ties upwards


def test_what_goes_in_and_what_comes_out():
    session = Session((TICKETS["5+bonus"], TICKETS["3"]), WINNING, BONUS)
    assert session.question() == "paid 2,000\n7 1 2 3 4 5\n1 2 3 14 15 7\ndrawn 1 2 3 4 5 6\nbonus 7"
    assert session.answer() == (
        "tickets: 2\n7*1+2+3+4+5+ 5+bonus\n1+2+3+14-15-7* 3\n3: 1\n4: 0\n5: 0\n5+bonus: 1\n6: 0\nprize: 30,005,000\n"
        "yield: 1,500,250.0%"
    )
    assert read_answer(session.answer()) == session.fields()
    assert read_answer("") == read_answer("yields: 3\n3:") == dict.fromkeys(FIELDS, "")
    assert read_answer("3: 1\n3: 2")["3"] == "2"


def outcome(session):
    return tuple(value for name, value in session.fields().items() if name != "yield")


def test_nothing_of_the_exam_is_trained():
    task = Lottery()
    exam = task.examples()
    trained = {session.question() for session in sessions(5000, 42)} | set(documents("synthetic:lottery:3000"))
    assert not trained & {example.prompt[0]["content"] for example in exam}
    outcomes = {outcome(session) for session in sessions(5000, 42)}
    new = [e for e in exam if e.tags["outcome"] == "new"]
    assert 0.4 < len(new) / len(exam) < 0.6
    rng = random.Random(3)
    held = [random_session(rng, held_out=True) for _ in range(200)]
    assert all(s.is_held_out() and len(s.tickets) > 1 for s in held) and not outcomes & {outcome(s) for s in held}


def test_the_exam_grades_every_field():
    task = get_task("lottery")
    (conversation,) = itertools.islice(task.train_conversations(1, 7), 1)
    normalize(conversation)
    example = task.examples()[0]
    right = "\n".join(f"{name}: {value}" for name, value in example.expected.items())
    assert task.grade(example, right) and task.readings(example, right) == dict.fromkeys(FIELDS, True)
    wrong = right.replace(f"yield: {example.expected['yield']}", "yield: 1.0%")
    assert not task.grade(example, wrong)
    assert [name for name, ok in task.readings(example, wrong).items() if not ok] == ["yield"]
    assert not task.grade(example, "") and not any(task.readings(example, "").values())
    assert all(task.grade(e, "\n".join(f"{k}: {v}" for k, v in e.expected.items())) for e in task.examples())
    assert len(task.train_examples(1)) == 8192


def test_the_longest_session_fits_the_tiers_context():
    """Cut answers once cost the model every session of eight tickets."""
    config = load_config("lotto")
    tokenizer = train_tokenizer(documents("synthetic:lottery:3000"), config.model.vocab_size, 10**9, 10**6)
    rng, task = random.Random(5), Lottery()
    most = [s for s in (random_session(rng) for _ in range(2000)) if len(s.tickets) == lottery.MOST_TICKETS]
    talks = [render(tokenizer, [user(s.question()), assistant(s.answer())])[0] for s in most]
    prompts = [render_prompt(tokenizer, [user(s.question())]) for s in most]
    assert max(map(len, talks)) <= config.model.seq_len
    assert max(len(talk) - len(prompt) for talk, prompt in zip(talks, prompts, strict=True)) <= task.max_tokens
