"""Many clients at once, and such as give up: everybody is answered, every slot is free again, the books are right."""

import asyncio
import json
import logging
import random

import httpx
import pytest
from live_service import live, slowed
from small_model import GREETING, QUESTION

from serve.app import JsonLines
from serve.service import Metrics

CHAT = "/v1/chat/completions"


@pytest.fixture(scope="module")
def service():
    with live(queue_length=400) as running:
        at_once(running, [{"messages": GREETING}] * 24, 120)  # compiles
        yield running


def at_once(service, bodies, timeout):
    """Status of each, or the name of the client's own error."""

    async def one(client, body):
        try:
            answer = await client.post(CHAT, json=body)
            return answer.status_code
        except httpx.HTTPError as error:
            return type(error).__name__

    async def every():
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=service.url, limits=limits, timeout=timeout) as client:
            return await asyncio.gather(*(one(client, body) for body in bodies))

    return asyncio.run(every())


def test_two_hundred_who_give_up(service):
    bodies = [{"messages": GREETING, "ignore_eos": True, "stream": i % 2 == 0} for i in range(200)]
    with slowed(service.worker, 0.02):
        results = at_once(service, bodies, httpx.Timeout(0.5, connect=30))
    assert results.count("ReadTimeout") > 100
    service.wait_until_idle()
    answer = service.post(CHAT, {"messages": GREETING}, timeout=20)
    assert answer.json()["choices"][0]["message"]["content"] == "Hi 🙂 안녕!"
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert service.gauge(name) == 0, name


def test_more_clients_than_slots_are_all_answered(service):
    bodies = [{"messages": (GREETING, QUESTION)[i % 2], "stream": i % 3 == 0} for i in range(40)]
    assert at_once(service, bodies, 60) == [200] * 40
    assert service.worker.busy == 0


def test_some_leave_at_random_and_the_others_notice_nothing(service):
    draw = random.Random(0)

    async def one(client, leaves):
        text = ""
        async with client.stream("POST", CHAT, json={"messages": GREETING, "stream": True}) as answer:
            async for line in answer.aiter_lines():
                if leaves and draw.random() < 0.3:
                    return None
                if line.startswith("data: {"):
                    text += json.loads(line[6:])["choices"][0]["delta"].get("content", "")
        return text

    async def every():
        async with httpx.AsyncClient(base_url=service.url, timeout=60) as client:
            return await asyncio.gather(*(one(client, i % 2 == 0) for i in range(60)))

    texts = asyncio.run(every())
    assert texts[1::2] == ["Hi 🙂 안녕!"] * 30
    service.wait_until_idle()
    assert service.gauge("num_requests_running") == 0


def test_the_books():
    with live() as service:
        used = [service.post(CHAT, {"messages": GREETING, "n": n}).json()["usage"] for n in (1, 2)]
        service.post(CHAT, {"messages": GREETING, "max_tokens": 2})
        service.post(CHAT, {"messages": []})
        with slowed(service.worker, 0.1), pytest.raises(httpx.ReadTimeout):
            service.post(CHAT, {"messages": GREETING, "ignore_eos": True}, timeout=0.3)
        service.wait_until_idle()
        text = httpx.get(f"{service.url}/metrics")
        assert text.headers["content-type"].startswith("text/plain")
        found = dict(line.rsplit(" ", 1) for line in text.text.splitlines() if line[0] != "#")
        label = '{model_name="nano"}'
        prompt = used[0]["prompt_tokens"]
        assert float(found[f"jaxchat:prompt_tokens_total{label}"]) == 4 * prompt
        made = sum(usage["completion_tokens"] for usage in used) + 2
        assert made < float(found[f"jaxchat:generation_tokens_total{label}"]) < made + 60
        for reason, count in (("stop", 3), ("length", 1), ("abort", 1)):
            key = f'jaxchat:request_success_total{{finished_reason="{reason}",model_name="nano"}}'
            assert float(found[key]) == count, reason
        assert float(found['jaxchat:request_errors_total{model_name="nano",status="400"}']) == 1
        for name, count in (
            ("time_to_first_token", 5), ("e2e_request_latency", 4), ("request_queue_time", 5),
            ("inter_token_latency", 4),
        ):  # fmt: skip
            assert float(found[f"jaxchat:{name}_seconds_count{label}"]) == count, name
            assert float(found[f"jaxchat:{name}_seconds_sum{label}"]) >= 0
        assert "_created" not in text.text


def test_a_models_name_breaks_no_line_of_the_metrics():
    with live() as service:
        text = Metrics(service.worker, 'a "b"\n# c').text().decode()
    assert 'jaxchat:num_requests_running{model_name="a \\"b\\"\\n# c"} 0.0' in text.splitlines()


@pytest.mark.parametrize("wanted", [False, True])
def test_logs_hold_texts_only_where_they_are_wanted(wanted):
    lines = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(JsonLines().format(record))
    logger = logging.getLogger("jaxchat.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        with live(log_text=wanted) as service:
            for stream in (False, True):
                service.post(CHAT, {"messages": GREETING, "stream": stream})
            service.post("/v1/completions", {"prompt": "hello \x00 there", "max_tokens": 3})
            service.post(CHAT, {"messages": [{"role": "king", "content": "secret"}]})
            service.wait_until_idle()
    finally:
        logger.removeHandler(handler)
    records = [json.loads(line) for line in lines]
    answers = [record for record in records if record["event"] == "request"]
    assert [record["status"] for record in answers] == [200, 200, 200, 400]
    for record in answers[:3]:
        assert record["completion_tokens"] >= 3 and record["prompt_tokens"] > 3 and record["seconds"] > 0
        assert record["client"] == "127.0.0.1" and record["finish"][0] in ("stop", "length")
    assert ("안녕" in "".join(lines)) == wanted and ("hello" in "".join(lines)) == wanted
