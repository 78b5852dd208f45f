"""Dialogues for SFT: form, the split of the corpus, and no other bot speaking of itself."""

import gzip
import json
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from jaxchat.chat import normalize
from jaxchat.data.sources import chitchat_conversations, iterate_documents
from jaxchat.errors import DataError, UsageError
from jaxchat.tasks.conversations import (
    LEAST_USES,
    MAX_TURNS,
    Found,
    chatterbot_pairs,
    chitchat_dialogues,
    conversation_of,
    file_conversations,
    is_other_bot,
)
from jaxchat.tasks.speech import words


def lines(dialogues):
    return {line for d in dialogues for m in d for line in m["content"].split("\n")}


def test_chitchat_dialogues_are_conversations():
    dialogues = list(chitchat_dialogues("train", 0.02))
    assert len(dialogues) > 7000
    for dialogue in dialogues:
        assert len(normalize(dialogue)) == len(dialogue) <= MAX_TURNS and len(dialogue) % 2 == 0
        assert all(m["content"].strip() for m in dialogue) and any(m["weight"] for m in dialogue)
    learned = [m for dialogue in dialogues for m in dialogue if m["weight"]]
    assert {m["role"] for m in learned} == {"user", "assistant"}
    counts = Counter(word for texts in chitchat_conversations() for turn in texts for t in turn for word in words(t))
    assert min(counts[word] for m in learned for word in words(m["content"])) == LEAST_USES
    assert not any("weight" in m for dialogue in chitchat_dialogues("val", 0.02) for m in dialogue)


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
    """A line that is no JSON stops the run: the file may be damaged."""
    talks = [
        [{"role": "user", "content": "안녕"}, {"role": "assistant", "content": "반가워요!"}],
        [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "hi"},
            {"role": "assistant", "content": "Hi.", "weight": 0},
            {"role": "assistant", "content": "Ho."},
        ],
    ]
    lines = "".join(json.dumps({"id": 1, "messages": talk}) + "\n\n" for talk in talks)
    (tmp_path / "a.jsonl").write_text(lines)
    assert list(file_conversations(f"files:{tmp_path}")) == talks
    (tmp_path / "a.jsonl").write_text(lines + "{")
    with pytest.raises(DataError, match=r"a\.jsonl:5: .*not JSON"):
        list(file_conversations(f"files:{tmp_path}/a.jsonl"))
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(DataError, match=r"b\.txt: conversations are read from"):
        list(file_conversations(f"files:{tmp_path}/b.txt"))


Q, A = "what?", "that."
USUAL = [("user", Q), ("assistant", A)]
MESSAGES = [{"role": "user", "content": Q}, {"role": "assistant", "content": A}]
SHAREGPT = [{"from": "human", "value": Q}, {"from": "gpt", "value": A}]
MORE = [("user", f"s\n\n{Q}"), USUAL[1], *USUAL]  # with a system message, twice
NAN = float("nan")


@pytest.mark.parametrize(
    ("record", "turns"),
    [
        ({"messages": MESSAGES}, USUAL),
        ({"messages": json.dumps(MESSAGES)}, USUAL),
        ({"messages": {"role": ["user", "assistant"], "content": [Q, A]}}, USUAL),
        (MESSAGES, USUAL),
        ({"conversations": MESSAGES, "prompt": "no"}, USUAL),
        ({"conversations": SHAREGPT, "id": 5}, USUAL),
        ({"conversations": [{"from": "system", "value": "s"}, *SHAREGPT, *SHAREGPT]}, MORE),
        ({"items": [*SHAREGPT, *SHAREGPT], "system": "s"}, MORE),
        ({"conversations": [SHAREGPT[0], {"from": "function_call", "value": "f"}, {"from": "observation", "value": "r"},
                            SHAREGPT[1]]}, [("user", Q), ("assistant", "f"), ("user", "r"), ("assistant", A)]),
        ({"conversations": [Q, A]}, USUAL),
        ({"data": [Q, A, Q, A], "id": "x"}, [*USUAL, *USUAL]),
        ({"conversation": [{"input": Q, "output": A}] * 2}, [*USUAL, *USUAL]),
        ({"messages": [{"role": "prompter", "text": Q}, {"role": "Assistant", "text": A}]}, USUAL),
        ({"instruction": Q, "input": "", "output": A, "text": "### Human: no"}, USUAL),
        ({"instruction": Q, "input": "this", "output": A}, [("user", f"{Q}\n\nthis"), ("assistant", A)]),
        ({"instruction": "", "input": Q, "output": A}, USUAL),
        ({"instruction": Q, "input": NAN, "output": A, "system": "s", "history": [[Q, A]]}, MORE),
        ({"instruction": Q, "context": "this", "response": A}, [("user", f"{Q}\n\nthis"), ("assistant", A)]),
        ({"instruction": Q, "input": "this", "context": "that", "output": A},
         [("user", f"{Q}\n\nthis\n\nthat"), ("assistant", A)]),
        ({"messages": [], "instruction": Q, "output": A, "history": MESSAGES}, [*USUAL, *USUAL]),
        ({"question": Q, "answer": [A, "also right"]}, USUAL),
        ({"prompt": Q, "completion": A}, USUAL),
        ({"prompt": MESSAGES[:1], "completion": MESSAGES[1:]}, USUAL),
        ({"system_prompt": "", "question": Q, "response": A}, USUAL),
        ({"Question": Q, "Answer": 5}, [("user", Q), ("assistant", "5")]),
        ({"inputs": Q, "targets": A}, USUAL),
        ({"질문": Q, "답변": A}, USUAL),
        ({"text": f"<|im_start|>user\n{Q}<|im_end|>\n<|im_start|>assistant\n{A}<|im_end|>\n"}, USUAL),
        ({"text": f"### Human: {Q}### Assistant: {A}"}, USUAL),
        ({"system": "SYSTEM: s", "chat": f"USER: {Q}\n\n\nASSISTANT: {A} <|endoftext|>\n\n\n" * 2}, MORE),
    ],
)  # fmt: skip
def test_the_forms_of_data_sets(record, turns):
    _, messages = conversation_of(record)
    whole = [(m["role"], m["content"] if m["role"] == "user" else m["content"][0]["text"]) for m in normalize(messages)]
    assert whole == turns


def test_only_the_completion_is_learned():
    _, messages = conversation_of({"prompt": [*MESSAGES, MESSAGES[0]], "completion": MESSAGES[1:]})
    assert [m.get("weight") for m in messages if m["role"] == "assistant"] == [0, None]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ("hello", "neither an object"), (5, "neither an object"), ({}, "no known form"), ([], "no known form"),
        ({"text": "Once upon a time."}, "no known form .*text"), ({"messages": [5], "system": "s"}, r"messages\[1\]"),
        ({"messages": MESSAGES[:1]}, "no answer"), ({"conversations": [Q]}, "no answer"),
        ({"messages": [MESSAGES[0], MESSAGES[1] | {"weight": 0}]}, "no answer"),
        ({"messages": [MESSAGES[0], {"role": "assistant", "content": " "}]}, "no answer"),
        ({"messages": [{"role": "king", "content": Q}, MESSAGES[1]]}, r"messages\[0\]: role 'king'"),
        ({"messages": [{"role": "user", "content": None}, MESSAGES[1]]}, r"messages\[0\]: content"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}, MESSAGES[1]]}, "reads text only"),
        ({"conversations": [SHAREGPT[0], {"from": "gpt", "value": NAN}]}, r"messages\[1\]: content"),
        ({"instruction": Q, "output": None}, "no question with an answer"), ({"instruction": Q, "output": ""}, "empty"),
        ({"instruction": Q, "output": NAN}, "no question"), ({"instruction": "", "output": A}, "empty"),
        ({"question": Q, "answer": True}, "bool"), ({"instruction": Q, "output": A, "history": 5}, "history"),
        ({"prompt": Q, "chosen": A, "rejected": "no"}, "preference"),
        ({"prompt": Q, "completion": A, "label": True}, "preference"),
        ({"role": "prompter", "text": Q, "parent_id": None}, "no known form"),
    ],
)  # fmt: skip
def test_what_is_no_conversation_says_why(record, reason):
    with pytest.raises(UsageError, match=reason):
        conversation_of(record)


LINES = [{"conversations": SHAREGPT[: 2 * (i != 6)], "n": i} for i in range(9)]  # the seventh is empty
JSONL = "".join(json.dumps(record) + "\n" for record in LINES).encode()
ARRAY, OBJECT, CHATS = (
    json.dumps(v).encode() for v in (LINES, {"version": 1, "data": LINES}, {"conversations": LINES})
)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.jsonl", JSONL), ("a.ndjson", JSONL), ("a.json", ARRAY), ("b.json", OBJECT), ("c.json", CHATS),
     ("d.json", JSONL), ("a.jsonl.gz", gzip.compress(JSONL)),
     ("a.json.zst", pa.compress(ARRAY, "zstd", asbytes=True)), ("a.parquet", b"")],
)  # fmt: skip
def test_the_kinds_of_files(tmp_path, name, content):
    """What was recognised and what was left out are counted; a share above the limit names the first place."""
    (tmp_path / name).write_bytes(content)
    if not content:
        pq.write_table(pa.Table.from_pylist(LINES), tmp_path / name)
    found = Found()
    talks = list(file_conversations(f"files:{tmp_path}", max_left_out=0.2, found=found))
    assert len(talks) == 8 == found.forms.total() and found.left_out == 1
    assert all(form.startswith("ShareGPT") for form in found.forms)
    assert found.first.startswith(f"{tmp_path / name}:7: ")
    assert len(list(file_conversations(f"files:{tmp_path}", count=5))) == 5
    with pytest.raises(DataError, match=rf"1 of 9 .*{name}:7"):
        list(file_conversations(f"files:{tmp_path}"))
