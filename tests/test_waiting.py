"""The queue in which clients take turns, and what a chunk's tokens mean for one answer; without a device."""

from small_model import tokenizer

from jaxchat.engine.device import FULL, RUNNING, STOPPED
from jaxchat.engine.request import Handle, Request
from jaxchat.engine.scheduler import Waiting, take_in
from jaxchat.engine.turn import Turn


def handle(client="", **settings):
    request = Request([1, 2], client=client, **settings)
    return Handle(request, 0, 99, Turn(tokenizer(), request.stop_texts))


def test_clients_take_turns_and_each_in_its_order():
    waiting = Waiting()
    many, one = [handle("many") for _ in range(3)], handle("one")
    for h in (*many, one):
        waiting.add(h)
    assert len(waiting) == 4 and one in waiting
    assert (waiting.of("many"), waiting.of("nobody")) == (3, 0)
    assert [waiting.take() for _ in range(4)] == [many[0], one, many[1], many[2]]
    assert not waiting


def test_a_removed_request_leaves_its_client_in_turn():
    waiting = Waiting()
    first, second, other = handle("a"), handle("a"), handle("b")
    for h in (first, second, other):
        waiting.add(h)
    waiting.remove(first)
    assert first not in waiting and len(waiting) == 2
    waiting.remove(second)
    assert waiting.take() is other and len(waiting) == 0


def test_a_chunk_that_ends_by_a_stop_id():
    answer, text = handle(), tokenizer().encode("hello")
    end = tokenizer().special["<|assistant_end|>"]
    events = take_in(answer, text, (), RUNNING)
    assert answer.made == len(text) and answer.first_token is not None
    events += take_in(answer, [end], (), STOPPED)
    assert "".join(event.text for event in events) == "hello"
    assert answer.stop_id == end and answer.made == len(text) + 1 and answer.turn.tokens == text


def test_tokens_behind_a_stop_text_do_not_count():
    answer = handle(stop_texts=("lo",))
    ids = [i for letter in "hello you" for i in tokenizer().encode(letter)]
    events = take_in(answer, ids, (), FULL)
    assert "".join(event.text for event in events) == "hel" and answer.turn.stopped
    assert answer.made < len(ids) == answer.advanced
