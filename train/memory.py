"""Out of device memory: one line with the key to lower and the largest value that fits."""

from __future__ import annotations

import functools
import gc
import traceback
from collections.abc import Callable
from typing import Any

import jax

from jaxchat import hosts
from jaxchat.config import Config
from jaxchat.errors import JaxchatError, OutOfMemoryError
from jaxchat.log import say
from jaxchat.mesh import make_mesh
from train.machine import available_memory

GIB = 2**30


def explained(fit: Callable[..., Any]) -> Callable[..., Any]:
    """`fit(job)`, whose running out of device memory, compiling or training, becomes an `OutOfMemoryError`."""

    @functools.wraps(fit)
    def wrapped(job: Any) -> Any:
        try:
            return fit(job)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the state; compiling for a GPU needs room too
            gc.collect()
        raise OutOfMemoryError(advice(job.config))

    return wrapped


def advice(config: Config) -> str:
    """What did not fit and which `train.device_batch_rows` does, found by compiling the step with fewer rows.

    Several processes cannot compile one by one: they get the next smaller value, and the command that finds the best.
    """
    from train.compiled import largest_rows, rows_and_accumulation  # it knows the training loop, which is wrapped here
    from train.targets import MEMORY_FRACTION

    mesh, device = make_mesh(config.mesh), jax.local_devices()[0]
    rows, accumulate = rows_and_accumulation(config, mesh)
    smaller = max((n for n in range(1, rows) if rows * accumulate % n == 0), default=0)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and (free := available_memory()) is not None:
        limit = int(MEMORY_FRACTION * free) // jax.local_device_count()
    size = f" ({limit / GIB:.1f} GiB)" if limit else ""
    begin = f"out of device memory{size} with train.device_batch_rows={rows}"
    fits = None
    if limit and smaller and not hosts.several():
        say("  out of device memory; compiling smaller batches to find the largest that fits")
        try:
            fits = largest_rows(config, mesh, int(limit / MEMORY_FRACTION))
        except (JaxchatError, jax.errors.JaxRuntimeError) as error:  # the advice below is better than none
            say(f"  which fits could not be found: {(str(error).splitlines() or [''])[0][:200]}", style="yellow")
    if fits == 0 or not smaller:
        return (
            f"{begin}; no smaller batch fits: shard with mesh.fsdp, recompute with train.remat=full, or a smaller model"
        )
    if fits is None or fits >= rows:
        held = "by the compiled step it fits, so something else takes memory; " if fits else ""
        return f"{begin}; {held}take --set train.device_batch_rows={smaller}, or see what fits with --plan"
    return f"{begin}; {fits} is the most that fits: the same command with --set train.device_batch_rows={fits} goes on"
