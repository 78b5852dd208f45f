"""Independent jobs over the cores of this machine, or over a Ray cluster; results come in the order of the jobs."""

from __future__ import annotations

import collections
import concurrent.futures
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any, TypeVar

from jaxchat.errors import DataError, JaxchatError, UsageError

J = TypeVar("J")
R = TypeVar("R")
ENGINES = ("local", "ray")
AHEAD = 4  # jobs of a generator that are taken ahead of the results, for each worker
ORPHAN_POLL = 0.5  # seconds between a worker's looks at whether its parent is still there


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def workers_for(wanted: int, jobs: int) -> int:
    """Processes to start: `wanted`, or (-1) one a core, but none without a job."""
    return max(1, min(jobs, wanted if wanted > 0 else cores()))


def spread(work: Callable[[J], R], jobs: Iterable[J], engine: str, workers: int) -> Iterator[R]:
    """`work(job)` for every job, in other processes (`local`) or as Ray tasks; `work` and jobs must be picklable.

    A sequence of jobs is handed out at once. Of any other iterable a few jobs for each worker are in memory at a time.

    What a job raises is raised here; jobs not yet begun are dropped. With Ray, the cluster that `RAY_ADDRESS` names is
    used, or one is started on this machine; paths in the jobs must mean the same on all its machines.
    """
    if engine not in ENGINES:
        raise UsageError(f"data.engine: {engine!r} is unknown; choose from {', '.join(ENGINES)}")
    return _over_ray(work, jobs, workers) if engine == "ray" else _over_processes(work, jobs, workers)


def _over_processes(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[R]:
    context = multiprocessing.get_context("spawn")  # JAX has threads, which a fork would leave half dead
    pool = concurrent.futures.ProcessPoolExecutor(workers, context, initializer=_die_with, initargs=(os.getpid(),))
    at_once = len(jobs) if isinstance(jobs, Sequence) else AHEAD * workers
    waiting: collections.deque[concurrent.futures.Future[R]] = collections.deque()
    try:
        for job in jobs:
            if len(waiting) >= at_once:
                yield waiting.popleft().result()
            waiting.append(pool.submit(work, job))
        while waiting:
            yield waiting.popleft().result()
    except BrokenProcessPool:
        raise DataError(
            "a process that tokenized was killed (out of memory?); the same command goes on, "
            "--set data.workers=1 needs the least memory"
        ) from None
    finally:
        _stop(pool)


def _stop(pool: concurrent.futures.ProcessPoolExecutor) -> None:
    """Without waiting for jobs under way: what they have finished is on the disk."""
    for process in list((pool._processes or {}).values()):
        process.terminate()
    pool.shutdown(wait=True, cancel_futures=True)


def _die_with(parent: int) -> None:
    """A worker whose parent was killed ends too, instead of writing beside the next run; Ctrl-C is the parent's."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(ORPHAN_POLL)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _over_ray(work: Callable[[J], R], jobs: Iterable[J], workers: int) -> Iterator[R]:
    try:
        import ray
    except ImportError:
        raise UsageError("data.engine: ray is not installed; pip install -e '.[ray]'") from None
    started = not ray.is_initialized()
    if started:
        # the cluster's machines must find this very package, wherever the command was started
        root = str(Path(__file__).resolve().parents[2])
        ray.init(log_to_driver=False, logging_level=logging.ERROR, runtime_env={"env_vars": {"PYTHONPATH": root}})
    try:
        task: Any = ray.remote(max_retries=3)(_called)
        at_once = max(workers, 2 * int(ray.cluster_resources().get("CPU", 1)))  # submitted, so that nobody waits
        waiting: collections.deque[Any] = collections.deque()
        for job in jobs:
            if len(waiting) >= at_once:
                yield _result(ray, waiting.popleft())
            waiting.append(task.remote(work, job))
        while waiting:
            yield _result(ray, waiting.popleft())
    finally:
        if started:
            ray.shutdown()


def _called(work: Callable[[J], R], job: J) -> R:
    return work(job)  # Ray takes plain functions alone, no partial ones


def _result(ray: Any, reference: Any) -> Any:
    """What the task returned; its own error, not Ray's wrapping of it."""
    try:
        return ray.get(reference)
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, JaxchatError):
            raise error.cause from None
        raise
    except ray.exceptions.RayError as error:
        raise DataError(f"data.engine ray: {str(error).splitlines()[0]}; the same command goes on") from None
