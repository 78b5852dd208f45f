"""The only training loop: stages differ in where a step's batch comes from, not in how they train."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import gc
import math
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from jaxchat import distributed as hosts
from jaxchat.checkpoint import Checkpoints, check_recorded, params_sha256
from jaxchat.config import Config
from jaxchat.data.loader import Batches, own_columns, place, val_batches
from jaxchat.data.packing import Rows
from jaxchat.errors import DivergedError, InterruptedRun, JaxchatError, OutOfMemoryError
from jaxchat.log import MetricsFile, Task, animated, progress, say
from jaxchat.optimizer import advance_schedules, carry_moments, make_optimizer, make_schedule
from jaxchat.run_dir import RunDir
from jaxchat.sharding import batch_devices, batch_sharding, make_mesh, micro_batch
from jaxchat.sizes import flops_per_token, peak_flops
from jaxchat.train_state import (
    Batch,
    TrainState,
    abstract_state,
    check_kernels,
    compute_dtype,
    init_state,
    make_eval_step,
    make_train_step,
)

from .doctor import available_memory
from .plots import loss_plot
from .statistics import Z95
from .trackers import trackers

# Signals that ask a training to save and leave.


@contextlib.contextmanager
def signals(asked: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP (the terminal is gone) call `asked`, so that the loop saves and leaves.

    A second SIGINT stops at once.

    Main thread only; elsewhere nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, frame: Any) -> None:
        asked(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's is left alone
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, ask) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# What a training step learns from.


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


# Bits per byte of held-out rows: nats over the targets that stand for text, by the bytes of that text.


def bits_per_byte(
    eval_step: Any, params: Any, rows: Rows, byte_lengths: np.ndarray, batch_rows: int, max_rows: int, mesh: Mesh
) -> dict[str, Any]:
    """`bits_per_byte` with its standard error `se` and 95 % `interval`, mean `loss` (nats per target), `perplexity`,
    and the `targets` and `bytes` behind them.

    The error takes rows as drawn at random (the variance of a ratio by linearization; None for a single row).
    Special tokens count neither way in bits per byte; loss and perplexity are over every weighted target.
    `eval_step` comes from `scores.make_eval_step`; `byte_lengths` is (V,) int32, 0 for special tokens.
    """
    sums, by_row = {"all_nats": 0.0, "targets": 0.0}, []
    lengths = np.asarray(byte_lengths, np.int32)
    shape, sharding = (1, batch_rows, rows.meta["row_len"] - 1), batch_sharding(mesh)
    columns = own_columns(sharding, shape)
    for batch in val_batches(rows, batch_rows, max_rows, columns):
        found = jax.device_get(eval_step(params, place(batch, sharding, shape, columns), lengths))
        sums = {name: total + float(found[name]) for name, total in sums.items()}
        by_row.append(np.stack([found["nats"], found["bytes"]]).astype(np.float64))
    nats, sizes = np.concatenate(by_row, axis=1)
    score = nats.sum() / math.log(2) / max(sizes.sum(), 1.0)
    error = standard_error(nats / math.log(2), sizes)
    loss = sums["all_nats"] / max(sums["targets"], 1.0)
    return {
        "bits_per_byte": float(score),
        "se": error,
        "interval": None if error is None else (float(score - Z95 * error), float(score + Z95 * error)),
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "targets": int(sums["targets"]),
        "bytes": int(sizes.sum()),
    }


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """A value and its standard error as text: 1.5740 ± 0.0100."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def standard_error(amounts: np.ndarray, sizes: np.ndarray) -> float | None:
    """Of sum(amounts) / sum(sizes); rows without size (padding of the last batch) say nothing."""
    amounts, sizes = amounts[sizes > 0], sizes[sizes > 0]
    n = len(sizes)
    if n < 2:
        return None
    ratio = amounts.sum() / sizes.sum()
    return float(math.sqrt(n / (n - 1) * np.square(amounts - ratio * sizes).sum()) / sizes.sum())


# Out of device memory: one line with the key to lower and the largest value that fits.


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
    from .compiled import largest_rows, rows_and_accumulation  # it knows the training loop, which is wrapped here
    from .targets import MEMORY_FRACTION

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


SAY_SECONDS = 30.0  # between lines of progress where there is no terminal to draw on
Evaluator = Callable[[TrainState, int], Iterable[tuple[str, float]]]
Timings = dict[str, list[float]]  # "start", "save", "validate", "evaluate", "sample" -> seconds of each time
Step = Callable[[TrainState, Any], tuple[TrainState, dict[str, Any]]]


@dataclass
class Job:
    """One stage's training: `config.train.steps` updates on `rows`, or on what `draw(state, step)` gives, kept in
    `directory`.

    `start` maps the freshly initialized state to the one to train from (SFT loads the base model there).
    """

    config: Config
    directory: Path
    rows: Rows | None
    val_rows: Rows | None
    byte_lengths: np.ndarray  # (V,) int32
    start: Callable[[TrainState], TrainState] = lambda state: state
    draw: Callable[[TrainState, int], Draw] | None = None
    evaluators: list[Evaluator] = field(default_factory=list)
    score_start: bool = False  # evaluate before the first step too; the scores are facts["start"]
    sampler: Callable[[TrainState, int], None] | None = None  # every `train.sample_every` steps
    title: str = "train"
    limit: int = 0  # leave after so many steps as if they were all, with their `timings` in the facts; 0: never

    @property
    def last(self) -> int:
        """Steps after which the training ends."""
        steps = self.config.train.steps
        return min(steps, self.limit or steps)


@contextlib.contextmanager
def timed(timings: Timings, name: str) -> Iterator[None]:
    """Append the seconds of the block to `timings[name]`."""
    begin = time.perf_counter()
    yield
    timings.setdefault(name, []).append(time.perf_counter() - begin)


class NotFinite(DivergedError):
    """Too many steps in a row whose loss or gradient was not finite; `steps` says which."""

    def __init__(self, message: str, steps: range):
        super().__init__(message)
        self.steps = steps


@explained
def fit(job: Job) -> dict[str, Any]:
    """Train to the last step, resuming from the newest whole checkpoint; returns the stage's facts.

    Where too many steps in a row are not finite, it goes back to the newest checkpoint, once, and leaves their batches
    out from then on. Raises `InterruptedRun` after a signal (a checkpoint is saved), `DivergedError` the second time.
    """
    mesh = make_mesh(job.config.mesh)
    config = check_kernels(job.config, mesh)
    shape = micro_batch(config, batch_devices(mesh))
    optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
    timings: Timings = {}
    checkpoints = Checkpoints(job.directory, config.train.keep_last, config.train.keep_every)
    step, eval_step = _steps(config, optimizer, mesh), make_eval_step(config, mesh)
    bad: Sequence[int] = ()
    try:
        while True:
            with timed(timings, "start"):
                state, facts = _newest(job, config, optimizer, checkpoints, mesh)
            done = facts.get("step", 0)
            left_out = facts.get("left_out") or [number for number in bad if number >= done]
            facts |= {"left_out": left_out} if left_out else {}
            run = _Run(job, eval_step, checkpoints, facts, shape[0], mesh, timings)
            draw = job.draw
            if draw is None:
                assert job.rows is not None, "a job has rows, or draws"
                draw = rows_in_order(job.config, job.rows, shape, done, mesh, left_out)
            try:
                state = run.loop(state, done, step, draw)
                break
            except NotFinite as fault:
                if left_out or job.draw:
                    raise
                bad = fault.steps
                say(f"  steps {bad[0]} to {bad[-1]}: going back, their batches are left out", style="yellow")
                checkpoints.wait()
        checkpoints.wait()
    finally:
        checkpoints.close()
    if hosts.index() == 0:
        loss_plot(job.directory / "metrics.jsonl", job.directory / "loss.png", job.title)
    if job.limit:
        run.facts |= {"timings": timings | {"written": checkpoints.seconds}}
    return run.facts | {"params_sha256": params_sha256(state.params)}


def continued(run: RunDir, stage: str, state: TrainState) -> TrainState:
    """`state` with the parameters and optimizer moments that `stage` ended with; its schedules stay at step 0.

    `DataError` where the newest checkpoint is damaged or is not what the stage recorded.
    """
    checkpoints = Checkpoints(run.stage(stage))
    try:
        before, _ = checkpoints.restore(state, go_back=False)
    finally:
        checkpoints.close()
    check_recorded(run, stage, before.params)
    return TrainState(before.params, carry_moments(before.opt_state, state.opt_state), state.step)


def _newest(
    job: Job, config: Config, optimizer: optax.GradientTransformation, checkpoints: Checkpoints, mesh: Mesh
) -> tuple[TrainState, dict[str, Any]]:
    """State and facts of the newest whole checkpoint, or of a start."""
    if checkpoints.latest() is None:
        return job.start(init_state(config, optimizer, mesh)), {"seconds": 0.0, "bad_steps": 0}
    state, facts = checkpoints.restore(abstract_state(config, optimizer, mesh))
    say(f"  resumed from step {facts['step']} of {config.train.steps}")
    return state, facts


def _steps(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> Step:
    """The update for a batch of rows of any length (layers choose their attention by it), or for none at all."""

    @functools.cache
    def of(length: int) -> Step:
        model = dataclasses.replace(config.model, seq_len=length)
        return make_train_step(dataclasses.replace(config, model=model), optimizer, mesh)

    def step(state: TrainState, batch: Batch | None) -> tuple[TrainState, dict[str, Any]]:
        if batch is None:
            nothing = {"loss": 0.0, "grad_norm": 0.0, "ok": 1.0, "overflowed": 0.0}
            return TrainState(state.params, advance_schedules(state.opt_state), state.step + 1), nothing
        return of(batch["inputs"].shape[-1])(state, batch)

    return step


class _Run:
    """What the loop carries besides the state: metrics, evaluation, saving, signals."""

    def __init__(
        self,
        job: Job,
        eval_step: Any,
        checkpoints: Checkpoints,
        facts: dict[str, Any],
        batch_rows: int,
        mesh: Mesh,
        timings: Timings,
    ):
        self.job, self.eval_step, self.checkpoints, self.timings = job, eval_step, checkpoints, timings
        self.batch_rows, self.mesh = batch_rows, mesh
        self.facts = {"tokens": facts.get("step", 0) * job.config.train.batch_tokens}  # where no draw has counted them
        self.facts |= {k: v for k, v in facts.items() if k not in ("step", "format")}
        self.metrics = MetricsFile(job.directory / "metrics.jsonl", write=hosts.index() == 0)
        # all at once: a number asked of the device in the loop would wait behind the step that is running
        self.rates = np.asarray(jax.vmap(make_schedule(job.config))(jnp.arange(job.config.train.steps)))
        self.clock = time.perf_counter()
        self.said = time.perf_counter()
        self.bad_in_a_row = 0
        self.stop_signal = 0
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak = peak * jax.device_count() if peak else None

    def loop(self, state: TrainState, done: int, step: Step, draw: Callable[[TrainState, int], Draw]) -> TrainState:
        train = self.job.config.train
        self.metrics.truncate_to(done)
        curves = trackers(self.job.config, self.job.directory, done, write=self.metrics.write)
        with signals(self._ask), curves as self.track, progress(self.job.title, self.job.last, done) as bar:
            if done == 0 and self.job.score_start:
                self.facts["start"] = self._scores(state, 0)
            if self._due(done):
                self._evaluate(state, done)  # the checkpoint was saved before its evaluation
                self._leave_if_asked(done)
            self.clock = time.perf_counter()
            pending, ballot = None, hosts.Ballot()
            for index in range(done, self.job.last):
                drawn = draw(state, index)
                state, metrics = step(state, drawn.batch)
                # read the step before while this one runs, so that logging never stalls the device
                self._record(pending, bar)
                pending, count = (index, metrics, drawn), index + 1
                sample = self.job.sampler is not None and train.sample_every > 0 and count % train.sample_every == 0
                stop = ballot.cast(self.stop_signal)  # a signal to one process stops all of them after the same step
                if self._due(count) or count % train.checkpoint_every == 0 or sample or stop:
                    self._record(pending, bar)
                    pending = None
                    with timed(self.timings, "save"):
                        self.checkpoints.save(count, state, self.facts)  # before the evaluation, which could fail
                    self._leave_if_asked(count)
                    if self._due(count):
                        self._evaluate(state, count)
                    if sample and self.job.sampler:
                        with timed(self.timings, "sample"):
                            self.job.sampler(state, count)
                    self._leave_if_asked(count)
                    self.clock = time.perf_counter()
        return state

    def _ask(self, number: int) -> None:
        self.stop_signal = number

    def _due(self, count: int) -> bool:
        """Whether an evaluation follows after `count` steps."""
        train = self.job.config.train
        return count == self.job.last or (train.eval_every > 0 and count > 0 and count % train.eval_every == 0)

    def _record(self, pending: tuple[int, dict[str, Any], Draw] | None, bar: Task) -> None:
        """Write one finished step's metrics; stop if too many in a row were not finite."""
        if pending is None:
            return
        index, arrays, drawn = pending
        values = {k: float(v) for k, v in jax.device_get(arrays).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.facts["seconds"] += seconds
        self.facts["tokens"] += drawn.tokens
        config = self.job.config
        rate = drawn.tokens / seconds
        mfu = drawn.trained / seconds * flops_per_token(config.model) / self.peak if self.peak else None
        record = {
            "step": index,
            "tokens": self.facts["tokens"],
            "loss": values["loss"] if np.isfinite(values["loss"]) else None,
            "lr_mult": float(self.rates[index]),
            "grad_norm": values["grad_norm"] if np.isfinite(values["grad_norm"]) else None,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": mfu,
        }
        self.metrics.append(record | drawn.facts)
        self.track(index, record | drawn.facts)
        self._check(index, bool(values["ok"]), bool(values["overflowed"]))
        bar.advance()
        speed = f"{rate:,.0f} tok/s" + (f"  MFU {mfu:.1%}" if mfu else "")
        error = self.facts.get("val_bpb_se")
        shown = {"loss": record["loss"], "bpb": self.facts.get("val_bpb"), "reward": drawn.facts.get("reward")}
        texts = (
            f"{name} {with_error(value, error if name == 'bpb' else None, 3)}  "
            for name, value in shown.items()
            if value is not None
        )
        status = "".join(texts) + speed
        if not animated() and now - self.said > SAY_SECONDS:
            self.said = now
            left = (config.train.steps - index - 1) * seconds
            say(f"  step {index + 1:,} of {config.train.steps:,}  {status}  {left:.0f} s left")
        bar.update(status)

    def _check(self, index: int, ok: bool, overflowed: bool) -> None:
        """Count skipped updates. An overflow of float16 is expected now and then; the smaller scale mends it."""
        self.bad_in_a_row = 0 if ok else self.bad_in_a_row + 1
        self.facts["bad_steps"] += not ok or overflowed
        if ok:
            return
        say(f"  step {index}: loss or gradient not finite, update skipped", style="yellow")
        if self.bad_in_a_row >= self.job.config.train.max_bad_steps:
            steps = range(index + 1 - self.bad_in_a_row, index + 1)
            raise NotFinite(
                f"{self.job.title}: {self.bad_in_a_row} steps in a row were not finite (step {index}); "
                "start again with a lower optim.lr_scale in another --run-dir",
                steps,
            )

    def _evaluate(self, state: TrainState, count: int) -> None:
        """Scores into the facts and the newest record."""
        if scores := self._scores(state, count):
            self.facts |= scores
            self.metrics.amend(scores)
            self.track(count - 1, scores)  # of the step whose record has them

    def _scores(self, state: TrainState, count: int) -> dict[str, float]:
        """Held-out bits per byte and the job's own evaluators; not counted as training time."""
        job, begin = self.job, time.perf_counter()
        scores: dict[str, float] = {}
        if job.val_rows is not None:
            rows = job.config.train.eval_rows
            with timed(self.timings, "validate"):
                found = bits_per_byte(
                    self.eval_step, state.params, job.val_rows, job.byte_lengths, self.batch_rows, rows, self.mesh
                )
            scores |= {"val_bpb": found["bits_per_byte"], "val_loss": found["loss"]}
            scores |= {} if found["se"] is None else {"val_bpb_se": found["se"]}
        for evaluator in job.evaluators:
            with timed(self.timings, "evaluate"):
                scores |= dict(evaluator(state, count))
        self.facts["eval_seconds"] = self.facts.get("eval_seconds", 0.0) + time.perf_counter() - begin
        if scores:
            error = scores.get("val_bpb_se")
            shown = {name: value for name, value in scores.items() if name != "val_bpb_se"}
            text = "  ".join(f"{n} {with_error(v, error if n == 'val_bpb' else None)}" for n, v in shown.items())
            say(f"  step {count:>6,} of {job.config.train.steps:,}  {text}")
        return scores

    def _leave_if_asked(self, count: int) -> None:
        """End the run after a signal; the checkpoint of step `count` has been handed over."""
        number = hosts.agree(self.stop_signal)
        if not number:
            return
        self.checkpoints.wait()
        name = signal.Signals(number).name
        raise InterruptedRun(f"{self.job.title}: stopped by {name} after step {count}, saved; the same command resumes")
