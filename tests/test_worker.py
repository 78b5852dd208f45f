"""One thread owns the engine: many clients, cancellation, errors, the end."""

import asyncio

import pytest
from small_model import CONFIG, GREETING, QUESTION, learned, tokenizer

from jaxchat.engine import Engine
from jaxchat.errors import UsageError
from serve.worker import EngineStopped, Worker


@pytest.fixture(scope="module")
def worker():
    worker = Worker(Engine(CONFIG, learned(), tokenizer(), slots=4))
    yield worker
    worker.close()


async def collect(worker, messages, **settings):
    request = worker.engine.chat_request(messages, **({"max_tokens": 40} | settings))
    return [event async for event in worker.events(request)]


def text_of(events):
    return "".join(e.text for e in events if e.kind == "text")


def test_more_clients_than_slots_all_get_their_own_answer(worker):
    async def many():
        return await asyncio.gather(*(collect(worker, (QUESTION, GREETING)[i % 2]) for i in range(10)))

    for i, events in enumerate(asyncio.run(many())):
        assert text_of(events) == ("That is it.", "Hi 🙂 안녕!")[i % 2]
        assert events[-1].kind == "done" and events[-1].finish_reason == "stop"


def test_a_client_that_leaves_frees_its_slot(worker):
    async def leave():
        request = worker.engine.chat_request(GREETING, max_tokens=100, stop=())
        events = worker.events(request)
        assert (await anext(events)).kind == "text"
        await events.aclose()
        return await collect(worker, QUESTION)

    assert text_of(asyncio.run(leave())) == "That is it."
    for _ in range(100):
        if not worker.engine.running:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert worker.engine.running == 0 and worker.engine.waiting == 0


def test_errors_reach_the_client_that_caused_them(worker):
    with pytest.raises(UsageError, match="context holds"):
        asyncio.run(collect(worker, [{"role": "user", "content": "word " * 500}]))
    assert text_of(asyncio.run(collect(worker, GREETING))) == "Hi 🙂 안녕!"


def test_a_dying_engine_tells_everybody():
    worker = Worker(Engine(CONFIG, learned(), tokenizer(), slots=1))

    def fail():
        raise RuntimeError("device lost")

    worker.engine.step = fail
    with pytest.raises(EngineStopped, match="device lost"):
        asyncio.run(collect(worker, GREETING))
    assert not worker.alive
    with pytest.raises(EngineStopped):
        asyncio.run(collect(worker, GREETING))


def test_closed_is_closed():
    worker = Worker(Engine(CONFIG, learned(), tokenizer(), slots=1))
    worker.close()
    assert not worker.alive
    with pytest.raises(EngineStopped):
        asyncio.run(collect(worker, GREETING))
