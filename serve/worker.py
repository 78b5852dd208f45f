"""One thread owns the engine; everybody else hands it requests and awaits events."""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from jaxchat.engine import Engine, Event, Handle, Request
from jaxchat.errors import JaxchatError, UsageError

ANSWER_ROOM = 32  # tokens of the context kept for the answer where the conversation would fill it


class EngineStopped(JaxchatError):
    """The engine's thread has ended; no answer will come."""

    exit_code = 1


class Worker:
    """Runs an engine for many asynchronous clients at once.

    A client that stops listening (closes the iterator, is cancelled) frees its slot before the next chunk.
    """

    def __init__(self, engine: Engine):
        self.engine = engine
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._listeners: dict[Handle, Callable[[Event | BaseException], None]] = {}
        self._gate = threading.Lock()  # nothing is put into the inbox after the last look into it
        self._closing = self._ended = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """The pieces of one answer, "done" last. Raises what the engine raised, such as `UsageError`."""
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()
        handles: list[Handle] = []

        def tell(item: Event | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the client's loop has ended, and the client with it
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        def submit() -> None:
            if self._closing:
                tell(self._stopped())
                return
            try:
                handle = self.engine.submit(request)
            except Exception as error:
                tell(error)
                return
            handles.append(handle)
            self._listeners[handle] = tell

        def cancel() -> None:
            for handle in handles:
                self._listeners.pop(handle, None)
                if not self._ended:  # a broken engine may not even cancel
                    self.engine.cancel(handle)

        if not self._put(submit):
            raise self._stopped()
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.kind == "done":
                    return
        finally:
            self._put(cancel)  # no effect on a finished answer

    def close(self) -> None:
        """End the thread; answers under way end with `EngineStopped`."""
        self._closing = True
        self._put(lambda: None)  # wakes it
        self._thread.join(timeout=30)

    def _put(self, command: Callable[[], None]) -> bool:
        """Have the engine's thread run `command`; False where it has ended."""
        with self._gate:
            if not self._ended:
                self._inbox.put(command)
            return not self._ended

    def _stopped(self) -> EngineStopped:
        reason = f": {self._failure}" if self._failure else ""
        return EngineStopped(f"the engine has stopped{reason}; start the service again")

    def _run(self) -> None:
        try:
            while not self._closing:
                self._obey(wait=not self.engine.running and not self.engine.waiting)
                for handle, event in self.engine.step():
                    listener = self._listeners.get(handle)
                    if listener:
                        listener(event)
                    if event.kind == "done":
                        self._listeners.pop(handle, None)
        except Exception as error:
            self._failure = error
        finally:
            self._closing = True
            with self._gate:
                self._ended = True
            self._obey(wait=False)  # whoever has just come hears it too
            for tell in self._listeners.values():
                tell(self._stopped())

    def _obey(self, wait: bool) -> None:
        """Run all commands that have come in; with `wait`, at least one."""
        with contextlib.suppress(queue.Empty):
            if wait:
                self._inbox.get()()
            while True:
                self._inbox.get_nowait()()


def fitting_request(engine: Engine, messages: Sequence[dict[str, Any]], **settings: Any) -> tuple[Request, int]:
    """(request, dropped): the answer to a conversation, without as many of its oldest messages as do not fit.

    `UsageError` where the last message alone is longer than the context.
    """
    room, dropped = engine.capacity - min(ANSWER_ROOM, engine.capacity // 2), 0
    while True:
        request = engine.chat_request(messages[dropped:], **settings)
        if len(request.tokens) <= room or dropped + 2 >= len(messages):
            break
        dropped += 2
    if len(request.tokens) > engine.capacity:
        raise UsageError(f"the message has {len(request.tokens)} tokens; this model's context holds {engine.capacity}")
    return request, dropped
