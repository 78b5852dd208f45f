"""One thread owns the engine; everybody else hands it requests and awaits events."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

from jaxchat.engine import Engine, Event, Handle, Request
from jaxchat.errors import JaxchatError

IDLE_SECONDS = 0.5  # between looks at the closing flag while nothing is to do


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
        self._closing = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive() and not self._closing

    async def events(self, request: Request) -> AsyncIterator[Event]:
        """The pieces of one answer, "done" last. Raises what the engine raised, such as `UsageError`."""
        if not self.alive:
            raise EngineStopped("the engine has stopped; start the service again")
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[Event | BaseException]()
        handles: list[Handle] = []

        def tell(item: Event | BaseException) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(inbox.put_nowait, item)

        def submit() -> None:
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
                self.engine.cancel(handle)

        self._inbox.put(submit)
        try:
            while True:
                item = await inbox.get()
                if isinstance(item, BaseException):
                    raise item
                yield item
                if item.kind == "done":
                    return
        finally:
            self._inbox.put(cancel)  # no effect on a finished answer

    def close(self) -> None:
        """End the thread; answers under way end with `EngineStopped`."""
        self._closing = True
        self._inbox.put(lambda: None)
        self._thread.join(timeout=30)

    def _run(self) -> None:
        try:
            while not self._closing:
                self._obey()
                for handle, event in self.engine.step():
                    listener = self._listeners.get(handle)
                    if listener:
                        listener(event)
                    if event.kind == "done":
                        self._listeners.pop(handle, None)
        except Exception as error:
            self._failure = error
        finally:
            reason = f": {self._failure}" if self._failure else ""
            stopped: Any = EngineStopped(f"the engine has stopped{reason}; start the service again")
            self._closing = True
            for listener in list(self._listeners.values()):
                listener(stopped)

    def _obey(self) -> None:
        """Take what has come in; wait for something where nothing runs."""
        idle = not self.engine.running and not self.engine.waiting
        try:
            self._inbox.get(timeout=IDLE_SECONDS)() if idle else self._inbox.get_nowait()()
            while True:
                self._inbox.get_nowait()()
        except queue.Empty:
            return
