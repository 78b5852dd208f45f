"""WS /ws/chat with a real client."""

import json
import socket
import time

import pytest
from live_service import live, slowed
from small_model import GREETING, QUESTION
from websockets.exceptions import ConnectionClosed, InvalidStatus
from websockets.sync.client import connect

from serve.api import parse

HELLO = "Hi 🙂 안녕!"


@pytest.fixture(scope="module")
def service():
    with live(body_bytes=50_000) as running:
        yield running


@pytest.fixture
def talk(service):
    with connect(f"ws://127.0.0.1:{service.port}/ws/chat", open_timeout=30) as connection:
        yield connection


def ask(connection, said):
    """The messages of one answer, the last one apart."""
    connection.send(said if isinstance(said, (str, bytes)) else json.dumps(said))
    messages = []
    while not messages or not messages[-1]["done"]:
        messages.append(json.loads(connection.recv(timeout=30)))
    return messages[:-1], messages[-1]


def text_of(messages):
    return "".join(message["token"] for message in messages)


def test_a_plain_text_is_one_user_turn(talk):
    for _ in range(2):  # each stands for itself
        messages, end = ask(talk, GREETING[0]["content"])
        assert text_of(messages) == HELLO and len(messages) > 2
        assert all(message.keys() == {"token", "done"} for message in messages)
        assert end == {"done": True, "finish_reason": "stop"}


def test_a_conversation_with_settings(talk):
    settings = {"max_tokens": 3, "temperature": 0, "top_k": 5}
    messages, end = ask(talk, {"messages": GREETING} | settings)
    assert HELLO.startswith(text_of(messages)) and end["finish_reason"] == "length"
    stopped, end = ask(talk, {"messages": GREETING, "stop": "🙂", "repetition_penalty": 1.0, "min_p": 0.0})
    assert text_of(stopped) == HELLO.split("🙂")[0] and end["finish_reason"] == "stop"
    long = [*GREETING, {"role": "assistant", "content": "Hi"}, *GREETING]
    assert ask(talk, {"messages": long, "max_tokens": 4})[1]["finish_reason"] in ("stop", "length")


def test_a_calculator_call_stands_beside_the_text(talk):
    messages, _ = ask(talk, {"messages": QUESTION})
    parts = [message["part"] for message in messages if "part" in message]
    assert text_of(messages) == "That is it."
    assert "".join(part["text"] for part in parts if part["type"] == "python") == "12+30"
    assert "".join(part["text"] for part in parts if part["type"] == "python_output") == "42"


@pytest.mark.parametrize(
    ("said", "param"),
    [("{}", "messages"), ({"messages": []}, "messages"), ({"messages": 5}, "messages"), ({"text": "x"}, "messages"),
     ({"messages": GREETING, "temperature": -1}, "temperature"),
     ({"messages": GREETING, "max_tokens": -5}, "max_tokens"),
     ('{"messages": [{"role": "user"}], "temperature": 1e999}', "messages"),
     ('{"messages": NaN}', "messages"),
     ('{"messages": [', "messages"),
     ({"messages": [{"role": "tool", "content": [{"type": "image_url"}]}]}, "messages"),
     ({"messages": GREETING, "n": 2}, "n"), ({"messages": GREETING, "logprobs": True}, "logprobs"),
     ({"messages": GREETING, "tool_choice": "required"}, "tool_choice"), ({"messages": GREETING, "top_p": -1}, "top_p"),
     ({"messages": GREETING * 501}, "messages"),
     (b"\xff\x00", None),
     ("word " * 400, "messages"), ("x" * 9_000, "messages[0].content")],
)  # fmt: skip
def test_what_is_wrong_is_said_and_the_talk_goes_on(talk, said, param):
    messages, end = ask(talk, said)
    assert not messages and end["done"] and end["error"]["type"] == "invalid_request_error"
    assert end["error"]["param"] == param
    assert text_of(ask(talk, GREETING[0]["content"])[0]) == HELLO


@pytest.mark.parametrize("said", ["{", "[]", "5", '"hello"', "null", "\x00", "{hello} 🙂" * 3, ""])
def test_what_is_no_object_is_text(talk, said):
    assert parse(said).messages[0].content == said
    assert "error" not in ask(talk, said)[1]


def test_stop_keeps_what_has_come(service, talk):
    with slowed(service.worker, 0.1):
        talk.send(GREETING[0]["content"])
        first = json.loads(talk.recv(timeout=30))
        messages, end = ask(talk, {"stop": True})
        assert end == {"done": True, "finish_reason": "cancelled"}
        assert HELLO.startswith(first["token"] + text_of(messages)) and len(messages) < 3
        assert service.wait_until_idle() < 0.3
    assert text_of(ask(talk, GREETING[0]["content"])[0]) == HELLO


def test_a_stop_right_behind_its_question_counts(service, talk):
    with slowed(service.worker, 0.2):
        talk.send(GREETING[0]["content"])
        talk.send('{"stop": true}')
        messages = [json.loads(talk.recv(timeout=30))]
        while not messages[-1]["done"]:
            messages.append(json.loads(talk.recv(timeout=30)))
    assert messages[-1]["finish_reason"] == "cancelled"
    talk.send('{"stop": true}')  # with nothing to stop
    talk.send(GREETING[0]["content"])
    while not (message := json.loads(talk.recv(timeout=30)))["done"]:
        pass
    assert message["finish_reason"] == "stop"


def test_one_who_leaves_frees_the_slot(service):
    with slowed(service.worker, 0.1):
        with connect(f"ws://127.0.0.1:{service.port}/ws/chat") as talk:
            talk.send(GREETING[0]["content"])
            talk.recv(timeout=30)
            assert service.worker.busy == 1
            talk.socket.shutdown(socket.SHUT_RDWR)  # no good-bye
        assert service.wait_until_idle() < 0.3


def test_questions_wait_their_turn_and_not_too_many(service, talk):
    for _ in range(3):
        talk.send(GREETING[0]["content"])
    ends = []
    while len(ends) < 3:
        message = json.loads(talk.recv(timeout=30))
        ends += [message] if message["done"] else []
    assert [end["finish_reason"] for end in ends] == ["stop"] * 3
    with slowed(service.worker, 0.2):
        for _ in range(20):
            talk.send(GREETING[0]["content"])
        with pytest.raises(ConnectionClosed) as closed:
            while True:
                talk.recv(timeout=30)
        assert closed.value.rcvd.code == 1008 and "wait already" in closed.value.rcvd.reason
        service.wait_until_idle()


def test_a_slow_reader_holds_no_slot(service):
    """It reads a piece every now and then; the answer is made at the model's pace, and all of it arrives."""
    with connect(f"ws://127.0.0.1:{service.port}/ws/chat", max_queue=1) as talk:
        talk.send(GREETING[0]["content"])
        assert service.wait_until_idle() < 8  # before anything is read
        messages = []
        while not messages or not messages[-1]["done"]:
            time.sleep(0.05)
            messages.append(json.loads(talk.recv(timeout=30)))
        assert text_of(messages[:-1]) == HELLO


def test_too_large_a_message_closes_the_connection(talk):
    talk.send("x" * 60_000)
    with pytest.raises(ConnectionClosed) as closed:
        talk.recv(timeout=30)
    assert closed.value.rcvd.code == 1009


def test_keys_and_origins():
    with live(api_keys=("secret",), origins=("https://friend.example",)) as service:
        url, key = f"ws://127.0.0.1:{service.port}/ws/chat", {"Authorization": "Bearer secret"}
        own = f"http://127.0.0.1:{service.port}"
        refused = [({}, None, 401), ({"Authorization": "Bearer x"}, None, 401), (key, "https://evil.example", 403),
                   (key, "null", 403), (key, "http://[", 403)]  # fmt: skip
        for headers, origin, status in refused:
            with pytest.raises(InvalidStatus) as error:
                connect(url, additional_headers=headers, origin=origin)
            assert error.value.response.status_code == status
            assert json.loads(error.value.response.body)["error"]["code"]
        for origin in (None, own, "https://friend.example"):
            with connect(url, additional_headers=key, origin=origin) as talk:
                assert text_of(ask(talk, GREETING[0]["content"])[0]) == HELLO


def test_a_rate_counts_messages():
    with live(requests_per_minute=2) as service, connect(f"ws://127.0.0.1:{service.port}/ws/chat") as talk:
        assert [ask(talk, "{}")[1]["error"]["type"] for _ in range(3)].count("rate_limit_error") == 1
