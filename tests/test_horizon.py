"""What follows from the model: tokens, batch, steps, rates."""

import pytest

from jaxchat.config import KEYS, load_config
from jaxchat.errors import UsageError
from jaxchat.scaling import derivations, rate_scale, resolve
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
    assert rate_scale(2**11) == pytest.approx(8 * (2**11 / 2**19) ** 0.5)
    assert all(rate_scale(2**k) < rate_scale(2 ** (k + 1)) for k in range(10, 22))


def test_batch_must_hold_whole_rows():
    with pytest.raises(UsageError, match=r"no multiple of model.seq_len 256; take 1024"):
        resolve(load_config("nano", ["train.batch_tokens=1000"]))


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


@pytest.mark.parametrize("key", NUMBERS)
@pytest.mark.parametrize("value", ["0", "-1", "-7", "1000000000000"])
def test_any_number_is_taken_or_refused_by_name(key, value):
    """No number of a user's ends in a traceback here, and none that makes no sense gets through."""
    try:
        resolve(load_config("nano", [f"{key}={value}"]))
    except UsageError as error:
        assert key in str(error) or "model.seq_len" in str(error) or "model." in str(error)
    else:
        assert value != "-7" or key.startswith(("mesh.", "tokenizer.", "data."))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.checkpoint_every=0", "train.checkpoint_every: must be at least 1, not 0"),
        ("eval.rows=0", "eval.rows: must be at least 1"),
        ("train.compute_dtype=foo", "train.compute_dtype: 'foo' is unknown"),
        ("sft.batch_tokens=100", "sft.batch_tokens: 100 is no multiple of model.seq_len 256; take 256"),
        ("data.val_fraction=1.5", "data.val_fraction: must be at most 0.9"),
    ],
)
def test_numbers_that_make_no_sense(override, message):
    with pytest.raises(UsageError) as error:
        resolve(load_config("nano", [override]))
    assert message in str(error.value)
