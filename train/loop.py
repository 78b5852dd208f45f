"""The training loop. Stages differ in where a step's batch comes from, not in how they train."""

from __future__ import annotations

import contextlib
import functools
import gc
import math
import signal
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
from jaxchat.config import Config, replaced
from jaxchat.data.loader import Batches, own_columns, val_batches
from jaxchat.data.packing import Rows
from jaxchat.errors import DivergedError, InterruptedRun, JaxchatError, OutOfMemoryError
from jaxchat.log import MetricsFile, Task, animated, note, progress, read_metrics, say
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

from . import plausible
from .curves import plot, trackers
from .doctor import available_memory, memory_peak

Z95 = 1.959963984540054  # standard deviations on each side of a 95 % interval
SAY_SECONDS = 30.0  # between lines of progress where there is no terminal to draw on
Evaluator = Callable[[TrainState, int], Iterable[tuple[str, float]]]
Step = Callable[[TrainState, Batch | None], tuple[TrainState, dict[str, Any]]]


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


@dataclass
class Trainer:
    """Trains one stage: `config.train.steps` updates on `rows`, or on what `next_batch(state, step)` returns.

    `start` maps a state with blank weights to the one to train from (SFT loads the base model there). Checkpoints,
    metrics and the loss curve go to `directory`.
    """

    config: Config
    directory: Path
    byte_lengths: np.ndarray  # (V,) int32, 0 for special tokens
    rows: Rows | None = None
    val_rows: Rows | None = None
    next_batch: Callable[[TrainState, int], StepBatch] | None = None
    start: Callable[[TrainState], TrainState] | None = None  # None: random weights
    origin: dict[str, Any] = field(default_factory=dict)  # facts from the start on; `start` may add to them
    evaluators: Sequence[Evaluator] = ()
    score_start: bool = False  # evaluate before the first step too; the scores are facts["start"]
    # before the first step, every `train.sample_every` steps, after the last; never where that is 0
    sampler: Callable[[TrainState, int], None] | None = None
    title: str = "train"
    limit: int = 0  # stop after so many steps as if they were all, with their `timings` in the facts; 0: never

    def __post_init__(self) -> None:
        steps = self.config.train.steps
        self.last = min(steps, self.limit or steps)
        self.timings: dict[str, list[float]] = {}  # seconds of every start, save, validate, evaluate, sample
        self.facts: dict[str, Any] = {}
        self.bad = range(0)  # the newest steps, if their loss or gradient was not finite
        self.stop_signal = 0

    def run(self) -> dict[str, Any]:
        """Train to the last step, resuming from the newest whole checkpoint; returns the stage's facts.

        After too many steps in a row that are not finite it goes back to the newest checkpoint, once, and leaves their
        batches out from then on. Raises `DivergedError` the second time, `InterruptedRun` after a signal (a checkpoint
        is saved), and `OutOfMemoryError` with the batch size that fits.
        """
        sizes = (None if rows is None else len(rows) for rows in (self.rows, self.val_rows))
        warnings = plausible.warn(self.title, plausible.of_steps(self.title, self.config, *sizes))
        try:
            facts = self._train()
            if self.rows is not None:
                losses = [record["loss"] for record in read_metrics(self.metrics.path)]
                warnings += plausible.warn(self.title, plausible.of_losses(facts, losses))
            return facts | {"warnings": warnings}
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
        with contextlib.closing(self.checkpoints):
            while True:
                with self._timed("start"):
                    if self.checkpoints.latest() is None:
                        state = init_state(config, optimizer, mesh, blank=self.start is not None)
                        state, facts = self.start(state) if self.start else state, dict(self.origin)
                    else:
                        state, facts = self.checkpoints.restore(abstract_state(config, optimizer, mesh))
                        say(f"  resumed from step {facts['step']} of {config.train.steps}")
                done = facts.pop("step", 0)
                left_out = facts.get("left_out") or [number for number in self.bad if number >= done]
                self.facts = {"tokens": done * config.train.batch_tokens, "seconds": 0.0, "bad_steps": 0} | facts
                self.facts.pop("format", None)
                self.facts |= {"left_out": left_out} if left_out else {}
                batches: Iterator[Batch] = iter(())
                if self.rows is not None:
                    data = Batches(self.rows, *shape, config.seed, steps=config.train.steps)
                    batches = data.iterate(done, batch_sharding(mesh), left_out)
                try:
                    state = self._loop(state, done, step, batches)
                    break
                except DivergedError:
                    if left_out or self.rows is None:
                        raise
                    first, last = self.bad[0], self.bad[-1]
                    say(f"  steps {first} to {last}: going back, their batches are left out", style="yellow")
                    self.checkpoints.wait()
            self.checkpoints.wait()
        if distributed.index() == 0:
            plot(self.metrics.path, "loss", self.directory / "loss.png", self.title)
        if self.limit:
            self.facts |= {"timings": self.timings | {"written": self.checkpoints.seconds}}
        return self.facts | {"params_sha256": params_sha256(state.params)}

    def _loop(self, state: TrainState, done: int, step: Step, batches: Iterator[Batch]) -> TrainState:
        """Run steps `done` to the last one, with evaluations, samples and checkpoints between them."""
        train = self.config.train

        def evaluation_due(count: int) -> bool:
            return count == self.last or (train.eval_every > 0 and count > 0 and count % train.eval_every == 0)

        self.metrics.truncate_to(done)
        note(folder=self.directory.name, steps=self.config.train.steps, step=done)
        self.bad, self.said = range(0), time.perf_counter()
        curves = trackers(self.config, self.directory, done, write=self.metrics.write)
        with self._signals(), curves as self.track, progress(self.title, self.last, done) as bar:
            if (done == 0 and self.score_start) or evaluation_due(done):  # a checkpoint is saved before its evaluation
                self._evaluate(state, done)
            if done == 0:
                self._sample(state, 0)
            self.clock = time.perf_counter()
            pending, ballot = None, distributed.Ballot()
            for index in range(done, self.last):
                if self.next_batch:
                    batch = self.next_batch(state, index)
                else:
                    batch = StepBatch(next(batches), train.batch_tokens, train.batch_tokens)
                state, metrics = step(state, batch.arrays)
                # read the step before while this one runs, so that logging never stalls the device
                if pending:
                    self._record(*pending, bar)
                pending, count = (index, metrics, batch), index + 1
                evaluate = evaluation_due(count)
                sample = self.sampler is not None and train.sample_every > 0 and count % train.sample_every == 0
                stop = ballot.cast(self.stop_signal)  # a signal to one process stops all of them after the same step
                if evaluate or sample or stop or count % train.checkpoint_every == 0:
                    self._record(*pending, bar)
                    pending = None
                    with self._timed("save"):
                        self.checkpoints.save(count, state, self.facts)  # before the evaluation, which could fail
                    note(f"{self.title}: checkpoint of step {count}", checkpoint=count, memory_bytes=memory_peak())
                    if evaluate and not stop:
                        self._evaluate(state, count)
                    if (sample or count == self.last) and not stop:
                        self._sample(state, count)
                    if stop or (self.stop_signal and not distributed.several()):
                        self._leave(stop or self.stop_signal, count)
                    self.clock = time.perf_counter()
            if self.stop_signal:
                self._leave(self.stop_signal, self.last)
        return state

    def _record(self, index: int, arrays: dict[str, Any], batch: StepBatch, bar: Task) -> None:
        """Write one finished step's metrics; `DivergedError` after too many in a row that were not finite."""
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
        self.facts["bad_steps"] += not values["ok"] or bool(values["overflowed"])  # the latter: float16's loss scale
        self.bad = range(0) if values["ok"] else range(self.bad.start if self.bad else index, index + 1)
        if self.bad:
            say(f"  step {index}: loss or gradient not finite, update skipped", style="yellow")
        if self.bad and len(self.bad) >= self.config.train.max_bad_steps:
            raise DivergedError(
                f"{self.title}: {len(self.bad)} steps in a row were not finite (step {index}); "
                "start again with a lower optim.lr_scale in another --run-dir"
            )
        shown = [f"{key} {record[key]:.3f}" for key in ("loss", "reward") if record.get(key) is not None]
        if "val_bpb" in self.facts:
            shown.insert(1, f"bpb {with_error(self.facts['val_bpb'], self.facts.get('val_bpb_se'), 3)}")
        status = "  ".join([*shown, f"{rate:,.0f} tok/s", *([f"MFU {mfu:.1%}"] if mfu else [])])
        if not animated() and now - self.said > SAY_SECONDS:
            self.said, steps = now, self.config.train.steps
            say(f"  step {index + 1:,} of {steps:,}  {status}  {(steps - index - 1) * seconds:.0f} s left", keep=False)
        bar.advance()
        bar.update(status)

    def _evaluate(self, state: TrainState, count: int) -> None:
        """Put held-out bits per byte and the evaluators' scores into the facts and the newest record."""
        begin, scores = time.perf_counter(), dict[str, float]()
        if self.val_rows is not None:
            with self._timed("validate"):
                result = self.validate(state.params, self.val_rows, self.byte_lengths)
            scores |= {"val_bpb": result["bits_per_byte"], "val_loss": result["loss"]}
            scores |= {} if result["se"] is None else {"val_bpb_se": result["se"]}
        for evaluator in self.evaluators:
            with self._timed("evaluate"):
                scores |= dict(evaluator(state, count))
        self.facts["eval_seconds"] = self.facts.get("eval_seconds", 0.0) + time.perf_counter() - begin
        if not scores:
            return
        errors = {"val_bpb": scores.get("val_bpb_se")}
        shown = (f"{n} {with_error(v, errors.get(n))}" for n, v in scores.items() if n != "val_bpb_se")
        say(f"  step {count:>6,} of {self.config.train.steps:,}  {'  '.join(shown)}")
        if count == 0:
            self.facts["start"] = scores
        else:
            self.facts |= scores
            self.metrics.amend(scores)
            self.track(count - 1, scores)  # of the step whose record has them

    def _sample(self, state: TrainState, count: int) -> None:
        if self.sampler and self.config.train.sample_every > 0:
            with self._timed("sample"):
                self.sampler(state, count)

    def _leave(self, number: int, count: int) -> None:
        """End the run after a signal to any process; the checkpoint of step `count` is being written."""
        self.checkpoints.wait()
        name = signal.Signals(number).name
        raise InterruptedRun(f"{self.title}: stopped by {name} after step {count}, saved; the same command resumes")

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Note SIGTERM, SIGINT and SIGHUP (the terminal is gone); a second SIGINT interrupts at once."""

        def handler(number: int, frame: Any) -> None:
            self.stop_signal = number
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

    @contextlib.contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.timings.setdefault(name, []).append(time.perf_counter() - begin)


def train_step(config: Config, optimizer: optax.GradientTransformation, mesh: Mesh) -> Step:
    """Return the update for a batch of rows of any length (layers choose their attention by it), or for none at all."""

    @functools.cache
    def compiled(length: int) -> Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]]:
        return make_train_step(replaced(config, "model", seq_len=length), optimizer, mesh)

    def step(state: TrainState, batch: Batch | None) -> tuple[TrainState, dict[str, Any]]:
        if batch is None:
            nothing = {"loss": 0.0, "grad_norm": 0.0, "ok": 1.0, "overflowed": 0.0}
            return TrainState(state.params, advance_schedules(state.opt_state), state.step + 1), nothing
        return compiled(batch["inputs"].shape[-1])(state, batch)

    return step


def continued(run: RunDir, stage: str, state: TrainState) -> TrainState:
    """Return `state` with the parameters and optimizer moments that `stage` ended with; its schedules stay at step 0.

    `DataError` where the newest checkpoint is damaged or is not what the stage recorded.
    """
    with contextlib.closing(Checkpoints(run.stage(stage))) as checkpoints:
        before, _ = checkpoints.restore(state, go_back=False)
    check_recorded(run, stage, before.params)
    return TrainState(before.params, carry_moments(before.opt_state, state.opt_state), state.step)


def bits_per_byte(
    eval_step: Any, params: Any, rows: Rows, byte_lengths: np.ndarray, batch_rows: int, max_rows: int, mesh: Mesh
) -> dict[str, Any]:
    """Return bits per byte of held-out rows, with standard error `se` and 95 % `interval`.

    Also mean `loss` (nats per target), `perplexity`, and the `targets` and `bytes` behind them. Special tokens count
    neither way in bits per byte; loss and perplexity are over every weighted target. `eval_step`: see `make_eval_step`.
    """
    sums, by_row = {"all_nats": 0.0, "targets": 0.0}, []
    lengths = np.asarray(byte_lengths, np.int32)
    shape, sharding = (1, batch_rows, rows.meta["row_len"] - 1), batch_sharding(mesh)
    columns = own_columns(sharding, shape)
    for batch in val_batches(rows, batch_rows, max_rows, columns):
        global_batch = jax.make_array_from_process_local_data(sharding, batch, shape)
        result = jax.device_get(eval_step(params, global_batch, lengths))
        sums = {name: total + float(result[name]) for name, total in sums.items()}
        by_row.append(np.stack([result["nats"], result["bytes"]]).astype(np.float64))
    nats, sizes = np.concatenate(by_row, axis=1)
    score = nats.sum() / math.log(2) / max(sizes.sum(), 1.0)
    bits, real = nats[sizes > 0] / math.log(2), sizes[sizes > 0]  # without the padding of the last batch
    error = ratio_error(bits, real)
    interval = None if error is None else (float(score - Z95 * error), float(score + Z95 * error))
    loss = sums["all_nats"] / max(sums["targets"], 1.0)
    return {
        "bits_per_byte": float(score),
        "se": error,
        "interval": interval,
        "loss": loss,
        "perplexity": math.exp(min(loss, 700.0)),
        "targets": int(sums["targets"]),
        "bytes": int(sizes.sum()),
    }


def ratio_error(values: np.ndarray, sizes: np.ndarray) -> float | None:
    """Return the standard error of sum(values) / sum(sizes), both (n,), of pairs drawn at random; None for one pair.

    Variance of a ratio by linearization.
    """
    n = len(values)
    if n < 2:
        return None
    residuals = np.square(values - values.sum() / sizes.sum() * sizes).sum()
    return float(math.sqrt(n / (n - 1) * residuals) / sizes.sum())


def with_error(value: float, error: float | None, digits: int = 4) -> str:
    """Return a value and its standard error as text: 1.5740 ± 0.0100."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")


def memory_advice(config: Config) -> str:
    """Say what did not fit and which `train.device_batch_rows` does, found by compiling the step with fewer rows.

    Where that cannot be found (several processes cannot compile one by one) it is the next smaller divisor.
    """
    from .compiled import largest_rows, rows_and_accumulation  # loaded only for this failure
    from .targets import MEMORY_FRACTION

    mesh, device = make_mesh(config.mesh), jax.local_devices()[0]
    rows, accumulate = rows_and_accumulation(config, mesh)
    fits = max((n for n in range(1, rows) if rows * accumulate % n == 0), default=0)
    limit = (device.memory_stats() or {}).get("bytes_limit")
    if limit is None and (free := available_memory()) is not None:
        limit = int(MEMORY_FRACTION * free) // jax.local_device_count()
    if limit and fits and not distributed.several():
        say("  out of device memory; compiling smaller batches to find the largest that fits")
        with contextlib.suppress(JaxchatError, jax.errors.JaxRuntimeError):  # the next smaller one is better than none
            fits = min(fits, largest_rows(config, mesh, int(limit / MEMORY_FRACTION)))
    size = f" ({limit / 2**30:.1f} GiB)" if limit else ""
    advice = "no smaller batch fits: set mesh.fsdp or train.remat=full, or take a smaller model"
    if fits:
        advice = f"add --set train.device_batch_rows={fits} to the same command"
    return f"out of device memory{size} with train.device_batch_rows={rows}; {advice}"
