"""POST /v1/responses, by the official client and by what goes over the wire."""

import json

import httpx
import pytest
from live_service import live, needs_openai, openai
from small_model import GREETING, QUESTION

from serve.schemas import Response, ResponseEvent

PATH, CHAT, HELLO = "/v1/responses", "/v1/chat/completions", "Hi 🙂 안녕!"
SAID = GREETING[0]["content"]


@pytest.fixture(scope="module")
def service():
    with live() as running:
        yield running


def text_of(answer):
    assert answer.status_code == 200, answer.text
    return answer.json()["output"][0]["content"][0]["text"]


def test_a_text_and_items_have_the_answer_of_the_same_chat(service):
    function = {"name": "f", "arguments": "{}"}
    items = [
        {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
        {"type": "reasoning", "id": "r", "summary": []},
        {"type": "function_call", "call_id": "1"} | function,
        {"type": "function_call_output", "call_id": "1", "output": "42"},
        {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b", "annotations": []}]},
        *GREETING,
    ]
    messages = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "a"},
        {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": function}]},
        {"role": "tool", "tool_call_id": "1", "content": "42"}, {"role": "assistant", "content": "b"}, *GREETING,
    ]  # fmt: skip
    for given, same in (({"input": SAID}, GREETING), ({"input": items, "instructions": "s"}, messages)):
        answer, chat = service.post(PATH, given), service.post(CHAT, {"messages": same}).json()
        assert text_of(answer) == chat["choices"][0]["message"]["content"]
        assert answer.json()["usage"]["input_tokens"] == chat["usage"]["prompt_tokens"]
        Response.model_validate(answer.json(), strict=True)


def test_the_format_of_the_text_is_that_of_response_format(service):
    schema = {"type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"], "additionalProperties": False}
    given = {"input": SAID, "text": {"format": {"type": "json_schema", "name": "x", "schema": schema, "strict": True}}}
    assert json.loads(text_of(service.post(PATH, given)))["a"] in (1, 2)
    given["text"]["format"]["schema"] = {"type": "no such type"}
    refused = service.post(PATH, given)
    assert refused.status_code == 400 and refused.json()["error"]["param"] == "text.format", refused.text


def test_an_answer_that_its_limit_cuts_is_incomplete(service):
    settings = {"input": SAID, "ignore_eos": True, "temperature": 2.0, "seed": 3}
    for asked, made in ((3, 3), (-1, 100), (10**6, 100)):
        answer = service.post(PATH, settings | {"max_output_tokens": asked}).json()
        assert answer["usage"]["output_tokens"] == made and answer["status"] == "incomplete"
        assert answer["incomplete_details"] == {"reason": "max_output_tokens"}


def test_a_calculator_call_stands_beside_the_text(service):
    (message,) = service.post(PATH, {"input": QUESTION}).json()["output"]
    assert message["content"][0]["text"] == "That is it."
    assert [part["text"] for part in message["parts"]] == ["12+30", "42", "That is it."]
    assert service.post(PATH, {"input": [*QUESTION, message, *GREETING]}).status_code == 200


def nested(depth):
    return {"a": nested(depth - 1)} if depth else {}


@pytest.mark.parametrize(
    ("fields", "param"),
    [({"previous_response_id": "resp_1"}, "previous_response_id"), ({"conversation": "c"}, "conversation"),
     ({"background": True}, "background"), ({"tool_choice": "required"}, "tool_choice"), ({"n": 2}, "n"),
     ({"tool_choice": {"type": "function", "name": "f"}}, "tool_choice"), ({"truncation": "auto"}, "truncation"),
     ({"prompt": {"id": "p"}}, "prompt"), ({"top_logprobs": 3}, "top_logprobs"),
     ({"max_output_tokens": 0}, "max_output_tokens"), ({"max_tokens": 5}, "max_tokens"),
     ({"logprobs": True}, "logprobs"),
     ({"include": ["message.output_text.logprobs"]}, "include"), ({"temperature": -1}, "temperature"),
     ({"input": []}, "input"), ({"input": 5}, "input"), ({"input": [{"type": "reasoning"}]}, "input"),
     ({"input": [{"type": "item_reference", "id": "i"}]}, "input[0]"), ({"input": [{"type": ["x"]}]}, "input[0]"),
     ({"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "x"}]}]}, "input"),
     ({"input": "x" * 9_000}, "input"), ({"text": {"format": {"type": "xml"}}}, "text"),
     ({"text": {"format": {"name": "x"}}}, "text"), ({"text": {"format": {"type": "json_schema"}}}, "text")],
)  # fmt: skip
def test_what_cannot_be_had_is_refused(service, fields, param):
    answer = service.post(PATH, {"input": SAID} | fields)
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith(param), answer.text
    assert text_of(service.post(PATH, {"input": SAID, "store": True, "tools": [{"type": "web_search"}]})) == HELLO


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize(
    "fields", [{"metadata": {"a": "\ud800"}}, {"instructions": "\ud83d"}, {"tools": [nested(300)]}]
)
def test_what_cannot_be_returned_with_the_answer_is_refused(service, fields, stream):
    body = json.dumps({"input": SAID, "stream": stream} | fields)  # httpx itself would not write half a character
    answer = httpx.post(service.url + PATH, content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 400


def test_a_stream_is_the_whole_answer_in_pieces(service):
    whole = service.post(PATH, {"input": SAID, "seed": 1}).json()
    with service.stream(PATH, {"input": SAID, "seed": 1}) as response:
        blocks = response.read().decode().removesuffix("\n\n").split("\n\n")
    events = [json.loads(block.split("\ndata: ")[1]) for block in blocks]
    assert [block.split("\n")[0] for block in blocks] == [f"event: {event['type']}" for event in events]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    for event in events:
        ResponseEvent.model_validate(event, strict=True)
    deltas = [event["delta"] for event in events if event["type"] == "response.output_text.delta"]
    assert "".join(deltas) == HELLO and len(deltas) > 2
    assert events[0]["response"]["output"] == [] and events[0]["response"]["status"] == "in_progress"
    last = events[-1]["response"]
    assert last["output"][0]["content"] == whole["output"][0]["content"]
    assert (
        last["usage"]["output_tokens"] == whole["usage"]["output_tokens"] and last["id"] == events[0]["response"]["id"]
    )


@needs_openai
def test_the_official_client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none", max_retries=0) as client:
        assert client.responses.create(model="nano", input=SAID).output_text == HELLO
        with client.responses.stream(model="nano", input=SAID) as stream:
            assert [event.type for event in stream][-1] == "response.completed"
            assert stream.get_final_response().output_text == HELLO
        cut = client.responses.create(model="nano", input=SAID, max_output_tokens=2, stream=True)
        assert [event.type for event in cut][-1] == "response.incomplete"
        service.worker.engine.step = lambda: 1 / 0
        with pytest.raises(openai.APIError, match="stopped"):
            list(client.responses.create(model="nano", input=SAID, stream=True))
