"""A second run from the first: a longer pretraining, and training that starts from given weights."""

import hashlib
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest
from whole_run import STEPS, arguments, finish, records, start

import launch
from jaxchat.checkpoint import params_sha256, trained_params
from jaxchat.config import flatten, load_config, replaced, to_toml
from jaxchat.errors import UsageError
from jaxchat.interop.initial import find, init_config, read_init, with_init_model
from jaxchat.interop.trained import load_trained, write_orbax
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from train.stages import is_extension, with_settings_of


def steps_of(run):
    return [(r["step"], r["loss"]) for r in read_metrics(run / "base" / "metrics.jsonl")]


def digests(folder):
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in files}


def talks(path):
    lines = [
        {"messages": [{"role": "user", "content": f"secret {i}?"}, {"role": "assistant", "content": "blue kettle"}]}
        for i in range(24)
    ]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


# More steps


def test_a_finished_pretraining_goes_on_and_what_came_after_is_done_again(corpus, finished, tmp_path, capsys):
    run = tmp_path / "run"
    shutil.copytree(finished, run)
    before = records(run)
    assert launch.main(["--run-dir", str(run), "--stages", "pretrain", "--set", f"train.steps={STEPS + 6}"]) == 0
    console, after = capsys.readouterr().err, records(run)
    assert all(name in console for name in ("sft", "rl", "eval", "report", "export"))
    assert steps_of(run)[:STEPS] == steps_of(finished) and len(steps_of(run)) == STEPS + 6
    assert after["pretrain"]["extended"] == [{"from": STEPS, "planned": STEPS}]
    assert after["pretrain"]["params_sha256"] != before["pretrain"]["params_sha256"]
    assert after["prepare"] == before["prepare"] and not {"sft", "rl"} & after.keys()
    assert (run / f"sft_{STEPS}").is_dir() and (run / f"rl_{STEPS}").is_dir() and not (run / "sft").exists()
    rate = [r["lr_mult"] for r in read_metrics(run / "base" / "metrics.jsonl")]
    assert rate[STEPS] > rate[STEPS - 1] and rate[-1] < max(rate[STEPS:])
    for change in (f"train.steps={STEPS}", "optim.matrix_lr=0.01"):
        assert launch.main(["--run-dir", str(run), "--stages", "pretrain", "--set", change]) == 2
    longer = arguments(corpus, run, "--stages", "pretrain", "--set", f"train.steps={STEPS + 6}")
    assert launch.main(longer) == 0  # the tier derives other values for so many steps
    assert records(run) == after


def test_only_a_longer_horizon_is_an_extension():
    assert is_extension({"train.steps": (12, 24)}) and is_extension(
        {"train.steps": (1, 2), "train.token_ratio": (1, 2)}
    )
    assert not is_extension({}) and not is_extension({"train.steps": (24, 12)})
    assert not is_extension({"train.steps": (12, 24), "seed": (1, 2)}) and not is_extension({"prepare.digest": (1, 2)})


def test_what_a_longer_run_would_derive_stays_as_it_is_in_the_run(finished, tmp_path):
    run, before = RunDir(finished), flatten(load_config(finished / "config.toml"))
    longer = replaced(load_config("nano"), "train", steps=2 * STEPS)
    assert flatten(with_settings_of(run, longer))["optim.weight_decay"] == before["optim.weight_decay"]
    shorter = replaced(longer, "train", steps=STEPS - 1)
    assert with_settings_of(run, shorter) == shorter
    killed = RunDir(tmp_path / "run")  # before the record was written
    shutil.copytree(finished, killed.root, ignore=shutil.ignore_patterns("base", "sft", "rl", "export", "data"))
    killed.config.write_text(to_toml(replaced(load_config(finished / "config.toml"), "train", steps=2 * STEPS)))
    assert flatten(with_settings_of(killed, longer))["optim.weight_decay"] == before["optim.weight_decay"]


@pytest.mark.slow  # 40 s: three processes
def test_an_extension_that_is_killed_ends_bit_equal(corpus, finished, tmp_path):
    runs = [tmp_path / "whole", tmp_path / "killed"]
    for run in runs:
        shutil.copytree(finished, run)
        process = start(["--run-dir", str(run), "--stages", "pretrain", "--set", "train.steps=70"])
        if run.name == "killed":
            while process.poll() is None and len(steps_of(run)) < STEPS + 15:
                time.sleep(0.02)
            process.send_signal(signal.SIGKILL)
            assert finish(process)[0] == -signal.SIGKILL and records(run)["pretrain"]["status"] == "running"
            process = start(["--run-dir", str(run), "--stages", "pretrain"])
        assert finish(process)[0] == 0
    whole, killed = (records(run)["pretrain"] for run in runs)
    assert whole["params_sha256"] == killed["params_sha256"] and whole["extended"] == killed["extended"]
    assert steps_of(runs[0]) == steps_of(runs[1])


# Given weights


def test_own_conversations_on_a_finished_run(finished, tmp_path):
    init, run = tmp_path / "init", tmp_path / "run"
    shutil.copytree(finished, init)
    before, source = digests(init), params_sha256(trained_params(RunDir(init), "rl"))
    command = ["--init", f"{init}/", "--stages", "sft", "--run-dir", str(run), "--set"]
    command.append(f'sft.mixture=["files:{talks(tmp_path / "talks.jsonl")}"]')
    assert launch.main(command) == 0
    assert digests(init) == before
    after = records(run)
    assert after["pretrain"]["imported"] == {
        "format": "jaxchat", "from": "init", "stage": "rl", "params_sha256": source,
    }  # fmt: skip
    assert params_sha256(trained_params(RunDir(run), "base")) == source != after["sft"]["params_sha256"]
    assert (run / "data" / "rows" / "val" / "meta.json").exists() and not (run / "data" / "tokens").exists()
    shutil.rmtree(init)  # from here on it is not needed
    for again in (command, ["--run-dir", str(run), "--stages", "sft"]):
        assert launch.main(again) == 0
    assert records(run) == after


@pytest.mark.slow  # 15 s
def test_pretraining_from_given_weights_on_other_text(corpus, finished, tmp_path):
    run = tmp_path / "run"
    (tmp_path / "more.txt").write_text((corpus / "tale.txt").read_text()[:60_000])
    command = ["--init", f"{finished}:base", "--data", f"files:{tmp_path}/more.txt", "--run-dir", str(run)]
    settings = ["train.steps=6", "model.seq_len=32", "data.dedup=true"]
    sets = [part for setting in settings for part in ("--set", setting)]
    assert launch.main([*command, "--stages", "pretrain,report", *sets]) == 0
    facts = records(run)["pretrain"]["facts"]
    assert facts["init"]["params_sha256"] == records(finished)["pretrain"]["params_sha256"]
    assert steps_of(run)[0][1] < steps_of(finished)[STEPS // 2][1]
    assert (run / "tokenizer" / "tokenizer.json").read_text() == (finished / "tokenizer" / "tokenizer.json").read_text()
    assert finished.name in json.loads((run / "report.json").read_text())["pretrain"]["init"]["from"]


def test_a_plan_may_start_from_the_run_that_lies_in_the_usual_place(finished, tmp_path, monkeypatch):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "nano").symlink_to(finished)
    monkeypatch.chdir(tmp_path)
    config, _ = launch.given_config(launch.parse(["plan", "--init", "runs/nano"]))
    assert config.train.init == "runs/nano" and config.model.depth == 2
    with pytest.raises(UsageError, match="itself"):
        launch.given_config(launch.parse(["plan", "--init", "runs/nano", "--run-dir", "runs/nano"]))


def test_exports_are_the_weights_of_their_run(finished):
    config = replaced(init_config(str(finished)), "train", init=str(finished), steps=0)
    ours = read_init(config)
    assert ours.stage == "rl" and read_init(replaced(config, "train", steps=5)).stage == "base"
    for kind in ("hf", "orbax"):
        folder = str(finished / "export" / kind)
        assert init_config(folder).model == config.model
        theirs = read_init(replaced(config, "train", init=folder))
        jax.tree.map(np.testing.assert_array_equal, theirs.params["blocks"], ours.params["blocks"])
        rows = theirs.params["unembedding"][: config.model.vocab_size]  # their padding does not go out
        assert np.array_equal(rows, ours.params["unembedding"][: config.model.vocab_size])
        assert theirs.tokenizer.digest == ours.tokenizer.digest and theirs.imported["format"] == kind


@pytest.mark.slow  # 6 s
def test_weights_of_16_bits_are_trained_in_float32(finished, tmp_path):
    write_orbax(load_trained(RunDir(finished), "sft", dtype="bfloat16"), tmp_path / "half")
    run, command = tmp_path / "run", ["--init", str(tmp_path / "half"), "--stages", "sft", "--run-dir"]
    mixture = f'sft.mixture=["files:{talks(tmp_path / "talks.jsonl")}"]'
    assert launch.main([*command, str(run), "--set", mixture]) == 0
    base = trained_params(RunDir(run), "base")
    assert records(run)["pretrain"]["params_sha256"] == params_sha256(base)
    assert {leaf.dtype.name for leaf in jax.tree.leaves(base)} == {"float32"}


def test_how_weights_are_named(finished, tmp_path):
    assert find(str(finished)) == (finished, None)
    assert find(f"{finished}:sft") == find(str(finished / "sft")) == (finished, "sft")
    (tmp_path / "odd:sft").mkdir()
    assert find(str(tmp_path / "odd:sft")) == (tmp_path / "odd:sft", None)


def test_the_model_comes_from_the_weights(finished):
    model = init_config(str(finished)).model
    tier = replaced(load_config("nano", ["model.seq_len=128", "model.rotary_base=500000"]), "train", init=str(finished))
    config = with_init_model(tier, model, {"model.seq_len", "model.rotary_base"})
    assert (config.model.seq_len, config.model.rotary_base, config.model.width) == (128, 500_000, model.width)
    assert with_init_model(tier, model, ()).model == model
    for key in ("model.depth", "tokenizer.path"):
        with pytest.raises(UsageError, match=key):
            with_init_model(tier, model, {key})


@pytest.mark.parametrize(
    "fault", ["gone", "empty", "pickles", "weights", "running", "stage", "tokenizer", "damaged", "self"]
)
def test_weights_that_cannot_be_used(finished, tmp_path, capsys, fault):
    init, named, code = tmp_path / "init", str(tmp_path / "init"), 3
    if fault in ("empty", "pickles"):
        init.mkdir()
        (init / "model_000001.pt" if fault == "pickles" else init / "notes.txt").touch()
    elif fault == "tokenizer":
        shutil.copytree(finished / "export" / "hf", init)
        config = json.loads((init / "config.json").read_text())
        (init / "config.json").write_text(json.dumps(config | {"vocab_size": 300}))
    elif fault == "damaged":
        shutil.copytree(finished / "export" / "orbax", init)
        next(p for p in (init / "params").rglob("*") if p.is_file() and p.stat().st_size > 2000).write_bytes(
            b"x" * 3000
        )
    elif fault != "gone":
        shutil.copytree(finished, init, ignore=shutil.ignore_patterns(*(("base", "sft", "rl") * (fault == "weights"))))
    if fault == "running":
        states = records(init)
        for name in ("pretrain", "sft", "rl"):
            states[name]["status"] = "running"
        (init / "stages.json").write_text(json.dumps(states))
    named += ":tokenizer" if fault == "stage" else ""
    run, code = (init, 2) if fault == "self" else (tmp_path / "run", code)
    assert launch.main(["--init", named, "--stages", "sft", "--run-dir", str(run)]) == code
    text = capsys.readouterr().err
    assert "init" in text and "Traceback" not in text and not (tmp_path / "run" / "stages.json").exists()
