"""Several processes, one run: JAX's own runtime, started where a cluster or the flags ask for it.

Process 0 decides, writes files and prints; the others train with it and wait in everything else. Messages go through
the key-value store of JAX's coordinator, so that waiting for hours occupies no device. A failure of one process ends
all of them with its message and its exit code.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import re
import threading
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxchat.errors import InterruptedRun, JaxchatError, UsageError, first_line

T = TypeVar("T")
GRACE_SECONDS = 10.0  # for a process to end by itself after another one's failure
STOP_SECONDS = 25.0  # for all processes to meet at the end
POLL_MS = 1000  # between looks for a failure while waiting
FAILED = "jaxchat/failed"
REQUIRED = "give --coordinator HOST:PORT, --processes N and --process-id I together, the same but for the last"

_failure: dict[str, Any] = {}  # another process's: message, code, process
_failed = threading.Event()  # another process has
_ended = threading.Event()  # this process's part
_stopping = threading.Lock()
_messages = 0  # broadcasts of process 0 so far; the same in every process
_watch: threading.Thread | None = None


def index() -> int:
    """Return which process this is; 0 writes and prints."""
    return jax.process_index() if several() else 0


def several() -> bool:
    """Return whether the run has several processes."""
    return jax.distributed.is_initialized()


# Start and end


def start(
    coordinator: str | None,
    processes: int | None,
    process_id: int | None,
    timeout: int,
    whole_host: bool,
    indexed_pod: bool,
    complain: Callable[[str, int], None],
) -> bool:
    """Join the run's other processes, before any use of a device; False where there is only this one.

    Without flags JAX's own detection decides: Slurm, Open MPI, TPU pods, Kubernetes (`indexed_pod`: of an indexed Job).
    Raises `UsageError` for flags that contradict one another and processes that differ in their devices.

    Args:
      timeout: seconds for all processes to come; JAX would then abort with a stack trace.
      whole_host: the only process of its host takes all devices there (JAX gives a Slurm task just one).
      complain: shows the message and the exit code of a failure that ends the process from a thread of ours.
    """
    global _watch
    flags = (coordinator, processes, process_id)
    if processes == 1 or (flags == (None, None, None) and _detected(indexed_pod) < 2):
        return False
    if (
        not re.fullmatch(r".+:[1-9]\d{0,4}", coordinator or "cluster:1")
        or (processes is not None and processes < 1)
        or not 0 <= (process_id or 0) < (processes or 1 << 30)
    ):
        raise UsageError(f"--coordinator {coordinator} --processes {processes} --process-id {process_id}: {REQUIRED}")
    place = coordinator or "the coordinator that the cluster names"
    late = f"not all processes met at {place} within {timeout} s; check its host, its port and that every process runs"
    timer = _exit_after(timeout, UsageError.exit_code, lambda: complain(late, UsageError.exit_code))
    try:
        jax.distributed.initialize(
            coordinator,
            processes,
            process_id,
            local_device_ids=[] if whole_host else None,
            cluster_detection_method="deactivate" if None not in flags else None,
            initialization_timeout=timeout + 60,
        )
    except (ValueError, TypeError, RuntimeError, KeyError) as error:
        raise UsageError(f"starting several processes at {place}: {first_line(error)}; {REQUIRED}") from error
    finally:
        timer.cancel()
    _watch = threading.Thread(target=_watch_others, args=(complain,), daemon=True)
    _watch.start()
    counts = collections.Counter(device.process_index for device in jax.devices())
    if len(set(counts.values())) > 1:
        text = ", ".join(f"{count} on process {process}" for process, count in sorted(counts.items()))
        raise UsageError(f"processes must have equally many devices, not {text}; restart those that differ")
    return True


def _watch_others(complain: Callable[[str, int], None]) -> None:
    """Wait for another process's failure; end this process where it hangs on a device that waits for that one."""
    while not _failed.is_set() and not _ended.is_set():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nothing yet
            _failure.update(json.loads(_store().blocking_key_value_get(FAILED, POLL_MS)))
            _failed.set()
    if not _ended.wait(GRACE_SECONDS):
        complain(str(_its_error()), _failure["code"])
        stop(_failure["code"])
        os._exit(_failure["code"])


def stop(code: int = 0) -> None:
    """End the runtime, where all processes meet; if they do not, end this one with `code`."""
    if not several():
        return
    with _stopping:
        _ended.set()
        if _watch is not None and _watch is not threading.current_thread():
            _watch.join()
        timer = _exit_after(STOP_SECONDS, code)
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # a process is gone; there is nothing left to end
            jax.distributed.shutdown()
        timer.cancel()


def fail(message: str, code: int) -> None:
    """Make all other processes end with this code, and end the runtime."""
    if several():
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # another one was first, or the coordinator is gone
            _store().key_value_set(FAILED, json.dumps({"message": message, "code": code, "process": index()}))
        stop(code)


def lost(error: Exception) -> JaxchatError | InterruptedRun | None:
    """Return what to say of a device error that another process's end has caused; None for any other error."""
    if not several() or not isinstance(error, jax.errors.JaxRuntimeError):
        return None
    if _failed.wait(3 * POLL_MS / 1000):
        return _its_error()
    if re.search("gloo|nccl|connection|socket|peer|unavailable|coordination|heartbeat", str(error), re.IGNORECASE):
        return InterruptedRun(f"another process is gone ({first_line(error)}); the same command goes on from here")
    return None


def _its_error() -> JaxchatError | InterruptedRun:
    """Return the other process's failure as an error of this one, with the same exit code."""
    kind = InterruptedRun if _failure["code"] == InterruptedRun.exit_code else JaxchatError
    error = kind(f"process {_failure['process']} ended: {_failure['message']}")
    error.exit_code = _failure["code"]
    return error


def _exit_after(seconds: float, code: int, before: Callable[[], None] = lambda: None) -> threading.Timer:
    """Return a running timer that ends the process, wherever that hangs."""

    def leave() -> None:
        before()
        os._exit(code)

    timer = threading.Timer(seconds, leave)
    timer.daemon = True
    timer.start()
    return timer


# The only two uses of private parts of JAX. How many processes a cluster has must be known before `initialize`, which
# fails outside a cluster; and the coordinator's key-value store has no public name (Orbax reaches it in the same way).


def _detected(indexed_pod: bool) -> int:
    """Return how many processes JAX's detection finds; 1 outside a cluster."""
    from jax._src.clusters import ClusterEnv

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # every pod without the client of Kubernetes gets a warning
        for cluster in ClusterEnv._cluster_types:
            pods = cluster.__name__ == "K8sCluster"
            if not cluster.opt_in_only_method and (indexed_pod or not pods) and cluster.is_env_present():
                return cluster.get_process_count()
    if indexed_pod:
        raise UsageError(f"a pod of an indexed Job without Kubernetes' client: pip install kubernetes, or {REQUIRED}")
    return 1


def _store() -> Any:
    from jax._src import distributed

    return distributed.global_state.client


# Messages and agreement


def broadcast(value: Any) -> Any:
    """Send a JSON value from process 0 to all others, which `receive` it; returns it as they see it."""
    global _messages
    text = json.dumps(value)
    if several():
        _store().key_value_set(f"jaxchat/message/{_messages}", text)
        _messages += 1
    return json.loads(text)


def receive() -> Any:
    """Wait for the next broadcast of process 0, for hours if need be; raises what ended another process meanwhile."""
    global _messages
    while not _failed.is_set():
        try:
            value = _store().blocking_key_value_get(f"jaxchat/message/{_messages}", POLL_MS)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # a dead process 0 is noticed by JAX's heartbeats
                raise
            continue
        _messages += 1
        return json.loads(value)
    raise _its_error()


def on_first(work: Callable[[], T]) -> T:
    """Run `work()` on process 0 alone; all return its value (JSON) when it is done."""
    if not several():
        return work()
    return receive() if index() > 0 else broadcast(work())


class Ballot:
    """The largest number cast by any process, known to all of them at the same call and without waiting."""

    def __init__(self) -> None:
        self._before: Any = 0
        if several():
            mesh = Mesh(np.array(jax.devices()), ("all",))
            self._split, result = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("all",), ()))
            self._largest = jax.jit(jnp.max, out_shardings=result)

    def cast(self, number: int) -> int:
        """Return that of this call with one process; of the call before with several, reduced meanwhile."""
        if not several():
            return number
        value = np.full(1, number, np.int32)
        numbers = jax.make_array_from_callback((jax.device_count(),), self._split, lambda _: value)
        before, self._before = self._before, self._largest(numbers)
        return int(before)


def gathered(array: Any) -> np.ndarray:
    """Return one array whole, on the host of every process; all of them must ask for the same one."""
    if isinstance(array, jax.Array) and not array.is_fully_addressable and not array.is_fully_replicated:
        return multihost_utils.process_allgather(array, tiled=True)
    return np.asarray(array)
