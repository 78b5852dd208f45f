"""A run and its exports made by jaxchat 0.1 load, resume, report and answer; see tests/old_run/README.md."""

import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from random_model import logits_of

import launch
from jaxchat.config import REMOVED, ModelConfig, load_config
from jaxchat.engine import Engine
from jaxchat.interop.huggingface import read_hf
from jaxchat.interop.trained import write_run

OLD = Path(__file__).parent / "old_run"


@pytest.fixture(scope="module")
def old(tmp_path_factory):
    """The folder with `run`, the text it was made of, and the answer that its engine gave."""
    folder = tmp_path_factory.mktemp("old")
    with tarfile.open(OLD / "old_run.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


@pytest.fixture
def inside(old, tmp_path, monkeypatch):
    """A copy of it, as the working directory."""
    shutil.copytree(old, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


def answer(folder, run):
    question = [{"role": "user", "content": json.loads((folder / "answer.json").read_text())["question"]}]
    return Engine.from_pretrained(run).chat(question, temperature=0.0, max_tokens=16)


def test_its_configuration_has_removed_keys(old):
    text = (old / "run" / "config.toml").read_text()
    assert all(f"\n{key.rpartition('.')[2]} = " in text for key in REMOVED)
    assert load_config(old / "run" / "config.toml").model.width == 24


def test_it_answers_as_before(old):
    assert answer(old, old / "run") == json.loads((old / "answer.json").read_text())["answer"]


def test_trained_stages_are_kept_and_the_report_is_written(inside, capsys):
    before = json.loads((inside / "run" / "stages.json").read_text())
    assert launch.main(["--run-dir", "run"]) == 0
    after = json.loads((inside / "run" / "stages.json").read_text())
    for name in ("tokenizer", "prepare", "pretrain", "sft"):
        assert after[name] == before[name]
    report = json.loads((inside / "run" / "report.json").read_text())
    assert "sft" in report["exams"] and (inside / "run" / "report.md").stat().st_size > 1000


def test_sft_trains_again_from_its_checkpoint_and_rl_after_it(inside):
    stages = json.loads((inside / "run" / "stages.json").read_text())
    (inside / "run" / "stages.json").write_text(
        json.dumps({k: v for k, v in stages.items() if k not in ("sft", "eval")})
    )
    shutil.rmtree(inside / "run" / "sft")
    tiny = ["rl.environment=word_problems", "rl.steps=1", "rl.prompts=2", "rl.samples=2", "rl.max_tokens=8",
            "rl.eval_every=0", "rl.eval_prompts=2", "rl.eval_samples=2", "rl.slots=4"]  # fmt: skip
    sets = [f"--set={setting}" for setting in tiny]
    assert launch.main(["--run-dir", "run", "--stages", "rl", *sets]) == 0
    after = json.loads((inside / "run" / "stages.json").read_text())
    assert after["pretrain"] == stages["pretrain"] and after["rl"]["status"] == "done"
    losses = [json.loads(line)["loss"] for line in (inside / "run/sft/metrics.jsonl").read_text().splitlines()]
    assert len(losses) == after["sft"]["facts"]["steps"] > 10 and losses[-1] < losses[0]


def test_its_hugging_face_export_loads(old, tmp_path):
    write_run(read_hf(old / "run" / "export" / "hf"), tmp_path / "imported")
    assert answer(old, tmp_path / "imported") == json.loads((old / "answer.json").read_text())["answer"]


def test_its_orbax_export_loads(old):
    folder = old / "run" / "export" / "orbax"
    params = ocp.StandardCheckpointer().restore(folder / "params")
    model = ModelConfig(**json.loads((folder / "config.json").read_text())["model"])
    with np.load(folder / "golden.npz") as golden:
        logits = logits_of(model, params, golden["ids"])[:, -golden["logits"].shape[1] :]
        assert np.abs(logits - golden["logits"]).max() < 1e-4
