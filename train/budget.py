"""`--budget` and `--hours`: the deepest model that a sum of money or a time buys on a target."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from jaxchat.config import Config, load_config, tier_files
from jaxchat.errors import UsageError
from jaxchat.log import say
from jaxchat.optim.horizon import resolve
from train.plan import compile_plan, disk, estimate
from train.plan_table import console, show
from train.targets import NoCompiler, Target, parse_target

DEPTHS = range(2, 49)


def plan_budget(given: Config, target: str, budget: str | None, hours: float | None, as_json: bool) -> dict[str, Any]:
    """Print and return the plan of the deepest model that both limits allow; nothing is trained.

    Args:
      given: not resolved: every depth derives its own width, batch and steps.
      budget: `100usd`, or just the number.
    """
    usd = _parse_usd(budget)
    where = parse_target(target)
    if usd is not None and not where.chip.price:
        raise UsageError(f"--budget {budget}: {where.chip.name} has no price; give --hours, or another --target")
    affordable = [c for c in (_at_depth(given, d) for d in DEPTHS) if c and _allows(c, where, usd, hours)]
    if not affordable:
        least = estimate(_fitting(_at_depth(given, DEPTHS[0]) or resolve(given), where), where)
        raise UsageError(
            f"{_limits(usd, hours)} on {target}: not even {DEPTHS[0]} layers; they take {least['hours_estimate']:.3g} "
            f"hours and {least['usd_estimate']:.3g} USD"
        )
    config, result = _deepest_that_fits(affordable, where, usd, hours)
    result["deepest_tier"] = _deepest_tier(where, usd, hours)
    result["command"] = _command(given, config)
    result |= disk(config)
    if as_json:
        print(json.dumps(result))
        return result
    show(result)
    tier = f"; of the tiers, {result['deepest_tier']}" if result["deepest_tier"] else "; no tier is that small"
    console.print(f"{_limits(usd, hours)} on {target}: {config.model.depth} layers at most{tier}. To run it:")
    console.print(f"    {result['command']}", soft_wrap=True, markup=False)
    return result


def _parse_usd(text: str | None) -> float | None:
    if text is None:
        return None
    found = re.fullmatch(r"\$?(\d+(?:\.\d+)?)\s*(?:usd|\$)?", text.strip().lower())
    if not found or not float(found[1]):
        raise UsageError(f"--budget {text}: give an amount such as 100usd")
    return float(found[1])


def _limits(usd: float | None, hours: float | None) -> str:
    return " and ".join(([f"{usd:g} USD"] if usd else []) + ([f"{hours:g} hours"] if hours else []))


def _at_depth(given: Config, depth: int) -> Config | None:
    try:
        return resolve(dataclasses.replace(given, model=dataclasses.replace(given.model, depth=depth)))
    except UsageError:  # shapes set by hand that this depth cannot have
        return None


def _fitting(config: Config, target: Target) -> Config:
    """With as few rows a device as memory asks for."""
    rows = config.train.device_batch_rows
    while rows > 1 and not estimate(_with_rows(config, rows), target)["fits"]:
        rows //= 2
    return _with_rows(config, rows)


def _with_rows(config: Config, rows: int) -> Config:
    return dataclasses.replace(config, train=dataclasses.replace(config.train, device_batch_rows=rows))


def _allows(config: Config, target: Target, usd: float | None, hours: float | None) -> bool:
    batch = config.train.batch_tokens // config.model.seq_len
    result = estimate(_fitting(config, target), target)
    return _within(result, usd, hours) and result["fits"] and batch % target.devices == 0


def _within(result: dict[str, Any], usd: float | None, hours: float | None) -> bool:
    return result["hours_estimate"] <= (hours or 1e30) and result["usd_estimate"] <= (usd or 1e30)


def _deepest_that_fits(
    affordable: list[Config], target: Target, usd: float | None, hours: float | None
) -> tuple[Config, dict[str, Any]]:
    """Compiled from the deepest down, with the rows that the compiler finds; analytic where there is no compiler."""
    for config in reversed(affordable):
        try:
            result = compile_plan(config, target)
        except NoCompiler as missing:
            say(f"{missing}; this is the analytic estimate")
            fitting = _fitting(config, target)
            return fitting, estimate(fitting, target)
        rows = result["largest_device_batch_rows"]
        if not result["fits"] and rows:
            config = _with_rows(config, rows)
            kept = {key: result[key] for key in ("largest_device_batch_rows", "by_rows", "decode")}
            result = compile_plan(config, target, search=False) | kept
        if result["fits"] and _within(result, usd, hours):
            return config, result
        say(f"{config.model.depth} layers do not fit {target.text}, or not into the limits once compiled")
    raise UsageError(f"--target {target.text}: no depth that the limits allow fits the memory; take more devices")


def _deepest_tier(target: Target, usd: float | None, hours: float | None) -> str | None:
    given = [load_config(path.stem) for path in tier_files()]
    tiers = [resolve(config) for config in given if not config.data.size_model]  # that one's depth is its text's
    fitting = [c for c in tiers if _allows(c, target, usd, hours)]
    return max(fitting, key=lambda c: c.model.depth).tier if fitting else None


def _command(given: Config, config: Config) -> str:
    """What trains that configuration; keys set on this command line have to be repeated by hand."""
    parts = [f"python launch.py --tier {given.tier}"]
    if config.model.depth != given.model.depth:
        parts.append(f"--set model.depth={config.model.depth} --run-dir runs/d{config.model.depth}")
    if config.train.device_batch_rows != given.train.device_batch_rows:
        parts.append(f"--set train.device_batch_rows={config.train.device_batch_rows}")
    return " ".join(parts)
