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


def tool(name, arguments):
    return {"id": "1", "type": "function", "function": {"name": name, "arguments": arguments}}


def result(text, role="tool"):
    return {"role": role, "content": text}


def said(role, text):
    return {"role": role, "content": text if role == "user" else [{"type": "text", "text": text}]}


def calls(*tools, content=None):
    return {"role": "assistant", "content": content, "tool_calls": list(tools)}


S = {"role": "system", "content": "s"}
CALCULATED = [{"type": "python", "text": "2*(3+4)"}, {"type": "python_output", "text": "14"}]


@pytest.mark.parametrize(
    ("messages", "turns"),
    [
        ([S, user("u")], [said("user", "s\n\nu")]),
        ([{"role": "developer", "content": "s"}, user("u")], [said("user", "s\n\nu")]),
        ([S], [said("user", "s")]),
        ([S, {"role": "system", "content": ""}, user("u")], [said("user", "s\n\nu")]),
        ([user("a"), user(""), user("b")], [said("user", "a\n\nb")]),
        ([user("a"), assistant("x"), assistant("y")], [said("user", "a"), said("assistant", "x\n\ny")]),
        ([user("a"), assistant("x"), S, user("b")],
         [said("user", "a"), said("assistant", "x"), said("user", "s\n\nb")]),
        ([assistant("hi"), user("a")], [said("user", ""), said("assistant", "hi"), said("user", "a")]),
        ([S, assistant("hi")], [said("user", "s"), said("assistant", "hi")]),
        ([user("a"), {"role": "assistant"}], [said("user", "a"), said("assistant", "")]),
        ([user("a"), result({"at": "대전", "t": 3}), result(7)], [said("user", 'a\n\n{"at": "대전", "t": 3}\n\n7')]),
        ([user("a"), calls(tool("w", '{"x": 1}')), result("r")],
         [said("user", "a"), said("assistant", '{"name": "w", "arguments": {"x": 1}}'), said("user", "r")]),
        ([user("a"), calls({"name": "w", "arguments": {"x": "é"}}, content="See:")],
         [said("user", "a"), said("assistant", 'See:\n\n{"name": "w", "arguments": {"x": "é"}}')]),
        ([user("a"), {"role": "assistant", "function_call": {"name": "w"}}, result("r", "function"), assistant("z")],
         [said("user", "a"), said("assistant", '{"name": "w", "arguments": {}}'), said("user", "r"),
          said("assistant", "z")]),
        ([user("a"), calls(tool("calculator", "{}"))],
         [said("user", "a"), said("assistant", '{"name": "calculator", "arguments": {}}')]),
    ],
)  # fmt: skip
def test_what_becomes_of_messages(messages, turns):
    before = copy.deepcopy(messages)
    assert normalize(messages) == turns == normalize(turns) and messages == before


@pytest.mark.parametrize("arguments", ['{"expression": "2*(3+4)"}', {"code": "2*(3+4)"}])
@pytest.mark.parametrize("name", ["calculator", "python"])
def test_a_call_of_a_calculator_is_our_calculators(name, arguments):
    """With its result and the text behind it, it is one turn; two calls go with two results."""
    whole = normalize([user("a"), calls(tool(name, arguments), content="See: "), result("14"), assistant("It is 14.")])
    assert whole[1:] == [assistant([{"type": "text", "text": t} if t else c for t, c in zip(
        ("See: ", "", "", "It is 14."), (0, *CALCULATED, 0), strict=True)])]  # fmt: skip
    two = normalize([user("a"), calls(tool("w", "{}"), tool(name, arguments)), result("r"), result("14")])
    assert two[1]["content"][1:] == CALCULATED and two[2] == said("user", "r")


@pytest.mark.parametrize(
    "arguments", [{"code": "import os"}, {"a": "1", "b": "2"}, {"x": 5}, {}, "no JSON", "2+2", None]
)
def test_other_calls_of_a_calculator_are_text(arguments):
    turns = normalize([user("a"), calls(tool("python", arguments)), result("14")])
    assert [part["type"] for part in turns[1]["content"]] == ["text"] and turns[2] == said("user", "14")


def test_a_message_of_weight_0_is_not_learned(tokenizer):
    first, second = assistant("x") | {"weight": 0}, assistant("y") | {"weight": 1}
    end = "<|assistant_end|>"
    assert learned(tokenizer, [user("a"), first, user("b"), second]) == f"y{end}"
    assert learned(tokenizer, [user("a"), first, second]) == f"\n\ny{end}"
    assert learned(tokenizer, [user("a"), second, first]) == "y"
    assert learned(tokenizer, [user("a"), first, assistant(""), first, second]) == f"\n\ny{end}"
    whole = [part["text"] for part in normalize([second, assistant("") | {"weight": 0}, first])[1]["content"]]
    assert "".join(whole) == "y\n\nx"
    assert learned(tokenizer, [user("a"), assistant(CALL) | {"weight": 0}]) == ""
    messages = [user("a"), first, second]
    assert learned(tokenizer, normalize(messages)) == learned(tokenizer, messages)


def test_a_users_message_of_weight_1_is_learned(tokenizer):
    first, second, answer = user("a") | {"weight": 1}, user("b"), assistant("y") | {"weight": 1}
    end = "<|assistant_end|>"
    messages = [first, answer, second, answer]
    assert learned(tokenizer, messages) == f"<|user_start|>a<|user_end|>y{end}y{end}"
    assert learned(tokenizer, normalize(messages)) == learned(tokenizer, messages)
    assert render(tokenizer, messages)[0] == render(tokenizer, [user("a"), answer, second, answer])[0]


def test_a_last_message_of_the_assistant_stays_open(tokenizer):
    messages = [user("x"), assistant("I am")]
    ids = render_prompt(tokenizer, messages, continue_final=True)
    assert show(tokenizer, ids) == "<|bos|><|user_start|>x<|user_end|><|assistant_start|>I am"
    with pytest.raises(UsageError, match=r"messages\[0\]"):
        render_prompt(tokenizer, messages[:1], continue_final=True)
    sum_of_it = [user("x"), calls(tool("python", {"x": "1+1"})), result("2")]
    assert show(tokenizer, render_prompt(tokenizer, sum_of_it)).endswith("<|output_start|>2<|output_end|>")


@pytest.mark.parametrize(
    ("messages", "words"),
    [
        ([], "must be a list with at least one"),
        ("hello", "must be a list"),
        (None, "must be a list"),
        ({"role": "user"}, "must be a list"),
        (["hello"], r"messages\[0\]: role None"),
        ([user("x"), {"role": "king", "content": "y"}], r"messages\[1\]: role 'king'"),
        ([{"role": ["user"], "content": "y"}], r"messages\[0\]: role"),
        ([{"role": "user"}], r"messages\[0\]: content must be text .*not NoneType"),
        ([user(3)], "not int"),
        ([user([{"type": "image_url"}])], r"messages\[0\]: .*text only, .*'image_url'"),
        ([user([{"type": "text", "text": None}])], r"messages\[0\]: a part of type text needs"),
        ([user([{"type": "python", "text": "1+1"}])], r"messages\[0\]: only an assistant"),
        ([user("x"), assistant(["a"])], r"messages\[1\]: "),
        ([user("x"), assistant([{"type": [], "text": "a"}])], r"messages\[1\]: "),
        ([user("x"), assistant("") | {"tool_calls": 5}], r"messages\[1\]: tool_calls"),
        ([user("x"), calls("f")], r"messages\[1\]: a tool call"),
        ([user("x"), calls({"function": {"name": 5}})], r"messages\[1\]: a tool call"),
        ([user("x"), calls(tool("python", {"x": "1+1"})), result([5])], r"messages\[2\]: "),
    ],
)
def test_malformed_conversations_are_refused_by_number(tokenizer, messages, words):
    for function in (render, render_prompt):
        with pytest.raises(UsageError, match=words):
            function(tokenizer, messages)


def test_a_prompt_ends_with_the_user(tokenizer):
    with pytest.raises(UsageError, match=r"messages\[1\]: the last one must be the user's"):
        render_prompt(tokenizer, [user("x"), assistant("y")])
