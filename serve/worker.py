"""The thread that owns the engine. Asynchronous clients submit requests to it and await events."""

from __future__ import annotations

import asyncio
import bisect
import collections
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from typing import Any, Literal, TypeVar

from jaxchat.engine import Engine, Event, Handle, QueueFull, Request
from jaxchat.errors import JaxchatError, UsageError

T = TypeVar("T")
MAX_CALLS = 64  # that may wait
ANSWER_ROOM = 32  # tokens of the context kept for the answer where the conversation would fill it
Group = tuple[Request, Sequence[int | None]]  # a prompt, and a seed for each answer to it
Events = list[tuple[int, Event]]  # (number of the answer, event)


class Unavailable(JaxchatError):
    """No request is taken now. `state` is "loading", "draining" or "dead"."""

    exit_code = 1

    def __init__(self, message: str, state: str):
        super().__init__(message)
        self.state = state


class EngineStopped(Unavailable):
    """The engine's thread has ended; no answer will come."""

    def __init__(self, failure: BaseException | None = None):
        reason = f": {failure}" if failure else ""
        super().__init__(f"the engine has stopped{reason}; start the service again", "dead")


class Answers:
    """The answers to one client's request while they are generated.

    Iterating yields one list of events for each decoded chunk that has some; it ends after the last "done". `close`
    frees the slots before the next chunk.
    """

    def __init__(self, worker: Worker):
        self.handles: list[Handle] = []
        self.loop = asyncio.get_running_loop()
        self._worker = worker
        self._unfinished: set[int] | None = None
        self._inbox = asyncio.Queue[Events | Exception]()

    def put(self, item: Events | Exception) -> None:
        """Called in the client's event loop."""
        self._inbox.put_nowait(item)

    def stop(self) -> None:
        """Finish all answers as "cancelled"; what has been generated so far stays."""
        self.close()
        left = range(len(self.handles)) if self._unfinished is None else sorted(self._unfinished)
        self.put([(number, Event("done", finish_reason="cancelled")) for number in left])

    def close(self) -> None:
        self._worker.cancel(self)

    async def __aiter__(self) -> AsyncIterator[Events]:
        self._unfinished = set(range(len(self.handles)))
        while self._unfinished:
            item = await self._inbox.get()
            if isinstance(item, Exception):
                raise item
            self._unfinished -= {number for number, event in item if event.kind == "done"}
            yield item


class Worker:
    """Runs an engine for many asynchronous clients at once.

    Args:
      engine: an engine, or a function that makes one. The thread calls it with the worker; until it returns, `state` is
        "loading". `loaded` then holds the engine or the error.
    """

    def __init__(self, engine: Engine | Callable[[Worker], Engine]):
        self._engine = engine if isinstance(engine, Engine) else None
        self._make = None if isinstance(engine, Engine) else engine
        self.loaded: Future[Engine] = Future()
        self.progress: str | None = None  # of loading
        self.draining = False  # no new requests; those under way finish
        self.closing = False
        self.failure: BaseException | None = None
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._calls: collections.deque[Callable[[], None]] = collections.deque()
        self._listeners: dict[Handle, tuple[Answers, int]] = {}
        self._lock = threading.Lock()  # nothing enters the inbox after the thread has emptied it for the last time
        self._ended = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise Unavailable("the model is still loading", "loading")
        return self._engine

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self.closing

    @property
    def state(self) -> Literal["loading", "ready", "draining", "dead"]:
        """Whether requests are taken."""
        if not self.alive:
            return "dead"
        return "loading" if self._engine is None else "draining" if self.draining else "ready"

    @property
    def busy(self) -> int:
        """Answers under way, in slots or waiting for one."""
        return self._engine.running + self._engine.waiting if self._engine else 0

    def check(self) -> None:
        """Raise `Unavailable` where a new request would not be answered."""
        state = self.state
        if state == "dead":
            raise EngineStopped(self.failure)
        if state == "draining":
            raise Unavailable("the service is shutting down", state)
        _ = self.engine

    async def submit(self, groups: Sequence[Group]) -> Answers:
        """Queue the answers to these prompts, numbered through; all or none. Raises what the engine raises."""
        self.check()
        answers = Answers(self)

        def submit() -> None:
            try:
                for request, seeds in groups:
                    answers.handles += self.engine.submit_group(request, seeds)
            except Exception:
                for handle in answers.handles:
                    self.engine.cancel(handle)
                raise
            self._listeners.update((handle, (answers, i)) for i, handle in enumerate(answers.handles))

        try:
            await self._ask(submit, self._put)
        except BaseException:
            answers.close()
            raise
        return answers

    async def call(self, work: Callable[[Engine], T]) -> T:
        """Return `work(engine)`, run in the engine's thread, one such call between two chunks.

        Raises what it raises, and `QueueFull` where too many wait. Also works while draining.
        """
        if len(self._calls) >= MAX_CALLS:
            raise QueueFull(f"{MAX_CALLS} texts wait to be scored already; try again later")
        return await self._ask(lambda: work(self.engine), lambda run: self._put(lambda: self._calls.append(run)))

    def cancel(self, answers: Answers) -> None:
        """Cancel what of these is not finished."""

        def cancel() -> None:
            for handle in answers.handles:
                self._listeners.pop(handle, None)
                if not self._ended:  # a broken engine may not even cancel
                    self.engine.cancel(handle)

        self._put(cancel)

    def close(self, wait: float = 30.0) -> None:
        """End the thread, within `wait` seconds if it can; answers under way end with `EngineStopped`."""
        self.closing = True
        self._put(lambda: None)  # wakes it
        self._thread.join(wait)

    async def _ask(self, work: Callable[[], T], put: Callable[[Callable[[], None]], bool]) -> T:
        """Return what `work` returns in the engine's thread."""
        result: Future[T] = Future()

        def run() -> None:
            if not result.set_running_or_notify_cancel():  # the client has gone
                return
            try:
                if self.closing:
                    raise EngineStopped(self.failure)
                result.set_result(work())
            except Exception as error:
                result.set_exception(error)

        if not put(run):
            raise EngineStopped(self.failure)
        return await asyncio.wrap_future(result)

    def _put(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread run `command`; False where it has ended."""
        with self._lock:
            if not self._ended:
                self._inbox.put(command)
            return not self._ended

    def _run(self) -> None:
        try:
            if self._make:
                self._engine = self._make(self)
            self.loaded.set_result(self.engine)
            while not self.closing:
                self._run_commands(wait=not self._calls and not self.engine.running and not self.engine.waiting)
                if self._calls:
                    self._calls.popleft()()
                self._publish(self.engine.step())
        except Exception as error:
            self.failure = error
        finally:
            self.closing = True
            if self._engine:
                self._engine.stop_compiling()
            with self._lock:
                self._ended = True
            self._run_commands(wait=False)  # those that came last are told too
            while self._calls:
                self._calls.popleft()()
            stopped = EngineStopped(self.failure)
            for answers in {answers for answers, _ in self._listeners.values()}:
                _call_in_loop(answers.loop, answers.put, stopped)
            if not self.loaded.done():
                self.loaded.set_exception(self.failure or stopped)

    def _run_commands(self, wait: bool) -> None:
        """Run all commands that have come in; with `wait`, at least one."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._inbox.get()()
            while True:
                self._inbox.get_nowait()()

    def _publish(self, events: Sequence[tuple[Handle, Event]]) -> None:
        """Send the clients the events of one chunk, those of one kind merged: one wake-up for each event loop."""
        by_loop: dict[Any, dict[Answers, Events]] = {}
        for handle, event in events:
            listener = self._listeners.get(handle)
            if not listener:
                continue
            answers, number = listener
            own = by_loop.setdefault(answers.loop, {}).setdefault(answers, [])
            if own and own[-1][0] == number and own[-1][1].kind == event.kind:
                before = own[-1][1]
                own[-1] = number, Event(event.kind, before.text + event.text, None, before.tokens + event.tokens)
            else:
                own.append((number, event))
            if event.kind == "done":
                del self._listeners[handle]
        for loop, letters in by_loop.items():
            _call_in_loop(loop, _deliver, letters)


def _deliver(letters: dict[Answers, Events]) -> None:
    for answers, events in letters.items():
        answers.put(events)


def _call_in_loop(loop: asyncio.AbstractEventLoop, function: Callable[..., None], *args: Any) -> None:
    with contextlib.suppress(RuntimeError):  # the client's loop has ended, and the client with it
        loop.call_soon_threadsafe(function, *args)


def fitting_request(engine: Engine, messages: Sequence[dict[str, Any]], **settings: Any) -> tuple[Request, int]:
    """Return (request, dropped): the conversation without its `dropped` oldest messages, so that it fits the context.

    A system message at the start stays. `UsageError` where the last message alone is longer than the context.
    """
    system = list(messages[:1]) if messages and messages[0]["role"] == "system" else []
    messages = messages[len(system) :]
    room = engine.capacity - min(ANSWER_ROOM, engine.capacity // 2)

    def with_turns(turns: int) -> Request:
        return engine.chat_request([*system, *messages[len(messages) - 1 - 2 * turns :]], **settings)

    turns = range(1, (len(messages) + 1) // 2)  # before the last message
    kept = bisect.bisect_right(turns, room, key=lambda n: len(with_turns(n).tokens))
    request = with_turns(kept)
    if len(request.tokens) > engine.capacity:
        raise UsageError(f"the message has {len(request.tokens)} tokens; this model's context holds {engine.capacity}")
    return request, len(messages) - 1 - 2 * kept
