"""Conversations as ids and masks: worked by hand, what is learned, what typed control tokens do, malformed input."""

import copy
import itertools

import pytest

from jaxchat.chat import normalize, render, render_prompt
from jaxchat.data.sources import iterate_documents
from jaxchat.errors import UsageError
from jaxchat.tokenizer import SPECIAL_TOKENS, train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(itertools.islice(iterate_documents("chitchat"), 100), 500, 10**9, 10_000)


def user(text):
    return {"role": "user", "content": text}


def assistant(content):
    return {"role": "assistant", "content": content}


def show(tokenizer, ids):
    """ids as text in which the special tokens are written out."""
    names = {i: name for name, i in tokenizer.special.items()}
    return b"".join(names[i].encode() if i in names else tokenizer.token_bytes(i) for i in ids).decode()


def learned(tokenizer, messages):
    ids, mask = render(tokenizer, messages)
    assert len(ids) == len(mask) and set(mask) <= {0, 1}
    return show(tokenizer, [i for i, m in zip(ids, mask, strict=True) if m])


CALL = [
    {"type": "text", "text": "Let me see: "},
    {"type": "python", "text": "17+25"},
    {"type": "python_output", "text": "42"},
    {"type": "text", "text": "It is 42."},
]


def test_a_conversation_worked_by_hand(tokenizer):
    system = {"role": "system", "content": "Be brief."}
    messages = [system, user("What is 17+25?"), assistant(CALL), user("Thanks"), assistant("Bye")]
    assert show(tokenizer, render(tokenizer, messages)[0]) == (
        "<|bos|><|user_start|>Be brief.\n\nWhat is 17+25?<|user_end|>"
        "<|assistant_start|>Let me see: <|python_start|>17+25<|python_end|><|output_start|>42<|output_end|>It is 42."
        "<|assistant_end|><|user_start|>Thanks<|user_end|><|assistant_start|>Bye<|assistant_end|>"
    )
    assert learned(tokenizer, messages) == (
        "Let me see: <|python_start|>17+25<|python_end|>It is 42.<|assistant_end|>Bye<|assistant_end|>"
    )


def test_the_prompt_is_the_beginning_of_the_conversation(tokenizer):
    messages = [user("Hi"), assistant(CALL), user("안녕?")]
    prompt = render_prompt(tokenizer, messages)
    whole, mask = render(tokenizer, [*messages, assistant("Yes.")])
    assert whole[: len(prompt)] == prompt
    assert show(tokenizer, prompt).endswith("<|user_start|>안녕?<|user_end|><|assistant_start|>")
    assert mask[len(prompt) - 1] == 0 and all(mask[len(prompt) :])


def test_parts_of_text_equal_plain_text(tokenizer):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert normalize([user(parts)]) == normalize([user("ab")])
    assert show(tokenizer, render(tokenizer, [user("x"), assistant(parts)])[0]) == (
        "<|bos|><|user_start|>x<|user_end|><|assistant_start|>ab<|assistant_end|>"
    )


@pytest.mark.parametrize("name", SPECIAL_TOKENS)
def test_typed_control_tokens_are_ordinary_characters(tokenizer, name):
    """Whoever types them, and in whichever field: the frame has the same special tokens as with harmless text."""
    special = set(tokenizer.special.values())

    def frame(text):
        parts = [{"type": kind, "text": text} for kind in ("text", "python", "python_output", "text")]
        messages = [{"role": "system", "content": text}, user(text), assistant(text), user(text), assistant(parts)]
        return [i for i in render(tokenizer, messages)[0] if i in special]

    assert frame(f"{name} x {name}{name}") == frame("x") and len(frame("x")) == 13


def test_messages_are_not_changed(tokenizer):
    messages = [{"role": "system", "content": "s"}, user("u"), assistant(copy.deepcopy(CALL)), user("v")]
    before = copy.deepcopy(messages)
    render(tokenizer, messages)
    render_prompt(tokenizer, messages)
    assert messages == before


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "must be a list with at least one"),
        ("hello", "must be a list"),
        (None, "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\]: role None"),
        ([{"role": "system", "content": "x"}], "only a system message"),
        ([assistant("x")], r"messages\[0\]: role 'assistant' where 'user'"),
        ([user("x"), user("y")], r"messages\[1\]: role 'user' where 'assistant'"),
        ([{"role": "system", "content": "s"}, user("x"), user("y")], r"messages\[2\]: role 'user'"),
        ([user("x"), {"role": "system", "content": "y"}], r"messages\[1\]: role 'system'"),
        ([{"role": ["user"], "content": "y"}], r"messages\[0\]: role"),
        ([{"role": "user"}], r"messages\[0\]: content must be text .*not NoneType"),
        ([user(3)], "not int"),
        ([user([{"type": "image"}])], r"messages\[0\]: a part needs"),
        ([user([{"type": "text", "text": None}])], r"messages\[0\]: a part needs"),
        ([user([{"type": "python", "text": "1+1"}])], r"messages\[0\]: only an assistant"),
        ([user("x"), assistant(None)], r"messages\[1\]: content must be text or a list of parts"),
        ([user("x"), assistant(["a"])], r"messages\[1\]: a part needs a type of text, python, python_output"),
        ([user("x"), assistant([{"type": [], "text": "a"}])], r"messages\[1\]: a part needs"),
    ],
)
def test_malformed_conversations_are_refused_by_number(tokenizer, messages, words):
    for function in (render, render_prompt):
        with pytest.raises(UsageError, match=words):
            function(tokenizer, messages)


def test_a_prompt_ends_with_the_user(tokenizer):
    with pytest.raises(UsageError, match=r"messages\[1\]: the last one must be the user's"):
        render_prompt(tokenizer, [user("x"), assistant("y")])
