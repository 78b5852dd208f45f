"""POST /v1/chat/completions, by the official client and by what goes over the wire."""

import json
import math

import httpx
import pytest
from live_service import live, needs_openai, openai, slowed
from small_model import CAPACITY, GREETING, QUESTION, tokenizer

from serve.completions import DONE
from serve.schemas import ChatChunk, ChatCompletion

CHAT = "/v1/chat/completions"
HELLO = "Hi 🙂 안녕!"


@pytest.fixture(scope="module")
def service():
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def post(service, **body):
    return service.post(CHAT, {"messages": GREETING} | body)


def events(service, **body):
    """The events of a stream as they stand on the wire, [DONE] checked and left out."""
    response = post(service, stream=True, **body)
    assert response.status_code == 200 and response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.content.endswith(DONE)
    blocks = response.content.removesuffix(DONE).split(b"\n\n")
    assert blocks.pop() == b"" and all(block.startswith(b"data: {") for block in blocks)
    return [json.loads(block.removeprefix(b"data: ")) for block in blocks]


@needs_openai
def test_a_whole_answer(client):
    answer = client.chat.completions.create(model="nano", messages=GREETING)
    (choice,) = answer.choices
    assert choice.message.content == HELLO and choice.message.role == "assistant" and choice.finish_reason == "stop"
    assert answer.object == "chat.completion" and answer.model == "nano" and answer.id.startswith("chatcmpl-")
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.usage.prompt_tokens > 3 and answer.usage.completion_tokens > 10


def test_what_is_sent_has_the_documented_form(service):
    ChatCompletion.model_validate(post(service, logprobs=True, top_logprobs=2).json(), strict=True)
    for chunk in events(service, logprobs=True, top_logprobs=2, stream_options={"include_usage": True}):
        ChatChunk.model_validate(chunk, strict=True)
    called = post(service, messages=QUESTION).json()
    ChatCompletion.model_validate(called, strict=True)


def test_a_stream_is_exact(service):
    chunks = events(service, stream_options={"include_usage": True})
    assert len({(c["id"], c["created"], c["object"], c["model"]) for c in chunks}) == 1
    *chunks, usage = chunks
    assert usage["choices"] == [] and usage["usage"]["completion_tokens"] > 10
    assert all(c["usage"] is None and len(c["choices"]) == 1 for c in chunks)
    choices = [c["choices"][0] for c in chunks]
    assert choices[0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in choice["delta"] for choice in choices[1:])
    assert choices[-1]["delta"] == {} and [c["finish_reason"] for c in choices] == [None] * (len(choices) - 1) + [
        "stop"
    ]
    texts = [choice["delta"]["content"] for choice in choices[1:-1]]
    assert "".join(texts) == HELLO and len(texts) > 2 and all(texts) and "\ufffd" not in "".join(texts)


def test_without_include_usage_no_chunk_has_one(service):
    assert all("usage" not in chunk and chunk["choices"] for chunk in events(service))


@needs_openai
def test_the_client_streams(client):
    with client.chat.completions.create(model="nano", messages=GREETING, stream=True) as stream:
        text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert text == HELLO


def test_a_calculator_call_stands_beside_the_text(service):
    message = post(service, messages=QUESTION).json()["choices"][0]["message"]
    assert message["content"] == "That is it."
    parts = [("python", "12+30"), ("python_output", "42"), ("text", "That is it.")]
    assert [(part["type"], part["text"]) for part in message["parts"]] == parts
    again = [*QUESTION, {"role": "assistant", "content": message["parts"]}, *GREETING]
    assert post(service, messages=again).status_code == 200
    deltas = [c["choices"][0]["delta"] for c in events(service, messages=QUESTION)]
    streamed = [part for delta in deltas for part in delta.get("parts", [])]
    assert "".join(p["text"] for p in streamed if p["type"] == "python") == "12+30"
    assert "".join(delta.get("content", "") for delta in deltas) == "That is it."


def test_answers_with_one_seed_differ_and_come_again(service):
    settings = {"n": 4, "seed": 7, "temperature": 3.0, "max_tokens": 12, "ignore_eos": True}
    first, second = post(service, **settings).json(), post(service, **settings).json()
    texts = [choice["message"]["content"] for choice in first["choices"]]
    assert len(set(texts)) == 4 and texts == [choice["message"]["content"] for choice in second["choices"]]
    assert [choice["index"] for choice in first["choices"]] == [0, 1, 2, 3]
    assert first["usage"]["completion_tokens"] == 48
    alone = post(service, **settings | {"n": 1}).json()
    assert alone["choices"][0]["message"]["content"] == texts[0]
    assert alone["usage"]["prompt_tokens"] == first["usage"]["prompt_tokens"]
    chunks = [c["choices"][0] for c in events(service, **settings)]
    for number, text in enumerate(texts):
        own = [c for c in chunks if c["index"] == number]
        assert "".join(c["delta"].get("content", "") for c in own) == text
        assert own[0]["delta"]["role"] == "assistant" and [c["finish_reason"] for c in own if c["finish_reason"]] == [
            "length"
        ]


@pytest.mark.parametrize("count", [None, 0, 5, 20])
def test_logprobs_and_alternatives(service, count):
    asked = {"logprobs": True} | ({} if count is None else {"top_logprobs": count})
    choice = post(service, **asked).json()["choices"][0]
    content = choice["logprobs"]["content"]
    said = b"".join(bytes(token["bytes"]) for token in content).decode()
    assert said == HELLO and all(-20 < token["logprob"] <= 0 for token in content)
    for token in content:
        top = token["top_logprobs"]
        assert len(top) == (count or 0) and len({entry["token"] for entry in top}) == len(top)
        assert [e["logprob"] for e in top] == sorted((e["logprob"] for e in top), reverse=True)
        if top:  # greedy: the likeliest was taken
            assert (top[0]["token"], top[0]["logprob"]) == (token["token"], token["logprob"])
            assert sum(math.exp(entry["logprob"]) for entry in top) <= 1.0001
    streamed = [c["choices"][0] for c in events(service, **asked)]
    assert [t for c in streamed if c["logprobs"] for t in c["logprobs"]["content"]] == content
    for c in streamed:  # a chunk's tokens are those of its text
        if c["delta"].get("content"):
            assert b"".join(bytes(t["bytes"]) for t in c["logprobs"]["content"]).decode() == c["delta"]["content"]


def test_no_logprobs_where_none_are_asked(service):
    assert post(service).json()["choices"][0]["logprobs"] is None


@pytest.mark.parametrize(
    ("stop", "text"), [("안", "Hi 🙂 "), (["!", "🙂"], "Hi "), (["zzz"], HELLO), ("녕!", "Hi 🙂 안")]
)
def test_stop_texts(service, stop, text):
    choice = post(service, stop=stop).json()["choices"][0]
    assert (choice["message"]["content"], choice["finish_reason"]) == (text, "stop")
    assert "".join(c["choices"][0]["delta"].get("content", "") for c in events(service, stop=stop)) == text


def test_length_is_is_news(service):
    for name in ("max_tokens", "max_completion_tokens"):
        answer = post(service, **{name: 3}).json()
        assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 3


@needs_openai
def test_a_prompt_too_long_is_refused_with_the_numbers(service, client):
    with pytest.raises(openai.BadRequestError, match=f"has 1[0-9]* tokens; this model's context holds {CAPACITY}") as e:
        client.chat.completions.create(model="nano", messages=[{"role": "user", "content": "word " * 200}])
    assert e.value.code == "context_length_exceeded" and e.value.param == "messages"


@needs_openai
def test_the_clients_errors(client):
    with pytest.raises(openai.NotFoundError) as missing:
        client.chat.completions.create(model="gpt-4", messages=GREETING)
    assert missing.value.code == "model_not_found"
    tools = [{"type": "function", "function": {"name": "f"}}]
    for choice in ("required", {"type": "function", "function": {"name": "f"}}):
        with pytest.raises(openai.BadRequestError, match="calls no functions") as refused:
            client.chat.completions.create(model="nano", messages=GREETING, tools=tools, tool_choice=choice)
        assert refused.value.param == "tool_choice"


def said(service, **body):
    choice = post(service, **body).json()["choices"][0]
    return choice["message"]["content"], choice["finish_reason"]


def test_tools_that_need_not_be_called_are_answered_in_text(service):
    function = {"name": "f", "parameters": {"type": "object", "properties": {}}}
    for choice in ({}, {"tool_choice": "none"}, {"tool_choice": "auto", "parallel_tool_calls": False}):
        assert said(service, tools=[{"type": "function", "function": function}], **choice) == (HELLO, "stop")
    assert said(service, functions=[function], function_call="auto") == (HELLO, "stop")


def test_tool_results_are_read(service):
    """In the newer and the older form: what the model reads is the same, and more than without the result."""
    call = {"name": "f", "arguments": "{}"}
    newer = [{"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]},
             {"role": "tool", "tool_call_id": "1", "content": "42"}]  # fmt: skip
    older = [{"role": "assistant", "content": None, "function_call": call},
             {"role": "function", "name": "f", "content": "42"}]  # fmt: skip
    used = [post(service, messages=[*GREETING, *more]).json()["usage"]["prompt_tokens"] for more in (newer, older)]
    empty = [*GREETING, newer[0], {"role": "tool", "tool_call_id": "1", "content": ""}]
    assert used[0] == used[1] > post(service, messages=empty).json()["usage"]["prompt_tokens"]


def test_an_answer_goes_on_behind_a_calculators_result(service):
    call = {"name": "calculator", "arguments": '{"expression": "12+30"}'}
    asked = [*QUESTION, {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": call}]}]
    for flags in ({}, {"add_generation_prompt": True}):
        answer = said(service, messages=[*asked, {"role": "tool", "tool_call_id": "1", "content": "42"}], **flags)
        assert answer == ("That is it.", "stop")


def test_an_answer_goes_on_behind_its_beginning(service):
    begun = [*GREETING, {"role": "assistant", "content": "Hi 🙂"}]
    for flags in (
        {},
        {"continue_final_message": True},
        {"continue_final_message": True, "add_generation_prompt": False},
    ):
        assert said(service, messages=begun, **flags) == (HELLO.removeprefix("Hi 🙂"), "stop")
    for flags in ({"continue_final_message": True, "add_generation_prompt": True}, {"continue_final_message": False},
                  {"add_generation_prompt": True}):  # fmt: skip
        assert post(service, messages=begun, **flags).status_code == 400
    for flags in ({"continue_final_message": True}, {"add_generation_prompt": False}):
        assert post(service, **flags).status_code == 400


def test_other_conversations_that_clients_send(service):
    system = [{"role": "system", "content": GREETING[0]["content"]}]
    assert said(service, messages=system) == (HELLO, "stop")
    assert post(service, messages=[{"role": "assistant", "content": "Hello!"}, *GREETING]).status_code == 200
    image = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    refused = post(service, messages=[{"role": "user", "content": [{"type": "text", "text": "what is it?"}, image]}])
    assert refused.status_code == 400 and "reads text only" in refused.json()["error"]["message"]


def test_more_tokens_than_there_are_is_as_many_as_there_are(service):
    most = {"ignore_eos": True, "temperature": 2.0, "seed": 1}
    for name in ("max_tokens", "max_completion_tokens"):
        for asked in (-1, 4096, 4096.0, 10**20):
            answer = post(service, **most | {name: asked}).json()
            assert answer["choices"][0]["finish_reason"] == "length" and answer["usage"]["completion_tokens"] == 100
    assert service.post("/v1/completions", {"prompt": "x", "max_tokens": 10**6}).status_code == 200


def test_empty_stops_stop_nothing(service):
    for stop in ("", [""], [], ["", "zzz"]):
        assert said(service, stop=stop) == (HELLO, "stop")


def test_neighbours_of_one_role_are_one_message(service):
    """As OpenAI takes them; what the model is shown is what `/tokenize` shows."""

    def shown(*messages, **more):
        body = {"messages": [{"role": role, "content": content} for role, content in messages]} | more
        answer = httpx.post(f"{service.url}/tokenize", json=body)
        assert answer.status_code == 200, answer.text
        return answer.json()["tokens"]

    assert shown(("user", "a"), ("user", "b")) == shown(("user", "a\n\nb"))
    assert shown(("system", "s"), ("developer", "t"), ("user", "a")) == shown(("user", "s\n\nt\n\na"))
    late = shown(("user", "a"), ("assistant", "x"), ("system", "s"), ("user", "b"))
    assert late == shown(("user", "a"), ("assistant", "x"), ("user", "s\n\nb"))
    assert shown(("user", "a"), ("assistant", None), ("user", "b")) == shown(
        ("user", "a"), ("assistant", ""), ("user", "b")
    )
    whole = shown(("user", "a"), ("assistant", "x"), add_generation_prompt=False)
    assert whole == [*shown(("user", "a")), *tokenizer().encode("x"), tokenizer().special["<|assistant_end|>"]]
    assert shown(("user", "a"), add_generation_prompt=False) == shown(("user", "a"))[:-1]
    two = post(service, messages=[*GREETING, {"role": "user", "content": "🙂"}], top_logprobs=0).json()
    one = post(service, messages=[{"role": "user", "content": GREETING[0]["content"] + "\n\n🙂"}]).json()
    assert two["choices"][0]["message"] == one["choices"][0]["message"]


def test_a_system_message_reaches_the_model(service):
    system = [{"role": "system", "content": "hello"}, {"role": "user", "content": "🙂"}]
    spelled = post(service, messages=[{"role": "user", "content": "hello\n\n🙂"}]).json()
    for role in ("system", "developer"):
        system[0]["role"] = role
        answer = post(service, messages=system).json()
        assert answer["usage"] == spelled["usage"] and answer["choices"] == spelled["choices"]


def test_leaving_ends_the_answer(service):
    """Streamed or not, the slot is free within one chunk of the engine."""
    long = {"ignore_eos": True, "max_tokens": 100}
    with slowed(service.worker, 0.15):
        body = {"messages": GREETING, "stream": True} | long
        with httpx.stream("POST", service.url + CHAT, json=body) as response:
            pieces = response.iter_bytes()
            next(pieces)
            assert service.worker.busy == 1
        assert service.wait_until_idle() < 0.4
        with pytest.raises(httpx.ReadTimeout):
            service.post(CHAT, {"messages": GREETING} | long, timeout=0.4)
        assert service.wait_until_idle() < 0.4


def test_the_pieces_of_a_chunk_leave_in_one_block(service):
    """One write for what one chunk of the engine brought: tokens cost no write each."""
    chunks = events(service, ignore_eos=True, max_tokens=40, temperature=2.0, seed=1)
    assert len(chunks) <= 2 + 10 + 2  # 40 tokens, 4 a chunk; here and there one waits for the rest of its character


PERSON = {"type": "object", "properties": {"name": {"type": "string", "maxLength": 4}, "age": {"enum": [7, 42]}},
          "required": ["name", "age"], "additionalProperties": False}  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [
        {"response_format": {"type": "json_schema", "json_schema": {"name": "p", "schema": PERSON, "strict": True}}},
        {"structured_outputs": {"json": PERSON, "regex": None, "disable_fallback": True}},
        {"guided_json": json.dumps(PERSON)},
    ],
)
def test_an_answer_of_a_schema(service, form):
    for seed in range(3):
        (choice,) = post(service, temperature=1.0, seed=seed, **form).json()["choices"]
        assert choice["finish_reason"] == "stop"
        person = json.loads(choice["message"]["content"])
        assert set(person) == {"name", "age"} and len(person["name"]) <= 4 and person["age"] in (7, 42)
    pieces = [c["choices"][0]["delta"].get("content", "") for c in events(service, temperature=1.0, seed=2, **form)]
    assert "".join(pieces) == choice["message"]["content"]


def test_choices_and_patterns(service):
    answer = post(service, structured_outputs={"choice": ["네", "아니오"]}, n=3, temperature=2.0).json()
    assert {choice["message"]["content"] for choice in answer["choices"]} <= {"네", "아니오"}
    assert post(service, guided_regex="[0-9]{4}").json()["choices"][0]["message"]["content"].isdigit()
    assert post(service, response_format={"type": "json_object"}).json()["choices"][0]["message"]["content"][0] == "{"
    for more in ({}, {"json_schema": {"schema": PERSON}}):
        assert (
            post(service, response_format={"type": "text"} | more).json()["choices"][0]["message"]["content"] == HELLO
        )


def test_constraints_wait_in_a_queue_of_limited_length(service):
    body = {"guided_regex": "["}
    line = service.service.constraints
    assert post(service, **body).status_code == 400 and line.waiting == 0
    line.waiting = 64
    assert post(service, **body).status_code == 429 and post(service).status_code == 200
    line.waiting = 0


def test_a_constraint_turns_the_calculator_off(service):
    answer = post(service, messages=QUESTION, structured_outputs={"choice": ["forty-two"]}).json()
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "forty-two", "refusal": None}


@pytest.mark.parametrize(
    ("param", "body"),
    [
        ("response_format", {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "tuple"}}}}),
        ("response_format", {"response_format": {"type": "json_schema"}}),
        ("response_format", {"response_format": {"type": "xml"}}),
        ("structured_outputs", {"structured_outputs": {"regex": "("}}),
        ("structured_outputs", {"structured_outputs": {"grammar": "root ::= x"}}),
        ("guided_choice", {"guided_choice": ["a"], "response_format": {"type": "json_object"}}),
        ("guided_choice", {"guided_choice": []}),
        ("logit_bias", {"logit_bias": {"99999": 1}}), ("logit_bias", {"logit_bias": {"x": 1}}),
        ("logit_bias", {"logit_bias": {"5": 101}}), ("logit_bias", {"logit_bias": {str(i): 1 for i in range(301)}}),
        ("frequency_penalty", {"frequency_penalty": 2.1}), ("presence_penalty", {"presence_penalty": -3}),
        ("min_tokens", {"min_tokens": 20, "max_tokens": 10}), ("min_tokens", {"min_tokens": -1}),
        ("stop_token_ids", {"stop_token_ids": [10**6]}), ("stop_token_ids", {"stop_token_ids": ["a"]}),
    ],
)  # fmt: skip
def test_wrong_constraints_and_penalties(service, param, body):
    for stream in (False, True):
        response = post(service, stream=stream, **body)
        assert response.status_code == 400, response.text
        assert response.json()["error"]["param"].split(".")[0].split("[")[0] == param


def test_penalties_bias_and_stops_are_applied(service):
    def text(**body):
        (choice,) = post(service, **body).json()["choices"]
        return choice["message"]["content"]

    ids = tokenizer().encode(HELLO)
    assert text(temperature=3.0, top_p=0, seed=1) == HELLO
    assert text(logit_bias={str(ids[0]): -100}) != HELLO and "H" not in text(logit_bias={str(ids[0]): -100})
    assert text(stop_token_ids=[ids[1]]) == "H"
    assert text(frequency_penalty=2.0, presence_penalty=2, logit_bias={str(ids[0]): 20}) != HELLO
    ended, held = (post(service, **body).json() for body in ({}, {"min_tokens": 40, "max_tokens": 60}))
    assert ended["usage"]["completion_tokens"] < 40 <= held["usage"]["completion_tokens"]
