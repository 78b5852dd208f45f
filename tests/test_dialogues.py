"""Dialogues for SFT: form, the split of the corpus, and no other bot speaking of itself."""

import json

import pytest

from jaxchat.chat import normalize
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import DataError
from jaxchat.tasks.conversations import (
    MAX_TURNS,
    chatterbot_pairs,
    chitchat_dialogues,
    file_conversations,
    is_other_bot,
)


def lines(dialogues):
    return {line for d in dialogues for m in d for line in m["content"].split("\n")}


def test_chitchat_dialogues_are_conversations():
    dialogues = list(chitchat_dialogues("train", 0.02))
    assert len(dialogues) > 7000
    for dialogue in dialogues:
        assert len(normalize(dialogue)) == len(dialogue) <= MAX_TURNS and len(dialogue) % 2 == 0
        assert all(m["content"].strip() for m in dialogue)


@pytest.mark.parametrize("fraction", [0.02, 0.0])
def test_what_is_held_out_in_pretraining_is_held_out_here(fraction):
    held_out = list(iterate_documents("chitchat", "val", fraction))
    dialogues = list(chitchat_dialogues("val", fraction))
    assert dialogues
    documents = "\n\0\n".join(held_out)
    assert all("\n".join(m["content"] for m in d) in documents for d in dialogues)
    # lines that only held-out documents have are in no training dialogue
    in_training = {line for text in iterate_documents("chitchat", "train", fraction) for line in text.split("\n")}
    own = {line for text in held_out for line in text.split("\n")} - in_training
    assert len(own) > 10 and not own & lines(chitchat_dialogues("train", fraction))


def test_chatterbot_pairs_are_questions_and_answers_each_once():
    pairs = list(chatterbot_pairs())
    texts = [tuple(m["content"] for m in pair) for pair in pairs]
    assert len(set(texts)) == len(texts) > 700
    assert all([m["role"] for m in normalize(pair)] == ["user", "assistant"] for pair in pairs)
    assert ("Hello", "Hi") in texts and any("password" in question for question, _ in texts)
    spoken = " ".join(answer.lower() for _, answer in texts)
    assert "i'm a computer" not in spoken and "piece of software" not in spoken
    questions = {question.lower().strip("?!. ") for question, _ in texts}
    assert not questions & {"who are you", "what are you", "what is your name", "are you a robot", "who made you"}


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("Who are you?", "Who? Who is but a form following the function of what"),
        ("What are you", "A thing."),
        ("what is your name?", "ALICE"),
        ("Are you a human?", "No."),
        ("who created you", "Richard."),
        ("do you eat", "I'm a computer, I can't eat or drink."),
        ("You are jealous", "Normally, as a bot i don't have feelings."),
        ("Are you hungry?", "My processor requires very little power."),
        ("hi", "My name is Bob."),
        ("너는 어디에서 왔니?", "나는 모든 소프트웨어의 고향에서 왔다."),
        ("네 이름은 뭐니?", "철수야."),
        ("넌 누가 만들었어?", "어떤 사람이."),
    ],
)
def test_other_bots_are_known(question, answer):
    assert is_other_bot(question, answer)


@pytest.mark.parametrize(
    ("question", "answer"),
    [
        ("How are you?", "I am doing well."),
        ("오늘 기분은 어때?", "아주 좋아요. 당신은 어때요?"),
        ("I am working on a project", "What are you working on?"),
        ("What is a computer?", "A computer is an electronic device which takes information in digital form."),
        ("can you write a callback?", "```\ngreet('Alice', print)\n```"),
        ("My computer won't turn on.", "Check if it's plugged in."),
    ],
)
def test_ordinary_pairs_are_kept(question, answer):
    assert not is_other_bot(question, answer)


def test_every_language_can_be_read():
    assert len(list(chatterbot_pairs("korean"))) > 200
    assert all(len(pair) == 2 for language in ("french", "japanese", "spanish") for pair in chatterbot_pairs(language))
    with pytest.raises(DataError, match=r"no language 'klingon'; it has bengali, .*korean"):
        list(chatterbot_pairs("klingon"))


def test_conversations_of_ones_own(tmp_path):
    talks = [
        [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "반가워요!"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hi."},
        ],
    ]
    lines = "".join(json.dumps({"id": 1, "messages": [m | {"weight": 1} for m in talk]}) + "\n\n" for talk in talks)
    (tmp_path / "a.jsonl").write_text(lines)
    assert list(file_conversations(f"files:{tmp_path}")) == talks
    bad = {
        '{"text": "no conversation"}': "messages: must be a list",
        '{"messages": [{"role": "king", "content": "first"}]}': "role 'king'",
        "[]": "messages: must be a list",
        "{": "not JSON",
    }
    for text, words in bad.items():
        (tmp_path / "a.jsonl").write_text(lines + text)
        with pytest.raises(DataError, match=rf"a\.jsonl:5: .*{words}"):
            list(file_conversations(f"files:{tmp_path}/a.jsonl"))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=r"b\.txt: conversations are read from"):
        list(file_conversations(f"files:{tmp_path}/b.txt"))
