"""What idle slots still hold, and how much of it a new prompt can go on from."""

from __future__ import annotations

from dataclasses import dataclass

from jaxchat.engine.spans import common_prefix

LEAST_REUSE = 32  # tokens; a shorter prefix is sooner run again


@dataclass(frozen=True)
class Held:
    """An idle slot's cache holds the keys of `tokens`, and has perhaps seen positions up to `reach`."""

    tokens: list[int]
    reach: int

    def usable(self, prompt: list[int], ring: int) -> int:
        """How many first tokens of a prompt need not run again; the last one always does, to say what follows.

        `ring`: positions of the smallest windowed layer's cache. One that came round has lost what it held before, so
        all that it saw must belong to the prompt; the one position behind that the window does not need is harmless.
        """
        n = common_prefix([self.tokens, prompt[:-1]])
        if n < LEAST_REUSE or 2 * n < len(prompt) or (self.reach > ring and self.reach > n + 1):
            return 0
        return n
