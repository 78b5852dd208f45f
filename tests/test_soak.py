"""Long drills of a served model, as a process of its own: clients that come and go, and what they leave behind.

python -m pytest -m slow -n0 tests/test_soak.py        SOAK_SECONDS=600 for ten minutes of 64 clients
"""

import asyncio
import json
import os
import random
import signal
import time

import httpx
import pytest
from small_model import GREETING, QUESTION, write_run
from test_serve_process import CHAT, free_port, start, until

SECONDS = float(os.environ.get("SOAK_SECONDS", "60"))
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")


@pytest.fixture(scope="module")
def service(tmp_path_factory):
    """(process, address) of a service of four slots."""
    run = write_run(tmp_path_factory.mktemp("run"))
    port = free_port()
    settings = ("slots=4", "max_tokens=100", "queue_length=256", "requests_per_minute=0")
    words = [word for setting in settings for word in ("--set", f"serve.{setting}")]
    log = open(tmp_path_factory.mktemp("log") / "service.log", "w+")  # a pipe that nobody reads would fill
    process = start(run.root, port, *words, stdout=log, stderr=log)
    url = f"http://127.0.0.1:{port}"
    try:
        until(lambda: httpx.get(f"{url}/health").status_code == 200)
        yield process, url
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
        log.seek(0)
        assert "Traceback" not in log.read()
    finally:
        process.kill()
        log.close()


def memory(process):
    """Resident bytes."""
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


async def ask(client, draw):
    """One request, as people send them: streamed or not, one answer or several, read to its end or left."""
    body = {"messages": draw.choice([GREETING, QUESTION]), "temperature": draw.choice([0, 1]), "n": draw.choice([1, 2]),
            "ignore_eos": draw.random() < 0.3, "stream": draw.random() < 0.7}  # fmt: skip
    patience = draw.choice([0.01, 0.1, 0.5, 60, 60])
    try:
        if not body["stream"]:
            return (await client.post(CHAT, json=body, timeout=httpx.Timeout(patience, connect=60))).status_code
        async with client.stream("POST", CHAT, json=body, timeout=60) as answer:
            begin = time.monotonic()
            async for _ in answer.aiter_lines():
                if time.monotonic() > begin + patience:
                    return "left"
            return answer.status_code
    except (httpx.ReadTimeout, httpx.WriteTimeout):  # its own patience was at an end
        return "left"


def crowd(url, clients, more):
    """`clients` at once ask again and again while `more(requests so far)`; what became of the requests, counted."""
    counts: dict[object, int] = {}

    async def one(http, number):
        draw = random.Random(number)
        while more(sum(counts.values())):
            found = await ask(http, draw)
            counts[found] = counts.get(found, 0) + 1

    async def everyone():
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=clients)
        async with httpx.AsyncClient(base_url=url, limits=limits) as http:
            await asyncio.gather(*(one(http, i) for i in range(clients)))

    asyncio.run(everyone())
    return counts


def idle(url):
    lines = httpx.get(f"{url}/metrics").text.splitlines()
    return all(f'jaxchat:{name}{{model_name="nano"}} 0.0' in lines for name in GAUGES)


DRILLS = {
    "a thousand requests": (16, lambda done, begin: done < 1000),
    "64 clients": (64, lambda done, begin: time.monotonic() < begin + SECONDS),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", DRILLS)
def test_nothing_is_left_of_those_who_left(service, name):
    """All slots free and all gauges 0 within a second, memory within 5 %, and the next one is answered."""
    process, url = service
    clients, more = DRILLS[name]
    crowd(url, clients, lambda done: done < 300)  # pools, buffers and caches fill
    until(lambda: idle(url), 1)
    before, begin = memory(process), time.monotonic()
    counts = crowd(url, clients, lambda done: more(done, begin))
    until(lambda: idle(url), 1)
    after = memory(process)
    requests = sum(counts.values())
    figures = {"requests": requests, "left": counts["left"], "seconds": round(time.monotonic() - begin, 1)}
    print(json.dumps({"drill": name, **figures, "memory_before": before, "memory_after": after}))
    assert set(counts) == {200, "left"} and counts["left"] > requests / 10 and counts[200] > requests / 10
    assert after < 1.05 * before
    answer = httpx.post(url + CHAT, json={"messages": GREETING, "temperature": 0}).json()
    assert answer["choices"][0]["message"]["content"] == "Hi 🙂 안녕!"
