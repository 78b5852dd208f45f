"""What the chat page shows: lines, tool calls, tokens with their probabilities, the model's card."""

import json
from html.parser import HTMLParser

import gradio as gr
import pytest
from live_service import config
from small_model import tokenizer

from jaxchat.engine.request import Token
from jaxchat.run_dir import RunDir
from serve.page import BREAK, TEXTS, model_card, next_turn, show, token_spans, turn
from serve.service import Service

PARTS = [{"type": "python", "text": "12+30"}, {"type": "python_output", "text": "42"}, {"type": "text", "text": "So."}]
TALK = [*turn("a", [{"type": "text", "text": "A"}]), *turn("b", PARTS), *turn("c")]


def test_every_language_has_every_text():
    assert set(TEXTS["en"]) <= set(TEXTS["ko"]) and all(all(words.values()) for words in TEXTS.values())


def lines(messages):
    """As the chatbot gets them, components as their HTML."""
    return [
        (line["role"], line["content"].value if isinstance(line["content"], gr.HTML) else line["content"])
        for line in show(messages)
    ]


def test_a_tool_call_is_a_line_of_its_own():
    assert lines(TALK) == [
        ("user", "a"),
        ("assistant", "A"),
        ("user", "b"),
        ("assistant", "<code>12+30 = 42</code>"),
        ("assistant", "So."),
        ("user", "c"),
        ("assistant", "…"),
    ]
    assert lines(turn("x", PARTS[1:]))[1:] == [("assistant", "So.")]  # output without a call
    assert lines(turn("x", PARTS[:1]))[1:] == [("assistant", "<code>12+30</code>")]  # the result is still to come
    assert lines(turn("x", [{"type": "python", "text": "<b>&"}]))[1][1] == "<code>&lt;b&gt;&amp;</code>"


class Spans(HTMLParser):
    """(text, probability, steps) of every token span; any other tag is an error."""

    def __init__(self, html):
        super().__init__()
        self.found = []
        self.feed(html)

    def handle_starttag(self, tag, attributes):
        assert tag == "span" and [name for name, _ in attributes] == ["class", "tabindex", "style", "data-steps"]
        values = dict(attributes)
        self.found.append(["", float(values["style"].removeprefix("--p:")), json.loads(values["data-steps"])])

    def handle_data(self, data):
        self.found[-1][0] += data


def tokens(text, logprob=-0.1):
    """Each with two alternatives, one of them special."""
    ids = tokenizer().encode(text)
    return [Token(i, logprob, ((i, logprob), (tokenizer().bos, -3.0))) for i in ids]


@pytest.mark.parametrize("together", [True, False])
def test_tokens_show_exactly_the_text(together):
    """Whether they come at once or one by one; characters of several tokens stand in one span."""
    text = "Hi 🙂 안녕! <script>alert('1')</script> \"&amp;${x}\n {{y}}`"
    made, html, rest = tokens(text), "", []
    for some in [made] if together else [[token] for token in made]:
        spans, rest = token_spans(tokenizer(), [*rest, *some], not html, final=False)
        html += spans
    assert not rest
    found = Spans(html).found
    assert "".join(part for part, _, _ in found) == text
    assert [p for part, p, steps in found if part == "안"] == [pytest.approx(0.9048 ** len(tokens("안")), abs=1e-3)]
    assert [len(steps) for part, _, steps in found if part == "안"] == [len(tokens("안"))]
    name, p, top = found[0][2][0]
    assert p == 0.9048 and top == [[name, 0.9048], ["<|bos|>", 0.0498]]
    assert html.count('tabindex="0"') == 1


def test_a_character_cut_off_shows_as_such():
    part = tokens("안")[:1]
    assert token_spans(tokenizer(), part, final=False) == ("", part)
    ((text, _, steps),) = Spans(token_spans(tokenizer(), part)[0]).found
    assert text == "\ufffd" and steps[0][0].startswith("bytes:")
    assert [steps[0][0] for _, _, steps in Spans(token_spans(tokenizer(), tokens(" \n"))[0]).found] == ["␣", "⏎"]


@pytest.mark.parametrize(
    ("data", "before", "text"),
    [
        (None, 6, "typed"),
        ({"index": 2, "value": {"text": "example"}}, 6, "example"),
        ({"index": 5, "value": "c"}, 4, "c"),  # again; a tool call makes a line more
        ({"index": 2, "value": "new", "previous_value": "b"}, 2, "new"),
        ({"index": 0, "value": "new", "previous_value": "a"}, 0, "new"),
        ({"index": 2, "value": "  ", "previous_value": "b"}, 6, ""),  # edited to nothing: nothing happens
    ],
)
def test_where_a_conversation_goes_on(data, before, text):
    assert next_turn(TALK, "typed", gr.EventData(None, data)) == (TALK[:before], text)


def test_an_edited_message_is_the_one_written():
    shown = show(turn("a <b> &amp; 1<2\n  c"))
    assert shown[0]["content"] == f"a <{BREAK}b> &{BREAK}amp; 1<2\n{BREAK}  c"
    data = {"index": 0, "value": shown[0]["content"], "previous_value": shown[0]["content"]}
    assert next_turn(turn("x"), "", gr.EventData(None, data))[1] == "a <b> &amp; 1<2\n  c"


def test_the_model_card_tells_size_time_and_scores(tmp_path):
    own, service = RunDir(tmp_path), Service(config(), None)
    card = model_card(own, service, TEXTS["en"])
    assert "<dd>2</dd>" in card and "trained in" not in card
    scores = {"tasks": {"word_problems": {"metric": 0.953, "accuracy": 0.953, "n": 256},
                        "spelling_bee": {"metric": 2, "n": 3},
                        "bits_per_byte": {"metric": 1.9, "n": 1}}}  # fmt: skip
    own.eval("sft").parent.mkdir()
    own.eval("sft").write_text(json.dumps(scores))
    own.eval("base").write_text(json.dumps({"tasks": {"bits_per_byte": {"metric": 1.6054, "n": 1}}}))
    own.stages.write_text(json.dumps({"pretrain": {"seconds": 251.4}, "sft": {"seconds": 65}, "eval": {"seconds": 9}}))
    card = model_card(own, service, TEXTS["ko"])
    assert "문장제" in card and "95.3%" in card and "철자 맞히기" in card
    assert "1.605" in card and "1.900" not in card and "0:05:16" in card
    own.eval("sft").write_text(json.dumps({"core": 0.2219, "tasks": {"<b>": {"metric": 0.5}}}))
    card = model_card(own, service, TEXTS["en"])
    assert "CORE</dt>" in card and "0.222" in card and "&lt;b&gt;" in card
    own.eval("sft").write_text("[")
    own.stages.write_text("{")
    assert "학습 시간" not in model_card(own, service, TEXTS["ko"])
