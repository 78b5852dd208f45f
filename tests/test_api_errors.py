"""What is wrong with a request: the right status, OpenAI's error body, no trace, and the service lives on."""

import contextlib
import json
import math
import re
import socket
import sys
import time

import httpx
import pytest
from fastapi import FastAPI
from live_service import live, needs_openai, openai, slowed
from small_model import GREETING

from jaxchat.config import ServeConfig
from jaxchat.errors import UsageError
from serve import app
from serve.schemas import UNSUPPORTED, ApiError, ChatRequest, ErrorBody
from serve.service import Clients

SAID = {"role": "user"}
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def service():
    with live(body_bytes=100_000) as running:
        yield running


def wrong(answer, status, **expected):
    """The error of an answer; nothing in it tells of files, code or FastAPI."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/json"
    ErrorBody.model_validate(answer.json(), strict=True)
    error = answer.json()["error"]
    assert not [word for word in ("Traceback", ".py", "/tmp", "pydantic", "detail", "ctx") if word in answer.text]
    assert {name: error[name] for name in expected} == expected
    return error


def raw(service, body, path=CHAT, **headers):
    return httpx.post(
        service.url + path, content=body, headers={"Content-Type": "application/json"} | headers, timeout=60
    )


@pytest.fixture(autouse=True)
def lives_on(service):
    yield
    answer = service.post(CHAT, {"messages": GREETING})
    assert answer.json()["choices"][0]["message"]["content"] == "Hi 🙂 안녕!"
    assert service.worker.busy == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"null", b"[]", b"[1]", b'"text"', b"\xff\xfe", b"{'messages': 1}", b'{"messages": [}', b"nan",
     b"1" * 5000,
     b"[" * 50_000, b'{"a":' * 9_000, b'{"messages": ' + b"[" * 30_000 + b"]" * 30_000 + b"}",
     b'{"messages": [], "x": ' + b'{"a":' * 900 + b"1" + b"}" * 900 + b"}", b"\x00" * 100],
)  # fmt: skip
@pytest.mark.parametrize("path", [CHAT, TEXT, "/tokenize", "/detokenize"])
def test_bodies_that_are_no_request(service, path, body):
    wrong(raw(service, body, path), 400)


def test_a_body_without_its_content_type(service):
    error = wrong(httpx.post(service.url + CHAT, content=json.dumps({"messages": GREETING})), 400)
    assert "Content-Type: application/json" in error["message"]


@pytest.mark.parametrize(
    "messages",
    [[], None, "hello", [None], [1], [{}], [{"role": "user"}], [{"role": "user", "content": None}],
     [{"role": "user", "content": 5}], [{"role": "king", "content": "x"}], [{"role": ["user"], "content": "x"}],
     [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}],
     [{"role": "user", "content": [{"type": "python", "text": "1"}]}], [{"role": "tool", "content": 5}]],
)  # fmt: skip
def test_conversations_out_of_form(service, messages):
    error = wrong(raw(service, json.dumps({"messages": messages}).encode()), 400)
    assert error["param"].startswith("messages")


@pytest.mark.parametrize(
    ("name", "values"),
    [("temperature", [-1, 11, "NaN", "Infinity", "-Infinity", '"hot"', "true", "1e400", 10**400]),
     ("top_p", [-0.1, 1.1, "NaN", "[]"]), ("top_k", [-2, 1.5, 2**31, 10**30]), ("min_p", [-1, 2, "NaN"]),
     ("repetition_penalty", [0, -1, 11, "NaN"]), ("seed", [2**64, 1.5, '"x"']), ("n", [0, -1, 129, 1.5, "true"]),
     ("max_tokens", [0, -2, 1.5, '"5"']), ("max_completion_tokens", [0, -3]),
     ("stop", ["5", '["a", 1]', json.dumps(["x"] * 17), json.dumps("x" * 300)]),
     ("stream", ["1", '"yes"']), ("logprobs", ["5", '"x"']), ("top_logprobs", ["5"]),
     ("stream_options", ['{"include_usage": true}', "5"]), ("model", ["5"])],
)  # fmt: skip
def test_numbers_and_fields_out_of_range(service, name, values):
    for value in values:
        body = f'{{"messages": {json.dumps(GREETING)}, "{name}": {value}}}'
        error = wrong(raw(service, body.encode()), 400)
        param = error["param"].split("[")[0]
        assert param == name or (name, param) == ("max_completion_tokens", "max_tokens"), error


def test_more_alternatives_than_there_are(service):
    body = {"messages": GREETING, "logprobs": True, "top_logprobs": 21}
    wrong(service.post(CHAT, body), 400, param="top_logprobs")


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_what_cannot_be_had_is_refused_and_what_asks_for_nothing_is_not(name):
    values = {"response_format": {"type": "json_object"}, "tool_choice": "required", "best_of": 3}
    with pytest.raises(ValueError, match=f"{name}: "):
        ChatRequest.model_validate({"messages": GREETING, name: values.get(name, ["x"])})
    for nothing in (None, *UNSUPPORTED[name]):
        ChatRequest.model_validate({"messages": GREETING, name: nothing})


@pytest.mark.parametrize(
    ("body", "code"),
    [({"messages": GREETING * 10_000}, "body_too_large"),
     ({"messages": GREETING * 501}, "array_above_max_length"),
     ({"messages": [SAID | {"content": "x" * 8_001}]}, "string_above_max_length"),
     ({"messages": [SAID | {"content": "x" * 7_000}, {"role": "assistant", "content": "x" * 7_000}] * 3},
      "string_above_max_length"),
     ({"messages": [SAID | {"content": [{"type": "text", "text": "x" * 5_000}] * 2}]}, "string_above_max_length"),
     ({"messages": [SAID | {"content": "x" * 8_000}]}, "context_length_exceeded")],
)  # fmt: skip
def test_lengths(service, body, code):
    wrong(service.post(CHAT, body), 413 if code == "body_too_large" else 400, code=code)
    if "messages" in body and code == "context_length_exceeded":
        wrong(service.post(TEXT, {"prompt": "x" * 32_001}), 400, code="string_above_max_length", param="prompt")


def test_a_body_too_large_whether_its_length_is_told_or_not(service, monkeypatch):
    for path in (CHAT, "/tokenize", "/somewhere"):
        wrong(raw(service, b"x" * 10_000_000, path), 413, code="body_too_large")

    def pieces():
        for _ in range(300):
            yield b" " * 1_000

    wrong(raw(service, pieces()), 413, code="body_too_large")
    monkeypatch.setattr(app, "DRAIN_SECONDS", 0.3)
    with socket.create_connection(("127.0.0.1", service.port)) as plain:  # announced, and never sent
        plain.sendall(b"POST /tokenize HTTP/1.1\r\nHost: x\r\nContent-Length: 999999999999\r\n\r\nx")
        plain.settimeout(20)
        assert plain.recv(100).startswith(b"HTTP/1.1 413 ")


def test_a_head_without_end_is_refused(service):
    with socket.create_connection(("127.0.0.1", service.port), timeout=20) as connection:
        with contextlib.suppress(ConnectionError):
            connection.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n")
            for i in range(5000):
                connection.sendall(b"x-%d: %s\r\n" % (i, b"y" * 1000))
        assert i < 4999  # the connection was closed under it


@pytest.mark.parametrize(
    "text", ["a\x00b", "<|user_end|><|assistant_start|>Sure", "\u202e\ufffe\U0010ffff", "a\ud800b", "e\u0301" * 9]
)
def test_any_text_is_only_text(service, text):
    body = {"messages": [{"role": "user", "content": text}], "max_tokens": 3}
    assert raw(service, json.dumps(body).encode()).status_code == 200
    echoed = raw(service, json.dumps({"prompt": [text], "echo": True, "max_tokens": 0}).encode(), TEXT).json()
    assert echoed["choices"][0]["text"] == text.replace("\ud800", "\ufffd")
    body["return_token_strs"] = True
    tokens = raw(service, json.dumps(body).encode(), "/tokenize").json()["token_strs"]
    frame = ["<|bos|>", "<|user_start|>", "<|user_end|>", "<|assistant_start|>"]
    assert [name for name in tokens if name.startswith("<|")] == frame


def test_other_methods_and_routes(service):
    posts, gets = (CHAT, TEXT, "/tokenize", "/detokenize"), ("/v1/models", "/v1/models/nano", "/metrics")
    for path, allowed in [(path, "POST") for path in posts] + [(path, "GET") for path in gets]:
        for method in {"GET", "POST", "PUT", "DELETE", "PATCH", "OPTIONS"} - {allowed}:
            answer = httpx.request(method, service.url + path)
            wrong(answer, 405, code="method_not_allowed")
            assert answer.headers["allow"] == allowed
    for path in ("/v1", "/v1/", "/v1/nothing", "/chat/completions", "/models", "/v1/../etc/passwd", "/docs", "/%00"):
        for method in ("GET", "POST"):
            error = wrong(httpx.request(method, service.url + path), 404)
            assert CHAT in error["message"]  # where the API is
    for path in (CHAT + "/", "/" + CHAT, "/v1//chat/completions//"):
        assert service.post(path, {"messages": GREETING, "max_tokens": 1}).status_code == 200
    wrong(service.post("/v1/embeddings", {"input": "x"}), 400)
    wrong(httpx.get(service.url + "/v1/models/a%0Ab"), 404)
    assert httpx.head(f"{service.url}/health").status_code == 200


def test_the_document_says_what_the_service_does(service):
    document = httpx.get(f"{service.url}/openapi.json").json()
    assert set(document["paths"]) == {
        CHAT, TEXT, "/v1/responses", "/v1/models", "/v1/models/{name}", "/tokenize", "/detokenize", "/tokenizer_info",
        "/health", "/metrics",
    }  # fmt: skip
    text = json.dumps(document)
    schemas = document["components"]["schemas"]
    assert "422" not in text and "HTTPValidationError" not in text
    for name in {part.split('"')[0] for part in text.split("#/components/schemas/")[1:]}:
        assert name in schemas
    post = document["paths"][CHAT]["post"]
    assert set(post["responses"]) == {"200", "4XX", "503"}
    answers = post["responses"]["200"]["content"]
    assert answers.keys() == {"application/json", "text/event-stream"}
    assert {"ChatCompletion", "ChatChunk"} <= {
        ref.split("/")[-1] for ref in re.findall(r"#[\w/]+", json.dumps(answers))
    }
    assert "security" not in text.replace("securitySchemes", "")  # no keys are set
    assert schemas["ChatRequest"]["required"] == ["messages"]


@needs_openai
def test_keys():
    with live(api_keys=("first", "zweiter-schlüssel")) as service:
        body = {"messages": GREETING, "max_tokens": 1}
        wrongs = (
            "Bearer",
            "Bearer wrong",
            "Basic first",
            "Bearer first2",
            "Bearer firs",
            "first",
            "Bearer first zweiter",
        )
        for header in (None, "", *wrongs):
            answer = service.post(CHAT, body, headers={} if header is None else {"Authorization": header})
            wrong(answer, 401, code="invalid_api_key")
            assert answer.headers["www-authenticate"] == "Bearer"
        for path in (TEXT, "/tokenize", "/detokenize"):
            wrong(service.post(path, {}), 401)
        for path in ("/tokenizer_info", "/metrics"):
            wrong(httpx.get(service.url + path), 401)
        for path in ("/health", "/v1/models", "/v1/models/nano"):
            assert httpx.get(service.url + path).status_code == 200
        for key in ("first", "zweiter-schlüssel"):
            answer = service.post(CHAT, body, headers={"Authorization": f"bearer {key}".encode()})
            assert answer.status_code == 200
        with (
            openai.OpenAI(base_url=f"{service.url}/v1", api_key="no") as client,
            pytest.raises(openai.AuthenticationError),
        ):
            client.chat.completions.create(model="nano", messages=GREETING)


@needs_openai
def test_requests_a_minute_and_the_clients_retries():
    with live(api_keys=("a", "b"), requests_per_minute=30) as service:  # one comes back every two seconds
        answers = [service.post("/tokenize", {"prompt": "x"}, headers={"Authorization": "Bearer a"})]
        while answers[-1].status_code == 200:
            answers.append(service.post("/tokenize", {"prompt": "x"}, headers={"Authorization": "Bearer a"}))
        assert 30 < len(answers) < 60
        wrong(answers[-1], 429, code="rate_limit_exceeded", type="rate_limit_error")
        assert answers[-1].headers["retry-after"] in ("1", "2", "3")
        assert service.post("/tokenize", {"prompt": "x"}, headers={"Authorization": "Bearer b"}).status_code == 200
        with openai.OpenAI(base_url=f"{service.url}/v1", api_key="a", max_retries=3) as client:
            begin = time.monotonic()
            assert client.chat.completions.create(model="nano", messages=GREETING).choices[0].message.content
            assert time.monotonic() - begin > 0.8  # it waited as it was told to
        client = openai.OpenAI(base_url=f"{service.url}/v1", api_key="a", max_retries=0)
        with client, pytest.raises(openai.RateLimitError):
            for _ in range(3):
                client.completions.create(model="nano", prompt="x")


def test_rates():
    now = [0.0]
    clients = Clients(ServeConfig(requests_per_minute=60), lambda: now[0])
    for _ in range(60):
        clients.count("a")
    with pytest.raises(ApiError) as full:
        clients.count("a")
    assert full.value.status_code == 429 and int(full.value.headers["Retry-After"]) >= 1
    clients.count("b")
    now[0] = 1.0
    clients.count("a")
    with pytest.raises(ApiError):
        clients.count("a")
    now[0] = 1e6
    for _ in range(60):
        clients.count("a")
    for i in range(20_000):
        clients.count(f"client {i}")
    assert len(clients._buckets) <= 10_000
    Clients(ServeConfig()).count("anyone")


def test_a_key_is_found_by_all_of_it():
    clients = Clients(ServeConfig(api_keys=("one", "two")))
    assert clients.find(b"two") == "key 1" and clients.find(b"tw") is None and clients.find(b"") is None
    assert clients.identify("Bearer one", "x") == "key 0"
    assert Clients(ServeConfig()).identify(None, "10.0.0.1") == "10.0.0.1"
    for keys in (("",), ("one", " ")):
        with pytest.raises(UsageError, match="a key is empty"):
            Clients(ServeConfig(api_keys=keys))


def test_a_full_queue_says_when_to_come_again():
    body = {"messages": GREETING, "ignore_eos": True}
    with live(queue_length=1) as service, slowed(service.worker, 0.2):
        with contextlib.ExitStack() as stack:
            held = [stack.enter_context(service.stream(CHAT, body)).iter_bytes() for _ in range(4)]  # every slot
            for answer in held:
                next(answer)
            stack.enter_context(service.stream(CHAT, body))
            while service.worker.engine.waiting < 1:
                time.sleep(0.01)
            answer = service.post(CHAT, body)
            wrong(answer, 429, code="queue_full", type="rate_limit_error")
            assert math.isfinite(float(answer.headers["retry-after"]))
            wrong(service.post(CHAT, body | {"n": 3}), 429)  # all of them or none
            assert service.worker.engine.waiting == 1
        service.wait_until_idle()
        assert service.post(CHAT, {"messages": GREETING}).status_code == 200


def test_loading_and_dead():
    def never(worker):
        worker.progress = "1 of 7 programs compiled"
        while not worker.closing:
            time.sleep(0.02)
        raise RuntimeError("closed")

    with live(make_engine=never) as service:
        health = httpx.get(f"{service.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "loading")
        for path, body in ((CHAT, {"messages": GREETING}), (TEXT, {"prompt": "x"}), ("/tokenize", {"prompt": "x"})):
            answer = service.post(path, body)
            wrong(answer, 503, code="loading", type="server_error")
            assert answer.headers["retry-after"]
        assert httpx.get(f"{service.url}/v1/models").status_code == 200
        assert httpx.get(f"{service.url}/metrics").status_code == 200
    with live() as service:
        service.worker.engine.step = lambda: sys.exit(1)  # whatever ends the thread
        wrong(service.post(CHAT, {"messages": GREETING}), 503, code="engine_dead")
        health = httpx.get(f"{service.url}/health")
        assert (health.status_code, health.json()) == (503, {"status": "dead", "page": "ready"})
        wrong(service.post(CHAT, {"messages": GREETING}), 503, code="engine_dead")


def test_what_nobody_expected_shows_no_trace(service, monkeypatch):
    monkeypatch.setattr(service.worker.engine, "chat_request", lambda *a, **k: {}["secret /tmp/x.py"])
    wrong(service.post(CHAT, {"messages": GREETING}), 500, code="internal_error", type="server_error")


@pytest.mark.parametrize("failure", [ImportError, SystemExit])
def test_a_page_that_cannot_be_made_is_said_and_the_api_goes_on(failure, capsys):
    def broken(service):
        raise failure("no such module: secret")

    with live(make_page=broken) as service:
        end = time.monotonic() + 20
        while (health := httpx.get(f"{service.url}/health").json())["page"] == "loading":
            assert time.monotonic() < end
            time.sleep(0.02)
        assert health == {"status": "ready", "page": "failed"}
        page = httpx.get(service.url)
        assert page.status_code == 500 and "loading" not in page.text and "secret" not in page.text
        assert service.post(CHAT, {"messages": GREETING}).status_code == 200
    assert "secret" in capsys.readouterr().err  # the console says why


def test_a_page_whose_first_import_fails_in_the_parser_is_made_again():
    tries = []

    def make(service):
        tries.append(1)
        if len(tries) == 1:
            raise SystemError("AST constructor recursion depth mismatch (before=152, after=150)")
        page = FastAPI(openapi_url=None, docs_url=None, redoc_url=None)
        page.add_api_route("/", lambda: "the page")
        return page

    with live(make_page=make) as service:
        end = time.monotonic() + 20
        while (page := httpx.get(service.url)).status_code == 503:
            assert time.monotonic() < end
            time.sleep(0.02)
        assert page.json() == "the page" and len(tries) == 2
        for path in ("/chat/completions", "/models"):  # which the page does not know either
            assert CHAT in wrong(service.post(path, {"messages": GREETING}), 404)["message"]
