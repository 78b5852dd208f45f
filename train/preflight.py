"""Before a run trains: the disk and the time that it takes, and accelerators that JAX does not use."""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from jaxchat.config import Config
from jaxchat.data.files import find_files, text_size
from jaxchat.data.hub import MARGIN
from jaxchat.data.hub import parse as parse_hub
from jaxchat.data.shards import token_dtype
from jaxchat.data.sources import kind_of, parse
from jaxchat.errors import DataError, UsageError
from jaxchat.log import say
from jaxchat.run_dir import RunDir
from jaxchat.sizes import count_parameters, flops_per_token
from jaxchat.tasks.registry import parse_mixture_entry

from .doctor import unused_accelerator
from .stages import Stage, remaining
from .targets import CPU

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
SLOWEST_RATE = 1e9  # FLOP/s of any CPU: what is short even there is not measured
PRODUCT = 1536  # side of the measured matrices


def before_training(config: Config, run: RunDir, stages: Sequence[Stage]) -> None:
    """Name an accelerator that JAX does not use; stop where training takes days on a CPU or a disk is too small.

    Only stages that are not done count. Raises `UsageError` for the time and `DataError` for the disk.
    """
    left = {stage.name for stage in remaining(config, run, stages)}
    if not left:
        return
    line = unused_accelerator()
    if line:
        say(f"  {line}", style="yellow")
    check_time(config, run, left, line)
    check_room(config, run, left)


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
    download, folder = _download(config)
    item = token_dtype(config.model.vocab_size).itemsize
    tokens = round(text_bytes(config) / bytes_per_token(config.model.vocab_size))
    one = checkpoint_bytes(config)
    saves = {stage: _saves(config, stage) for stage in ("pretrain", "sft", "rl")}
    kept = {stage: _kept(config, steps) for stage, steps in saves.items()}
    more = any(len(saves[stage]) > kept[stage] for stage in saves)
    weights = 2 if config.export.dtype == "bfloat16" else 4
    parameters = count_parameters(config.model).total
    named = {parse_mixture_entry(entry)[0] for entry in config.sft.mixture} | set(config.eval.exams)
    datasets = 0 if config.tasks.data_dir else sum(size for name, size in DATASETS.items() if name in named)
    parts = [
        Part("text", download, ("tokenizer", "prepare"), "cache", folder),
        Part("conversations and exams", datasets, ("sft", "rl", "eval"), "cache", "tasks"),
        Part("token shards", tokens * item, ("prepare",), folder="data/tokens"),
        Part("rows", tokens * item, ("prepare",), folder="data/rows"),
        Part("conversation rows", sft_tokens(config) * (item + 1), ("sft",), folder="data/sft"),
        Part("checkpoints, base", one * kept["pretrain"], ("pretrain",), folder="base"),
        Part("checkpoints, sft", one * kept["sft"], ("sft",), folder="sft"),
        Part("checkpoints, rl", one * kept["rl"], ("rl",), folder="rl"),
        Part("a checkpoint being written", one * more, ("pretrain", "sft", "rl")),
        Part("exports", weights * parameters * len(config.export.formats), ("export",), folder="export"),
        Part("logs and reports", LOG_BYTES + METRICS_BYTES * config.train.steps, ("pretrain", "eval", "report")),
    ]
    return [part for part in parts if part.bytes]


def check_room(config: Config, run: RunDir, left: Collection[str]) -> None:
    """Raise `DataError` where a file system has less room than the stages `left` have still to write."""
    places = {"run": run.root, "cache": Path(config.data.cache_dir).expanduser()}
    needs: dict[int, list[tuple[Part, int]]] = {}  # by file system
    for part in disk_parts(config):
        if any(stage in left for stage in part.stages):
            root = places[part.place]
            written = used(root / part.folder) if part.folder else 0
            needs.setdefault(os.stat(_existing(root)).st_dev, []).append((part, max(0, part.bytes - written)))
    for parts in needs.values():
        total = sum(size for _, size in parts)
        where = [place for place in ("run", "cache") if any(part.place == place for part, _ in parts)]
        free = shutil.disk_usage(_existing(places[where[0]])).free
        if total > free:
            listed = ", ".join(f"{part.name} {size_text(size)}" for part, size in parts if size > total / 50)
            flags = " or ".join({"run": "--run-dir", "cache": "--cache-dir"}[place] for place in where)
            lower = "lower train.keep_last, set export.formats=[], or take" if "run" in where else "take"
            raise DataError(
                f"{' and '.join(str(places[place]) for place in where)}: {size_text(total)} are needed and "
                f"{size_text(free)} are free ({listed}); {lower} {flags} on a larger disk"
            )


def checkpoint_bytes(config: Config) -> int:
    """Return the bytes of a checkpoint: parameters and moments in float32, one moment for Muon's, two for Adam's."""
    count = count_parameters(config.model)
    moments = 2 * count.total - (count.trunk if config.optim.kind == "muon" else 0)
    return round(WRITTEN * 4 * (count.total + moments))


def bytes_per_token(vocab_size: int) -> float:
    """Return the bytes of text in a token, about: 3.75 with 4,096 tokens (chitchat), 4.6 with 32,768 (web text)."""
    return max(1.5, 3.75 + (4.6 - 3.75) / 3 * math.log2(vocab_size / 4096))


def sft_tokens(config: Config) -> int:
    """Return the tokens of SFT's conversations, repeated as the mixture says."""
    total = 0.0
    for entry in config.sft.mixture:
        name, count, epochs = parse_mixture_entry(entry)
        if name.startswith("files:"):
            total += epochs * _files_bytes(name) / bytes_per_token(config.model.vocab_size)
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


def used(folder: Path) -> int:
    """Return the bytes of all files below a folder; 0 where there is none."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process removes files meanwhile
                total += os.lstat(os.path.join(place, name)).st_size
    return total


def size_text(count: float) -> str:
    """Return bytes in words: 1.5 GB."""
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.0f} MB"


def text_bytes(config: Config) -> float:
    """Return the bytes of the pretraining text, about; of hub sources without `data.text_bytes` nothing is known."""
    total = 0.0
    for source, share in parse(config.data.source):
        if source.startswith("hf:"):
            total += max(0, config.data.text_bytes) * share * MARGIN
        elif source.startswith("files:"):
            total += _files_bytes(source)
        else:
            total += kind_of(source).size(source)
    return total


def _download(config: Config) -> tuple[int, str]:
    """(bytes of text to download, folder of the cache for them)."""
    hub = [(parse_hub(source)[0], share) for source, share in parse(config.data.source) if source.startswith("hf:")]
    size = 0 if config.data.mirror else max(0, config.data.text_bytes) * MARGIN / HUB_TEXT
    folder = f"data/{hub[0][0].replace('/', '--')}" if len(hub) == 1 else "data"
    return round(size * sum(share for _, share in hub)), folder


def _files_bytes(source: str) -> int:
    with contextlib.suppress(DataError):  # reported when they are read
        return sum(map(text_size, find_files(source)))
    return 0


def _saves(config: Config, stage: str) -> list[int]:
    """Steps after which a stage writes a checkpoint, the last one included."""
    steps, every = config.train.steps, config.train.checkpoint_every
    if stage == "sft":
        steps = -(-round(sft_tokens(config) * config.sft.epochs) // config.sft.batch_tokens)
    elif stage == "rl":
        steps, every = rl_steps(config), config.rl.checkpoint_every
    return [*range(every, steps, every), steps] if steps else []


def _kept(config: Config, saves: list[int]) -> int:
    """Return how many of them are kept: the last ones, and where `keep_every` is set its multiples."""
    last, period = config.train.keep_last, config.train.keep_every
    return len(saves[-last:]) + sum(period > 0 and step % period == 0 for step in saves[:-last])


def _existing(path: Path) -> Path:
    return next(p for p in (path.absolute(), *path.absolute().parents) if p.exists())


# Time


def check_time(config: Config, run: RunDir, left: Collection[str], line: str | None = None) -> None:
    """Raise `UsageError` where the stages `left` would train for more than two days on this CPU."""
    if config.train.allow_slow or jax.default_backend() != "cpu":
        return
    flops = training_flops(config, run, left)
    if flops / SLOWEST_RATE <= LONGEST_HOURS * 3600:
        return
    rate = product_rate() * jax.process_count()
    hours = flops / (rate * CPU.mfu) / 3600
    if hours > LONGEST_HOURS:
        measured = f"{rate / 1e9:,.0f} GFLOP/s in float32 products, {flops:.2g} FLOPs left"
        advice = f"{line}. Or take" if line else "Take"
        raise UsageError(
            f"{config.tier}: training would take about {hours / 24:,.0f} days on this CPU ({measured}). {advice} a "
            "machine with a GPU or TPU (what it needs there: plan --target h100:8), or a smaller tier (tiers); "
            "--set train.allow_slow=true trains here all the same"
        )


def training_flops(config: Config, run: RunDir, left: Collection[str]) -> float:
    """Return the FLOPs that the stages `left` have still to train, checkpoints counted as done."""
    per_token, total = flops_per_token(config.model), 0.0
    if "pretrain" in left:
        steps = [int(p.name) for p in run.stage("base").glob("*") if p.name.isdigit()]
        done = min(max(steps, default=0), config.train.steps)
        total += (config.train.steps - done) * config.train.batch_tokens * per_token
    if "sft" in left:
        total += sft_tokens(config) * config.sft.epochs * per_token
    if "rl" in left:  # sampling an answer takes a third of the FLOPs of training on it
        answers = rl_steps(config) * config.rl.prompts * config.rl.samples
        total += answers * config.rl.max_tokens * per_token * 4 / 3
    return total


def product_rate(repeats: int = 3) -> float:
    """Return the FLOP/s of float32 products on this CPU, the best of a few."""
    multiply, matrix = jax.jit(jnp.matmul), jnp.ones((PRODUCT, PRODUCT), jnp.float32)
    seconds = []
    for _ in range(repeats + 1):  # the first compiles
        begin = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        seconds.append(time.perf_counter() - begin)
    return 2 * PRODUCT**3 / min(seconds)
