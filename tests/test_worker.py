"""One thread owns the engine: many clients, cancellation, errors, the end."""

import asyncio
import contextlib
import threading
import time

import pytest
from small_model import CONFIG, GREETING, QUESTION, learned, tokenizer

from jaxchat.engine import Engine
from jaxchat.errors import UsageError
from serve.worker import Unavailable, Worker, fitting_request


def start(slots=1):
    worker = Worker(lambda worker: Engine(CONFIG, learned(), tokenizer(), slots=slots))
    worker.loaded.result(60)
    return worker


@pytest.fixture(scope="module")
def worker():
    worker = start(slots=4)
    yield worker
    worker.close()


async def events_of(worker, request):
    answers = await worker.submit([(request, [request.seed])])
    try:
        async for pieces in answers:
            for _, event in pieces:
                yield event
    finally:
        worker.cancel(answers)


async def collect(worker, messages, **settings):
    request = worker.engine.chat_request(messages, **({"max_tokens": 40} | settings))
    return [event async for event in events_of(worker, request)]


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
        events = events_of(worker, request)
        assert (await anext(events)).kind == "text"
        await events.aclose()
        return await collect(worker, QUESTION)

    assert text_of(asyncio.run(leave())) == "That is it."
    end = time.monotonic() + 5
    while worker.busy:
        assert time.monotonic() < end


def test_errors_reach_the_client_that_caused_them(worker):
    with pytest.raises(UsageError, match="context holds"):
        asyncio.run(collect(worker, [{"role": "user", "content": "word " * 500}]))
    assert text_of(asyncio.run(collect(worker, GREETING))) == "Hi 🙂 안녕!"


def test_clients_are_not_told_why_loading_failed():
    def fail(worker):
        raise UsageError("/a/path of ours")

    worker = Worker(fail)
    assert str(worker.loaded.exception(20)) == "/a/path of ours" and worker.state == "dead"
    with pytest.raises(Unavailable):
        _ = worker.engine
    worker.close()


def test_clients_that_come_while_the_engine_ends_are_told():
    """The last look into the inbox comes after the last moment to put something there."""
    worker = start()
    step, busy, go_on = worker.engine.step, threading.Event(), threading.Event()

    def held():
        busy.set()
        assert go_on.wait(20)
        return step()

    worker.engine.step = held

    async def scenes():
        early = asyncio.create_task(collect(worker, GREETING))
        await asyncio.to_thread(busy.wait, 20)
        late = [asyncio.create_task(worker.call(lambda engine: 1)) for _ in range(3)]
        await asyncio.sleep(0)
        worker.closing = True
        go_on.set()
        told = await asyncio.gather(early, *late, collect(worker, QUESTION), return_exceptions=True)
        worker.close()
        return [*told, *await asyncio.gather(worker.call(lambda engine: 1), return_exceptions=True)]

    told = asyncio.run(asyncio.wait_for(scenes(), 30))
    assert [type(error) for error in told] == [Unavailable] * 6 and worker.state == "dead"


def test_a_client_whose_loop_has_ended_harms_nobody(worker):
    """Its events have nowhere to go; the engine's thread lives on."""
    loop = asyncio.new_event_loop()
    events = events_of(worker, worker.engine.chat_request(GREETING, max_tokens=60, stop=()))
    assert loop.run_until_complete(anext(events)).kind == "text"
    loop.close()
    assert text_of(asyncio.run(collect(worker, QUESTION))) == "That is it." and worker.state == "ready"


def test_a_conversation_loses_its_oldest_turns_until_it_fits(worker):
    engine, turn = worker.engine, [*GREETING, {"role": "assistant", "content": "Hi"}]
    assert fitting_request(engine, GREETING)[1] == 0
    request, dropped = fitting_request(engine, [*turn * 20, *GREETING], temperature=0.5)
    assert dropped in range(2, 40, 2) and len(request.tokens) <= engine.capacity - 32 and request.temperature == 0.5
    assert request.tokens == engine.chat_request([*turn * (20 - dropped // 2), *GREETING]).tokens
    assert len(engine.chat_request([*turn * (21 - dropped // 2), *GREETING]).tokens) > engine.capacity - 32
    with pytest.raises(UsageError, match="context holds 128"):
        fitting_request(engine, [*turn, {"role": "user", "content": "word " * 500}])


def test_a_long_conversation_is_not_read_whole(worker, monkeypatch):
    """And what the system says stays, whatever else goes."""
    engine, turn = worker.engine, [*GREETING, {"role": "assistant", "content": "Hi"}]
    read, real = [], engine.chat_request
    monkeypatch.setattr(engine, "chat_request", lambda m, **s: read.append(len(m)) or real(m, **s))
    system = {"role": "system", "content": "be kind"}
    request, dropped = fitting_request(engine, [system, *turn * 500, *GREETING])
    kept = 1000 - dropped
    assert 0 < kept < 60 and dropped % 2 == 0 and sum(read) < 2500
    assert request.tokens == real([system, *turn * (kept // 2), *GREETING]).tokens
    more = real([system, *turn * (kept // 2 + 1), *GREETING])
    assert len(more.tokens) > engine.capacity - 32 >= len(request.tokens)


def test_a_dropped_call_is_not_run_and_harms_nobody(worker):
    async def scenes():
        hold, ran = threading.Event(), []
        first = asyncio.create_task(worker.call(lambda engine: hold.wait(20)))
        await asyncio.sleep(0.1)
        calls = [asyncio.create_task(worker.call(lambda engine, i=i: ran.append(i))) for i in range(2)]
        await asyncio.sleep(0.1)
        calls[0].cancel()
        await asyncio.sleep(0)
        hold.set()
        assert await first
        await calls[1]
        return ran

    assert asyncio.run(asyncio.wait_for(scenes(), 30)) == [1]
    assert text_of(asyncio.run(collect(worker, QUESTION))) == "That is it."


def test_a_dying_engine_tells_everybody_though_somebody_left():
    own, hold = start(), threading.Event()

    def fail():
        hold.wait(20)
        raise RuntimeError("device lost")

    own.engine.step = fail

    async def scenes():
        answer = asyncio.create_task(collect(own, GREETING))
        await asyncio.sleep(0.3)
        leaves, stays = (asyncio.create_task(own.call(lambda engine: 1)) for _ in range(2))
        await asyncio.sleep(0.1)
        leaves.cancel()
        await asyncio.sleep(0.1)
        hold.set()
        with contextlib.suppress(asyncio.CancelledError):
            await leaves
        return await asyncio.wait_for(asyncio.gather(answer, stays, return_exceptions=True), 20)

    assert all(isinstance(error, Unavailable) for error in asyncio.run(scenes()))
    assert own.state == "dead" and "device lost" in str(own.failure)
    with pytest.raises(Unavailable):
        asyncio.run(collect(own, GREETING))
