"""Connections that never come to their point, against a live service."""

import socket
import time

import pytest
from live_service import live

from serve import app as protocol


@pytest.fixture(scope="module")
def service():
    with live() as running:
        yield running


def talk(service, *pieces, seconds=20.0):
    """What comes back, to the end of the connection."""
    with socket.create_connection(("127.0.0.1", service.port), timeout=seconds) as connection:
        try:
            for piece in pieces:
                connection.sendall(piece)
        except (BrokenPipeError, ConnectionResetError):
            pass
        said = b""
        try:
            while piece := connection.recv(65536):
                said += piece
        except ConnectionResetError:
            pass
        return said


def test_a_head_without_end_is_refused(service):
    lines = (b"x-%d: %s\r\n" % (i, b"y" * 1000) for i in range(5000))
    begin = time.monotonic()
    said = talk(service, b"GET /health HTTP/1.1\r\nhost: x\r\n", *lines)
    assert time.monotonic() - begin < 10 and said[:12] in (b"HTTP/1.1 431", b"")  # or a reset that overtook it
    assert talk(service, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


@pytest.mark.parametrize(
    "said", [b"", b"GET /hea", b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 99\r\n\r\n{"]
)
def test_a_request_without_end_is_given_up(service, monkeypatch, said):
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.5)
    begin = time.monotonic()
    answer = talk(service, said)
    assert 0.3 < time.monotonic() - begin < 10 and (answer.startswith(b"HTTP/1.1 408") or not said.startswith(b"GET"))
    assert talk(service, b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n").startswith(b"HTTP/1.1 200")


def test_long_answers_are_no_long_requests(service, monkeypatch):
    monkeypatch.setattr(protocol, "REQUEST_SECONDS", 0.2)
    body = {"messages": [{"role": "user", "content": "hello"}], "ignore_eos": True, "max_tokens": 100, "n": 4}
    with service.stream("/v1/chat/completions", body) as stream:
        assert b"[DONE]" in b"".join(stream.iter_bytes())
