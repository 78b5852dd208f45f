"""Configuration: frozen dataclasses, TOML tiers, and strict overrides.

A number of -1, a string "auto" or a bool of None means "derived": `recipes.py` fills the shapes from the depth,
`optim/horizon.py` the steps, the batch and the rates.
Loading is strict: an unknown key or a wrong type is a `UsageError` that names the key and the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import tomllib
import types
import typing
import unicodedata
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxchat.errors import UsageError

# Frozen dataclasses of settings as TOML and back, strictly: an unknown key or a wrong type is an error naming it.


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """`{"model.depth": 4, ...}` of a configuration, in the order of the fields."""
    flat: dict[str, Any] = {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            flat |= flatten(value, f"{prefix}{f.name}.")
        else:
            flat[prefix + f.name] = list(value) if isinstance(value, tuple) else value
    return flat


def to_toml(config: Any, reasons: dict[str, str] | None = None) -> str:
    """The configuration as TOML that `config.load_config` reads back to an equal object; `reasons` become comments."""
    lines, sections = [], []
    reasons = reasons or {}
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            sections.append(f.name)
        else:
            lines.append(f"{f.name} = {_toml_value(value)}")
    for name in sections:
        lines += ["", f"[{name}]"]
        for key, value in flatten(getattr(config, name)).items():
            if value is not None:
                reason = reasons.get(f"{name}.{key}")
                lines.append(f"{key} = {_toml_value(value)}" + (f"  # {reason}" if reason else ""))
    return "\n".join(lines) + "\n"


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    # JSON's strings are TOML's basic strings, except that TOML also wants DEL escaped
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def parse_value(key: str, text: str) -> Any:
    """A TOML value; anything that is not one is taken as a plain string (so `--set data.source=files:x` works)."""
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def insert(table: dict[str, Any], key: str, value: Any) -> None:
    """Put a value where a dotted key says."""
    *parents, last = key.split(".")
    for parent in parents:
        table = table.setdefault(parent, {})
        if not isinstance(table, dict):
            raise UsageError(f"{key}: unknown key")
    table[last] = value


def nearest(name: str, known: typing.Iterable[str]) -> str:
    """Advice: the known name most like this one, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f", did you mean {near[0]}?" if near else ""


def build(cls: type, table: dict[str, Any], prefix: str = "", root: type | None = None) -> Any:
    """An object of the frozen dataclass `cls` from nested tables; `UsageError` names a wrong key or type.

    `root`: of which the known keys are, for the advice; `cls` itself by default.
    """
    root = root or cls
    hints = typing.get_type_hints(cls)
    values: dict[str, Any] = {}
    for key, value in table.items():
        if key not in hints:
            raise UsageError(f"{prefix}{key}: unknown key{_suggest(root, prefix + key)}")
        hint = hints[key]
        if dataclasses.is_dataclass(hint):
            if not isinstance(value, dict):
                raise UsageError(f"{prefix}{key}: is a section, not a value")
            values[key] = build(typing.cast(type, hint), value, f"{prefix}{key}.", root)
        else:
            values[key] = _convert(f"{prefix}{key}", hint, value)
    return cls(**values)


def _suggest(root: type, key: str) -> str:
    """Nearest known key, by the whole dotted name or by its last part."""
    known = list(flatten(root()))
    by_leaf = [k for k in known if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    near = f", did you mean {by_leaf[0]}?" if by_leaf else nearest(key, known)
    return near or "; docs/configuration.md has every key"


def _convert(key: str, hint: Any, value: Any) -> Any:
    if isinstance(hint, types.UnionType):
        hint = next(a for a in typing.get_args(hint) if a is not type(None))
    if typing.get_origin(hint) is tuple:
        item = typing.get_args(hint)[0]
        values = value if isinstance(value, list) else [value]  # --set serve.api_keys=one
        if any(type(v) is not item and not (item is float and type(v) is int) for v in values):
            raise UsageError(f"{key}: needs a list of {'strings' if item is str else 'numbers'}, not {value!r}")
        return tuple(_convert(key, item, v) for v in values)
    if hint is float and type(value) is int:
        value = float(value)
    if type(value) is not hint:
        plain = unicodedata.normalize("NFKC", value) if isinstance(value, str) else value
        advice = f"; did you mean {plain}, in plain digits?" if plain != value and hint is not str else ""
        raise UsageError(f"{key}: needs {_TYPE_NAMES[hint]}, not {value!r}{advice}")
    if hint is float and not math.isfinite(value):
        raise UsageError(f"{key}: needs a finite number, not {value!r}")
    return value


_TYPE_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "a string"}


CONFIG_DIR = Path(__file__).resolve().parent.parent / "configs"


@dataclass(frozen=True)
class ModelConfig:
    """Shapes of the GPT. `recipe` fills what is not given; see `RECIPES`."""

    recipe: str = "modern"  # "modern" | "classic"
    depth: int = 4  # layers; the one dial
    seq_len: int = 2048  # context, tokens
    vocab_size: int = 32768  # tokens, special tokens included
    width: int = -1
    n_heads: int = -1
    n_kv_heads: int = -1
    head_width: int = -1
    mlp_factor: float = 4.0
    tie_embeddings: bool = False
    rotary_base: float = -1.0
    window_pattern: str = "auto"  # S: short window, L: full context; tiled over the layers, the last is always L
    window_short: int = -1  # tokens before the current one that a short window sees
    qk_scale: float = -1.0  # on q and on k after their norm
    value_embeddings: bool | None = None
    residual_scalars: bool | None = None
    smear: bool | None = None
    backout: bool | None = None
    softcap: float = 15.0  # logits = softcap * tanh(logits / softcap)
    norm_eps: float = 1.1920929e-7  # float32's machine epsilon, as nanochat; Hugging Face's NanoChat has 1e-6
    attention: str = "auto"  # "auto" | "cudnn" | "splash" | "blocked" | "xla"


@dataclass(frozen=True)
class TokenizerConfig:
    path: str = ""  # an existing tokenizer.json; empty: train one
    normalize: str = "none"  # of a trained one: "none" | "nfc" (letters and their marks composed into one character)
    train_chars: int = 2_000_000_000  # characters of the training text that BPE sees
    doc_chars: int = 10_000  # of one document at most, so that a few giants do not decide the merges


@dataclass(frozen=True)
class DataConfig:
    source: str = "chitchat"  # files:GLOB, hf:OWNER/NAME[@REV][:PATTERN], synthetic:lottery, or a mixture of them
    text_bytes: int = -1  # of text wanted from the hub, of which no more files are downloaded; 0: all
    mirror: str = ""  # a folder that holds the hub's files
    cache_dir: str = "~/.cache/jaxchat"  # downloads and compiled programs, shared by all runs
    encoding: str = "auto"  # of text files: "auto" (by byte order mark, else UTF-8) | Python's name of one
    size_model: bool = False  # fit what is -1 of model and steps to the amount of text (`train/prepare.py`)
    val_fraction: float = 0.01  # of documents, chosen by a hash of their text
    val_source: str = ""  # hf: or files: source that is held out whole, instead of `val_fraction` of every source
    remainder: str = "auto"  # of a cut document: "keep" | "continue" | "drop" (`data/packing.py`), "auto": by source
    dedup: bool = False  # leave out documents that came before, letter for letter
    shard_tokens: int = 100_000_000  # tokens in one token shard, at most
    pack_docs: int = 20_000  # documents in one best-fit window
    engine: str = "local"  # who tokenizes and renders: "local" (this machine's cores) | "ray" (a cluster)
    workers: int = -1  # processes of "local"; -1: one a core


@dataclass(frozen=True)
class TrainConfig:
    steps: int = -1  # optimizer steps
    token_ratio: float = -1.0  # tokens per scaling parameter; sets the steps
    batch_tokens: int = -1  # tokens per optimizer step
    device_batch_rows: int = 32  # rows per device and micro-batch; gradient accumulation makes up the rest
    checkpoint_every: int = 250  # steps
    keep_last: int = 2  # checkpoints kept
    keep_every: int = 0  # steps: checkpoints at multiples of it are kept too; 0: none
    eval_every: int = 250  # steps; 0: only at the end
    eval_rows: int = 512  # held-out rows at most per evaluation
    sample_every: int = 0  # steps between samples during pretraining; 0: only before and after
    compute_dtype: str = "auto"  # "auto" | "bfloat16" | "float16" (with loss scaling) | "float32"
    matmul: str = "plain"  # of the layers: "plain" (in compute_dtype) | "fp8"
    remat: str = "none"  # "none" | "names" | "dots" | "full": what the backward pass computes again
    loss_chunk: int = -1  # tokens per chunk of the loss
    scan_unroll: int = -1  # groups of layers unrolled in the trunk's scan
    max_bad_steps: int = 5  # consecutive non-finite steps until the run goes back, once, or stops
    allow_slow: bool = False  # go on where training would be slow: days on a CPU, or attention without its fast kernel
    deterministic: bool = False  # on GPUs: only kernels that add in a fixed order, so that a repeated run has its bits
    tensorboard: bool = False  # curves for TensorBoard too, in the run's `tensorboard/`
    wandb: str = ""  # project on Weights & Biases that gets the curves too; empty: nothing leaves the machine


@dataclass(frozen=True)
class OptimConfig:
    kind: str = "muon"  # "muon" (matrices; AdamW for the rest) | "adamw" (everything)
    lr_scale: float = -1.0  # multiplies every rate below but smear's and backout's
    matrix_lr: float = 0.02
    unembedding_lr: float = -1.0
    embedding_lr: float = -1.0
    scalar_lr: float = 0.5
    mixing_lr: float = 0.2  # of smear and backout; never multiplied by lr_scale
    adamw_lr: float = 6e-4  # kind = "adamw": one rate for everything
    weight_decay: float = -1.0
    warmup_steps: int = -1
    warmdown_ratio: float = -1.0  # share of the steps in which the rate falls
    final_lr: float = -1.0  # lr_mult at the last step
    grad_clip: float = -1.0  # global norm; 0: off
    momentum: tuple[float, ...] = (0.85, 0.97, 0.90)  # Muon's: first step, after its warm-up, last step
    momentum_warmup_steps: int = 400
    ns_steps: int = 5  # Polar Express iterations


@dataclass(frozen=True)
class SftConfig:
    mixture: tuple[str, ...] = ("chitchat", "chatterbot", "identity:500", "word_problems:20000")
    identity: str = ""  # an identity.toml: who the model is (`tasks/persona.py`); empty: jaxchat
    epochs: float = 1.0
    lr_ratio: float = 0.8  # first rate over pretraining's
    warmdown_ratio: float = 0.5
    batch_tokens: int = -1
    eval_every: int = 0
    exam_cases: int = 0  # questions of each chat exam at every evaluation


@dataclass(frozen=True)
class RlConfig:
    environment: str = "gsm8k"  # a task that has questions for training; "": no RL
    steps: int = -1
    epochs: float = 1.0  # passes over the questions, where no steps are given
    prompts: int = 16  # questions a step
    samples: int = 16  # answers to each
    max_tokens: int = 256  # of an answer
    temperature: float = 1.0
    top_k: int = 50  # 0: off
    format_bonus: float = 0.0  # added to the reward of 1 where the answer has the task's form
    lr_ratio: float = 0.05  # first rate over pretraining's; falls to 0 in a line
    eval_every: int = 60  # steps; 0: only before and after
    eval_prompts: int = 400  # of the exam's questions
    eval_samples: int = 8  # answers to each: pass@1 to pass@8
    checkpoint_every: int = 20  # steps
    slots: int = 128  # answers made at once on a device, a power of two


@dataclass(frozen=True)
class EvalConfig:
    exams: tuple[str, ...] = ("auto",)  # names of exams; "auto": the generated ones, and those whose data is at hand
    max_per_task: int = -1  # examples; -1: all
    rows: int = 2048  # held-out rows at most for the final bits per byte
    batch_rows: int = -1  # engine slots and rows per scoring batch; -1: 32 on a CPU, elsewhere 256 or what fits
    sample_tokens: int = 64
    sample_prompts: int = 5  # openings of held-out texts that a base model continues
    sample_temperatures: tuple[float, ...] = (0.0, 0.8)
    chat_prompts: tuple[str, ...] = ()  # questions in a chat model's samples; empty: English ones
    copied: bool = False  # search the training text for the longest passage that the base model repeats
    samples: int = 0  # drawn answers to each written question, for pass@1 to pass@k; 0: only the one at temperature 0
    temperature: float = 0.8  # of those
    overlap_documents: int = 100_000  # training documents searched for the exams' text; -1: all, 0: none


@dataclass(frozen=True)
class MeshConfig:
    data: int = -1  # -1 fills with the devices that are left
    fsdp: int = 1
    tensor: int = 1


@dataclass(frozen=True)
class TasksConfig:
    data_dir: str = ""  # local mirror of the exams' data sets
    sandbox: str = "auto"  # of a model's code: "auto" (the strongest there is) | "strict" (level 2 at least)


@dataclass(frozen=True)
class ServeConfig:
    host: str = "127.0.0.1"
    port: int = 8000
    language: str = "auto"  # of the page: "auto" (the browser's) | "en" | "ko"
    api_keys: tuple[str, ...] = ()  # whoever brings none of them is refused; empty: everybody is served
    slots: int = 8  # answers made at once
    weights: str = "auto"  # auto, float32, bfloat16 or int8
    max_tokens: int = 256  # of an answer, at most and where nobody says otherwise
    temperature: float = 0.7
    top_k: int = 50
    model_name: str = ""  # in the API; empty: the tier's
    queue_length: int = 256  # answers that may wait for a slot
    requests_per_minute: int = 0  # of one key or address; 0: any number
    max_messages: int = 500  # of one conversation
    message_chars: int = 8_000  # characters of one message
    total_chars: int = 32_000  # characters of one conversation or prompt
    body_bytes: int = 2_000_000  # of one HTTP request or WebSocket message
    drain_seconds: float = 30.0  # that running answers get to finish when the service is stopped
    log_text: bool = False  # whether logs hold prompts and answers
    origins: tuple[str, ...] = ()  # web pages from elsewhere that may use the API, as https://example.org
    trusted_proxies: tuple[str, ...] = ()  # addresses whose X-Forwarded-For is believed


@dataclass(frozen=True)
class ExportConfig:
    formats: tuple[str, ...] = ("orbax", "hf")  # folders of `export/`; empty: no export
    dtype: str = "auto"  # of the weights there: "auto" (as trained) | "float32" | "bfloat16"


@dataclass(frozen=True)
class Config:
    format: int = 1  # of this file
    tier: str = "nano"
    seed: int = 42
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


def load_config(tier: str | Path = "nano", overrides: typing.Sequence[str] = ()) -> Config:
    """Read a tier (a name in `configs/` or a path to a TOML file) and apply `key=value` overrides.

    Raises `UsageError` that names an unknown tier, an unknown key (with the nearest known one) or a wrong type.
    """
    path = Path(tier) if str(tier).endswith(".toml") else CONFIG_DIR / f"{tier}.toml"
    if not path.is_file():
        known = [p.stem for p in tier_files()]
        raise UsageError(f"tier {str(tier)!r} is unknown{nearest(str(tier), known)}; tiers: {', '.join(known)}")
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: not valid TOML ({error})") from None
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UsageError(f"--set {override}: write it as key=value, for example --set model.depth=10")
        insert(table, key.strip(), parse_value(key.strip(), text.strip()))
    if table.get("format", 1) != Config.format:
        raise UsageError(f"{path}: has format {table['format']!r}, and this version reads format {Config.format}")
    config = build(Config, table)
    return config if "tier" in table else dataclasses.replace(config, tier=path.stem)


def tier_files() -> list[Path]:
    """The tiers that exist, smallest first."""
    return sorted(CONFIG_DIR.glob("*.toml"), key=lambda p: (p.stem != "nano", len(p.stem), p.stem))
