"""What a run needs: memory and time on a target (command `plan`), disk, and the checks before training starts.

The train step is compiled for the target; memory, collectives and bytes moved are read from the compiled program.
Without the target's compiler the plan is arithmetic on the configuration (`"method": "analytic"`). Seconds are
arithmetic in both cases. Every assumption is part of the result.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax

from jaxchat.config import Config, replaced
from jaxchat.data.shards import cores, token_dtype
from jaxchat.data.sources import MARGIN, find_files, generator_of, parse, parse_hub, text_size
from jaxchat.errors import DataError, UsageError, command_line
from jaxchat.log import print_facts, say, size_text, waiting
from jaxchat.run_dir import TRAINED, RunDir, saved_steps
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh, micro_batch
from jaxchat.sizes import activation_bytes, count_parameters, flops_per_token, matmul_parameters
from jaxchat.tasks import parse_mixture_entry

from . import compiled, hlo
from .doctor import existing, unused_accelerator
from .targets import CPU, GPUS_PER_HOST, MEMORY_FRACTION, PRICES_OF, NoCompiler, Target, parse_target, target_devices

# Share of the activations that each `train.remat` keeps in bfloat16, from the tiers compiled for H100s; in float32
# "none" keeps all of them
KEPT = {"none": 0.43, "names": 0.43, "dots": 0.4, "full": 0.05}
# Of the peak that matrix products and attention kernels reach on an H100 or H200 (650 and 425 of 989 TFLOP/s), and of
# the data sheet's bandwidth that elementwise kernels do; measured on one H200: 770 to 800 TFLOP/s for one large product
# alone, 4.3 of 4.8 TB/s for a copy. They turn what a compiled program does into seconds.
PRODUCT_SHARE, ATTENTION_SHARE, BANDWIDTH_SHARE = 0.66, 0.43, 0.8
FP8_SHARE = 0.86  # of the products' FLOPs that train.matmul = "fp8" gives 8-bit operands
DEPTHS = range(2, 49)  # that --budget and --hours try
WRITTEN = 0.93  # bytes of a checkpoint over those of its float32 arrays: Orbax compresses (nano: 47.8 MB of 51.9)
HUB_TEXT = 2.5  # bytes of text in a byte of a compressed hub file (nanochat: 250 M characters in 100 MB)
# Conversations of a data set where the mixture gives no count, and tokens of one. The generated ones and those of
# packages were counted with nano's tokenizer; the others (rows from their cards) are estimates.
CONVERSATIONS = {
    "smoltalk": (460_341, 850), "mmlu": (99_842, 350), "gsm8k": (7_473, 200), "spelling_bee": (10_000, 66),
    "identity": (1_000, 37), "word_problems": (4_000, 56), "chitchat": (7_168, 133), "chatterbot": (757, 59),
    "chatterbot_korean": (124, 82), "lottery": (20_000, 184), "arithmetic": (1_000, 14), "arc_easy": (2_251, 100),
    "arc_challenge": (1_119, 100),
}  # fmt: skip
UNKNOWN = (1_000, 200)  # of any other data set
DATASETS = {"smoltalk": 1_000_000_000, "core": 200_000_000, "mmlu": 100_000_000}  # downloads, about
LOG_BYTES, METRICS_BYTES = 3_000_000, 250  # reports, samples and plots of a run; `metrics.jsonl`, a step
LONGEST_HOURS = 48.0  # on a CPU, without train.allow_slow

Plan = dict[str, Any]  # the object that `--json` prints


# The command


def plan(config: Config, target: str, as_json: bool) -> Plan:
    """Print the plan of a resolved configuration on a target, and return it."""
    result = best_plan(config, parse_target(target))
    show(result, as_json)
    return result


def best_plan(config: Config, target: Target) -> Plan:
    """Return the compiled plan, or the estimate where the target's compiler is not installed."""
    try:
        return compile_plan(config, target)
    except NoCompiler as missing:
        say(f"{missing}; this is the analytic estimate")
        return estimate(config, target)


def plan_budget(given: Config, target: str, budget: str | None, hours: float | None, as_json: bool) -> Plan:
    """Print and return the plan of the deepest model that both limits allow.

    Args:
      given: not resolved: every depth derives its own width, batch and steps.
      budget: `100usd`, or just the number.
    """
    where, usd = parse_target(target), math.inf
    if hours is not None and not 0 < hours < math.inf:
        raise UsageError(f"--hours {hours:g}: give a number of hours above 0")
    if budget is not None:
        amount = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*(?:usd|\$)?", budget.strip().lower())
        if not amount or not float(amount[1]):
            raise UsageError(f"--budget {budget}: give an amount such as 100usd")
        usd = float(amount[1])
        if not where.chip.price:
            raise UsageError(f"--budget {budget}: {where.chip.name} has no price; give --hours, or another --target")

    def allowed(result: Plan) -> bool:
        return result["fits"] and result["hours_estimate"] <= (hours or math.inf) and result["usd_estimate"] <= usd

    for depth in reversed(DEPTHS):
        try:
            config = resolve(replaced(given, "model", depth=depth))
            while not (result := estimate(config, where))["fits"] and config.train.device_batch_rows > 1:
                config = replaced(config, "train", device_batch_rows=config.train.device_batch_rows // 2)
        except UsageError:  # shapes set by hand that this depth cannot have, or a batch that the devices cannot share
            continue
        if not allowed(result):
            continue
        result = best_plan(config, where)
        if not result["fits"] and (rows := result["largest_device_batch_rows"]):
            config = replaced(config, "train", device_batch_rows=rows)
            result = best_plan(config, where)
        if allowed(result):
            break
        say(f"{depth} layers do not fit {target}, or exceed the limits once compiled")
    else:
        limits = " and ".join(f"--{name} {n}" for name, n in (("budget", budget), ("hours", hours)) if n is not None)
        raise UsageError(f"{limits}: not enough on {target} for any model that fits there")
    command = command_line(f"--tier {given.tier}")
    if depth != given.model.depth:
        command += f" --set model.depth={depth} --run-dir runs/d{depth}"
    if config.train.device_batch_rows != given.train.device_batch_rows:
        command += f" --set train.device_batch_rows={config.train.device_batch_rows}"
    result |= {"command": command}
    show(result, as_json)
    if not as_json:
        print(f"To run it:\n    {command}")
    return result


def show(result: Plan, as_json: bool) -> None:
    """Print a plan on standard output, as one JSON object or as a table of it."""
    if as_json:
        print(json.dumps(result))
    else:
        first = ("tier", "target", "fits", "hours_estimate", "usd_estimate", "peak_bytes_per_device", "device_bytes")
        names = dict.fromkeys([*first, *(name for name in result if name != "assumptions"), "assumptions"])
        print_facts({name: result[name] for name in names})


def estimate(config: Config, target: Target) -> Plan:
    """Return the plan from arithmetic alone, for pure data parallelism."""
    count, item = count_parameters(config.model), 4 if target.chip.platform == "cpu" else 2
    all_rows, accumulate = micro_batch(config, target.devices)
    rows = all_rows // target.devices
    # masters, gradients and moments in float32, all shared by the devices; the cast copy whole
    arguments = 4 * (count.total + moments(config)) // target.devices
    kept = 1.0 if item == 4 and config.train.remat == "none" else KEPT[config.train.remat]
    activations = round(kept * activation_bytes(config.model, rows, item))
    temporary = 4 * count.total // target.devices + item * count.total + activations
    sent = {"all-gather": 1, "reduce-scatter": accumulate} if target.devices > 1 else {}
    links = [
        hlo.Collective(kind, item * count.total, times, tuple(range(target.devices))) for kind, times in sent.items()
    ]
    return run_figures(config, target, rows, accumulate, links) | {
        "fits": arguments + temporary < MEMORY_FRACTION * target.chip.device_bytes,
        "peak_bytes_per_device": arguments + temporary,
        "argument_bytes": arguments,
        "temp_bytes": temporary,
        "compile_seconds": None,
        "method": "analytic",
    }


def compile_plan(config: Config, target: Target) -> Plan:
    """Return the plan from the step, compiled with the configured rows and with those that may fit.

    Raises `NoCompiler` without the target's compiler, `UsageError` for a mesh or batch that cannot be.
    """
    begin, limit = time.perf_counter(), target.chip.device_bytes
    mesh = make_mesh(config.mesh, target_devices(target))
    rows, accumulate = compiled.rows_and_accumulation(config, mesh)
    steps: dict[int, compiled.Step] = {}

    def peak_of(n: int) -> int:
        if n not in steps:
            times = rows * accumulate // n
            of = f"{n} rows a device x {times} micro-batches"
            with waiting(f"compiling the step of {config.tier} for {target.text}: {of}"):
                steps[n] = compiled.compile_step(config, mesh, n, times)
        return steps[n].peak

    peak, largest = peak_of(rows), compiled.largest_rows(config, mesh, limit, peak_of)
    step = steps[rows]
    text = step.text or (steps[largest].text if largest else "")  # "": refused for its memory
    program = hlo.Program(text)
    moved, compute = program.bytes_by_kind.total(), compute_seconds(config, target, program)
    return run_figures(config, target, rows, accumulate, program.collectives(mesh.size), compute) | {
        "bytes_per_step_per_device": moved,
        "bytes_by_kind": dict(program.bytes_by_kind),
        "memory_seconds": moved / target.chip.memory_rate,
        "fits": peak <= MEMORY_FRACTION * limit,
        "peak_bytes_per_device": peak,
        "argument_bytes": step.arguments,
        "temp_bytes": step.temp,
        "compile_seconds": step.seconds,
        "method": "compiled",
        "mesh": dict(mesh.shape),
        "memory": step.parts | {"temporaries": step.temp},
        "largest_device_batch_rows": largest,
        "peak_bytes_by_rows": {n: steps[n].peak for n in sorted(steps)},
        "plan_seconds": time.perf_counter() - begin,
    }


def compute_seconds(config: Config, target: Target, program: hlo.Program) -> float | None:
    """Return the seconds of a compiled step without its collectives on an NVIDIA GPU; None elsewhere.

    Products and attention, with what `train.remat` repeats, and the bytes of everything else come one after the other.
    A TPU keeps arrays on the chip that the text does not tell apart, a CPU in its caches.
    """
    if target.chip.platform != "cuda":
        return None
    tokens = config.train.batch_tokens / target.devices
    products = 6 * matmul_parameters(config.model) * tokens
    attention = flops_per_token(config.model) * tokens - products
    if config.train.matmul == "fp8":
        products *= 1 - FP8_SHARE / 2  # 8-bit ones run twice as fast
    seconds = (products / PRODUCT_SHARE + attention / ATTENTION_SHARE) / target.chip.peak
    seconds *= 4 / 3 if config.train.remat == "full" else 1
    return seconds + program.bytes_by_kind["other"] / (BANDWIDTH_SHARE * target.chip.memory_rate)


def run_figures(
    config: Config,
    target: Target,
    rows: int,
    accumulate: int,
    links: list[hlo.Collective],
    compute: float | None = None,
) -> Plan:
    """Return the part of a plan that follows from the configuration and the step's collectives: time and cost.

    `compute`: seconds of a compiled step; None: products take the MFU that is assumed for such devices. Collectives
    take the speed of the links, nothing overlapped.
    """
    chip, tokens = target.chip, config.train.steps * config.train.batch_tokens
    by_kind: dict[str, dict[str, int]] = {}
    link_seconds = 0.0
    for c in links:
        entry = by_kind.setdefault(c.kind, {"count": 0, "bytes": 0})
        entry["count"] += c.count
        entry["bytes"] += c.count * c.bytes
        hosts, rate = {device // GPUS_PER_HOST for device in c.group}, chip.link_rate
        if chip.gpu and len(hosts) > 1:  # over the network cards of all its members in one host together
            rate = min(rate, chip.network_rate * len(c.group) / len(hosts))
        link_seconds += c.count * c.sent_bytes / rate
    disk = {part.name: part.bytes for part in disk_parts(config)}
    ideal = flops_per_token(config.model) * config.train.batch_tokens / target.devices / chip.peak
    compute = compute or ideal / chip.mfu
    mfu = ideal / compute
    hours = (compute + link_seconds) * config.train.steps / 3600
    return {
        "tier": config.tier,
        "target": target.text,
        "devices": target.devices,
        "depth": config.model.depth,
        "params": count_parameters(config.model).total,
        "tokens": tokens,
        "steps": config.train.steps,
        "flops_total": flops_per_token(config.model) * tokens,
        "flops_per_token": flops_per_token(config.model),
        "device_bytes": chip.device_bytes,
        "device_batch_rows": rows,
        "grad_accum": accumulate,
        "collectives": by_kind,
        "sent_bytes_per_device": sum(c.count * c.sent_bytes for c in links),
        "compute_seconds_estimate": compute,
        "collective_seconds_estimate": link_seconds,
        "step_seconds_estimate": compute + link_seconds,
        "hours_estimate": hours,
        "usd_estimate": hours * target.devices * chip.price,
        "mfu_assumed": mfu,
        "disk_bytes": sum(disk.values()),
        "disk": disk,
        "assumptions": f"MFU {mfu:.0%} of {chip.peak / 1e12:,.4g} TFLOP/s; links {chip.link_rate / 1e9:.4g} GB/s, "
        f"between hosts {chip.network_rate / 1e9:.4g} GB/s a device, nothing overlapped; {chip.price:g} USD per device "
        f"and hour ({PRICES_OF}); {MEMORY_FRACTION:.0%} of the memory usable; without evaluation, checkpoints and "
        "fine-tuning",
    }


# Disk


@dataclass(frozen=True)
class Part:
    """Bytes in one folder of the run directory (`place` "run") or of `--cache-dir` ("cache"), and who writes them."""

    name: str
    bytes: int
    stages: tuple[str, ...]
    place: str = "run"
    folder: str = ""  # "": nothing there can be counted as written before


def disk_parts(config: Config) -> list[Part]:
    """Return everything that the run of a resolved configuration writes, at the moment when it takes most."""
    item, text, train = token_dtype(config.model.vocab_size).itemsize, text_bytes(config), config.train
    tokens = round(text / bytes_per_token(config.model.vocab_size))
    hub = [(parse_hub(source)[0], share) for source, share in parse(config.data.source) if source.startswith("hf:")]
    download = 0 if config.data.mirror else max(0, config.data.text_bytes) * MARGIN / HUB_TEXT
    folder = f"data/{hub[0][0].replace('/', '--')}" if len(hub) == 1 else "data"
    one, more, checkpoints = checkpoint_bytes(config), False, list[Part]()
    steps = stage_steps(config)
    for place, stage in TRAINED.items():
        every, last = config.rl.checkpoint_every if stage == "rl" else train.checkpoint_every, steps[stage]
        saves = [*range(every, last, every), last] if last else []
        older, newest = saves[: -train.keep_last], saves[-train.keep_last :]
        kept = len(newest) + sum(train.keep_every > 0 and step % train.keep_every == 0 for step in older)
        checkpoints.append(Part(f"checkpoints, {place}", one * kept, (stage,), folder=place))
        more |= len(saves) > kept
    weights = 2 if config.export.dtype == "bfloat16" else 4
    exported = sum(1.4 if name == "html" else weights for name in config.export.formats)  # bytes a parameter
    parameters = count_parameters(config.model).total
    named = {parse_mixture_entry(entry)[0] for entry in config.sft.mixture} | set(config.eval.exams)
    datasets = 0 if config.tasks.data_dir else sum(size for name, size in DATASETS.items() if name in named)
    parts = [
        Part("text", round(download * sum(share for _, share in hub)), ("tokenizer", "prepare"), "cache", folder),
        Part("conversations and exams", datasets, ("sft", "rl", "eval"), "cache", "tasks"),
        Part("token shards", tokens * item, ("prepare",), folder="data/tokens"),
        Part("rows", tokens * item, ("prepare",), folder="data/rows"),
        Part("conversation rows", sft_tokens(config) * (item + 1), ("sft",), folder="data/sft"),
        *checkpoints,
        Part("a checkpoint being written", one * more, ("pretrain", "sft", "rl")),
        Part("exports", round(exported * parameters), ("export",), folder="export"),
        Part("logs and reports", LOG_BYTES + METRICS_BYTES * train.steps, ("pretrain", "eval", "report")),
    ]
    return [part for part in parts if part.bytes]


def moments(config: Config) -> int:
    """Return the optimizer's moments: two for each parameter with Adam, one with Muon."""
    count = count_parameters(config.model)
    return 2 * count.total - (count.trunk if config.optim.kind == "muon" else 0)


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint: parameters and moments in float32."""
    return round(WRITTEN * 4 * (count_parameters(config.model).total + moments(config)))


def bytes_per_token(vocab_size: int) -> float:
    """Return the bytes of text in a token, about: 3.75 with 4,096 tokens (chitchat), 4.6 with 32,768 (web text)."""
    return max(1.5, 3.75 + (4.6 - 3.75) / 3 * math.log2(vocab_size / 4096))


def text_bytes(config: Config) -> float:
    """Return the bytes of the pretraining text, about; of hub sources without `data.text_bytes` nothing is known."""
    total = 0.0
    for source, share in parse(config.data.source):
        if source.startswith("hf:"):
            total += max(0, config.data.text_bytes) * share * MARGIN
        else:
            generator = generator_of(source)
            total += generator.size(source) if generator else files_bytes(source, config.data.column)
    return total


def files_bytes(source: str, column: str = "text") -> int:
    """Return the bytes of text in the files of a source; 0 where they cannot be read, which is reported later."""
    with contextlib.suppress(DataError):
        return sum(text_size(path, column) for path in find_files(source))
    return 0


def sft_tokens(config: Config) -> int:
    """Return the tokens of SFT's conversations, repeated as the mixture says."""
    total = 0.0
    for entry in config.sft.mixture:
        name, count, epochs = parse_mixture_entry(entry)
        if name.startswith("files:"):
            total += epochs * files_bytes(name) / bytes_per_token(config.model.vocab_size)
        else:
            known, tokens = CONVERSATIONS.get(name, UNKNOWN)
            total += epochs * (count or known) * tokens
    return round(total)


def rl_steps(config: Config) -> int:
    """Return RL's steps, from the questions where `rl.steps` gives none."""
    if not (config.rl.environment and config.sft.mixture):
        return 0
    questions = CONVERSATIONS.get(config.rl.environment, UNKNOWN)[0]
    return config.rl.steps if config.rl.steps > 0 else max(1, round(questions / config.rl.prompts))


def stage_steps(config: Config) -> dict[str, int]:
    """Return the optimizer steps of every trained stage, about: SFT's and RL's follow from their data."""
    sft_steps = -(-round(sft_tokens(config) * config.sft.epochs) // config.sft.batch_tokens)
    return {"pretrain": config.train.steps, "sft": sft_steps, "rl": rl_steps(config)}


def used(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process removes files meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


# Before a run trains


def before_training(config: Config, run: RunDir, left: Collection[str]) -> None:
    """Name an accelerator that JAX does not use; stop where training takes days on a CPU or a disk is too small.

    `left`: the stages that are not done. Raises `UsageError` for the time and `DataError` for the disk.
    """
    if not left:
        return
    if line := unused_accelerator():
        say(f"  {line}", style="yellow")
    check_time(config, run, left, line)
    check_room(config, run, left)


def check_room(config: Config, run: RunDir, left: Collection[str]) -> None:
    """Raise `DataError` where a file system has less room than the stages `left` have still to write."""
    places = {"run": run.root, "cache": Path(config.data.cache_dir).expanduser()}
    needs: dict[int, list[tuple[Part, int]]] = {}  # by file system
    for part in disk_parts(config):
        if any(stage in left for stage in part.stages):
            root = places[part.place]
            written = used(root / part.folder) if part.folder else 0
            needs.setdefault(os.stat(existing(root)).st_dev, []).append((part, max(0, part.bytes - written)))
    for parts in needs.values():
        total = sum(size for _, size in parts)
        where = sorted({part.place for part, _ in parts}, reverse=True)
        free = shutil.disk_usage(existing(places[where[0]])).free
        if total > free:
            listed = ", ".join(f"{part.name} {size_text(size)}" for part, size in parts if size > total / 50)
            flags = " or ".join({"run": "--run-dir", "cache": "--cache-dir"}[place] for place in where)
            raise DataError(
                f"{' and '.join(str(places[place]) for place in where)}: {size_text(total)} are needed and "
                f"{size_text(free)} are free ({listed}); take {flags} on a larger disk, lower train.keep_last, or set "
                "export.formats=[]"
            )


def check_time(config: Config, run: RunDir, left: Collection[str], line: str | None = None) -> None:
    """Raise `UsageError` where the stages `left` would train for more than two days on this CPU.

    The steps before a stage's newest checkpoint are done and do not count.
    """
    if config.train.allow_slow or jax.default_backend() != "cpu":
        return
    step_tokens = {
        "pretrain": config.train.batch_tokens,
        "sft": config.sft.batch_tokens,  # sampling for RL takes a third of the FLOPs of training
        "rl": config.rl.prompts * config.rl.samples * config.rl.max_tokens * 4 / 3,
    }
    tokens = 0.0
    for folder, stage in TRAINED.items():
        if stage in left:
            done = max(saved_steps(run.stage(folder)), default=0)
            tokens += max(0, stage_steps(config)[stage] - done) * step_tokens[stage]
    rate = CPU.peak * cores() * jax.process_count() * CPU.mfu
    hours = flops_per_token(config.model) * tokens / rate / 3600
    if hours > LONGEST_HOURS:
        raise UsageError(
            f"{config.tier}: training would take about {hours / 24:,.0f} days on this CPU ({rate / 1e9:,.0f} GFLOP/s). "
            f"{f'{line}. Or take' if line else 'Take'} a machine with a GPU or TPU (plan --target h100:8 says what it "
            "needs), a smaller tier, or --set train.allow_slow=true"
        )
