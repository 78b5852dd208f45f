"""An engine from a run directory: the furthest trained stage, a named one, or a clear error."""

import dataclasses
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxchat import model as gpt
from jaxchat.checkpoint import Checkpoints, check_recorded, params_sha256
from jaxchat.config import Config, ModelConfig, to_toml
from jaxchat.engine import Engine, Request, load_run
from jaxchat.errors import DataError, UsageError
from jaxchat.run_dir import RunDir, write_json
from jaxchat.scaling import resolve_model
from jaxchat.tokenizer import train_tokenizer
from jaxchat.train_state import TrainState

MODEL = ModelConfig(depth=1, seq_len=64, vocab_size=270, width=32, n_heads=2, head_width=16)
SEEDS = {"base": 1, "sft": 2}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = RunDir(tmp_path_factory.mktemp("run"))
    config = Config(model=MODEL)
    run.config.write_text(to_toml(dataclasses.replace(config, serve=dataclasses.replace(config.serve, slots=2))))
    train_tokenizer(["some text to learn from"], 270, 1000, 1000).save(run.tokenizer)
    for stage, seed in SEEDS.items():
        checkpoints = Checkpoints(run.stage(stage))
        state = TrainState(gpt.init_params(resolve_model(MODEL), seed), {"none": jnp.zeros(1)}, jnp.int32(1))
        checkpoints.save(1, state, {})
        checkpoints.wait()
        checkpoints.close()
    return run


def test_stages_are_found_and_named(run):
    for stage, seed in ((None, SEEDS["sft"]), ("sft", SEEDS["sft"]), ("base", SEEDS["base"])):
        config, params, tokenizer, serve = load_run(run, stage)
        assert config == resolve_model(MODEL) and tokenizer.vocab_size == 270 and serve.slots == 2
        np.testing.assert_array_equal(params["embedding"], gpt.init_params(config, seed)["embedding"])


def test_an_engine_from_a_run_is_that_model(run):
    config, params, tokenizer, _ = load_run(run, "sft")
    request = Request(tokenizer.encode("some text"), max_tokens=12, temperature=1.0, seed=5)
    found = Engine.from_pretrained(run.root).generate([request])[0].tokens
    assert found == Engine(config, params, tokenizer, slots=1).generate([request])[0].tokens and len(found) == 12


def test_a_base_model_continues_what_is_said(run):
    base, chat = (Engine.from_pretrained(run.root, stage, slots=1) for stage in ("base", None))
    talk = [
        {"role": "user", "content": "some "},
        {"role": "assistant", "content": "text"},
        {"role": "user", "content": " to"},
    ]
    assert not base.chats and chat.chats
    assert base.chat_request(talk).tokens == base.text_request("some text to").tokens != chat.chat_request(talk).tokens
    assert base.chat(talk, max_tokens=5) == base.generate([base.text_request("some text to", max_tokens=5)])[0].text
    assert base.chat_request(talk[1:]).tokens == base.text_request("text to").tokens
    with pytest.raises(UsageError, match="role 'narrator'"):
        base.chat_request([{"role": "narrator", "content": "x"}])


def test_other_parameters_than_the_stage_recorded_are_refused(run, tmp_path):
    """One flipped bit, which Orbax restores without a word."""
    own = RunDir(shutil.copytree(run.root, tmp_path / "run"))
    sha = params_sha256(load_run(own, "base")[1])
    record = {"start": "", "seconds": 1.0, "inputs": {}, "facts": {"digest": sha}}
    write_json(own.stages, {"pretrain": record | {"status": "done", "params_sha256": sha}})
    load_run(own, "base")
    write_json(own.stages, {"pretrain": record | {"status": "running", "params_sha256": "of an earlier one"}})
    load_run(own, "base")
    write_json(own.stages, {"pretrain": record | {"status": "done", "params_sha256": sha[::-1]}})
    with pytest.raises(DataError, match=r"base: its newest checkpoint is damaged .*SHA-256"):
        load_run(own, "base")
    load_run(own, "sft")  # has no record


def test_imported_weights_of_16_bits_are_themselves_in_float32(run, tmp_path):
    own, params = RunDir(tmp_path), load_run(run, "base")[1]
    half = jax.tree.map(lambda p: np.asarray(p).astype("bfloat16"), params)
    record = {"status": "done", "start": "", "seconds": 1.0, "inputs": {}, "facts": {"digest": ""}}
    record["params_sha256"] = params_sha256(half)
    wide = jax.tree.map(lambda p: p.astype("float32"), half)
    write_json(own.stages, {"pretrain": record | {"imported": {}}})
    check_recorded(own, "base", wide)
    with pytest.raises(DataError):
        check_recorded(own, "base", load_run(run, "sft")[1])
    write_json(own.stages, {"pretrain": record})
    with pytest.raises(DataError):
        check_recorded(own, "base", wide)


def test_what_is_missing_is_named(run, tmp_path):
    with pytest.raises(DataError, match=r"no stage 'rl' with a checkpoint; found: sft, base"):
        Engine.from_pretrained(run.root, stage="rl")
    with pytest.raises(DataError, match="not a run directory"):
        Engine.from_pretrained(tmp_path)
    (tmp_path / "config.toml").write_text(run.config.read_text())
    with pytest.raises(DataError, match="no trained stage yet"):
        Engine.from_pretrained(tmp_path)
