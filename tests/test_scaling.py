"""What follows from the depth: shapes, tokens, batch, steps, rates."""

import pytest

from jaxchat.config import KEYS, ModelConfig, load_config
from jaxchat.errors import UsageError
from jaxchat.scaling import derivations, rate_scale, resolve, resolve_model
from jaxchat.sizes import count_parameters


def test_modern_horizon_is_12_tokens_per_scaling_parameter():
    config = resolve(load_config("d12", ["model.recipe=modern", "train.token_ratio=12"]))
    tokens = config.train.steps * config.train.batch_tokens
    assert tokens == pytest.approx(12 * count_parameters(config.model).scaling, rel=1e-3)
    assert config.train.batch_tokens == 2**19
    assert config.optim.weight_decay == pytest.approx(0.28, rel=1e-3)
    assert config.optim.lr_scale == 1.0


def test_classic_horizon_is_20_tokens_per_parameter():
    config = resolve(load_config("d20", ["model.recipe=classic", "model.vocab_size=65536", "train.token_ratio=-1"]))
    assert count_parameters(config.model).total == 560_988_160  # nanochat's first d20: 561 M
    tokens = config.train.steps * config.train.batch_tokens
    assert tokens == pytest.approx(11.2e9, rel=0.01)
    assert config.train.batch_tokens == 2**19


def test_decay_keeps_rate_times_decay_times_steps():
    """2405.13698: what d12 has, every depth has."""
    products = []
    for tier in ("d12", "d20", "d26"):
        c = resolve(load_config(tier, ["train.token_ratio=12"]))
        products.append(c.optim.lr_scale * c.optim.weight_decay * c.train.steps)
    assert products == pytest.approx([products[0]] * 3, rel=1e-3)


@pytest.mark.parametrize("ratio", [8, 10.5, 12])
def test_decay_is_that_of_nanochat_at_any_ratio(ratio):
    """Its formula: 0.28 sqrt(B / 2^19) (tokens of d12 / tokens), both at the same tokens a parameter."""
    c = resolve(load_config("d20", [f"train.token_ratio={ratio}"]))
    scaling = [count_parameters(resolve(load_config(tier)).model).scaling for tier in ("d12", "d20")]
    formula = 0.28 * (c.train.batch_tokens / 2**19) ** 0.5 * scaling[0] / scaling[1]
    assert c.optim.weight_decay == pytest.approx(formula, rel=1e-3)


def test_rate_scale():
    assert rate_scale(2**19) == 1.0
    assert rate_scale(2**21) == 2.0
    assert rate_scale(2**11) == 1.0


@pytest.mark.parametrize("key", ["train.batch_tokens", "sft.batch_tokens"])
def test_batch_must_hold_whole_rows(key):
    with pytest.raises(UsageError, match=rf"{key}: 1000 is no multiple of model.seq_len 256"):
        resolve(load_config("nano", [f"{key}=1000"]))


def test_adamw_stays_selectable():
    c = resolve(load_config("nano", ["optim.kind=adamw"]))
    assert (c.optim.weight_decay, c.optim.grad_clip, c.optim.final_lr) == (0.1, 1.0, 0.1)
    with pytest.raises(UsageError, match="optim.kind"):
        resolve(load_config("nano", ["optim.kind=sgd"]))


def test_every_derived_key_has_a_reason():
    given = load_config("d20")
    reasons = derivations(given, resolve(given))
    assert "model.width" in reasons and "train.steps" in reasons
    assert all(text.startswith("derived: ") for text in reasons.values())


NUMBERS = [name for name, key in KEYS.items() if type(key.default) in (int, float)]


@pytest.mark.parametrize("value", ["0", "-1", "-7", "1000000000000"])
def test_any_number_is_taken_or_refused_by_name(value):
    """No number ends in a traceback, and negative ones that mean nothing are refused."""
    for key in NUMBERS:
        try:
            resolve(load_config("nano", [f"{key}={value}"]))
        except UsageError as error:
            assert key in str(error) or "model." in str(error)
        else:
            assert value != "-7" or key == "format", key


@pytest.mark.parametrize("depth", [4, 12, 20, 26, 32])
def test_the_dial(depth):
    model = resolve_model(ModelConfig(depth=depth))
    assert model.width == 64 * depth
    assert model.head_width == 128 and model.n_heads == model.width // 128 == model.n_kv_heads
    assert model.window_short == 512


def test_the_width_is_a_multiple_of_the_head_width():
    model = resolve_model(ModelConfig(depth=5))  # 320 is no multiple of 128
    assert (model.width, model.n_heads) == (384, 3)
    assert resolve_model(ModelConfig(depth=6, width=320, n_heads=8)).head_width == 40


@pytest.mark.parametrize(
    "fields",
    [
        {"recipe": "retro"},
        {"depth": 0},
        {"width": 100},
        {"n_heads": 4, "n_kv_heads": 3, "head_width": 32},
        {"head_width": 33, "n_heads": 2},
        {"window_pattern": "SXL"},
        {"attention": "flash"},
        {"seq_len": -1},
    ],
)
def test_impossible_shapes_are_refused(fields):
    with pytest.raises(UsageError, match="model."):
        resolve_model(ModelConfig(**fields))
