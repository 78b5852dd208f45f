"""Requests that wait for a slot: clients take turns, and each client's own come in order."""

from __future__ import annotations

from collections import deque

from jaxchat.engine.request import Handle, QueueFull


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

    def of(self, client: str) -> int:
        """How many of a client's wait."""
        return len(self._clients.get(client, ()))

    def check_room(self, client: str, more: int, most: int, free: int) -> None:
        """`QueueFull` where `more` of a client's requests find no place: `most` may wait beside those that fill `free`
        slots. Who has nothing waiting may still come where others have taken that many places."""
        others = 0 if self.of(client) else min(len(self), most)
        if len(self) - others + more > most + free:
            raise QueueFull(f"{len(self)} requests wait already, and no more than {most} may; come again")

    def add(self, handle: Handle) -> None:
        self._clients.setdefault(handle.request.client, deque()).append(handle)

    def take(self) -> Handle:
        """The request whose turn it is."""
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
