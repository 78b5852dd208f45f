"""What is refused or warned of before anything is trained, and errors as a person reads them."""

import errno
import json
import os
import shutil
import subprocess
import sys

import jax
import pytest
from whole_run import ROOT, TINY

import launch
from jaxchat.config import load_config
from jaxchat.data.packing import Rows
from jaxchat.engine.scheduler import load_run
from jaxchat.errors import DataError, UsageError, explained
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.tokenizer import train_tokenizer
from train import curves, plausible, sft
from train.stages import run_stages, select


def talk(question, answer):
    return {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}


def write_lines(path, records):
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records), encoding="utf-8")
    return path


def config_of(corpus, *more):
    return resolve(load_config("nano", [*TINY, f"data.source=files:{corpus}/*.txt", 'rl.environment=""', *more]))


SUM = {"question": "1 + 1?", "answer": "It is 2\n#### 2"}
FAULTS = {
    "a torn line": ("talks.jsonl", [talk(f"{i}?", "yes") for i in range(30)] + ['{"messages": [{"role"'], ()),
    "no conversations": ("talks.jsonl", [talk("a", "b"), {"id": 1}, {"id": 2}, {"id": 3}], ()),
    "an exam": ("gsm8k/test.jsonl", [SUM] * 40 + [{"question": "and the answer?"}], ('eval.exams=["gsm8k"]',)),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_data_of_a_later_stage_is_read_before_the_first(corpus, tmp_path, fault):
    name, records, more = FAULTS[fault]
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    write_lines(path, records)
    sources = more or (f'sft.mixture=["files:{path}"]',)
    config, run = config_of(corpus, f"tasks.data_dir={tmp_path}", *sources), RunDir(tmp_path / "run")
    with pytest.raises(DataError, match=path.name):
        run_stages(config, run, select(None, None), {})
    assert not run.tokenizer.exists() and not run.stage("base").exists() and not run.stages.exists()


def test_answers_beyond_the_context_are_found_before_the_first_training(corpus, tmp_path):
    path = write_lines(tmp_path / "talks.jsonl", [talk(f"tell me {i} " * 90, "no") for i in range(20)])
    config, run = config_of(corpus, f'sft.mixture=["files:{path}"]'), RunDir(tmp_path / "run")
    with pytest.raises(DataError, match="context"):
        run_stages(config, run, select(None, None), {})
    assert list(run.records()) == ["tokenizer", "prepare"] and not run.stage("base").exists()


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer([f"tell me {i} no yes maybe, I see\n" * 40 for i in range(300)], 300, 10**6, 10**4)


def test_rows_are_made_once_and_conversations_without_an_answer_in_reach_are_left_out(corpus, tmp_path, tokenizer):
    few = [talk(f"tell me {i} " * (90 if i % 4 == 0 else 1), "I see") for i in range(80)]
    path = write_lines(tmp_path / "talks.jsonl", few)
    config, run = config_of(corpus, f'sft.mixture=["files:{path}"]'), RunDir(tmp_path / "run")
    tokenizer.save(run.tokenizer)
    facts = sft.prepare_rows(config, run, tokenizer)
    assert 10 <= facts["no_target"] <= 20 and f"{facts['no_target']} conversations" in facts["warnings"][0]
    rows, used = Rows(run.data / "sft" / "train"), sum(facts["conversations"].values())
    assert used + facts["no_target"] + facts["val"]["conversations"] == 80 and facts["train"]["conversations"] == used
    assert all(weights.any() for _, weights in (rows[i] for i in range(len(rows))))
    times = [p.stat().st_mtime_ns for p in sorted(run.data.rglob("*.bin"))]
    sft.ready(config, run)
    assert sft.prepare_rows(config, run, tokenizer) == facts
    assert times == [p.stat().st_mtime_ns for p in sorted(run.data.rglob("*.bin"))]
    write_lines(path, few[:40])
    assert sum(sft.prepare_rows(config, run, tokenizer)["conversations"].values()) < used


@pytest.mark.parametrize(
    ("pretrain", "own", "rows", "epochs", "devices", "batch", "steps"),
    [
        (512, 512, 6, 30, 1, 4, 45),  # an imported model: 131,072 tokens a step, and some 60 conversations
        (512, 512, 100_000, 1, 1, 512, 195),
        (512, 512, 6, 30, 4, 4, 45),  # a row a device at least
        (512, 8, 6, 30, 1, 8, 22),  # chosen: kept
        (8, 8, 3, 1, 1, 1, 3),
        (8, 8, 1600, 1, 1, 8, 200),  # nano's is as it was
    ],
)
def test_a_batch_that_nobody_chose_follows_the_data(pretrain, own, rows, epochs, devices, batch, steps):
    sizes = [f"train.batch_tokens={pretrain * 256}", f"sft.batch_tokens={own * 256}", f"sft.epochs={epochs}"]
    config = sft.sft_config(resolve(load_config("nano", sizes)), rows, devices)
    assert config.train.batch_tokens == batch * 256 and config.train.steps == steps


def test_what_does_not_fit_each_other_is_warned_of_with_numbers():
    config = resolve(load_config("nano", ["train.steps=7", "train.batch_tokens=65536"]))
    few, large, held_out = plausible.of_steps("pretrain", config, 100, 3)
    assert "7" in few and "train.steps" in few and "65,536" in large and "25,600" in large and "3" in held_out
    assert plausible.of_steps("pretrain", resolve(load_config("nano")), 13_306, 64) == []
    assert len(plausible.of_losses({"val_bpb": 0.0}, [2.0, 0.0, None, 0.0])) == 2
    assert plausible.of_losses({"val_bpb": 1.5}, [5.0, 2.0]) == plausible.of_losses({}, [None]) == []
    assert len(plausible.of_text(["my/README.md", "my/LICENSE"], 500, 0, 0)) == 2
    assert plausible.of_text(["my/README.md", "my/book.txt"], 5_000_000, 0, 40) == []
    (copies,) = plausible.of_text([], 5_000_000, 12, 40)
    assert "12 of 40" in copies


def test_weights_and_biases_without_a_login_is_refused_at_the_start(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    settings = {"mode": "online", "api_key": None, "base_url": "https://wandb.invalid"}
    fake = type("Setup", (), {"settings": type("Settings", (), settings)})
    monkeypatch.setattr("wandb.setup", lambda: fake)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    config = load_config("nano", ["train.wandb=mine"])
    with pytest.raises(UsageError, match="wandb login"):
        curves.check_trackers(config)
    (tmp_path / "netrc").write_text("machine wandb.invalid login user password key\n")
    curves.check_trackers(config)
    (tmp_path / "netrc").unlink()
    fake.settings.mode = "offline"
    curves.check_trackers(config)


def test_a_platform_that_is_not_here_is_one_line():
    command = [sys.executable, "-m", "jaxchat.interop", "export", "--run-dir", "x", "--format", "hf", "--out", "y"]
    env = os.environ | {"JAX_PLATFORMS": "cuda"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("there is a GPU here")
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "JAX_PLATFORMS=cuda" in done.stderr


def told(capsys, *arguments):
    """Exit code and error of a command, in this process."""
    code = launch.main(list(map(str, arguments)))
    return code, capsys.readouterr().err.strip()


def test_what_is_no_configuration_and_no_run_directory_is_named(tmp_path, capsys, monkeypatch):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path, tmp_path / "none.toml"):
        code, said = told(capsys, "--config", path, "--run-dir", tmp_path / "run")
        assert code == 2 and str(path) in said and len(said.splitlines()) == 1
    with pytest.raises(DataError, match="--run-dir"), RunDir(tmp_path / "file").lock():
        pass
    monkeypatch.setattr(launch, "prepare_plan", lambda target: None)
    for hours in ("0", "-2", "nan"):
        code, said = told(capsys, "plan", "--hours", hours, "--target", "h100:8")
        assert code == 2 and "--hours" in said


def test_a_checkpoint_of_another_shape_is_refused(finished, tmp_path):
    for name in ("config.toml", "stages.json", "sft", "tokenizer"):
        copy = shutil.copytree if (finished / name).is_dir() else shutil.copy
        copy(finished / name, tmp_path / name)
    text = (tmp_path / "config.toml").read_text()
    (tmp_path / "config.toml").write_text(text.replace("depth = 2", "depth = 1"))
    with pytest.raises(DataError, match="config.toml"):
        load_run(RunDir(tmp_path), "sft")
    (tmp_path / "config.toml").write_text(text)
    shutil.rmtree(next((tmp_path / "sft").glob("[0-9]*")) / "params")
    with pytest.raises(DataError, match="is gone"):
        load_run(RunDir(tmp_path), "sft")


def test_errors_from_below_are_cut_and_those_of_our_own_are_not():
    full = OSError(errno.ENOSPC, "No space left on device", "runs/x")
    assert explained(full)[1] == 3 and "make room" in explained(full)[0] and "runs/x" in explained(full)[0]
    assert explained(MemoryError())[1] == 4
    long = jax.errors.JaxRuntimeError("INTERNAL: no kernel image\n" + "frame of XLA\n" * 50)
    text, code = explained(long)
    assert code == 1 and len(text.splitlines()) == 2 and "no kernel image" in text
    path = text.rpartition(" ")[2]
    with open(path, encoding="utf-8") as file:
        assert "frame of XLA" in file.read()
    os.unlink(path)
    assert explained(KeyError("ours")) is None
