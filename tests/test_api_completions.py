"""POST /v1/completions and the token routes: texts and ids to continue, and to score as lm-eval does."""

import json
from operator import itemgetter

import httpx
import pytest
from live_service import live, needs_openai, openai
from small_model import CAPACITY, GREETING, QUESTION

from jaxchat.chat import render_prompt
from serve.completions import TextCall, token_name
from serve.schemas import Completion, CompletionRequest, Detokenized, ModelCard, ModelList, TokenizerInfo, Tokens

ROUTE = "/v1/completions"


@pytest.fixture(scope="module")
def service():
    with live() as running:
        yield running


@pytest.fixture(scope="module")
def tokenizer(service):
    return service.worker.engine.tokenizer


def ask(service, **body):
    answer = service.post(ROUTE, body)
    assert answer.status_code == 200, answer.text
    Completion.model_validate(answer.json(), strict=True)
    return answer.json()


def test_a_prompt_of_ids_is_a_prompt_of_text(service, tokenizer):
    ids = render_prompt(tokenizer, GREETING)  # with the token that begins a document: it is not put before once more
    answer = ask(service, prompt=ids, max_tokens=40, stop=["\n"], ignore_eos=False)
    assert answer["choices"][0]["text"].startswith("Hi 🙂 안녕!")
    assert TextCall(service.service, "", {}, CompletionRequest(prompt=ids)).prompts == [ids]
    text = "hello there"
    of_text = ask(service, prompt=text, max_tokens=8, seed=3, temperature=1.0)
    of_ids = ask(service, prompt=tokenizer.encode(text), max_tokens=8, seed=3, temperature=1.0)
    assert of_text["choices"] == of_ids["choices"] and of_text["usage"] == of_ids["usage"]
    assert of_text["usage"]["prompt_tokens"] == len(tokenizer.encode(text)) + 1


def test_many_prompts_and_many_answers_to_each(service, tokenizer):
    texts = ["hello", "Tom has", "how many"]
    settings = {"max_tokens": 6, "temperature": 2.0, "seed": 5, "ignore_eos": True}
    answer = ask(service, prompt=texts, n=2, **settings)
    assert [choice["index"] for choice in answer["choices"]] == list(range(6))
    assert len({choice["text"] for choice in answer["choices"]}) == 6
    assert answer["usage"]["completion_tokens"] == 36
    assert answer["usage"]["prompt_tokens"] == sum(len(tokenizer.encode(t)) + 1 for t in texts)
    ids = ask(service, prompt=[tokenizer.encode(text) for text in texts], n=2, **settings)
    assert ids["choices"] == answer["choices"]
    for i, text in enumerate(texts):
        alone = ask(service, prompt=text, n=2, **settings)
        assert [c["text"] for c in alone["choices"]] == [c["text"] for c in answer["choices"][2 * i : 2 * i + 2]]


def test_a_stream_of_several(service):
    body = {"prompt": ["hello", "Tom"], "max_tokens": 7, "echo": True, "stream": True, "logprobs": 1,
            "stream_options": {"include_usage": True}}  # fmt: skip
    whole = ask(service, **{k: v for k, v in body.items() if not k.startswith("stream")})
    *events, done, end = service.post(ROUTE, body).text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    *chunks, usage = [json.loads(event.removeprefix("data: ")) for event in events]
    for chunk in chunks:
        Completion.model_validate(chunk, strict=True)
    assert usage["usage"] == whole["usage"] and usage["choices"] == []
    for number, choice in enumerate(whole["choices"]):
        own = [c["choices"][0] for c in chunks if c["choices"][0]["index"] == number]
        assert "".join(c["text"] for c in own) == choice["text"]
        assert [c["finish_reason"] for c in own if c["finish_reason"]] == [choice["finish_reason"]]
        for name, values in choice["logprobs"].items():
            assert [value for c in own if c["logprobs"] for value in c["logprobs"][name]] == values, name


def test_scoring_as_lm_eval_does(service, tokenizer):
    """Its request and its reading of the answer: ids without the first token of a document, one more token made."""
    context, continuation = render_prompt(tokenizer, GREETING)[1:], tokenizer.encode("Hi 🙂 안녕!")
    wrong = tokenizer.encode("How many?")
    prompts = [context + continuation, context + wrong, tokenizer.encode(QUESTION[0]["content"])]
    answer = ask(service, prompt=prompts, temperature=0, max_tokens=1, logprobs=1, seed=1234, echo=True)
    found = []
    for choice, start in zip(sorted(answer["choices"], key=itemgetter("index")), [len(context)] * 2 + [1], strict=True):
        logprobs = choice["logprobs"]
        assert {len(v) for v in logprobs.values()} == {len(prompts[choice["index"]]) + 1}
        values, tops = logprobs["token_logprobs"][start:-1], logprobs["top_logprobs"][start:-1]
        found.append((sum(values), all(v == max(top.values()) for v, top in zip(values, tops, strict=True))))
    assert found[0][1] and not found[1][1] and found[0][0] > -1 > found[1][0] + 5
    assert None not in answer["choices"][0]["logprobs"]["token_logprobs"]  # the first one follows the document's begin


def test_scores_are_those_of_generating(service, tokenizer):
    """What the model made itself, scored again: the same numbers, and their sum is that of a single sequence."""
    prompt = render_prompt(tokenizer, GREETING)
    made = ask(service, prompt=prompt, max_tokens=10, logprobs=5)["choices"][0]["logprobs"]
    ids = [*prompt, *tokenizer.encode("Hi 🙂 안녕!")]
    scored = ask(service, prompt=ids, max_tokens=0, logprobs=5, echo=True)["choices"][0]
    assert scored["finish_reason"] == "length" and scored["logprobs"]["token_logprobs"][0] is None
    part = slice(len(prompt), len(prompt) + 10)
    assert scored["logprobs"]["tokens"][part] == made["tokens"]
    assert scored["logprobs"]["token_logprobs"][part] == pytest.approx(made["token_logprobs"], abs=1e-4)
    for a, b in zip(scored["logprobs"]["top_logprobs"][part], made["top_logprobs"], strict=True):
        assert a == pytest.approx(b, abs=1e-4)


def test_echo_with_and_without_scores(service):
    text = "hello 🙂 안"
    for settings in ({"max_tokens": 4}, {"max_tokens": 4, "logprobs": 0}, {"max_tokens": 0, "logprobs": 0}):
        choice = ask(service, prompt=text, echo=True, **settings)["choices"][0]
        assert choice["text"].startswith(text) and (choice["text"] == text) == (settings["max_tokens"] == 0)
        logprobs = choice["logprobs"]
        assert (logprobs is None) == ("logprobs" not in settings)
        if logprobs:
            assert all(list(top) == [t] for top, t in zip(logprobs["top_logprobs"], logprobs["tokens"], strict=True))
            assert logprobs["text_offset"] == sorted(logprobs["text_offset"])
            assert all(
                choice["text"][at:].startswith(token)
                for at, token in zip(logprobs["text_offset"], logprobs["tokens"], strict=True)
                if not token.startswith(("bytes:", "<|"))
            )


@pytest.mark.parametrize(("logprobs", "status"), [(0, 200), (5, 200), (20, 200), (21, 400), (-1, 400), (True, 400)])
def test_how_many_alternatives(service, logprobs, status):
    answer = service.post(ROUTE, {"prompt": "hello", "max_tokens": 2, "logprobs": logprobs})
    assert answer.status_code == status
    if status == 200:
        tops = answer.json()["choices"][0]["logprobs"]["top_logprobs"]
        assert all(len(top) in (max(logprobs, 1), logprobs + 1) for top in tops)
    else:
        assert answer.json()["error"]["param"] == "logprobs"


@pytest.mark.parametrize(
    "prompt", [[], [["a"]], [1, "a"], [-1], [280], [[1], [999999]], None, 5, {"a": 1}, [1.5], [True], [[[1]]]]
)
def test_prompts_out_of_form(service, prompt):
    answer = service.post(ROUTE, {"prompt": prompt, "max_tokens": 2})
    assert answer.status_code == 400 and answer.json()["error"]["param"].startswith("prompt"), answer.text


def test_a_chat_model_ends_a_text_as_it_ends_an_answer(service):
    """`eos_token` of /tokenizer_info ends a completion, unless the client says `ignore_eos`."""
    ids = httpx.post(f"{service.url}/tokenize", json={"messages": GREETING}).json()["tokens"]
    body = {"prompt": ids, "temperature": 0, "max_tokens": 40}
    (choice,) = service.post(ROUTE, body).json()["choices"]
    assert (choice["text"], choice["finish_reason"]) == ("Hi 🙂 안녕!", "stop")
    (choice,) = service.post(ROUTE, body | {"ignore_eos": True}).json()["choices"]
    assert choice["finish_reason"] == "length" and choice["text"].startswith("Hi 🙂 안녕!")


def test_a_prompt_too_long(service):
    answer = service.post(ROUTE, {"prompt": [[5], [5] * CAPACITY], "echo": True, "logprobs": 1, "max_tokens": 1})
    error = answer.json()["error"]
    assert answer.status_code == 400 and (error["code"], error["param"]) == ("context_length_exceeded", "prompt[1]")
    assert f"{CAPACITY + 1} tokens" in error["message"] and f"holds {CAPACITY}" in error["message"]
    full = ask(service, prompt=[5] * (CAPACITY - 1), max_tokens=5, ignore_eos=True)
    assert full["usage"] == {"prompt_tokens": CAPACITY, "completion_tokens": 1, "total_tokens": CAPACITY + 1}


@needs_openai
def test_the_official_client(service):
    with openai.OpenAI(base_url=f"{service.url}/v1", api_key="none") as client:
        answer = client.completions.create(model="nano", prompt="hello", max_tokens=5, logprobs=2, echo=True)
        assert answer.choices[0].text.startswith("hello") and len(answer.choices[0].logprobs.tokens) > 5
        pieces = client.completions.create(model="nano", prompt="hello", max_tokens=5, stream=True)
        assert "".join(p.choices[0].text for p in pieces) == answer.choices[0].text.removeprefix("hello")
        assert [model.id for model in client.models.list()] == ["nano"]
        assert client.models.retrieve("nano").owned_by == "jaxchat"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("gpt/4")


def test_tokens_there_and_back(service, tokenizer):
    text = "hello 🙂 안녕, <|bos|> \x00"
    found = service.post("/tokenize", {"prompt": text, "return_token_strs": True}).json()
    Tokens.model_validate(found, strict=True)
    assert found["tokens"] == [tokenizer.bos, *tokenizer.encode(text)] and found["count"] == len(found["tokens"])
    assert found["token_strs"][0] == "<|bos|>" and "<|bos|>" not in found["token_strs"][1:]  # what is typed is text
    plain = service.post("/tokenize", {"prompt": text, "add_special_tokens": False}).json()
    assert plain["tokens"] == found["tokens"][1:] and plain["token_strs"] is None
    back = service.post("/detokenize", {"tokens": found["tokens"]}).json()
    Detokenized.model_validate(back, strict=True)
    assert back["prompt"] == "<|bos|>" + text
    talk = service.post("/tokenize", {"messages": GREETING}).json()
    assert talk["tokens"] == render_prompt(tokenizer, GREETING)


def test_the_tokenizer_as_lm_eval_reads_it(service, tokenizer):
    info = httpx.get(f"{service.url}/tokenizer_info").json()
    TokenizerInfo.model_validate(info, strict=True)
    for name in ("bos_token", "eos_token"):  # it asks for the ids of these by their names
        found = service.post("/tokenize", {"prompt": info[name], "add_special_tokens": False}).json()
        assert found["tokens"] == [tokenizer.special[info[name]]]
    models = httpx.get(f"{service.url}/v1/models").json()
    ModelList.model_validate(models, strict=True)
    ModelCard.model_validate(models["data"][0], strict=True)
    assert models["data"][0]["max_model_len"] == CAPACITY == info["model_max_length"]


def test_names_of_tokens_are_their_own(tokenizer):
    names = [token_name(tokenizer, token) for token in range(tokenizer.vocab_size)]
    assert len(set(names)) == len(names)
    assert names[tokenizer.bos] == "<|bos|>" and any(name.startswith("bytes:\\x") for name in names)
