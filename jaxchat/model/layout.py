"""Static facts of a resolved model: windows, value-embedding layers, scan groups, padded vocabulary."""

from __future__ import annotations

import math

from jaxchat.config import ModelConfig
from jaxchat.errors import UsageError

VE_GATE_CHANNELS = 12  # of the normed attention input that gate a value embedding
SMEAR_CHANNELS = 24  # of the embedding that gate the smear
VOCAB_MULTIPLE = 64


def padded_vocab(config: ModelConfig) -> int:
    """Rows of the embedding tables: the vocabulary rounded up to whole tiles."""
    return -(-config.vocab_size // VOCAB_MULTIPLE) * VOCAB_MULTIPLE


def mlp_width(config: ModelConfig) -> int:
    return round(config.mlp_factor * config.width)


def windows(config: ModelConfig) -> list[int]:
    """Per layer, how many positions before itself a token sees; the last layer always sees all."""
    full, short = config.seq_len, min(config.window_short, config.seq_len)
    pattern = config.window_pattern
    sizes = [short if pattern[i % len(pattern)] == "S" else full for i in range(config.depth)]
    sizes[-1] = full
    return sizes


def value_layers(config: ModelConfig) -> list[int]:
    """Layers with a value embedding: every second one, the last included."""
    if not config.value_embeddings:
        return []
    return [i for i in range(config.depth) if i % 2 == (config.depth - 1) % 2]


def scan_groups(config: ModelConfig) -> tuple[int, int]:
    """(groups, layers per group) of the trunk's scan; layers after the last whole group are the tail.

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
    """Largest possible attention score: q and k are normed to length sqrt(N), then scaled."""
    return config.qk_scale**2 * math.sqrt(config.head_width) * 1.01


def check_mesh(config: ModelConfig, fsdp: int, tensor: int) -> None:
    """`UsageError` names the shapes that a mesh axis does not divide, and the nearest sizes that divide them all."""
    heads = {"heads": config.n_heads, "kv heads": config.n_kv_heads}
    split = {
        "tensor": (tensor, heads | {"MLP width": mlp_width(config), "padded vocabulary": padded_vocab(config)}),
        "fsdp": (fsdp, {"width": config.width}),
    }
    for axis, (size, shapes) in split.items():
        odd = [f"{name} {n}" for name, n in shapes.items() if n % size]
        if odd:
            common = math.gcd(*shapes.values())
            fitting = sorted((d for d in range(1, common + 1) if common % d == 0), key=lambda d: abs(d - size))
            raise UsageError(
                f"mesh.{axis}={size}: does not divide the {' and the '.join(odd)} of this model; "
                f"take {' or '.join(map(str, sorted(fitting[:2])))}"
            )
