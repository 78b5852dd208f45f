"""The table of all parameters, and what follows from it: counts, FLOPs and bytes. Arithmetic on the resolved config.

Letters: L layers, E layers with a value embedding, T time, H query heads, K kv heads, N head width, D model width,
F feed-forward width, V vocabulary.
"""

from __future__ import annotations

import math
import re
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from jaxchat.config import ModelConfig

VE_GATE_CHANNELS = 12  # of the normed attention input that gate a value embedding
SMEAR_CHANNELS = 24  # of the embedding that gate the smear
VOCAB_MULTIPLE = 64
EXAM_ROWS = 256  # of exams at once, where memory allows


def padded_vocab(config: ModelConfig) -> int:
    """Return the rows of the embedding tables: the vocabulary rounded up to whole tiles."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def mlp_width(config: ModelConfig) -> int:
    return round(config.mlp_factor * config.width)


def windows(config: ModelConfig) -> list[int]:
    """Return how many positions before itself a token sees, per layer; the last layer always sees all."""
    sizes = {"S": min(config.window_short, config.seq_len), "L": config.seq_len}
    pattern = config.window_pattern
    return [*(sizes[pattern[i % len(pattern)]] for i in range(config.depth - 1)), config.seq_len]


def value_layers(config: ModelConfig) -> list[int]:
    """Return the layers with a value embedding: every second one, the last included."""
    return list(range((config.depth - 1) % 2, config.depth, 2)) if config.value_embeddings else []


def scan_groups(config: ModelConfig) -> tuple[int, int]:
    """Return (groups, layers per group) of the forward pass's scan; the layers after them are the tail.

    Within a group every layer's window and value embedding are static, so a group spans the pattern's period.
    """
    period = math.lcm(len(config.window_pattern), 2 if config.value_embeddings else 1)
    sizes, groups = windows(config), 0
    while (groups + 1) * period <= config.depth and sizes[groups * period : (groups + 1) * period] == sizes[:period]:
        groups += 1
    return groups, period


def score_bound(config: ModelConfig) -> float:
    """Return the largest possible attention score: q and k are normed to length sqrt(N), then scaled.

    The halves of an offset key come from two keys, so it can be sqrt(2) times as long.
    """
    return config.qk_scale**2 * math.sqrt((2 if config.key_offset else 1) * config.head_width) * 1.01


class Parameter(NamedTuple):
    """The declaration of one parameter; all are float32."""

    shape: tuple[int, ...]
    axes: tuple[str, ...]  # logical axes, see `sharding`
    init: tuple[Any, ...]  # ("normal", std), ("uniform", low, high), ("constant", value) or ("ramp", first, last)
    group: str  # of the optimizer


def parameters(config: ModelConfig) -> dict[str, Parameter]:
    """Return the declaration of every parameter by its dotted path, the only place that lists them.

    Kernels are (in, out), stacked over the layers. A seed gives random numbers in the order of the table.
    """
    c, L, D, F, V = config, config.depth, config.width, mlp_width(config), padded_vocab(config)
    HN, K, KN, E = c.n_heads * c.head_width, c.n_kv_heads, c.n_kv_heads * c.head_width, len(value_layers(c))
    modern, zero, gate = c.recipe != "classic", ("constant", 0.0), ("uniform", 0.0, 0.02)
    table: dict[str, Parameter] = {}

    def add(
        path: str, shape: tuple[int, ...], axes: str, init: tuple[Any, ...], group: str, exists: bool = True
    ) -> None:
        if exists:
            table[path] = Parameter(shape, tuple(axes.split()), init, group)

    def uniform(std: float) -> tuple[Any, ...]:  # no outliers
        return "uniform", -(3**0.5 * std), 3**0.5 * std

    def kernel(n_in: int, n_out: int, factor: float = 1.0) -> tuple[Any, ...]:
        return uniform(factor * D**-0.5) if modern else ("normal", min(1.0, (n_out / n_in) ** 0.5) * n_in**-0.5)

    # a tied table also makes the logits, which a wide one would saturate; the norm behind it forgives any scale
    std = 0.02 if c.tie_embeddings else 0.8 if modern else 1.0
    init = ("normal", 0.001) if modern else zero
    add("embedding", (V, D), "vocab embed", ("normal", std), "embedding")
    add("unembedding", (V, D), "vocab embed", init, "unembedding", not c.tie_embeddings)
    add("value_embedding", (E, V, KN), "layer table kv_heads", uniform(D**-0.5), "value_embedding", E > 0)
    add("bigram_embedding", (c.bigram_rows, D), "vocab embed", zero, "bigram_embedding", c.bigram_rows > 0)
    add("smear_gate", (SMEAR_CHANNELS, 1), "gate gate", gate, "mixing", bool(c.smear))
    add("smear_scale", (), "", zero, "mixing", bool(c.smear))
    add("backout_scale", (), "", ("constant", 0.2), "mixing", bool(c.backout))
    add("blocks.q", (L, D, HN), "layer embed heads", kernel(D, HN), "matrix")
    add("blocks.k", (L, D, KN), "layer embed kv_heads", kernel(D, KN), "matrix")
    add("blocks.v", (L, D, KN), "layer embed kv_heads", kernel(D, KN), "matrix")
    add("blocks.o", (L, HN, D), "layer heads embed", zero, "matrix")
    add("blocks.fc", (L, D, F), "layer embed mlp", kernel(D, F, 0.4), "matrix")
    add("blocks.proj", (L, F, D), "layer mlp embed", zero, "matrix")
    add("blocks.residual_scale", (L,), "layer", ("ramp", 1.15, 1.05), "residual", bool(c.residual_scalars))
    add("blocks.x0_scale", (L,), "layer", ("ramp", 0.20, 0.05), "x0", bool(c.residual_scalars))
    add("blocks.ve_gate", (E, VE_GATE_CHANNELS, K), "layer gate kv_heads", gate, "matrix", E > 0)
    return table


class ParameterCount(NamedTuple):
    """Numbers of parameters by role."""

    embedding: int
    unembedding: int  # 0 where tied
    value_embedding: int
    bigram_embedding: int
    trunk: int  # matrices of the blocks, value gates included
    scalars: int

    @property
    def total(self) -> int:
        return sum(self)

    @property
    def scaling(self) -> int:
        """Trunk matrices and unembedding: the count that gave nanochat its cleanest scaling laws."""
        return self.trunk + (self.unembedding or self.embedding)


def count_parameters(config: ModelConfig) -> ParameterCount:
    sizes: Counter[str] = Counter()
    for p in parameters(config).values():
        sizes[p.group] += math.prod(p.shape)
    tables = {name: sizes.pop(name, 0) for name in ("embedding", "unembedding", "value_embedding", "bigram_embedding")}
    return ParameterCount(**tables, trunk=sizes.pop("matrix"), scalars=sizes.total())


def matmul_parameters(config: ModelConfig) -> int:
    """Return the parameters that multiply the token stream: trunk, unembedding and the smear gate."""
    return count_parameters(config).scaling + (SMEAR_CHANNELS if config.smear else 0)


def flops_per_token(config: ModelConfig) -> int:
    """Return training FLOPs per token: 6 per matmul parameter, 12 * H * N * keys seen per layer (PaLM, 2204.02311).

    Windows count with their length, not with the context; the causal half is not discounted, as everywhere.
    """
    seen = sum(min(window, config.seq_len) for window in windows(config))
    return 6 * matmul_parameters(config) + 12 * config.n_heads * config.head_width * seen


def kv_values_per_row(config: ModelConfig, context: int) -> int:
    """Return the cached values (keys and values, all layers) that one row of `context` tokens reads."""
    seen = sum(min(window + 1, context) for window in windows(config))
    return 2 * config.n_kv_heads * config.head_width * seen


def looked_up(config: ModelConfig) -> int:
    """Return the values that one token reads from tables: embedding, that of its bigram, and value embeddings."""
    values = len(value_layers(config)) * config.n_kv_heads * config.head_width
    return (2 if config.bigram_rows > 0 else 1) * config.width + values


def exam_rows(config: ModelConfig, free_bytes: int, devices: int, item_bytes: int, scores: bool) -> int:
    """Return the rows that exams run at once on `devices` with `free_bytes` each: 256, or the power of two that fits.

    Weights of the engine and of the scorer, the float32 ones of bits per byte, and a device's share of the rows take at
    most 80 % of what is free. `scores`: attention writes its (T, T) scores to memory, as XLA's does.
    """
    room = 0.8 * free_bytes - (2 * item_bytes + 4) * count_parameters(config).total
    layer = 8 * config.width + 2 * mlp_width(config)  # values a token: the stream thrice, norm, q, k, v, y, MLP twice
    # keys and values twice (a chunk of decoding works on a copy), and the activations of one layer
    row_bytes = item_bytes * (2 * kv_values_per_row(config, config.seq_len) + config.seq_len * layer)
    if scores:
        row_bytes += 2 * 4 * config.n_heads * config.seq_len**2  # float32, before and after the softmax
    rows = EXAM_ROWS
    while rows > devices and -(-rows // devices) * row_bytes > room:
        rows //= 2
    return rows


def activation_bytes(config: ModelConfig, rows: int, item_bytes: int) -> int:
    """Return the rough bytes of saved activations for `rows` rows without rematerialization.

    Per token and layer about 34 values of the width with an MLP factor of 4: inputs of every product, norms, q, k, v
    and the two MLP activations. Analytic only; a compile of the real step tells the truth.
    """
    per_token = 14 * config.width + 5 * mlp_width(config)
    return math.ceil(rows * config.seq_len * config.depth * per_token * item_bytes)


# Dense 16-bit FLOP/s of a JAX device, by a part of its `device_kind`; the file has the sources
PEAK_FLOPS: dict[str, float] = tomllib.loads(Path(__file__).with_name("peak_flops.toml").read_text(encoding="utf-8"))
# Parts of a card, or cards of other figures with the same name
NO_PEAK = re.compile(r"\bMIG\b|Laptop|[45]090 D|TPU v4 lite")


def peak_flops(device_kind: str) -> float | None:
    """Return the device's dense 16-bit peak in FLOP/s, or None where it is not known (then no MFU is shown)."""
    names = [name for name in PEAK_FLOPS if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device_kind)]
    return PEAK_FLOPS[max(names, key=len)] if names and not NO_PEAK.search(device_kind) else None
