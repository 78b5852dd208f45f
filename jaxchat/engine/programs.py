"""The engine's compiled programs, on one device or on several that share the slots.

On several devices each one owns a part of the slots and runs the same program on it, with whole weights of its own, so
nothing ever moves between them. What a program is told then has one entry for each device; on one device, one.
Slots are numbered through, the first device's first.
"""

from __future__ import annotations

import functools
import os
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxchat.config import ModelConfig
from jaxchat.engine import slots as device
from jaxchat.engine.decode import Made, decode_chunk
from jaxchat.engine.likelihood import lengths, rows_of, score_tokens
from jaxchat.mesh import BATCH_AXES, replicated
from jaxchat.model.backends import with_attention
from jaxchat.model.cache import Cache, serving_params

MIN_PROMPT_BUCKET = 32  # tokens
MIN_CACHE_BUCKET = 512  # positions; cutting out fewer costs more than reading them
PIECE = 512  # tokens of a prompt that run at once while others wait for their next ones
# Short prompts prefilled at once. One keeps a CPU as busy, and there every prompt runs as a long one's pieces do, so
# that half as many programs have to compile.
PREFILL_GROUP = {"cpu": 0}
ACCELERATOR_GROUP = 8
# Rows of the smallest chunk. For a single one XLA's GPU compiler multiplies and sums instead of calling a product, and
# writes products as large as the weights to memory: in d20 compiled for an H100, 1.46 GB and 450 kernels a step against
# 0.98 GB and 333 for two rows.
LEAST_ROWS = {"cpu": 1}
ACCELERATOR_ROWS = 2
COMPILERS = 4  # programs that compile at once
ROWS = P(BATCH_AXES)
_Call = tuple[Any, dict[str, Any], dict[str, Any]]  # function, static arguments, others


class Programs:
    """Runs programs over the state of all slots, which it holds.

    Args:
      params: from `load`; slots: of all devices together; capacity: tokens of a slot; chunk: decoding steps of a call.
      mesh: devices that share the slots; None: the default device alone.
    """

    def __init__(self, config: ModelConfig, slots: int, capacity: int, chunk: int, dtype: Any, mesh: Mesh | None):
        self.config, self.capacity, self.chunk, self.dtype = with_attention(config, dtype), capacity, chunk, dtype
        self.mesh = mesh if mesh is not None and mesh.size > 1 else None
        self.devices = self.mesh.size if self.mesh else 1
        self.slots = slots // self.devices  # of one device
        self.group = min(PREFILL_GROUP.get(jax.default_backend(), ACCELERATOR_GROUP), self.slots)
        self.least_rows = min(least_rows(), self.slots)
        self.piece = min(PIECE, capacity)
        self.prompt_buckets = buckets(MIN_PROMPT_BUCKET, self.piece)
        self.cache_buckets = buckets(MIN_CACHE_BUCKET, capacity)
        self.params: Any = None
        shape = self.config, slots, capacity, dtype
        self._coming: dict[Any, Future[None]] = {}  # programs that a background warm-up compiles
        self.state: device.Slots = (
            _new_slots(NamedSharding(self.mesh, ROWS))(*shape) if self.mesh else device.new_slots(*shape)
        )

    def load(self, params: Any, weights: str) -> None:
        """Take weights, in the training layout or as `serving_params` made them."""
        place = replicated(self.mesh) if self.mesh else None
        if "layers" in params:
            self.params = jax.device_put(params, place) if place else params
        else:
            self.params = _serve(place)(self.config, params, self.dtype, weights)

    # Each argument below is a NumPy array with `devices` entries (or as many times `group`) on its first axis

    def admit(self, tokens: Any, length: Any, target: Any, remaining: Any, settings: Any) -> None:
        prompts = {"tokens": tokens, "length": length}
        self._change(device.admit, params=self.params, **prompts, **_starts(target, remaining, settings))

    def take(self, slot: Any, length: Any, last: Any) -> Cache:
        return self._run(device.take, params=self.params, slots=self.state, slot=slot, length=length, last=last)

    def prolong(self, rows: Cache, tokens: Any, count: Any) -> Cache:
        return self._run(device.prolong, params=self.params, rows=rows, tokens=tokens, count=count)

    def start(self, rows: Cache, target: Any, remaining: Any, settings: Any) -> None:
        self._change(device.start, rows=rows, **_starts(target, remaining, settings))

    def decode(self, rows: int, bucket: int) -> Made:
        """A chunk of the first `rows` slots of every device; the outputs have the first device's rows first."""
        static = {"bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
        self.state, made = self._run(decode_chunk, static | {"rows": rows}, params=self.params, slots=self.state)
        return made

    def mark(self, slot: int, seen: Any) -> None:
        self._change(device.mark, slot=self.only(slot), seen=np.broadcast_to(seen, (self.devices, len(seen))))

    def resume(self, slot: int, ids: Sequence[int]) -> None:
        forced = np.zeros((self.devices, device.FORCED), np.int32)
        forced[:, : len(ids)] = ids
        count = np.full(self.devices, len(ids), np.int32)
        self._change(device.resume, slot=self.only(slot), forced=forced, count=count)

    def swap(self, a: int, b: int) -> None:
        """Two slots of one device."""
        self._change(device.swap, pair=np.stack([self.only(a), self.only(b)], axis=1))

    def release(self, slot: int) -> None:
        self._change(device.release, slot=self.only(slot))

    def only(self, slot: int) -> np.ndarray:
        """Number of a slot on its device, and on the others one that is no slot; (devices,) int32."""
        numbers = np.full(self.devices, self.slots, np.int32)
        if slot < self.slots * self.devices:
            numbers[slot // self.slots] = slot % self.slots
        return numbers

    def warm_up(self, background: bool = False) -> Iterator[int]:
        """Compile everything that any request can need, several programs at once, without running any of it; yields
        how many are still to come.

        With `background` it ends once a short request of a single client can be answered. The other programs go on
        compiling in threads of their own; whoever needs one that is not there yet waits for that one alone.
        """
        assert not self._coming
        calls = list(self._calls())
        first = [call for call in calls if self._is_first(*call)] if background else calls
        yield len(calls)
        threads = min(COMPILERS, os.cpu_count() or 1)
        left = len(calls)
        with ThreadPoolExecutor(threads) as pool:
            compiling = [pool.submit(self._compile, *call) for call in first]
            try:
                for done in as_completed(compiling):
                    done.result()
                    left -= 1
                    yield left
            finally:  # whoever stops listening need not wait for all of them
                pool.shutdown(wait=True, cancel_futures=True)
        if background:
            self._compile_behind([call for call in calls if not self._is_first(*call)], max(1, threads // 2))

    @property
    def compiling(self) -> int:
        """Programs that are still to come from `warm_up`."""
        return sum(not future.done() for future in list(self._coming.values()))

    def stop_compiling(self) -> None:
        """Drop what a background warm-up has not begun; a needed program compiles when it is used."""
        for future in list(self._coming.values()):
            future.cancel()

    def _is_first(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> bool:
        """Whether a short request of a single client needs this program."""
        if function is decode_chunk:
            return static["rows"] == self.least_rows and static["bucket"] == self.cache_buckets[0]
        if function in (device.admit, device.prolong):
            size, bucket = arguments["tokens"].shape
            return size == self.devices and bucket == self.prompt_buckets[0]
        return function is device.start

    def _compile_behind(self, calls: Sequence[_Call], threads: int) -> None:
        """Compile in threads; `_coming` has a future for every program."""

        def compile_one(call: _Call) -> None:
            if threading.main_thread().is_alive():  # else the process is about to end
                self._compile(*call)

        pool = ThreadPoolExecutor(threads, thread_name_prefix="compiler")
        self._coming = {_key(*call): pool.submit(compile_one, call) for call in calls}
        pool.shutdown(wait=False)

    def _await(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> None:
        """Wait for a program that is compiling just now. One that still waits its turn is left to its caller."""
        future = self._coming.pop(_key(function, static, arguments), None)
        if future and not future.cancel():
            future.result()

    def _calls(self) -> Iterator[_Call]:
        """(function, static arguments, others) of every program, the slowest to compile first.

        State and weights are given as shapes: the arrays may be gone when a thread comes to compile.
        """
        D, params, slots = self.devices, _shapes(self.params), _shapes(self.state)
        slot, zeros = self.only(self.slots * D), np.zeros(D, np.int32)
        rows = _shapes(self.take(zeros, zeros, zeros))  # also the first program

        def start(count: int) -> dict[str, Any]:
            target = np.full((count * D, 2), self.slots, np.int32)
            return _starts(target, np.ones(count * D, np.int32), device.blank_settings(count * D))

        for count in reversed(buckets(self.least_rows, self.slots)):
            for bucket in self.cache_buckets:
                static = {"rows": count, "bucket": bucket, "steps": self.chunk, "capacity": self.capacity}
                yield decode_chunk, static, {"params": params, "slots": slots}
        for bucket in reversed(self.prompt_buckets):
            for size in {1, self.group} if self.group else ():
                prompts = {"tokens": np.zeros((size * D, bucket), np.int32), "length": np.ones(size * D, np.int32)}
                yield device.admit, {}, {"slots": slots, "params": params, **prompts, **start(size)}
            piece = {"tokens": np.zeros((D, bucket), np.int32), "count": zeros}
            yield device.prolong, {}, {"params": params, "rows": rows, **piece}
        for length in lengths(self.capacity):
            yield score_tokens, {}, {"params": params, "tokens": np.zeros((rows_of(length), length), np.int32)}
        seen = np.broadcast_to(np.zeros(self.config.vocab_size, bool), (D, self.config.vocab_size))
        forced = np.zeros((D, device.FORCED), np.int32)
        yield device.start, {}, {"slots": slots, "rows": rows, **start(1)}
        yield device.mark, {}, {"slots": slots, "slot": slot, "seen": seen}
        yield device.resume, {}, {"slots": slots, "slot": slot, "forced": forced, "count": zeros}
        yield device.swap, {}, {"slots": slots, "pair": np.stack([slot, slot], axis=1)}
        yield device.release, {}, {"slots": slots, "slot": slot}

    def _compile(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> None:
        run, args, kwargs = self._ready(function, static, arguments)
        run.lower(*args, **kwargs).compile()

    def score(self, tokens: Any) -> Any:
        """`likelihood.score_tokens`, by every device alike."""
        return self._run(score_tokens, params=self.params, tokens=tokens)

    def _change(self, function: Any, **arguments: Any) -> None:
        self.state = self._run(function, slots=self.state, **arguments)

    def _run(self, function: Any, static: dict[str, Any] | None = None, **arguments: Any) -> Any:
        if self._coming:
            self._await(function, static or {}, arguments)
        run, args, kwargs = self._ready(function, static or {}, arguments)
        return run(*args, **kwargs)

    def _ready(self, function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> tuple[Any, Any, Any]:
        """A jitted function, and its positional and named arguments."""
        if function in WITH_CONFIG:
            static = static | {"config": self.config}
        if self.mesh is None or function is score_tokens:
            return function, (), static | arguments
        kept = ("params", "slots", "rows")  # lie where they should
        placed = jax.device_put({k: v for k, v in arguments.items() if k not in kept}, NamedSharding(self.mesh, ROWS))
        run = _spread(function, self.mesh, tuple(sorted(static.items())), tuple(arguments))
        return run, tuple((arguments | placed).values()), {}


WITH_CONFIG = (device.admit, device.take, device.prolong, decode_chunk, score_tokens)


def _shapes(tree: Any) -> Any:
    """What `lower` must know of arrays."""
    return jax.tree.map(
        lambda a: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=a.sharding if a.committed else None), tree
    )


def _key(function: Any, static: dict[str, Any], arguments: dict[str, Any]) -> Any:
    """What tells a program from the others: the shapes of what comes from the host differ."""
    shapes = tuple((name, a.shape) for name, a in sorted(arguments.items()) if isinstance(a, np.ndarray))
    return function, tuple(sorted(static.items())), shapes


def _starts(target: Any, remaining: Any, settings: Any) -> dict[str, Any]:
    return {"target": target, "remaining": remaining, "settings": settings}


@functools.cache
def _serve(place: NamedSharding | None) -> Any:
    return jax.jit(serving_params, static_argnums=(0, 2, 3), out_shardings=place)


@functools.cache
def _new_slots(place: NamedSharding) -> Any:
    return jax.jit(device.new_slots, static_argnums=(0, 1, 2, 3), out_shardings=place)


@functools.cache
def _spread(function: Any, mesh: Mesh, static: tuple[tuple[str, Any], ...], names: tuple[str, ...]) -> Any:
    """`function` on every device's own part of its arguments, weights alone being whole everywhere."""

    def local(*arguments: Any) -> Any:
        return function.__wrapped__(**dict(static), **dict(zip(names, arguments, strict=True)))

    donated = {device.take: (), device.prolong: ("rows",)}.get(function, ("slots",))
    spread = jax.shard_map(
        local, mesh=mesh, in_specs=tuple(P() if n == "params" else ROWS for n in names), out_specs=ROWS, check_vma=False
    )
    return jax.jit(spread, donate_argnums=tuple(names.index(name) for name in donated))


def least_rows() -> int:
    """Rows that the smallest chunk has on this machine: slots for a single person."""
    return LEAST_ROWS.get(jax.default_backend(), ACCELERATOR_ROWS)


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def buckets(smallest: int, largest: int) -> list[int]:
    """Powers of two from the smallest, and the largest itself."""
    sizes = [min(smallest, largest)]
    while sizes[-1] < largest:
        sizes.append(min(power_of_two(sizes[-1] + 1), largest))
    return sizes
