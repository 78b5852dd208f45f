"""Parameters, FLOPs and bytes of a model: the only place that counts. Plain arithmetic on the resolved config.

Letters: L layers, T time, D model width, N head width.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from jaxchat.config import ModelConfig
from jaxchat.errors import UsageError

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
    full, short = config.seq_len, min(config.window_short, config.seq_len)
    pattern = config.window_pattern
    sizes = [short if pattern[i % len(pattern)] == "S" else full for i in range(config.depth)]
    sizes[-1] = full
    return sizes


def value_layers(config: ModelConfig) -> list[int]:
    """Return the layers with a value embedding: every second one, the last included."""
    if not config.value_embeddings:
        return []
    return [i for i in range(config.depth) if i % 2 == (config.depth - 1) % 2]


def scan_groups(config: ModelConfig) -> tuple[int, int]:
    """Return (groups, layers per group) of the forward pass's scan; the layers after them are the tail.

    Within a group every layer's window and value embedding are static, so a group spans the pattern's period.
    """
    period = len(config.window_pattern)
    if config.value_embeddings:
        period = math.lcm(period, 2)
    sizes = windows(config)
    groups = 0
    while (groups + 1) * period <= config.depth and all(sizes[groups * period + j] == sizes[j] for j in range(period)):
        groups += 1
    return groups, period


def score_bound(config: ModelConfig) -> float:
    """Return the largest possible attention score: q and k are normed to length sqrt(N), then scaled."""
    return config.qk_scale**2 * math.sqrt(config.head_width) * 1.01


def check_mesh(config: ModelConfig, fsdp: int, tensor: int) -> None:
    """Raise `UsageError` with the shapes that a mesh axis does not divide, and the nearest sizes that do."""
    heads = {"heads": config.n_heads, "kv heads": config.n_kv_heads}
    split = {
        "tensor": (tensor, heads | {"MLP width": mlp_width(config), "padded vocabulary": padded_vocab(config)}),
        "fsdp": (fsdp, {"width": config.width}),
    }
    for axis, (size, shapes) in split.items():
        if odd := [f"{name} {n}" for name, n in shapes.items() if n % size]:
            common = math.gcd(*shapes.values())
            fitting = sorted((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - size))
            raise UsageError(
                f"mesh.{axis}={size}: does not divide the {' and the '.join(odd)} of this model; "
                f"take {' or '.join(map(str, sorted(fitting[:2])))}"
            )


@dataclass(frozen=True)
class ParameterCount:
    """Numbers of parameters by role; `total` equals the real tree's."""

    embedding: int
    unembedding: int  # 0 where tied
    value_embedding: int
    trunk: int  # matrices of the blocks, value gates included
    scalars: int

    @property
    def total(self) -> int:
        return self.embedding + self.unembedding + self.value_embedding + self.trunk + self.scalars

    @property
    def scaling(self) -> int:
        """Trunk matrices and unembedding: the count that gave nanochat its cleanest scaling laws."""
        return self.trunk + (self.unembedding or self.embedding)


def count_parameters(config: ModelConfig) -> ParameterCount:
    c, D, N = config, config.width, config.head_width
    table = padded_vocab(c) * D
    attention = 2 * D * c.n_heads * N + 2 * D * c.n_kv_heads * N
    with_value = len(value_layers(c))
    return ParameterCount(
        embedding=table,
        unembedding=0 if c.tie_embeddings else table,
        value_embedding=with_value * padded_vocab(c) * c.n_kv_heads * N,
        trunk=c.depth * (attention + 2 * D * mlp_width(c)) + with_value * VE_GATE_CHANNELS * c.n_kv_heads,
        scalars=(2 * c.depth if c.residual_scalars else 0)
        + (SMEAR_CHANNELS + 1 if c.smear else 0)
        + (1 if c.backout else 0),
    )


def matmul_parameters(config: ModelConfig) -> int:
    """Return the parameters that multiply the token stream: trunk, unembedding and the smear gate."""
    return count_parameters(config).scaling + (SMEAR_CHANNELS if config.smear else 0)


def flops_per_token(config: ModelConfig) -> int:
    """Return training FLOPs per token: 6 per matmul parameter, 12 * H * N * keys seen per layer (PaLM, 2204.02311).

    Windows count with their length, not with the context; the causal half is not discounted, as everywhere.
    """
    seen = sum(min(window, config.seq_len) for window in windows(config))
    return 6 * matmul_parameters(config) + 12 * config.n_heads * config.head_width * seen


def decode_bytes_per_step(config: ModelConfig, rows: int, context: int, item_bytes: int) -> int:
    """Return the bytes a decode step must read: weights that take part, one embedding row a token, the live cache."""
    c = config
    tables = 1 + len(value_layers(c))
    weights = matmul_parameters(c) + rows * tables * c.width
    return item_bytes * (weights + rows * kv_values_per_row(c, context))


def kv_values_per_row(config: ModelConfig, context: int) -> int:
    """Return the cached values (keys and values, all layers) that one row of `context` tokens reads."""
    seen = sum(min(window + 1, context) for window in windows(config))
    return 2 * config.n_kv_heads * config.head_width * seen


def exam_rows(config: ModelConfig, free_bytes: int, devices: int, item_bytes: int, scores: bool) -> int:
    """Return the rows that exams run at once on `devices` with `free_bytes` each: 256, or the power of two that fits.

    Weights of the engine and of the scorer, the float32 ones of bits per byte, and a device's share of the rows take at
    most 80 % of what is free. `scores`: attention writes its (T, T) scores to memory, as XLA's does.
    """
    room = 0.8 * free_bytes - (2 * item_bytes + 4) * count_parameters(config).total
    rows = EXAM_ROWS
    while rows > devices and -(-rows // devices) * exam_row_bytes(config, item_bytes, scores) > room:
        rows //= 2
    return rows


def exam_row_bytes(config: ModelConfig, item_bytes: int, scores: bool) -> int:
    """Return the bytes of one row of full context in an exam.

    Keys and values twice (a chunk of decoding works on a copy), and the activations of one layer.
    """
    layer = 8 * config.width + 2 * mlp_width(config)  # values a token: the stream thrice, norm, q, k, v, y, MLP twice
    matrix = 2 * 4 * config.n_heads * config.seq_len**2 if scores else 0  # float32, before and after the softmax
    return item_bytes * (2 * kv_values_per_row(config, config.seq_len) + config.seq_len * layer) + matrix


# Dense 16-bit peak with float32 accumulation, FLOP/s per JAX device, by a part of `device_kind`; the longest match
# counts. Sparse figures of the sheets halved. Sources: NVIDIA's data sheets (A10 and A10G second hand, from Ray's and
# Levanter's tables) and white papers (GeForce RTX: float32 accumulation runs at half rate there); AMD's data sheet;
# Google Cloud's TPU pages, per chip, halved for TPU7x, whose two cores are devices.
PEAK_FLOPS = {
    "H100": 989e12, "H100 PCIe": 756e12, "H100 NVL": 835e12, "H200": 989e12, "H200 NVL": 835e12, "GH200": 989e12,
    "B200": 2250e12, "GB200": 2500e12, "B300": 2250e12,
    "A100": 312e12, "A40": 149.7e12, "A10": 125e12, "A10G": 70e12, "L4": 121e12, "L40": 181e12, "L40S": 362e12,
    "RTX A6000": 154.8e12, "RTX 3090": 71e12, "RTX 3090 Ti": 80e12, "RTX 4090": 165.2e12,
    "RTX 5090": 209.5e12, "MI300X": 1307.4e12,
    "T4": 65e12, "V100": 125e12, "V100-PCIE": 112e12,
    "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5e": 197e12, "TPU v5": 459e12, "TPU v5p": 459e12,
    "TPU v6 lite": 918e12, "TPU v6e": 918e12, "TPU7x": 1153.5e12,
}  # fmt: skip
# Parts of a card, or cards of other figures with the same name
NO_PEAK = re.compile(r"\bMIG\b|Laptop|[45]090 D|TPU v4 lite")


def peak_flops(device_kind: str) -> float | None:
    """Return the device's dense 16-bit peak in FLOP/s, or None where it is not known (then no MFU is shown)."""
    found = [name for name in PEAK_FLOPS if re.search(rf"(?<!\w){re.escape(name)}(?!\w)", device_kind)]
    return PEAK_FLOPS[max(found, key=len)] if found and not NO_PEAK.search(device_kind) else None


def activation_bytes(config: ModelConfig, rows: int, item_bytes: int) -> int:
    """Return the rough bytes of saved activations for `rows` rows without rematerialization.

    Per token and layer about 34 values of the width with an MLP factor of 4: inputs of every product, norms, q, k, v
    and the two MLP activations. Analytic only; a compile of the real step tells the truth.
    """
    per_token = 14 * config.width + 5 * mlp_width(config)
    return math.ceil(rows * config.seq_len * config.depth * per_token * item_bytes)
