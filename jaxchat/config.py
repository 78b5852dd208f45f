"""Configuration: every key once, read from TOML files and `key=value` overrides.

A default of -1, "auto" or None means "derived": `jaxchat/scaling.py` computes the value from the depth, the data or the
device. `python -m bench.config_docs` writes docs/configuration.md from the declarations below.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxchat import ROOT
from jaxchat.errors import UsageError

CONFIG_DIR = ROOT / "configs"
TYPE_NAMES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a string"}


@dataclass(frozen=True)
class Key:
    """Declaration of a configuration key; the bounds are inclusive and hold for every number of a list."""

    default: Any
    meaning: str  # one line of Markdown
    low: float = -math.inf
    high: float = math.inf
    choices: tuple[str, ...] = ()  # empty: any value
    free: bool = False  # may change in a finished run: how fast or how often, never what is computed beyond rounding
    count: int = 0  # of the numbers in a list; 0: any


def key(*args: Any, **options: Any) -> Any:
    """Declare a key as a field of a dataclass, with the arguments of `Key`."""
    declared = Key(*args, **options)
    return field(default=declared.default, metadata={"key": declared})


# fmt: off
@dataclass(frozen=True)
class ModelConfig:
    recipe: str = key("modern", "`modern` and `classic` are nanochat's models of July 2026 and of October 2025; "
        "`jaxchat` adds what [learns more](learning.md) to the former", choices=("modern", "classic", "jaxchat"))
    depth: int = key(4, "layers; the one dial", 1, 10_000)
    seq_len: int = key(2048, "context, tokens", 1, 2**24)
    vocab_size: int = key(32768, "tokens, special tokens included", 1, 2**31)
    width: int = key(-1, "-1: 64 x depth, up to a multiple of the head width", 1, 2**20)
    n_heads: int = key(-1, "-1: width / head width", 1, 2**16)
    n_kv_heads: int = key(-1, "-1: as many as heads; fewer share keys and values", 1, 2**16)
    head_width: int = key(-1, "-1: 128, or width / heads", 1, 2**16)
    mlp_factor: float = key(4.0, "width of the MLP over the model's", 0.01, 1000)
    tie_embeddings: bool = key(False, "one table for embedding and unembedding")
    rotary_base: float = key(-1.0, "-1: by recipe; classic 10,000, modern 100,000", 1)
    window_pattern: str = key("auto", "S short window, L full, tiled over the layers, the last L; auto: by recipe")
    window_short: int = key(-1, "tokens before the current one that a short window sees; -1: a quarter of the context, "
        "up to a multiple of 128", 0, 2**24)
    qk_scale: float = key(-1.0, "factor on q and k after their norm; -1: by recipe", 0)
    value_embeddings: bool | None = key(None, "tables added to the values of every second layer; by recipe")
    residual_scalars: bool | None = key(None, "learned scales of residual stream and embedding in it; by recipe")
    smear: bool | None = key(None, "mixes the token before into each embedding; by recipe")
    bigram_rows: int = key(-1, "rows of the table of bigrams, hashed pairs of a token and the one before, added to "
        "the embeddings; 0: none; -1: the rows of the other tables, at most 3 x vocab_size (jaxchat), else 0", 0, 2**31)
    key_offset: bool | None = key(None, "half of every key is that of the token before; by recipe")
    backout: bool | None = key(None, "subtracts the middle layer's output at the end; by recipe")
    # at most 40: the loss subtracts the cap, not the maximum, and exp(-2 * 40) is not yet zero
    softcap: float = key(15.0, "logits = softcap * tanh(logits / softcap)", 0.01, 40)
    norm_eps: float = key(1.1920929e-7, "float32's epsilon, as nanochat; Hugging Face's NanoChat has 1e-6", 0, 1)
    attention: str = key("auto", "auto: cudnn on NVIDIA GPUs, splash on TPUs, blocked on CPUs; xla where they cannot "
        "run or are wrong (see `train.allow_slow`)", choices=("auto", "cudnn", "splash", "blocked", "xla"))


@dataclass(frozen=True)
class TokenizerConfig:
    path: str = key("", "an existing tokenizer.json; empty: train one")
    normalize: str = key("none", "of a trained one; nfc: letters and their marks are composed first, so that the two "
        "ways to write a Korean syllable are one", choices=("none", "nfc"))


@dataclass(frozen=True)
class DataConfig:
    source: str = key("chitchat", "chitchat, files:GLOB, hf:OWNER/NAME[@REVISION][:PATTERN], synthetic:lottery[:COUNT] "
        "or a mixture of them, see data.md")
    text_bytes: int = key(-1, "bytes of hub text to download; 0: all; -1: the horizon's tokens times 5, and what "
        "dropped remainders take", 0)
    mirror: str = key("", "a folder that holds the hub's files", free=True)
    cache_dir: str = key("~/.cache/jaxchat", "downloads and compiled programs of all runs", free=True)
    column: str = key("text", "the field of jsonl, json and parquet records that is the text")
    encoding: str = key("auto", "of text files: auto (byte order mark or UTF-8), or Python's name, such as cp949")
    size_model: bool = key(False, "fit layers, width, vocabulary, context and steps of -1 to the text (`book`)")
    val_fraction: float = key(0.01, "share of the documents that is held out, chosen by a hash of their text", 0, 0.9)
    val_source: str = key("", "an hf: or files: source held out whole instead; its files leave the training text")
    remainder: str = key("auto", "the rest of a document that is cut: keep (a piece with its own `<|bos|>`) or drop; "
        "auto: drop for hub text that is downloaded in part; of any other only source packed apart and read first; in "
        "mixtures keep", choices=("auto", "keep", "drop"))
    dedup: bool = key(False, "leave out documents that came before, letter for letter; they are counted in any case")
    engine: str = key("local", "where text is tokenized: local (this machine's cores) or ray (a cluster), with equal "
        "bytes", choices=("local", "ray"), free=True)
    workers: int = key(-1, "processes of local; -1: one a core", 1, free=True)


@dataclass(frozen=True)
class TrainConfig:
    steps: int = key(-1, "optimizer steps; 0: none, the weights of `train.init` as they are; -1: token_ratio x scaling "
        "parameters / batch_tokens", 0)
    init: str = key("", "weights to start from: a run, RUN:STAGE or an export, see [finetune.md](finetune.md); empty: "
        "random ones")
    token_ratio: float = key(-1.0, "tokens per scaling parameter; -1: 12 (modern), 20 (classic)", 1e-6)
    batch_tokens: int = key(-1, "tokens per optimizer step; -1: 2^19 (tokens / tokens of d12)^0.383, a power of two", 1)
    device_batch_rows: int = key(32, "rows per device and micro-batch; accumulation makes up the rest", 1, free=True)
    checkpoint_every: int = key(250, "steps between checkpoints", 1, free=True)
    keep_last: int = key(2, "checkpoints kept", 1, free=True)
    keep_every: int = key(0, "steps: checkpoints at multiples of it are kept too; 0: none", 0, free=True)
    eval_every: int = key(250, "steps between evaluations; 0: only at the end", 0, free=True)
    eval_rows: int = key(512, "held-out rows at most per evaluation", 1, free=True)
    sample_every: int = key(0, "steps between samples while a stage trains; 0: only before and after", 0, free=True)
    compute_dtype: str = key("auto", "auto: float32 on CPUs, bfloat16 elsewhere, float16 with a loss scale on NVIDIA "
        "cards without it (T4, V100). On a CPU with bfloat16 units, `auto` rounds the operands of a training step's "
        "products to it; `float32` does not", choices=("auto", "float32", "bfloat16", "float16"))
    matmul: str = key("plain", "products of the layers: `plain` in the compute dtype, `fp8` with 8-bit operands (e4m3, "
        "gradients e5m2, one scale a tensor)", choices=("plain", "fp8"))
    remat: str = key("none", "what the backward pass computes again to save memory: `none`, `names` (norms, rotary and "
        "activation functions), `dots`, `full` (whole layers)", choices=("none", "names", "dots", "full"), free=True)
    scan_unroll: int = key(-1, "groups of layers unrolled in the scan; -1: all on a GPU ([fewer bytes "
        "moved](performance.md#bytes-moved)), elsewhere all of a small model and one of a large", 1, free=True)
    max_bad_steps: int = key(5, "non-finite steps in a row before the run goes back, once", 1, free=True)
    allow_slow: bool = key(False, "train where it is slow: over two days on a CPU, without fast attention", free=True)
    deterministic: bool = key(False, "on GPUs: only kernels that add in a fixed order (not tried yet)")
    tensorboard: bool = key(False, "curves for TensorBoard too, in the run's `tensorboard/`", free=True)
    wandb: str = key("", "Weights & Biases project that gets the curves too; empty: nothing leaves here", free=True)
    trackio: str = key("", "trackio project that gets the curves too, on this machine; empty: none", free=True)


@dataclass(frozen=True)
class OptimConfig:
    kind: str = key("muon", "muon (AdamW for what is no matrix) or adamw (everything)", choices=("muon", "adamw"))
    lr_scale: float = key(-1.0, "on every rate but `mixing_lr`; -1: (batch / 2^19)^(1/2), below 2^19 1", 1e-9)
    matrix_lr: float = key(0.02, "Muon's rate", 0)
    unembedding_lr: float = key(-1.0, "-1: by recipe; also x (width / 768)^-0.5", 0)
    embedding_lr: float = key(-1.0, "-1: by recipe; also x (width / 768)^-0.5; value embeddings take half; a tied "
        "table takes `optim.unembedding_lr`", 0)
    scalar_lr: float = key(0.5, "of the x0 scalars; the residual ones take a hundredth", 0)
    mixing_lr: float = key(0.2, "of smear and backout; never multiplied by `optim.lr_scale`", 0)
    adamw_lr: float = key(6e-4, 'kind = "adamw": one rate for everything', 0)
    weight_decay: float = key(-1.0, "-1: by recipe, so that rate x decay x steps stays as at d12", 0)
    warmup_steps: int = key(-1, "-1: by recipe", 0)
    warmdown_ratio: float = key(-1.0, "share of the steps in which the rate falls; -1: by recipe", 0, 1)
    final_lr: float = key(-1.0, "multiplier at the last step; -1: by recipe", 0, 1)
    grad_clip: float = key(-1.0, "global norm; 0: off; -1: by recipe", 0)
    momentum: tuple[float, float, float] = key((0.85, 0.97, 0.90), "Muon's momentum at the first step, after its "
        "warm-up, and at the last step; SFT and RL have their own", 0, 1, count=3)
    momentum_warmup_steps: int = key(400, "steps in which Muon's momentum rises from the first to the second", 0)


@dataclass(frozen=True)
class SftConfig:
    mixture: tuple[str, ...] = key(("chitchat", "chatterbot", "identity:500", "word_problems:20000"),
        "`NAME`, `NAME:COUNT`, `NAME*EPOCHS` or `NAME:COUNT*EPOCHS`, see data.md")
    max_left_out: float = key(0.05, "share of a source's conversations that may be unusable: they are left out; more "
        "stop the run", 0, 1, free=True)
    identity: str = key("", "an identity.toml: who the model is, see data.md; empty: jaxchat")
    epochs: float = key(1.0, "passes over the mixture", 1e-6)
    lr_ratio: float = key(0.8, "first rate over pretraining's", 0)
    batch_tokens: int = key(-1, "tokens per optimizer step; -1: as in pretraining; fewer [where the data are "
        "few](training.md#warnings)", 1)
    eval_every: int = key(0, "steps between evaluations; 0: only at the end", 0, free=True)
    exam_cases: int = key(0, "questions of each chat exam at every evaluation, for `metrics.jsonl`", 0, free=True)


@dataclass(frozen=True)
class RlConfig:
    environment: str = key("gsm8k", "gsm8k, word_problems, spelling_bee, arithmetic, or files: with "
        "[questions](finetune.md#your-own-task) or [preferences](finetune.md#preferences) of your own; empty: no RL")
    steps: int = key(-1, "optimizer steps; -1: one pass over the training questions", 1)
    prompts: int = key(16, "questions a step", 1)
    samples: int = key(16, "answers to each question, at least 2", 2)  # one alone has nothing to be compared with
    max_tokens: int = key(256, "longest answer", 1)
    temperature: float = key(1.0, "of the sampling", 1e-3, 10)  # greedy answers of a group are all the same
    top_k: int = key(50, "likeliest tokens that may be sampled; 0: all", 0)
    beta: float = key(0.1, "of DPO: how much a difference in log-likelihood counts; larger stays closer to SFT", 1e-6)
    format_bonus: float = key(0.0, "reward for an answer in the task's form (GSM8K: one `####` line at the end)", 0, 1)
    lr_ratio: float = key(0.05, "first rate over pretraining's; falls to 0 in a straight line", 0)
    eval_every: int = key(60, "steps between evaluations; 0: only before and after", 0, free=True)
    eval_prompts: int = key(400, "questions of the exam for pass@k, at most", 1, free=True)
    eval_samples: int = key(8, "answers to each of them: pass@1 up to pass@8", 1, free=True)
    checkpoint_every: int = key(20, "steps between checkpoints", 1, free=True)
    slots: int = key(128, "answers made at once on a device, a power of two", 1, 4096, free=True)


@dataclass(frozen=True)
class EvalConfig:
    exams: tuple[str, ...] = key(("auto",), "names of exams, or files: with [questions](finetune.md#your-own-task); "
        "`auto`: those made here, and those whose data is at hand")
    max_per_task: int = key(-1, "questions of an exam, the first of a fixed shuffle; -1: all", 0)
    rows: int = key(2048, "held-out rows at most for the final bits per byte", 1)
    batch_rows: int = key(-1, "engine slots and rows per scoring batch on all devices; -1: 32 on a CPU, elsewhere 256 "
        "or what fits, see [exams](exams.md#how-many-rows-at-once)", 1, free=True)
    sample_tokens: int = key(64, "length of a sample", 1)
    sample_prompts: int = key(5, "openings of held-out texts that a base model continues in its samples", 0)
    sample_temperatures: tuple[float, ...] = key((0.0, 0.8), "of the samples", 0, 10)
    chat_prompts: tuple[str, ...] = key((), "questions of a chat model's samples and of the page; none: English ones")
    copied: bool = key(False, "search the training text for passages that the base model repeats letter for letter")
    samples: int = key(0, "answers drawn to each written question for pass@k; 0: only the greedy one", 0, 1024)
    temperature: float = key(0.8, "of those", 1e-3, 10)
    overlap_documents: int = key(100_000, "training documents searched for exam text; -1: all, 0: none", -1)


@dataclass(frozen=True)
class MeshConfig:
    data: int = key(-1, "devices that work on different rows; -1, for one of the three: all left", -1, free=True)
    fsdp: int = key(1, "devices over which parameters are split by width", -1, free=True)
    tensor: int = key(1, "devices over which heads, MLP and vocabulary are split", -1, free=True)


@dataclass(frozen=True)
class TasksConfig:
    data_dir: str = key("", "local mirror of the data sets of exams and SFT, see exams.md")
    sandbox: str = key("auto", "around a model's code: `auto` the strongest level there is, `strict` refuses below "
        "level 2, see [reliability.md](reliability.md#the-sandbox)", choices=("auto", "strict"))


@dataclass(frozen=True)
class ServeConfig:
    host: str = key("127.0.0.1", "address to listen on", free=True)
    port: int = key(8000, "port", 0, 65_535, free=True)
    language: str = key("auto", "of the page: auto (the browser's), en or ko", choices=("auto", "en", "ko"), free=True)
    api_keys: tuple[str, ...] = key((), "keys that the API asks for and the page takes as password; none: everybody is "
        "served. The environment variable `JAXCHAT_API_KEYS` (separated by commas) takes precedence", free=True)
    slots: int = key(8, "answers made at once, a power of two", 1, 4096, free=True)
    weights: str = key("auto", "numbers of the served weights; int8: of the kernels, with a scale a channel; auto: "
        "float32 on a CPU, else bfloat16", choices=("auto", "float32", "bfloat16", "int8"), free=True)
    max_tokens: int = key(256, "longest answer, and its length where the client names none", 1, free=True)
    temperature: float = key(0.7, "where the client names none", 0, 10, free=True)
    top_k: int = key(50, "where the client names none", 0, free=True)
    min_p: float = key(0.0, "least probability of a sampled token, as a share of the likeliest one's (2407.01082), "
        "where the client names none, and of the exam `free_answers`", 0, 1)
    model_name: str = key("", "name of the model in the API; empty: the tier's", free=True)
    queue_length: int = key(256, "answers that may wait for a slot; one more is refused (429)", 0, free=True)
    requests_per_minute: int = key(0, "of one key or address; 0: any number", 0, free=True)
    message_chars: int = key(8_000, "characters of one message", 1, free=True)
    total_chars: int = key(32_000, "characters of one conversation or prompt", 1, free=True)
    body_bytes: int = key(2_000_000, "bytes of one HTTP request or WebSocket message", 1_000, 2**31, free=True)
    drain_seconds: float = key(30.0, "seconds for running answers when the service is stopped", 0, 86_400, free=True)
    log_text: bool = key(False, "whether logs hold prompts and answers", free=True)
    origins: tuple[str, ...] = key((), "pages from elsewhere that may use the API, as `https://example.org`", free=True)
    trusted_proxies: tuple[str, ...] = key((), "addresses of proxies whose X-Forwarded-For is believed", free=True)


@dataclass(frozen=True)
class ExportConfig:
    formats: tuple[str, ...] = key(("orbax", "hf"), "folders in `export/`, see [weights.md](weights.md); none: nothing",
        choices=("orbax", "hf", "html"))
    dtype: str = key("auto", "of the weights there; auto: as trained", choices=("auto", "float32", "bfloat16"))


@dataclass(frozen=True)
class Config:
    format: int = key(1, "of this file; one of another format is refused")
    tier: str = key("nano", "name of the tier; names the default run directory")
    seed: int = key(42, "one seed for everything", 0, 2**63 - 1)
    model: ModelConfig = field(default_factory=ModelConfig)
    tokenizer: TokenizerConfig = field(default_factory=TokenizerConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    sft: SftConfig = field(default_factory=SftConfig)
    rl: RlConfig = field(default_factory=RlConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    tasks: TasksConfig = field(default_factory=TasksConfig)
    serve: ServeConfig = field(default_factory=ServeConfig)
    export: ExportConfig = field(default_factory=ExportConfig)

# fmt: on


SECTIONS: dict[str, Any] = {f.name: f.default_factory for f in dataclasses.fields(Config) if not f.metadata}
KEYS: dict[str, Key] = {  # by dotted name
    prefix + f.name: f.metadata["key"]
    for prefix, cls in (("", Config), *((f"{name}.", cls) for name, cls in SECTIONS.items()))
    for f in dataclasses.fields(cls)
    if f.metadata
}
SIZED = ("model.depth", "model.seq_len", "model.vocab_size")  # may be -1 where data.size_model fits them to the text
# Keys with a derived default that older records lack: what was so then.
ADDED: dict[str, Any] = {"model.bigram_rows": 0, "model.key_offset": False}
# Keys of older versions with the value that is built in now. Files and records that have it are still read.
REMOVED: dict[str, Any] = {
    "tokenizer.train_chars": 2_000_000_000,
    "tokenizer.doc_chars": 10_000,
    "data.shard_tokens": 100_000_000,
    "data.pack_docs": 20_000,
    "train.loss_chunk": -1,
    "optim.ns_steps": 5,
    "sft.warmdown_ratio": 0.5,
    "rl.epochs": 1.0,
    "serve.max_messages": 500,
}


def is_derived(value: Any) -> bool:
    """Return whether a value says "derive me"."""
    return value is None or value == "auto" or (type(value) in (int, float) and value == -1)


def flatten(config: Config) -> dict[str, Any]:
    """Return `{"model.depth": 4, ...}` in the order of the declarations, lists for tuples."""
    values = {}
    for name in KEYS:
        section, _, leaf = name.rpartition(".")
        value = getattr(getattr(config, section) if section else config, leaf)
        values[name] = list(value) if isinstance(value, tuple) else value
    return values


def to_toml(config: Config, reasons: dict[str, str] | None = None) -> str:
    """Return the TOML that `load_config` reads back to an equal object; `reasons` become comments of their keys."""
    lines, section = [], ""
    for name, value in flatten(config).items():
        before, (section, _, leaf) = section, name.rpartition(".")
        if section != before:
            lines += ["", f"[{section}]"]
        if value is not None:
            # JSON's strings and lists are TOML's, except that TOML also wants DEL escaped
            text = json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
            reason = (reasons or {}).get(name)
            lines.append(f"{leaf} = {text}" + (f"  # {reason}" if reason else ""))
    return "\n".join(lines) + "\n"


def nearest(name: str, known: Iterable[str]) -> str:
    """Return the advice ", did you mean X?" with the most similar known name, "" if none is similar."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def build(table: dict[str, Any]) -> Config:
    """Return the configuration of tables, as TOML has them; keys may also be dotted.

    `UsageError` names a bad key or value. A removed key with the value that is built in now is ignored.
    """
    values: dict[str, Any] = {}
    for name, value in table.items():
        if name in SECTIONS and not isinstance(value, dict):
            raise UsageError(f"{name}: is a section, not a value")
        values |= {f"{name}.{leaf}": v for leaf, v in value.items()} if name in SECTIONS else {name: value}
    sections: dict[str, dict[str, Any]] = {name: {} for name in ("", *SECTIONS)}
    for name, value in values.items():
        section, _, leaf = name.rpartition(".")
        if name in KEYS:
            sections[section][leaf] = _checked(name, KEYS[name], value)
        elif name not in REMOVED:
            advice = nearest(name, KEYS) or "; docs/configuration.md has every key"
            raise UsageError(f"{name}: unknown key{advice}")
        elif value != REMOVED[name]:
            raise UsageError(
                f"{name}: this key is gone, its value is always {REMOVED[name]}, not {value!r}; leave it out"
            )
    return Config(**sections[""], **{name: section(**sections[name]) for name, section in SECTIONS.items()})


def _checked(name: str, declared: Key, value: Any) -> Any:
    """Return the value in the type of its default. `UsageError` for a wrong type, a bad number, an unknown choice."""
    default = declared.default
    if isinstance(default, tuple):
        items = value if isinstance(value, list | tuple) else [value]  # --set serve.api_keys=one
        if declared.count and len(items) != declared.count:
            raise UsageError(f"{name}: needs {declared.count} numbers, not {value!r}")
        item = dataclasses.replace(declared, default=default[0] if default else "")
        return tuple(_checked(name, item, value) for value in items)
    if value is None and default is None:
        return None
    kind = bool if default is None else type(default)
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind or (kind is float and not math.isfinite(value)):
        raise UsageError(f"{name}: needs {TYPE_NAMES[kind]}, not {value!r}")
    derived = is_derived(value) and (is_derived(default) or name in SIZED)
    if kind in (int, float) and not derived and not declared.low <= value <= declared.high:
        bound = f"at least {declared.low:g}" if value < declared.low else f"at most {declared.high:g}"
        raise UsageError(f"{name}: must be {bound}, not {value}")
    if declared.choices and value not in declared.choices:
        raise UsageError(f"{name}: {value!r} is unknown; choose from {', '.join(declared.choices)}")
    return value


def load_config(tier: str | Path | Config = "nano", overrides: Sequence[str] = ()) -> Config:
    """Read a tier (a name in `configs/`, a path to a TOML file, or what was read) and apply `key=value` overrides.

    An override's value is TOML; what is not is taken as a string, so `data.source=files:x` needs no quotes.
    `UsageError` names an unknown tier, an unknown key (with the nearest known one) or a bad value.
    """
    if isinstance(tier, Config):
        path, table = Path(tier.tier), flatten(tier)
    else:
        path = Path(tier) if str(tier).endswith(".toml") else CONFIG_DIR / f"{tier}.toml"
        if not path.is_file():
            if path == Path(tier):
                raise UsageError(f"{path}: no such file; give a config.toml, or the name of a tier")
            known = [p.stem for p in tier_files()]
            raise UsageError(f"tier {str(tier)!r} is unknown{nearest(str(tier), known)}; tiers: {', '.join(known)}")
        try:
            table = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise UsageError(f"{path}: not valid TOML ({error})") from None
    for override in overrides:
        name, equals, text = (part.strip() for part in override.partition("="))
        if not equals:
            raise UsageError(f"--set {override}: write it as key=value, for example --set model.depth=10")
        try:
            value = tomllib.loads(f"v = {text}")["v"]
        except tomllib.TOMLDecodeError:
            value = text
        table = {**table, name: value}
    if table.get("format", 1) != Config.format:
        raise UsageError(f"{path}: has format {table['format']!r}, and this version reads format {Config.format}")
    return build({"tier": path.stem} | table)


def tier_files() -> list[Path]:
    """Return the files of the tiers, smallest tier first."""
    return sorted(CONFIG_DIR.glob("*.toml"), key=lambda p: (p.stem != "nano", len(p.stem), p.stem))


def replaced(config: Config, section: str, **values: Any) -> Config:
    """Return the configuration with other values of one section."""
    changed: dict[str, Any] = {section: dataclasses.replace(getattr(config, section), **values)}
    return dataclasses.replace(config, **changed)
