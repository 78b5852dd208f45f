"""One thread owns the engine: many clients, cancellation, errors, the end."""

import asyncio
import contextlib
import threading
import time

import pytest
from small_model import CONFIG, GREETING, QUESTION, learned, tokenizer

from jaxchat.engine import Engine
from jaxchat.errors import UsageError
from serve.worker import EngineStopped, Worker, fitting_request


@pytest.fixture(scope="module")
def worker():
    worker = Worker(Engine(CONFIG, learned(), tokenizer(), slots=4))
    yield worker
    worker.close()


async def events_of(worker, request):
    with contextlib.closing(await worker.submit([(request, [request.seed])])) as answers:
        async for pieces in answers:
            for _, event in pieces:
                yield event


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
    for _ in range(100):
        if not worker.engine.running:
            break
        asyncio.run(asyncio.sleep(0.05))
    assert worker.engine.running == 0 and worker.engine.waiting == 0


def test_errors_reach_the_client_that_caused_them(worker):
    with pytest.raises(UsageError, match="context holds"):
        asyncio.run(collect(worker, [{"role": "user", "content": "word " * 500}]))
    assert text_of(asyncio.run(collect(worker, GREETING))) == "Hi 🙂 안녕!"


def test_closed_is_closed():
    worker = Worker(Engine(CONFIG, learned(), tokenizer(), slots=1))
    worker.close()
    assert not worker.alive
    with pytest.raises(EngineStopped):
        asyncio.run(collect(worker, GREETING))


def test_a_client_that_comes_while_the_engine_ends_is_is_news():
    """The last look into the inbox comes after the last moment to put something there."""
    worker = Worker(Engine(CONFIG, learned(), tokenizer(), slots=1))
    step, busy, go_on = worker.engine.step, threading.Event(), threading.Event()

    def held():
        busy.set()
        assert go_on.wait(20)
        return step()

    worker.engine.step = held
    told = []

    def client(messages):
        try:
            asyncio.run(collect(worker, messages))
        except EngineStopped as error:
            told.append(str(error))

    threads = [threading.Thread(target=client, args=(GREETING,), daemon=True)]
    threads[0].start()
    assert busy.wait(20)
    closer = threading.Thread(target=worker.close, daemon=True)
    closer.start()
    while worker.alive:
        time.sleep(0.01)
    threads.append(threading.Thread(target=client, args=(QUESTION,), daemon=True))
    threads[1].start()
    time.sleep(0.3)
    go_on.set()
    for thread in [*threads, closer]:
        thread.join(20)
        assert not thread.is_alive()
    assert len(told) == 2


def test_a_client_whose_loop_has_ended_harms_nobody(worker):
    """Its events have nowhere to go; the engine's thread lives on."""
    loop = asyncio.new_event_loop()
    events = events_of(worker, worker.engine.chat_request(GREETING, max_tokens=60, stop=()))
    assert loop.run_until_complete(anext(events)).kind == "text"
    loop.close()
    assert text_of(asyncio.run(collect(worker, QUESTION))) == "That is it." and worker.alive


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


def test_those_who_score_texts_do_not_stop_the_answers(worker):
    """Four clients that score without end; an answer goes on between their batches."""

    async def scenes():
        done = asyncio.Event()

        async def score():
            count = 0
            while not done.is_set():
                await worker.call(lambda engine: time.sleep(0.01))
                count += 1
            return count

        scorers = [asyncio.create_task(score()) for _ in range(4)]
        events = await collect(worker, GREETING, max_tokens=60, stop=())
        done.set()
        return events, sum(await asyncio.gather(*scorers))

    events, scored = asyncio.run(asyncio.wait_for(scenes(), 30))
    assert events[-1].kind == "done" and 0 < scored < 200


def test_too_many_texts_to_score_are_refused_and_dropped_ones_harm_nobody(worker):
    async def scenes():
        hold = threading.Event()
        first = asyncio.create_task(worker.call(lambda engine: hold.wait(20)))
        await asyncio.sleep(0.3)
        calls = [asyncio.create_task(worker.call(lambda engine, i=i: i)) for i in range(2)]
        await asyncio.sleep(0.1)
        calls[0].cancel()
        hold.set()
        assert await first and await calls[1] == 1

    asyncio.run(asyncio.wait_for(scenes(), 30))
    assert text_of(asyncio.run(collect(worker, QUESTION))) == "That is it."


def test_a_dying_engine_tells_everybody_though_somebody_left():
    own = Worker(Engine(CONFIG, learned(), tokenizer(), slots=1))
    hold = threading.Event()

    def fail():
        hold.wait(20)
        raise RuntimeError("device lost")

    own.engine.step = fail

    async def scenes():
        answer = asyncio.create_task(collect(own, GREETING))
        await asyncio.sleep(0.3)
        leaves = asyncio.create_task(own.call(lambda engine: 1))
        stays = asyncio.create_task(own.call(lambda engine: 2))
        await asyncio.sleep(0.1)
        leaves.cancel()
        await asyncio.sleep(0.1)
        hold.set()
        return await asyncio.wait_for(asyncio.gather(answer, stays, return_exceptions=True), 20)

    errors = asyncio.run(scenes())
    assert all(isinstance(error, EngineStopped) for error in errors) and "device lost" in str(errors[0])
    assert not own.alive
    with pytest.raises(EngineStopped):
        asyncio.run(collect(own, GREETING))
