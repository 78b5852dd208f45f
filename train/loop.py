"""The training loop. Stages differ in where a step's batch comes from, not in how they train."""

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

from jaxchat import distributed
from jaxchat.checkpoint import Checkpoints, check_recorded, params_sha256
from jaxchat.config import Config
from jaxchat.data.loader import Batches, own_columns, val_batches
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

from .curves import plot, trackers
from .doctor import available_memory

Z95 = 1.959963984540054  # standard deviations on each side of a 95 % interval
SAY_SECONDS = 30.0  # between lines of progress where there is no terminal to draw on
GIB = 2**30
Evaluator = Callable[[TrainState, int], Iterable[tuple[str, float]]]


@dataclass
class StepBatch:
    """The batch of one step. `arrays` None: there is nothing to learn, and only the schedules advance.

    `tokens`: how many the step adds to the count; `trained`: how many go through the update, for the MFU; `facts` go
    into its record.
    """

    arrays: Batch | None
    tokens: int
    trained: int
    facts: dict[str, float] = field(default_factory=dict)


class NotFinite(DivergedError):
    """Too many `steps` in a row had a loss or gradient that was not finite."""

    def __init__(self, message: str, steps: range):
        super().__init__(message)
        self.steps = steps


@dataclass
class Trainer:
    """Trains one stage: `config.train.steps` updates on `rows`, or on what `next_batch(state, step)` returns.

    `start` maps the freshly initialized state to the one to train from (SFT loads the base model there). Checkpoints,
    metrics and the loss curve go to `directory`.
    """

    config: Config
    directory: Path
    byte_lengths: np.ndarray  # (V,) int32, 0 for special tokens
    rows: Rows | None = None
    val_rows: Rows | None = None
    next_batch: Callable[[TrainState, int], StepBatch] | None = None
    start: Callable[[TrainState], TrainState] = lambda state: state
    evaluators: Sequence[Evaluator] = ()
    score_start: bool = False  # evaluate before the first step too; the scores are facts["start"]
    sampler: Callable[[TrainState, int], None] | None = None  # every `train.sample_every` steps
    title: str = "train"
    limit: int = 0  # stop after so many steps as if they were all, with their `timings` in the facts; 0: never

    def __post_init__(self) -> None:
        steps = self.config.train.steps
        self.last = min(steps, self.limit or steps)
        self.timings: dict[str, list[float]] = {}  # seconds of every start, save, validate, evaluate, sample
        self.facts: dict[str, Any] = {}
        self.stop_signal = 0

    def run(self) -> dict[str, Any]:
        """Train to the last step, resuming from the newest whole checkpoint; returns the stage's facts.

        After too many steps in a row that are not finite it goes back to the newest checkpoint, once, and leaves their
        batches out from then on. Raises `DivergedError` the second time, `InterruptedRun` after a signal (a checkpoint
        is saved), and `OutOfMemoryError` with the batch size that fits.
        """
        try:
            return self._train()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            traceback.clear_frames(error.__traceback__)  # they hold the state; compiling for a GPU needs room too
        gc.collect()
        raise OutOfMemoryError(memory_advice(self.config))

    def _train(self) -> dict[str, Any]:
        mesh = make_mesh(self.config.mesh)
        config = check_kernels(self.config, mesh)
        shape = micro_batch(config, batch_devices(mesh))
        optimizer = make_optimizer(config, compute_dtype(config, mesh), mesh)
        step, eval_step = train_step(config, optimizer, mesh), make_eval_step(config, mesh)
        self.metrics = MetricsFile(self.directory / "metrics.jsonl", write=distributed.index() == 0)
        self.validate = functools.partial(  # (params, rows, byte_lengths) -> scores
            bits_per_byte, eval_step, batch_rows=shape[0], max_rows=config.train.eval_rows, mesh=mesh
        )
        # all at once: a number asked of the device in the loop would wait behind the step that is running
        self.rates = np.asarray(jax.vmap(make_schedule(config))(jnp.arange(config.train.steps)))
        peak = peak_flops(jax.devices()[0].device_kind)
        self.peak_flops = peak * jax.device_count() if peak else None
        self.checkpoints = Checkpoints(self.directory, config.train.keep_last, config.train.keep_every)
        bad: Sequence[int] = ()
        try:
            while True:
                with self._timed("start"):
                    if self.checkpoints.latest() is None:
                        state, facts = self.start(init_state(config, optimizer, mesh)), dict[str, Any]()
                    else:
                        state, facts = self.checkpoints.restore(abstract_state(config, optimizer, mesh))
                        say(f"  resumed from step {facts['step']} of {config.train.steps}")
                done = facts.pop("step", 0)
                left_out = facts.get("left_out") or [number for number in bad if number >= done]
                self.facts = {"tokens": done * config.train.batch_tokens, "seconds": 0.0, "bad_steps": 0} | facts
                self.facts.pop("format", None)
                self.facts |= {"left_out": left_out} if left_out else {}
                next_batch = self.next_batch
                if self.rows is not None:
                    next_batch = row_batches(config, self.rows, shape, done, mesh, left_out)
                assert next_batch, "a trainer has rows, or next_batch"
                try:
                    state = self._loop(state, done, step, next_batch)
                    break
                except NotFinite as fault:
                    if left_out or self.rows is None:
                        raise
                    bad = fault.steps
                    say(f"  steps {bad[0]} to {bad[-1]}: going back, their batches are left out", style="yellow")
                    self.checkpoints.wait()
            self.checkpoints.wait()
        finally:
            self.checkpoints.close()
        if distributed.index() == 0:
            plot(self.metrics.path, "loss", self.directory / "loss.png", self.title)
        if self.limit:
            self.facts |= {"timings": self.timings | {"written": self.checkpoints.seconds}}
        return self.facts | {"params_sha256": params_sha256(state.params)}

    def _loop(
        self, state: TrainState, done: int, step: Step, next_batch: Callable[[TrainState, int], StepBatch]
    ) -> TrainState:
        """Steps `done` to the last one, with evaluations, samples and checkpoints between them."""
        train = self.config.train
        self.metrics.truncate_to(done)
        self.bad_in_a_row, self.said = 0, time.perf_counter()
        curves = trackers(self.config, self.directory, done, write=self.metrics.write)
        with signals(self._stop), curves as self.track, progress(self.title, self.last, done) as bar:
            if done == 0 and self.score_start:
                self.facts["start"] = self._scores(state, 0)
            if self._evaluation_due(done):
                self._evaluate(state, done)  # the checkpoint was saved before its evaluation
                self._leave_if_stopped(done)
            self.clock = time.perf_counter()
            pending, ballot = None, distributed.Ballot()
            for index in range(done, self.last):
                batch = next_batch(state, index)
                state, metrics = step(state, batch.arrays)
                # read the step before while this one runs, so that logging never stalls the device
                if pending:
                    self._record(*pending, bar)
                pending, count = (index, metrics, batch), index + 1
                evaluate = self._evaluation_due(count)
                sample = self.sampler is not None and train.sample_every > 0 and count % train.sample_every == 0
                stop = ballot.cast(self.stop_signal)  # a signal to one process stops all of them after the same step
                if evaluate or sample or stop or count % train.checkpoint_every == 0:
                    self._record(*pending, bar)
                    pending = None
                    with self._timed("save"):
                        self.checkpoints.save(count, state, self.facts)  # before the evaluation, which could fail
                    self._leave_if_stopped(count)
                    if evaluate:
                        self._evaluate(state, count)
                    if sample and self.sampler:
                        with self._timed("sample"):
                            self.sampler(state, count)
                    self._leave_if_stopped(count)
                    self.clock = time.perf_counter()
        return state

    def _record(self, index: int, arrays: dict[str, Any], batch: StepBatch, bar: Task) -> None:
        """Write one finished step's metrics; `NotFinite` after too many in a row that were not."""
        values = {k: float(v) for k, v in jax.device_get(arrays).items()}
        now = time.perf_counter()
        seconds, self.clock = now - self.clock, now
        self.facts["seconds"] += seconds
        self.facts["tokens"] += batch.tokens
        rate = batch.tokens / seconds
        trained_flops = batch.trained * flops_per_token(self.config.model)
        mfu = trained_flops / seconds / self.peak_flops if self.peak_flops else None
        record = {
            "step": index,
            "tokens": self.facts["tokens"],
            "loss": values["loss"] if np.isfinite(values["loss"]) else None,
            "lr_mult": float(self.rates[index]),
            "grad_norm": values["grad_norm"] if np.isfinite(values["grad_norm"]) else None,
            "step_seconds": seconds,
            "tokens_per_second": rate,
            "mfu": mfu,
        } | batch.facts
        self.metrics.append(record)
        self.track(index, record)
        self._count_bad(index, bool(values["ok"]), bool(values["overflowed"]))
        shown = [f"{key} {record[key]:.3f}" for key in ("loss", "reward") if record.get(key) is not None]
        if "val_bpb" in self.facts:
            shown.insert(1, f"bpb {with_error(self.facts['val_bpb'], self.facts.get('val_bpb_se'), 3)}")
        status = "  ".join([*shown, f"{rate:,.0f} tok/s", *([f"MFU {mfu:.1%}"] if mfu else [])])
        if not animated() and now - self.said > SAY_SECONDS:
            self.said, steps = now, self.config.train.steps
            say(f"  step {index + 1:,} of {steps:,}  {status}  {(steps - index - 1) * seconds:.0f} s left")
        bar.advance()
        bar.update(status)

    def _count_bad(self, index: int, ok: bool, overflowed: bool) -> None:
        """Count skipped updates. float16 overflows now and then; its loss scale then becomes smaller."""
        self.bad_in_a_row = 0 if ok else self.bad_in_a_row + 1
        self.facts["bad_steps"] += not ok or overflowed
        if not ok:
            say(f"  step {index}: loss or gradient not finite, update skipped", style="yellow")
        if not ok and self.bad_in_a_row >= self.config.train.max_bad_steps:
            raise NotFinite(
                f"{self.title}: {self.bad_in_a_row} steps in a row were not finite (step {index}); "
                "start again with a lower optim.lr_scale in another --run-dir",
                range(index + 1 - self.bad_in_a_row, index + 1),
            )

    def _evaluation_due(self, count: int) -> bool:
        every = self.config.train.eval_every
        return count == self.last or (every > 0 and count > 0 and count % every == 0)

    def _evaluate(self, state: TrainState, count: int) -> None:
        """Put the scores into the facts and the newest record."""
        if scores := self._scores(state, count):
            self.facts |= scores
            self.metrics.amend(scores)
            self.track(count - 1, scores)  # of the step whose record has them

    def _scores(self, state: TrainState, count: int) -> dict[str, float]:
        """Held-out bits per byte and the stage's own evaluators; not counted as training time."""
        begin, scores = time.perf_counter(), dict[str, float]()
        if self.val_rows is not None:
            with self._timed("validate"):
                found = self.validate(state.params, self.val_rows, self.byte_lengths)
            scores |= {"val_bpb": found["bits_per_byte"], "val_loss": found["loss"]}
            scores |= {} if found["se"] is None else {"val_bpb_se": found["se"]}
        for evaluator in self.evaluators:
            with self._timed("evaluate"):
                scores |= dict(evaluator(state, count))
        self.facts["eval_seconds"] = self.facts.get("eval_seconds", 0.0) + time.perf_counter() - begin
        if scores:
            errors = {"val_bpb": scores.get("val_bpb_se")}
            shown = (f"{n} {with_error(v, errors.get(n))}" for n, v in scores.items() if n != "val_bpb_se")
            say(f"  step {count:>6,} of {self.config.train.steps:,}  {'  '.join(shown)}")
        return scores

    def _stop(self, number: int) -> None:
        self.stop_signal = number

    def _leave_if_stopped(self, count: int) -> None:
        """End the run after a signal to any process; the checkpoint of step `count` is being written."""
        if number := distributed.agree(self.stop_signal):
            self.checkpoints.wait()
            name = signal.Signals(number).name
            raise InterruptedRun(f"{self.title}: stopped by {name} after step {count}, saved; the same command resumes")

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timings.setdefault(name, []).append(time.perf_counter() - begin)


Step = Callable[[TrainState, Batch | None], tuple[TrainState, dict[str, Any]]]


def train_step(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> Step:
    """The update for a batch of rows of any length (layers choose their attention by it), or for none at all."""

    @functools.cache
    def compiled(length: int) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
        model = dataclasses.replace(config.model, seq_len=length)
        return make_train_step(dataclasses.replace(config, model=model), optimizer, mesh)

    def step(state: TrainState, batch: Batch | None) -> tuple[TrainState, dict[str, Any]]:
        if batch is None:
            nothing = {"loss": 0.0, "grad_norm": 0.0, "ok": 1.0, "overflowed": 0.0}
            return TrainState(state.params, advance_schedules(state.opt_state), state.step + 1), nothing
        return compiled(batch["inputs"].shape[-1])(state, batch)

    return step


def row_batches(
    config: Config, rows: Rows, shape: tuple[int, int], done: int, mesh: Mesh, left_out: Sequence[int] = ()
) -> Callable[[TrainState, int], StepBatch]:
    """Batches of `rows`, read ahead from step `done` on, without those of the numbers `left_out`.

    `shape`: rows of a micro-batch, micro-batches.
    """
    batches = Batches(rows, *shape, config.seed).iterate(done, batch_sharding(mesh), left_out)
    tokens = config.train.batch_tokens
    return lambda state, step: StepBatch(next(batches), tokens, tokens)


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


@contextlib.contextmanager
def signals(stop: Callable[[int], None]) -> Iterator[None]:
    """SIGTERM, SIGINT and SIGHUP (the terminal is gone) call `stop`; a second SIGINT interrupts at once.

    Main thread only; elsewhere nothing happens.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handler(number: int, frame: Any) -> None:
        stop(number)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # nohup's is left alone
        numbers.append(signal.SIGHUP)
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


def bits_per_byte(
    eval_step: Any, params: Any, rows: Rows, byte_lengths: np.ndarray, batch_rows: int, max_rows: int, mesh: Mesh
) -> dict[str, Any]:
    """Bits per byte of held-out rows, with standard error `se` and 95 % `interval`.

    Also mean `loss` (nats per target), `perplexity`, and the `targets` and `bytes` behind them. The error takes rows as
    drawn at random (variance of a ratio by linearization; None for a single row). Special tokens count neither way in
    bits per byte; loss and perplexity are over every weighted target. `eval_step` is from `make_eval_step`.
    """
    sums, by_row = {"all_nats": 0.0, "targets": 0.0}, []
    lengths = np.asarray(byte_lengths, np.int32)
    shape, sharding = (1, batch_rows, rows.meta["row_len"] - 1), batch_sharding(mesh)
    columns = own_columns(sharding, shape)
    for batch in val_batches(rows, batch_rows, max_rows, columns):
        global_batch = jax.make_array_from_process_local_data(sharding, batch, shape)
        found = jax.device_get(eval_step(params, global_batch, lengths))
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


def standard_error(amounts: np.ndarray, sizes: np.ndarray) -> float | None:
    """Of sum(amounts) / sum(sizes); rows without size (padding of the last batch) do not count."""
    amounts, sizes = amounts[sizes > 0], sizes[sizes > 0]
    n = len(sizes)
    if n < 2:
        return None
    ratio = amounts.sum() / sizes.sum()
    return float(math.sqrt(n / (n - 1) * np.square(amounts - ratio * sizes).sum()) / sizes.sum())


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """A value and its standard error as text: 1.5740 ± 0.0100."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def memory_advice(config: Config) -> str:
    """Say what did not fit and which `train.device_batch_rows` does, found by compiling the step with fewer rows.

    Several processes cannot compile one by one: they get the next smaller value, and the command that finds the best.
    """
    from .compiled import largest_rows, rows_and_accumulation  # loaded only for this failure
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
    if limit and smaller and not distributed.several():
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
        other = "by the compiled step it fits, so something else takes memory; " if fits else ""
        return f"{begin}; {other}take --set train.device_batch_rows={smaller}, or see what fits: python launch.py plan"
    return f"{begin}; {fits} is the most that fits: the same command with --set train.device_batch_rows={fits} goes on"
