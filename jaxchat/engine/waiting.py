"""Requests that wait for a slot: clients take turns, and each client's own come in order."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator

from jaxchat.engine.request import Handle


class Waiting:
    """A queue in which a client with a thousand requests delays another client's by one turn.

    Whoever had the last turn comes behind all who wait, so nobody waits for ever.
    """

    def __init__(self) -> None:
        self._clients: dict[str, deque[Handle]] = {}  # in the order of their next turns

    def __len__(self) -> int:
        return sum(map(len, self._clients.values()))

    def __bool__(self) -> bool:
        return bool(self._clients)

    def __contains__(self, handle: Handle) -> bool:
        return handle in self._clients.get(handle.request.client, ())

    def __iter__(self) -> Iterator[Handle]:
        return (handle for queue in self._clients.values() for handle in queue)

    def add(self, handle: Handle) -> None:
        self._clients.setdefault(handle.request.client, deque()).append(handle)

    def next(self) -> Handle:
        """The request whose turn it is; it stays."""
        return next(iter(self._clients.values()))[0]

    def take(self) -> Handle:
        """The same, off the queue."""
        client, queue = next(iter(self._clients.items()))
        handle = queue.popleft()
        del self._clients[client]
        if queue:
            self._clients[client] = queue  # behind the others
        return handle

    def remove(self, handle: Handle) -> None:
        queue = self._clients[handle.request.client]
        queue.remove(handle)
        if not queue:
            del self._clients[handle.request.client]
