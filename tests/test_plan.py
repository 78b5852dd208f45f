"""The plan without a compiler: the contract's object, what money and time buy, disk, and what stops a run first."""

import dataclasses
import importlib.util
import json

import pytest
from whole_run import TINY, arguments

import launch
from jaxchat.config import load_config
from jaxchat.errors import DataError, UsageError
from jaxchat.log import value_text
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from train.plan import (
    check_room,
    check_time,
    checkpoint_bytes,
    disk_parts,
    estimate,
    plan,
    plan_budget,
    sft_tokens,
    used,
)
from train.stages import STAGES, select, unfinished
from train.targets import parse_target

ALL = {stage.name for stage in STAGES}

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


@pytest.mark.parametrize(("name", "value", "text"), [
    ("peak_bytes", 1.5e9, "1.5 GB"), ("disk", {"rows": 7e6}, "rows: 7 MB"), ("seconds", 7200, "2.00 h"),
    ("step_seconds", 0.25, "0.25 s"), ("mfu_assumed", 0.46, "46.0%"), ("usd", 3, "3.00 USD"), ("tokens", 9876, "9,876"),
    ("flops", 10**18, "1e+18"), ("fits", False, "NO"), ("mfu", None, "-"), ("made_up", [], "none"),
    ("collectives", {"all-reduce": {"count": 2, "bytes": 1e6}}, "all-reduce: count 2, bytes 1 MB"),
])  # fmt: skip
def test_the_table_says_the_unit_that_a_name_tells(name, value, text):
    assert value_text(name, value) == text


def estimated(config, target):
    return estimate(config, parse_target(target))


def test_more_devices_take_less_time_for_little_more_money():
    config = resolve(load_config("d20"))
    one, eight = estimated(config, "h100:1"), estimated(config, "h100:8")
    assert one["compute_seconds_estimate"] == pytest.approx(8 * eight["compute_seconds_estimate"])
    assert one["collective_seconds_estimate"] == 0 < eight["collective_seconds_estimate"]
    assert 1 < eight["usd_estimate"] / one["usd_estimate"] < 1.05


@pytest.mark.parametrize(
    ("tier", "target", "compiled"),
    [("d12", "h100:1", 20.2e9), ("d20", "h100:8", 58.8e9), ("d26", "h100:8", 52.7e9), ("d32", "h100:8", 74.7e9)],
)
def test_arithmetic_is_near_the_compiler(tier, target, compiled):
    """Peaks of the tiers' compiled steps (jax 0.10.2)."""
    assert estimated(resolve(load_config(tier)), target)["peak_bytes_per_device"] == pytest.approx(compiled, rel=0.2)


def test_a_model_too_large_does_not_fit():
    assert not estimated(resolve(load_config("d32")), "v5e:1x1")["fits"]
    assert estimated(resolve(load_config("nano")), "cpu:1")["fits"]


def test_this_machine():
    assert estimated(resolve(load_config("nano")), "auto")["devices"] >= 1


@pytest.mark.parametrize(("budget", "hours", "target", "message"), [
    ("much", None, "h100:8", "--budget much: give an amount such as 100usd"),
    ("0usd", None, "h100:8", "--budget 0usd"),
    ("100usd", None, "cpu:1", "cpu has no price; give --hours"),
    ("0.001usd", None, "h100:8", "--budget 0.001usd"),
    (None, 1e-6, "h100:8", "--hours 1e-06"),
    ("100usd", None, "h100:12", "take a multiple of 8"),
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
    assert hundred["fits"]
    assert f"--tier d20 --set model.depth={hundred['depth']}" in hundred["command"]


def test_days_on_a_cpu_stop_before_anything_is_downloaded(tmp_path, capsys):
    args = ["--tier", "d20", "--run-dir", str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache")]
    assert launch.main(args) == 2
    assert "train.allow_slow=true" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_small_tiers_finished_stages_and_whoever_wants_to_go_on(tmp_path):
    d20, run = resolve(load_config("d20")), RunDir(tmp_path)
    with pytest.raises(UsageError):
        check_time(d20, run, {"sft"})
    check_time(d20, run, ALL - {"pretrain", "sft", "rl"})
    check_time(dataclasses.replace(d20, train=dataclasses.replace(d20.train, allow_slow=True)), run, ALL)
    for tier in ("nano", "lotto", "ko-nano"):
        check_time(resolve(load_config(tier)), run, ALL)


def test_steps_before_the_newest_checkpoint_take_no_time(tmp_path):
    d20, run = resolve(load_config("d20")), RunDir(tmp_path)
    (run.stage("base") / "10").mkdir(parents=True)
    with pytest.raises(UsageError):
        check_time(d20, run, {"pretrain"})
    (run.stage("base") / str(d20.train.steps)).mkdir()
    check_time(d20, run, {"pretrain"})


def test_a_finished_run_has_nothing_left(finished):
    config = resolve(load_config(finished / "config.toml"))
    assert unfinished(config, RunDir(finished)) == []


def test_a_disk_that_is_too_small_is_said_first(corpus, tmp_path, capsys):
    wide = ["--set", "model.width=16384", "--set", "model.n_heads=1024", "--set", "model.depth=400"]
    args = arguments(corpus, tmp_path / "run", *wide, "--set", "train.allow_slow=true", "--cache-dir", str(tmp_path))
    assert launch.main(args) == 3
    said = capsys.readouterr().err
    assert "train.keep_last" in said and "--run-dir" in said and not (tmp_path / "run").exists()


def test_only_what_is_not_written_yet_needs_room(tmp_path):
    large = resolve(load_config("d32", ["model.depth=150", f"data.cache_dir={tmp_path}"]))
    with pytest.raises(DataError):
        check_room(large, RunDir(tmp_path), ALL)
    check_room(large, RunDir(tmp_path), {"eval", "report"})
    part = next(p for p in disk_parts(large) if p.name == "checkpoints, base")
    (tmp_path / "base").mkdir()
    with open(tmp_path / "base" / "sparse", "wb") as file:
        file.truncate(part.bytes)
    with pytest.raises(DataError) as error:
        check_room(large, RunDir(tmp_path), {"pretrain"})
    assert "checkpoints, base" not in str(error.value) and "being written" in str(error.value)


def test_the_issues_figures_of_d20():
    """9.2 GB a checkpoint of float32 (8.5 compressed), about 115 GB in all: a quarter of the text is dropped."""
    config = resolve(load_config("d20"))
    assert checkpoint_bytes(config) == pytest.approx(9.2e9 * 0.93, rel=0.01)
    assert sum(part.bytes for part in disk_parts(config)) == pytest.approx(1.15e11, rel=0.05)


def test_parts_are_those_of_a_run_of_nano():
    """Measured with du -sb on a run: base with two checkpoints, token shards, rows."""
    parts = {part.name: part.bytes for part in disk_parts(resolve(load_config("nano")))}
    measured = {"checkpoints, base": 92_796_408, "token shards": 6_998_584, "rows": 6_940_304}
    assert {name: parts[name] for name in measured} == pytest.approx(measured, rel=0.1)


def test_a_run_takes_what_was_counted(finished, corpus):
    """A tiny run: Orbax's own files weigh, and what is still zero takes next to nothing, as many rows of bigrams."""
    config = resolve(load_config("nano", [*TINY, f'data.source="files:{corpus}/*.txt"']))
    parts = {part.name: part.bytes for part in disk_parts(config)}
    newest = max(int(p.name) for p in (finished / "base").iterdir() if p.name.isdigit())
    arrays = sum(p.stat().st_size for p in (finished / "base" / str(newest)).rglob("d/*") if p.stat().st_size > 5_000)
    assert 0.5 < arrays / checkpoint_bytes(config) < 1.05
    assert used(finished / "data" / "rows") == pytest.approx(parts["rows"], rel=0.5)
    assert len(list((finished / "base").glob("[0-9]*"))) == round(parts["checkpoints, base"] / checkpoint_bytes(config))


def test_more_checkpoints_and_copies_of_the_mixture_take_more():
    def total(*overrides):
        return sum(part.bytes for part in disk_parts(resolve(load_config("nano", overrides))))

    def checkpoints(stage, *overrides):
        config = resolve(load_config("nano", ["train.steps=1000", "train.checkpoint_every=200", *overrides]))
        sizes = {part.name: part.bytes for part in disk_parts(config)}
        return round(sizes[f"checkpoints, {stage}"] / checkpoint_bytes(config))

    assert checkpoints("base", "train.keep_last=3") == checkpoints("base") + 1 == 3
    assert checkpoints("base", "train.keep_every=400") == 3  # 400; 800 and 1,000 stay anyway
    assert total("export.formats=[]") < total('export.dtype="bfloat16"') < total()
    doubled = resolve(load_config("nano", ['sft.mixture=["identity:3000*2"]']))
    assert sft_tokens(doubled) == 2 * sft_tokens(resolve(load_config("nano", ['sft.mixture=["identity:3000"]'])))


def test_selected_stages_alone_count(corpus, tmp_path):
    """Text can be packed for a large model on a machine that could not train it."""
    d20 = resolve(load_config("d20"))
    names = {stage.name for stage in select("tokenizer,prepare", None)} & set(unfinished(d20, RunDir(tmp_path)))
    assert names == {"tokenizer", "prepare"}
    check_time(d20, RunDir(tmp_path), names)
