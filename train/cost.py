"""What a run took: wall clock by stage, and dollars where the device has a price."""

from __future__ import annotations

from typing import Any

from train.targets import PRICES_OF, chip_of


def wall_clock(record: dict[str, Any]) -> float:
    """Seconds of a stage. A killed process leaves no record of its time, but the checkpoints have the training's."""
    facts = record.get("facts", {})
    return max(record["seconds"], facts.get("seconds", 0.0) + facts.get("eval_seconds", 0.0))


def run_cost(records: dict[str, Any]) -> dict[str, Any]:
    """USD of the stages in `stages.json`: devices x hours x price.

    `usd` is 0 where everything ran on CPUs and null where a device has no price here; `stages` has every stage's share,
    `prices` the price of a device and hour, `words` says all of it.
    """
    stages: dict[str, float | None] = {}
    prices: dict[str, float] = {}
    unknown: dict[str, None] = {}
    for name, record in records.items():
        machine = record["hardware"]
        if machine["platform"] == "cpu":
            stages[name] = 0.0
            continue
        chip = chip_of(machine["device"])
        if chip is None:
            stages[name] = None
            unknown[machine["device"]] = None
        else:
            prices[machine["device"]] = chip.price
            stages[name] = machine["devices"] * wall_clock(record) / 3600 * chip.price
    known = sum(usd for usd in stages.values() if usd is not None)
    if unknown:
        words = f"not known: no price of {', '.join(unknown)} at hand"
        words += f"; the stages on other devices {known:,.2f} USD" if known else ""
    elif prices:
        words = f"{known:,.2f} USD ({PRICES_OF})"
    else:
        words = "nothing: it ran on CPUs; electricity is not counted"
    usd = None if unknown else known
    return {"usd": usd, "stages": stages, "prices": prices, "assumption": PRICES_OF, "words": words}
