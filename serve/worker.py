"""The thread that owns the engine. Clients in the server's event loop submit requests to it and await events."""

from __future__ import annotations

import asyncio
import bisect
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from jaxchat.engine import Engine, Event, Handle, Request
from jaxchat.errors import JaxchatError, UsageError

T = TypeVar("T")
ANSWER_ROOM = 32  # tokens of the context that are kept free for the answer
REASONS = {
    "loading": "the model is still loading",
    "draining": "the service is shutting down",
    "dead": "the engine has stopped",
}
State = Literal["loading", "ready", "draining", "dead"]
Group = tuple[Request, Sequence[int | None]]  # a prompt, and a seed for each answer to it
Events = list[tuple[int, Event]]  # (number of the answer, event)


class Unavailable(JaxchatError):
    """The service takes no requests now, or will send no answer. `state` is "loading", "draining" or "dead"."""

    exit_code = 1

    def __init__(self, state: str):
        super().__init__(REASONS[state])
        self.state = state


class ContextExceeded(UsageError):
    """A prompt is longer than the model's context."""

    def __init__(self, tokens: int, capacity: int):
        super().__init__(f"the prompt has {tokens} tokens; this model's context holds {capacity}")
        self.tokens, self.capacity = tokens, capacity


class Answers:
    """The answers to one client's request while they are generated.

    Iterating yields one list of events for each decoded chunk that has some; it ends after the last "done".
    """

    def __init__(self) -> None:
        self.handles: list[Handle] = []
        self.inbox = asyncio.Queue[Events | Exception]()

    def stop(self, asked: object = None) -> None:
        """End a single answer as "cancelled"; what has been generated so far stays."""
        self.inbox.put_nowait([(0, Event("done", finish_reason="cancelled"))])

    async def __aiter__(self) -> AsyncIterator[Events]:
        unfinished = len(self.handles)
        while unfinished > 0:
            item = await self.inbox.get()
            if isinstance(item, Exception):
                raise item
            unfinished -= sum(event.kind == "done" for _, event in item)
            yield item


class Worker:
    """Runs an engine for many asynchronous clients at once.

    `make_engine` is called in the thread, with the worker. Until it returns, `state` is "loading"; `loaded` then holds
    the engine or the error.
    """

    def __init__(self, make_engine: Callable[[Worker], Engine]):
        self.loaded: Future[Engine] = Future()
        self.progress: str | None = None  # of loading
        self.draining = False  # no new requests; those under way finish
        self.closing = False
        self.failure: BaseException | None = None
        self._ended = False
        self._loop: asyncio.AbstractEventLoop | None = None  # of the clients
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[Handle, tuple[Answers, int]] = {}
        self._thread = threading.Thread(target=self._run, args=[make_engine], name="engine", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        """The engine, also after it has stopped. `Unavailable` while it is loading, and where that failed."""
        if not self.loaded.done():
            raise Unavailable("loading")
        if self.loaded.exception():  # for the log alone: it may name paths
            raise Unavailable("dead")
        return self.loaded.result()

    @property
    def state(self) -> State:
        """Whether requests are taken."""
        if self.closing:
            return "dead"
        return "loading" if not self.loaded.done() else "draining" if self.draining else "ready"

    @property
    def busy(self) -> int:
        """Answers under way, in slots or waiting for one."""
        return 0 if self.state in ("loading", "dead") else self.engine.running + self.engine.waiting

    def check(self) -> None:
        """Raise `Unavailable` where a new request would not be answered."""
        if self.state != "ready":
            raise Unavailable(self.state)

    async def submit(self, groups: Sequence[Group]) -> Answers:
        """Queue the answers to all of these prompts, or none of them. Raises what the engine raises."""
        self.check()
        self._loop, answers = asyncio.get_running_loop(), Answers()

        def submit(engine: Engine) -> None:
            for request, seeds in groups:
                answers.handles += engine.submit_group(request, seeds)
            self._listeners.update((handle, (answers, i)) for i, handle in enumerate(answers.handles))

        try:
            await self.call(submit)
        except BaseException:
            self.cancel(answers)
            raise
        return answers

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Return `work(engine)`, run in the engine's thread between two chunks. Also works while draining."""
        return await asyncio.wrap_future(self._put(work))

    def cancel(self, answers: Answers) -> None:
        """Free the slots of those that are not finished, before the next chunk."""

        def cancel(engine: Engine) -> None:
            for handle in answers.handles:
                self._listeners.pop(handle, None)
                engine.cancel(handle)

        self._put(cancel)

    def close(self, wait: float = 30.0) -> None:
        """End the thread, within `wait` seconds if it can; answers under way end with `Unavailable`."""
        self.closing = True
        self._inbox.put(lambda: None)  # wakes it
        self._thread.join(wait)

    def _put(self, work: Callable[[Engine], T]) -> Future[T]:
        """Queue `work` for the engine's thread. The future fails with `Unavailable` where the thread has ended."""
        result: Future[T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():  # the client has gone
                return
            try:
                if self.closing:
                    raise Unavailable("dead")
                result.set_result(work(self.engine))
            except Exception as error:
                result.set_exception(error)

        self._inbox.put(run)
        if self._ended:  # perhaps after the thread has emptied the inbox for the last time
            self._run_commands(wait=False)
        return result

    def _run(self, make_engine: Callable[[Worker], Engine]) -> None:
        try:
            engine = make_engine(self)
            self.loaded.set_result(engine)
            while not self.closing:
                self._run_commands(wait=not engine.running and not engine.waiting)
                self._publish(engine.step())
        except BaseException as error:  # a SystemExit would end the thread and leave its clients waiting
            self.failure = error
        self.closing = self._ended = True
        self._run_commands(wait=False)
        self._deliver({answers: Unavailable("dead") for answers, _ in self._listeners.values()})
        if self.loaded.done():
            self.engine.programs.stop_compiling()
        else:
            self.loaded.set_exception(self.failure or Unavailable("dead"))

    def _run_commands(self, wait: bool) -> None:
        """Run all commands that have come in; with `wait`, at least one."""
        with contextlib.suppress(queue.Empty):
            while True:
                self._inbox.get(wait)()
                wait = False

    def _publish(self, events: Sequence[tuple[Handle, Event]]) -> None:
        """Send each client the events of one chunk; neighbours of one kind are merged."""
        by_client: dict[Answers, Events] = {}
        for handle, event in events:
            if handle not in self._listeners:
                continue
            answers, number = self._listeners[handle]
            own = by_client.setdefault(answers, [])
            if own and own[-1][0] == number and own[-1][1].kind == event.kind:
                before = own.pop()[1]
                event = Event(event.kind, before.text + event.text, None, before.tokens + event.tokens)
            own.append((number, event))
            if event.kind == "done":
                del self._listeners[handle]
        self._deliver(by_client)

    def _deliver(self, items: Mapping[Answers, Events | Exception]) -> None:
        """Wake the clients, all by one call into their event loop."""

        def deliver() -> None:
            for answers, item in items.items():
                answers.inbox.put_nowait(item)

        if items and self._loop:
            with contextlib.suppress(RuntimeError):  # the loop has ended, and the clients with it
                self._loop.call_soon_threadsafe(deliver)


def fitting_request(engine: Engine, messages: Sequence[dict[str, Any]], **settings: Any) -> tuple[Request, int]:
    """Return (request, dropped): the conversation without its `dropped` oldest messages, so that it fits the context.

    A system message at the start stays. `ContextExceeded` where the last message alone is longer than the context.
    """
    system = list(messages[:1]) if messages[0]["role"] == "system" else []
    messages = messages[len(system) :]
    room = engine.capacity - min(ANSWER_ROOM, engine.capacity // 2)

    def with_turns(turns: int) -> Request:
        return engine.chat_request([*system, *messages[len(messages) - 1 - 2 * turns :]], **settings)

    turns = range(1, (len(messages) + 1) // 2)  # before the last message
    kept = bisect.bisect_right(turns, room, key=lambda n: len(with_turns(n).tokens))
    request = with_turns(kept)
    if len(request.tokens) > engine.capacity:
        raise ContextExceeded(len(request.tokens), engine.capacity)
    return request, len(messages) - 1 - 2 * kept
