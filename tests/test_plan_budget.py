"""What money and time buy: limits that hold, and honest refusals before anything is compiled."""

import importlib.util
import json

import pytest

from jaxchat.config import load_config
from jaxchat.errors import UsageError
from train.plan import plan_budget


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
    importlib.util.find_spec("jax_plugins") is not None, reason="would compile many depths; test_plan_compiled does one"
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
