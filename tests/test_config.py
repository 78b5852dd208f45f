"""Configuration: strict, explained, and repeatable."""

import dataclasses
import re

import pytest

from jaxchat.config import (
    CONFIG_DIR,
    KEYS,
    REMOVED,
    Config,
    flatten,
    is_derived,
    load_config,
    tier_files,
    to_toml,
)
from jaxchat.errors import UsageError
from jaxchat.scaling import derivations, resolve
from train.plan import disk_parts
from train.prepare import sized

TIERS = [path.stem for path in tier_files()]


@pytest.fixture(scope="module")
def book(tmp_path_factory):
    """A text, for the tier that fits its model to one."""
    path = tmp_path_factory.mktemp("book") / "book.txt"
    path.write_text("It was the best of times. " * 20_000)
    return [f"data.source=files:{path}"]


@pytest.mark.parametrize("tier", TIERS)
def test_every_tier_resolves_with_nothing_left_to_derive(tier, book):
    config = resolve(sized(load_config(tier, book if tier == "book" else [])))
    left = [k for k, v in flatten(config).items() if k.startswith(("model.", "optim.", "train.")) and is_derived(v)]
    device_decides = {"model.attention", "train.compute_dtype", "train.scan_unroll"}
    assert set(left) <= device_decides


@pytest.mark.parametrize("tier", TIERS)
def test_saved_configuration_repeats_the_run(tier, tmp_path, book):
    given = load_config(tier, book if tier == "book" else [])
    config = resolve(sized(given))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config, derivations(given, config)), encoding="utf-8")
    again = load_config(path)
    assert again == config
    assert resolve(again) == config


@pytest.mark.parametrize("tier", [t for t in TIERS if t != "book"])
def test_tier_head_comment_says_the_disk_that_is_counted(tier):
    found = re.search(r"^# Disk: +about ([\d.]+) (GB|MB)", (CONFIG_DIR / f"{tier}.toml").read_text(), re.MULTILINE)
    counted = sum(part.bytes for part in disk_parts(resolve(load_config(tier))))
    assert float(found[1]) * {"GB": 1e9, "MB": 1e6}[found[2]] == pytest.approx(counted, rel=0.15)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("model.detph=3", "model.detph: unknown key, did you mean model.depth?"),
        ("depth=3", "depth: unknown key, did you mean model.depth?"),
        ("model.depth=three", "model.depth: needs a whole number, not 'three'"),
        ("모델.깊이=3", "모델.깊이: unknown key; docs/configuration.md has every key"),
        ("model.depth=3.5", "model.depth: needs a whole number, not 3.5"),
        ("model.depth=true", "model.depth: needs a whole number, not True"),
        ("model.smear=1", "model.smear: needs true or false, not 1"),
        ("optim.matrix_lr=nan", "optim.matrix_lr: needs a finite number, not nan"),
        ("model.depth=\uff16", "needs a whole number, not '\uff16'"),
        ("serve.api_keys=[1]", "serve.api_keys: needs a string, not 1"),
        ("model=3", "model: is a section, not a value"),
        ("model.depth", "write it as key=value"),
        ("data.pack_docs=3", "data.pack_docs: this key is gone"),
        ("optim.momentum=[0.9]", "optim.momentum: needs 3 numbers"),
        ("train.checkpoint_every=0", "train.checkpoint_every: must be at least 1, not 0"),
        ("train.compute_dtype=foo", "train.compute_dtype: 'foo' is unknown"),
        ("data.source.x=1", "data.source.x: unknown key"),
    ],
)
def test_strict_errors_name_the_key(override, message):
    with pytest.raises(UsageError) as error:
        load_config("nano", [override])
    assert message in str(error.value)


def test_a_removed_key_with_its_old_default_is_ignored():
    assert load_config("nano", [f"{key}={value}" for key, value in REMOVED.items()]) == load_config("nano")
    assert not set(REMOVED) & set(KEYS)


def test_a_tier_of_ones_own_is_named_after_its_file(tmp_path):
    (tmp_path / "mine.toml").write_text("[model]\ndepth = 5\n")
    assert load_config(tmp_path / "mine.toml").tier == "mine"


def test_unknown_tier_names_the_known_ones():
    with pytest.raises(UsageError, match=r"tier 'nanoo' is unknown, did you mean nano\?; tiers: nano, d12"):
        load_config("nanoo")


def test_broken_toml_is_named(tmp_path):
    path = tmp_path / "mine.toml"
    path.write_text("model = [")
    with pytest.raises(UsageError, match="not valid TOML"):
        load_config(path)


def test_overrides_are_typed_and_text_needs_no_quotes():
    config = load_config(
        "nano", ["data.source=files:a b/*.txt", "model.depth=7", "optim.matrix_lr=1", "serve.api_keys=k"]
    )
    assert config.data.source == "files:a b/*.txt"
    assert config.model.depth == 7
    assert config.optim.matrix_lr == 1.0 and type(config.optim.matrix_lr) is float
    assert config.serve.api_keys == ("k",)


def test_awkward_strings_survive_the_file(tmp_path):
    source = 'files:"quoted" \\ back\tslash é 한국어 \x7f'
    config = dataclasses.replace(Config(), data=dataclasses.replace(Config().data, source=source))
    path = tmp_path / "config.toml"
    path.write_text(to_toml(config), encoding="utf-8")
    assert load_config(path).data.source == source
