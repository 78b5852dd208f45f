"""Conversations that fit into the context."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import dataclasses
import functools
import queue
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

from jaxchat.engine import Engine, Event, Handle, QueueFull, Request
from jaxchat.errors import JaxchatError, UsageError

# One thread owns the engine; everybody else hands it requests and awaits events.


T = TypeVar("T")
CALLS = 64  # that may wait
Group = tuple[Request, Sequence[int | None]]  # a prompt, and a seed for each answer to it


class Unavailable(JaxchatError):
    """No answer now; `state` says why, and whether there is hope."""

    exit_code = 1

    def __init__(self, message: str, state: str):
        super().__init__(message)
        self.state = state


class EngineStopped(Unavailable):
    """The engine's thread has ended; no answer will come."""

    def __init__(self, reason: str):
        super().__init__(f"the engine has stopped{reason}; start the service again", "dead")


class Answers:
    """The answers to one client's request while they are made.

    Iterating gives lists of (number of the answer, event), one list for each chunk of the engine that brought
    something; it ends after the last "done". Whoever leaves the `async with` frees the slots before the next chunk.
    """

    def __init__(self, worker: Worker):
        self.handles: list[Handle] = []
        self.loop = asyncio.get_running_loop()
        self._worker, self._open = worker, set[int]()
        self._inbox = asyncio.Queue[list[tuple[int, Event]] | BaseException | None]()

    def tell(self, item: list[tuple[int, Event]] | BaseException | None) -> None:
        """Called in the client's loop."""
        self._inbox.put_nowait(item)

    async def accepted(self) -> Answers:
        """Wait until the engine has taken the request; raises what it raised, such as `UsageError`."""
        try:
            item = await self._inbox.get()
        except BaseException:
            self.close()
            raise
        if isinstance(item, BaseException):
            raise item
        self._open = set(range(len(self.handles)))
        return self

    def stop(self) -> None:
        """End what is not finished as "cancelled"; what has come so far stays."""
        self.close()
        self.tell([(number, Event("done", finish_reason="cancelled")) for number in sorted(self._open)])

    def close(self) -> None:
        self._worker.forget(self)

    async def __aenter__(self) -> Answers:
        return self

    async def __aexit__(self, *error: object) -> None:
        self.close()

    def __aiter__(self) -> Answers:
        return self

    async def __anext__(self) -> list[tuple[int, Event]]:
        if not self._open:
            raise StopAsyncIteration
        item = await self._inbox.get()
        if isinstance(item, BaseException):
            raise item
        assert item is not None
        self._open -= {number for number, event in item if event.kind == "done"}
        return item


class Worker:
    """Runs an engine for many asynchronous clients at once.

    Args:
      engine: an engine, or a function that makes one; the worker's thread calls it with the worker, and until it
        returns, `state` is "loading" (`loaded` becomes done with the engine or with what went wrong).
    """

    def __init__(self, engine: Engine | Callable[[Worker], Engine]):
        self._engine = engine if isinstance(engine, Engine) else None
        self._make = None if isinstance(engine, Engine) else engine
        self.loaded: Future[Engine] = Future()
        self.progress: str | None = None  # of loading
        self.draining = False  # no new requests; those under way end as they would
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._listeners: dict[Handle, tuple[Answers, int]] = {}
        self._gate = threading.Lock()  # nothing is put into the inbox after the last look into it
        self._closing = self._ended = False
        self.failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the model is still loading", "loading")
        return self._engine

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    @property
    def closing(self) -> bool:
        return self._closing

    @property
    def state(self) -> str:
        """ "loading", "ready", "draining" or "dead"."""
        if not self.alive:
            return "dead"
        return "loading" if self._engine is None else "draining" if self.draining else "ready"

    @property
    def busy(self) -> int:
        """Answers under way, in slots or waiting for one."""
        return self._engine.running + self._engine.waiting if self._engine else 0

    @property
    def compiling(self) -> int:
        """Programs that still compile; a request that needs one of them waits for it."""
        return self._engine.compiling if self._engine else 0

    def check(self) -> None:
        """Raises `Unavailable` where a new request would not be answered."""
        state = self.state
        if state == "dead":
            raise self._stopped()
        if state != "ready":
            words = {"loading": "the model is still loading", "draining": "the service is shutting down"}
            raise Unavailable(words[state], state)

    async def submit(self, groups: Sequence[Group]) -> Answers:
        """Answers to these prompts, numbered through; all are taken or none. Raises what the engine raises."""
        self.check()
        answers = Answers(self)

        def submit() -> None:
            handles = []
            try:
                if self._closing:
                    raise self._stopped()
                for request, seeds in groups:
                    if len(seeds) == 1:
                        handles.append(self.engine.submit(_with_seed(request, seeds[0])))
                    else:
                        handles += self.engine.submit_group(request, seeds)
            except Exception as error:
                for handle in handles:
                    self.engine.cancel(handle)
                self._post(answers, error)
                return
            answers.handles.extend(handles)
            self._listeners.update((handle, (answers, i)) for i, handle in enumerate(handles))
            self._post(answers, None)

        if not self._put(submit):
            raise self._stopped()
        return await answers.accepted()

    async def call(self, work: Callable[[Engine], T]) -> T:
        """What `work` returns, done in the engine's thread, one such call between two chunks. Raises what it raises,
        and `QueueFull` where too many wait. Also while draining: who asks has checked before its first call."""
        if not self.alive:
            raise self._stopped()
        if len(self._calls) >= CALLS:
            raise QueueFull(f"{CALLS} texts wait to be scored already; come again")
        done: Future[T] = Future()

        def run() -> None:
            if not done.set_running_or_notify_cancel():  # whoever asked has gone
                return
            try:
                if self._closing:
                    raise self._stopped()
                done.set_result(work(self.engine))
            except Exception as error:
                done.set_exception(error)

        if not self._put(lambda: self._calls.append(run)):
            raise self._stopped()
        return await asyncio.wrap_future(done)

    def forget(self, answers: Answers) -> None:
        """Cancel what of these is not finished."""

        def cancel() -> None:
            for handle in answers.handles:
                self._listeners.pop(handle, None)
                if not self._ended:  # a broken engine may not even cancel
                    self.engine.cancel(handle)

        self._put(cancel)

    def close(self, wait: float = 30.0) -> None:
        """End the thread, within `wait` seconds if it can; answers under way end with `EngineStopped`."""
        self._closing = True
        self._put(lambda: None)  # wakes it
        self._thread.join(wait)

    def _put(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread run `command`; False where it has ended."""
        with self._gate:
            if not self._ended:
                self._inbox.put(command)
            return not self._ended

    def _stopped(self) -> EngineStopped:
        return EngineStopped(f": {self.failure}" if self.failure else "")

    def _run(self) -> None:
        try:
            if self._make:
                self._engine = self._make(self)
            self.loaded.set_result(self.engine)
            while not self._closing:
                self._obey(wait=not self._calls and not self.engine.running and not self.engine.waiting)
                if self._calls:
                    self._calls.popleft()()
                self._tell(self.engine.step())
        except Exception as error:
            self.failure = error
        finally:
            self._closing = True
            if self._engine:
                self._engine.stop_compiling()
            with self._gate:
                self._ended = True
            self._obey(wait=False)  # whoever has just come hears it too
            while self._calls:
                self._calls.popleft()()
            for answers in {id(a): a for a, _ in self._listeners.values()}.values():
                self._post(answers, self._stopped())
            if not self.loaded.done():
                self.loaded.set_exception(self.failure or self._stopped())

    def _obey(self, wait: bool) -> None:
        """Run all commands that have come in; with `wait`, at least one."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._inbox.get()()
            while True:
                self._inbox.get_nowait()()

    def _tell(self, events: Sequence[tuple[Handle, Event]]) -> None:
        """Hand everybody the events of one chunk; one wake-up for each event loop, not for each token."""
        post: dict[Any, dict[Answers, list[tuple[int, Event]]]] = {}
        for handle, event in events:
            listener = self._listeners.get(handle)
            if not listener:
                continue
            answers, number = listener
            pieces = post.setdefault(answers.loop, {}).setdefault(answers, [])
            if pieces and pieces[-1][0] == number and pieces[-1][1].kind == event.kind:
                before = pieces[-1][1]
                pieces[-1] = number, Event(event.kind, before.text + event.text, None, before.tokens + event.tokens)
            else:
                pieces.append((number, event))
            if event.kind == "done":
                del self._listeners[handle]
        for loop, letters in post.items():
            _in_loop(loop, functools.partial(_deliver, letters))

    def _post(self, answers: Answers, item: BaseException | None) -> None:
        _in_loop(answers.loop, lambda: answers.tell(item))


def _with_seed(request: Request, seed: int | None) -> Request:
    return request if seed == request.seed else dataclasses.replace(request, seed=seed)


def _in_loop(loop: asyncio.AbstractEventLoop, work: Callable[[], Any]) -> None:
    with contextlib.suppress(RuntimeError):  # the client's loop has ended, and the client with it
        loop.call_soon_threadsafe(work)


def _deliver(letters: dict[Answers, list[tuple[int, Event]]]) -> None:
    for answers, pieces in letters.items():
        answers.tell(pieces)


ANSWER_ROOM = 32  # tokens of the context kept for the answer where the conversation would fill it


def fitting_request(engine: Engine, messages: Sequence[dict[str, Any]], **settings: Any) -> tuple[Request, int]:
    """(request, dropped): the answer to a conversation, without as many of its oldest turns as do not fit; what the
    system says stays.

    `UsageError` where the last message alone is longer than the context.
    """
    first = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    messages = messages[len(first) :]
    room = engine.capacity - min(ANSWER_ROOM, engine.capacity // 2)

    def asked(turns: int) -> Request:
        """With so many turns before the last message."""
        return engine.chat_request([*first, *messages[max(0, len(messages) - 1 - 2 * turns) :]], **settings)

    most = len(messages) // 2  # turns before the last message
    low, high = 0, 1  # fits, or has to; perhaps fits
    while high < most and len(asked(high).tokens) <= room:  # however long the conversation is, no more is read of it
        low, high = high, 2 * high
    high = min(high, most)
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if len(asked(middle).tokens) <= room else (low, middle - 1)
    request, dropped = asked(low), max(0, len(messages) - 1 - 2 * low)
    if len(request.tokens) > engine.capacity:
        raise UsageError(f"the message has {len(request.tokens)} tokens; this model's context holds {engine.capacity}")
    return request, dropped
