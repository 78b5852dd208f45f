"""The analytic plan: the contract's object, what money and time buy, and refusals before anything is compiled."""

import importlib.util
import json

import pytest

from jaxchat.config import load_config
from jaxchat.errors import UsageError
from jaxchat.scaling import resolve
from train.hlo import Program, Transfer
from train.plan import estimate, parse_target, plan, plan_budget, step_seconds
from train.targets import ATTENTION_SHARE, BANDWIDTH_SHARE, PRODUCT_SHARE

KEYS = {
    "tier", "target", "fits", "devices", "params", "tokens", "steps", "flops_total", "flops_per_token",
    "peak_bytes_per_device", "device_bytes", "argument_bytes", "temp_bytes", "collectives", "device_batch_rows",
    "grad_accum", "step_seconds_estimate", "hours_estimate", "usd_estimate", "mfu_assumed", "compile_seconds", "method",
}  # fmt: skip


def test_json_has_the_keys_of_the_contract(capsys):
    plan(resolve(load_config("d20")), "h100:8", as_json=True)
    found = json.loads(capsys.readouterr().out)
    assert set(found) >= KEYS
    assert found["method"] == "analytic" and found["devices"] == 8
    assert found["params"] == 896_533_746
    assert found["flops_total"] == found["flops_per_token"] * found["tokens"]
    assert found["disk_bytes"] == sum(found["disk"].values()) > 0
    rows = found["device_batch_rows"] * found["grad_accum"] * 8 * 2048
    assert rows * found["steps"] == found["tokens"]


def test_more_devices_take_less_time_for_little_more_money():
    config = resolve(load_config("d20"))
    one, eight = estimate(config, "h100:1"), estimate(config, "h100:8")
    assert one["compute_seconds_estimate"] == pytest.approx(8 * eight["compute_seconds_estimate"])
    assert one["collective_seconds_estimate"] == 0 < eight["collective_seconds_estimate"]
    assert 1 < eight["usd_estimate"] / one["usd_estimate"] < 1.05


@pytest.mark.parametrize(
    ("tier", "target", "compiled"),
    [("d12", "h100:1", 20.2e9), ("d20", "h100:8", 58.8e9), ("d26", "h100:8", 52.7e9), ("d32", "h100:8", 74.7e9)],
)
def test_arithmetic_is_near_the_compiler(tier, target, compiled):
    """Peaks of the tiers' compiled steps (jax 0.10.2)."""
    assert estimate(resolve(load_config(tier)), target)["peak_bytes_per_device"] == pytest.approx(compiled, rel=0.2)


def test_a_model_too_large_does_not_fit():
    assert not estimate(resolve(load_config("d32")), "v5e:1x1")["fits"]
    assert estimate(resolve(load_config("nano")), "cpu:1")["fits"]


def test_this_machine():
    assert estimate(resolve(load_config("nano")), "auto")["devices"] >= 1


def test_the_time_of_a_compiled_step_follows_from_products_attention_and_bytes():
    """A second of bf16 products, as many 8-bit FLOPs in half of it, a tenth of attention, 120 GB of the rest."""
    target, product = parse_target("h100:1"), PRODUCT_SHARE * 989e12
    program = Program(product_flops=2 * product, attention_flops=0.1 * ATTENTION_SHARE * 989e12)
    program.product_types.update({"bf16 x bf16": int(product), "f8e4m3fn x f8e4m3fn": int(product)})
    program.transfers = [
        Transfer("products", 5e9, 7, "dot"),
        Transfer("other", 1e9, 100, "copy"),
        Transfer("other", 2e9, 10, "add"),
    ]
    seconds = step_seconds(target, program)
    assert seconds["products"] == pytest.approx(1.5) and seconds["attention"] == pytest.approx(0.1)
    assert seconds["other"] == pytest.approx(120e9 / (BANDWIDTH_SHARE * 3.35e12))
    assert step_seconds(parse_target("v6e:2x4"), program) == {}


@pytest.mark.parametrize(("budget", "hours", "target", "message"), [
    ("much", None, "h100:8", "--budget much: give an amount such as 100usd"),
    ("0usd", None, "h100:8", "--budget 0usd"),
    ("100usd", None, "cpu:1", "cpu has no price; give --hours"),
    ("0.001usd", None, "h100:8", "not even 2 layers; they take"),
    (None, 1e-6, "h100:8", "1e-06 hours on h100:8: not even 2 layers"),
    ("100usd", None, "h100:12", "take h100:8 or h100:16"),
])  # fmt: skip
def test_limits_that_cannot_be(budget, hours, target, message):
    with pytest.raises(UsageError, match=message.replace("(", r"\(")):
        plan_budget(load_config("d20"), target, budget, hours, as_json=True)


@pytest.mark.skipif(
    importlib.util.find_spec("jax_plugins") is not None, reason="would compile many depths; test_compiled does one"
)
def test_the_deepest_model_within_the_limits(capsys):
    found = {}
    for budget, hours in (("$100", None), ("100", 1.0), ("1000usd", None)):
        plan_budget(load_config("d20"), "h100:8", budget, hours, as_json=True)
        found[budget, hours] = json.loads(capsys.readouterr().out)
    hundred, one_hour, thousand = found.values()
    assert hundred["usd_estimate"] <= 100 and one_hour["hours_estimate"] <= 1 and thousand["usd_estimate"] <= 1000
    assert one_hour["depth"] < hundred["depth"] < thousand["depth"]
    assert hundred["fits"] and hundred["deepest_tier"] == "d20" and thousand["deepest_tier"] == "d32"
    assert f"--tier d20 --set model.depth={hundred['depth']}" in hundred["command"]
