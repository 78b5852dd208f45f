"""An answer as it comes out: held-back UTF-8, parts, and what the calculator answers."""

import functools

import pytest

from jaxchat.engine.device import FORCED
from jaxchat.engine.request import TOOL_ERROR, Event, Turn
from jaxchat.tokenizer import Tokenizer, train_tokenizer


@functools.cache
def tokenizer() -> Tokenizer:
    return train_tokenizer(["Tom has 12 apples and 30 pears. " * 3], 270, 1000, 1000)


def feed(turn, *pieces):
    """Add texts and special tokens (in <|...|>); returns all events."""
    events = []
    for piece in pieces:
        special = tokenizer().special.get(piece)
        for token in tokenizer().encode(piece) if special is None else [special]:
            events += turn.add(token)
    return events


def test_text_comes_out_whole_and_in_pieces():
    turn = Turn(tokenizer())
    events = feed(turn, "Tom has 12 apples") + turn.flush()
    assert "".join(e.text for e in events) == "Tom has 12 apples" and {e.kind for e in events} == {"text"}
    assert turn.parts == [{"type": "text", "text": "Tom has 12 apples"}]


def test_no_event_ever_shows_half_a_character():
    turn = Turn(tokenizer())
    text = "안녕 🙂 é"
    assert len(tokenizer().encode(text)) > len(text)  # characters are split over tokens
    events = feed(turn, text)
    assert "".join(e.text for e in events) == text and not any("\ufffd" in e.text for e in events)


def test_an_answer_cut_inside_a_character_ends_with_a_replacement():
    turn = Turn(tokenizer())
    for token in tokenizer().encode("a🙂")[:-1]:
        turn.add(token)
    assert turn.parts[-1]["text"] == "a"
    assert turn.flush() == [Event("text", "\ufffd")] and turn.parts[-1]["text"] == "a\ufffd"


def test_parts_of_an_answer_with_a_call():
    turn = Turn(tokenizer())
    feed(turn, "So ", "<|python_start|>", "12+30", "<|python_end|>")
    assert turn.tool_output() == [
        tokenizer().special["<|output_start|>"], *tokenizer().encode("42"), tokenizer().special["<|output_end|>"]
    ]  # fmt: skip
    feed(turn, "<|output_start|>", "42", "<|output_end|>", "42 apples.")
    assert turn.parts == [
        {"type": "text", "text": "So "},
        {"type": "python", "text": "12+30"},
        {"type": "python_output", "text": "42"},
        {"type": "text", "text": "42 apples."},
    ]


@pytest.mark.parametrize("call", ["", "2**9", "__import__('os')", "1/0", "apples"])
def test_a_refused_call_is_answered_with_an_error(call):
    turn = Turn(tokenizer())
    feed(turn, "<|python_start|>", call, "<|python_end|>")
    assert tokenizer().decode(turn.tool_output()) == TOOL_ERROR


def test_marks_out_of_order_answer_nothing_and_show_nothing():
    turn = Turn(tokenizer())
    events = feed(turn, "a", "<|python_end|>", "b", "<|output_end|>", "<|user_end|>", "c")
    assert turn.tool_output() == [] and "".join(e.text for e in events) == "abc"
    assert turn.parts == [{"type": "text", "text": "abc"}]


def test_a_second_call_in_one_answer_is_its_own():
    turn = Turn(tokenizer())
    feed(turn, "<|python_start|>", "1+1", "<|python_end|>", "<|output_start|>", "2", "<|output_end|>")
    feed(turn, "<|python_start|>", "2*3", "<|python_end|>")
    assert tokenizer().decode(turn.tool_output()) == "6"


def test_a_result_fits_the_queue_of_forced_tokens():
    turn = Turn(tokenizer())
    feed(turn, "<|python_start|>", "9" * 29 + "+0.5", "<|python_end|>")
    assert 3 <= len(turn.tool_output()) <= FORCED
