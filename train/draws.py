"""What a training step learns from."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from jax.sharding import Mesh

from jaxchat.config import Config
from jaxchat.data.batches import Batches
from jaxchat.data.rows import Rows
from jaxchat.mesh import batch_sharding
from jaxchat.state import Batch, TrainState


@dataclass
class Draw:
    """What one step trains on. `batch` None: there is nothing to learn, and the step makes no update.

    `tokens`: how many the step adds to the count; `trained`: how many go through the update, for the MFU; `facts` go
    into its record.
    """

    batch: Batch | None
    tokens: int
    trained: int
    facts: dict[str, float] = field(default_factory=dict)


def rows_in_order(
    config: Config,
    rows: Rows,
    shape: tuple[int, int],
    done: int,
    mesh: Mesh,
    left_out: Sequence[int] = (),
) -> Callable[[TrainState, int], Draw]:
    """Batches of `rows`, of shape (rows of a micro-batch, micro-batches), from step `done` on and read ahead.

    What is drawn does not depend on the state. The batches of the numbers `left_out` never come.
    """
    batches = Batches(rows, *shape, config.seed).iterate(done, batch_sharding(mesh), left_out)
    tokens = config.train.batch_tokens
    return lambda state, step: Draw(next(batches), tokens, tokens)
