"""Counts equal the real trees."""

import dataclasses

import jax
import pytest

from jaxchat import model as gpt
from jaxchat.config import ModelConfig, load_config, tier_files
from jaxchat.scaling import resolve, resolve_model
from jaxchat.sharding import LOGICAL_TO_MESH
from jaxchat.sizes import (
    count_parameters,
    exam_rows,
    flops_per_token,
    kv_values_per_row,
    looked_up,
    matmul_parameters,
    parameters,
    peak_flops,
)

TIERS = [load_config(path.stem) for path in tier_files()]
MODELS = [resolve(config).model for config in TIERS if not config.data.size_model]  # that one's is its text's
MODELS += [dataclasses.replace(resolve(load_config("nano", ["model.recipe=classic"])).model, tie_embeddings=True)]
MODELS += [resolve_model(ModelConfig(depth=5, width=64, n_heads=4, n_kv_heads=2, vocab_size=100, seq_len=64))]


@pytest.mark.parametrize("model", MODELS, ids=lambda m: f"{m.recipe}-{m.depth}")
def test_counts_equal_the_tree(model):
    shapes = gpt.abstract_params(model)
    count = count_parameters(model)
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == count.total
    matrices = [v.size for k, v in shapes["blocks"].items() if k not in ("residual_scale", "x0_scale")]
    assert sum(matrices) == count.trunk
    assert shapes["embedding"].size == count.embedding
    for p in parameters(model).values():
        assert len(p.shape) == len(p.axes) and set(p.axes) <= set(LOGICAL_TO_MESH)


def test_known_sizes_of_d20():
    modern = resolve_model(ModelConfig(depth=20))
    assert round(count_parameters(modern).total / 1e6) == 897
    without = dataclasses.replace(modern, value_embeddings=False)
    assert round(count_parameters(without).total / 1e6) == 477


def test_flops_count_windows_not_the_context():
    model = resolve_model(ModelConfig(depth=4, width=256, n_heads=2, seq_len=2048, vocab_size=1024))
    attention = 12 * 256 * (512 * 3 + 2048)
    assert flops_per_token(model) == 6 * matmul_parameters(model) + attention


def test_values_that_decoding_reads():
    model = resolve_model(ModelConfig(depth=4, width=256, n_heads=2, seq_len=2048, vocab_size=1024))
    assert kv_values_per_row(model, 100) == 2 * 256 * 4 * 100
    assert kv_values_per_row(model, 1024) == 2 * 256 * (3 * 513 + 1024)
    assert looked_up(model) == 3 * 256


@pytest.mark.parametrize(("kind", "peak"), [
    ("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA H100 NVL", 835e12),
    ("NVIDIA H200", 989e12), ("NVIDIA H200 NVL", 835e12), ("NVIDIA GH200 480GB", 989e12), ("NVIDIA B200", 2250e12),
    ("NVIDIA GB200", 2500e12), ("NVIDIA A100-SXM4-80GB", 312e12), ("NVIDIA A100 80GB PCIe", 312e12),
    ("NVIDIA A10G", 70e12), ("NVIDIA A10", 125e12), ("NVIDIA L4", 121e12), ("NVIDIA L40S", 362e12),
    ("NVIDIA GeForce RTX 3090", 71e12), ("Tesla T4", 65e12), ("NVIDIA GeForce RTX 3090 Ti", 80e12),
    ("Tesla V100-SXM2-16GB", 125e12), ("Tesla V100-PCIE-16GB", 112e12), ("TPU v4", 275e12), ("TPU v5 lite", 197e12),
    ("TPU v5", 459e12), ("TPU v6 lite", 918e12), ("TPU7x", 1153.5e12), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
    ("NVIDIA GeForce RTX 4090 Laptop GPU", None), ("cpu", None), ("NVIDIA T400", None),
    ("Tesla V100S-PCIE-32GB", None), ("AMD Instinct MI300X", 1307.4e12),
])  # fmt: skip
def test_peaks_by_the_names_that_devices_give(kind, peak):
    assert peak_flops(kind) == peak


@pytest.mark.parametrize("devices", [1, 4, 8])
@pytest.mark.parametrize("scores", [False, True])
def test_exams_take_the_most_rows_that_fit(devices, scores):
    """A row holds keys and values twice, eight widths and two MLP widths a token, two float32 scores a head."""
    model = resolve_model(ModelConfig(depth=20))
    cache = 2 * 1280 * (15 * 513 + 5 * 2048)
    row = 2 * (2 * cache + 2048 * (8 + 8) * 1280) + scores * 2 * 4 * 10 * 2048**2
    weights = 8 * count_parameters(model).total
    found = [exam_rows(model, free, devices, 2, scores) for free in range(0, 400 * 10**9, 10**9)]
    assert found == sorted(found) and found[0] == devices and found[-1] == 256
    for free, rows in enumerate(found):
        room = 0.8 * free * 10**9 - weights
        assert rows == devices or rows // devices * row <= room
        assert rows == 256 or 2 * rows // devices * row > room
        assert rows == 256 or 2 * rows // devices * row > room
