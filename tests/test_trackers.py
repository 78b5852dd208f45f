"""Curves for TensorBoard, Weights & Biases and trackio: the real writers, read back."""

import json
import os
import shutil
import signal
import struct
import subprocess
import sys
import types

import numpy as np
import pytest
from test_loop import rows, trainer  # noqa: F401 - a fixture

from jaxchat.config import load_config
from jaxchat.errors import InterruptedRun, UsageError
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from train import curves as trackers
from train.stages import run_stages, select


def scalars(folder):
    """{name: {step: value}} of the event files, in the order of writing; a later file's purge hides what it repeats."""
    from tensorboardX.proto.event_pb2 import Event, SessionLog

    found = {}
    for path in sorted(folder.rglob("events.out.tfevents.*")):
        data = path.read_bytes()
        while data:  # TFRecord: length, its checksum, the record, its checksum
            (size,) = struct.unpack("<Q", data[:8])
            event, data = Event.FromString(data[12 : 12 + size]), data[16 + size :]
            if event.session_log.status == SessionLog.START:
                found = {name: {s: v for s, v in one.items() if s < event.step} for name, one in found.items()}
            for value in event.summary.value:
                found.setdefault(value.tag, {})[event.step] = value.simple_value
    return found


def test_tensorboard_has_the_curves_also_after_a_resume(rows, tmp_path):  # noqa: F811
    pytest.importorskip("tensorboardX")
    on = "train.tensorboard=true"

    def stop(state, step):
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(InterruptedRun):
        trainer(rows, tmp_path / "base", on, sampler=stop).run()
    trainer(rows, tmp_path / "base", on).run()
    records, seen = read_metrics(tmp_path / "base" / "metrics.jsonl"), scalars(tmp_path / "tensorboard" / "base")
    assert [r["step"] for r in records] == list(seen["loss"]) == list(range(12))
    assert np.allclose([r["loss"] for r in records], list(seen["loss"].values()))
    assert seen["val_bpb"] == pytest.approx({r["step"]: r["val_bpb"] for r in records if "val_bpb" in r})
    assert {"lr_mult", "grad_norm", "tokens_per_second"} <= seen.keys() and "step" not in seen


def test_weights_and_biases_gets_the_same_run_after_a_resume(rows, tmp_path, monkeypatch):  # noqa: F811
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")  # its own way of working without its service
    on = "train.wandb=mine"
    trainer(rows, tmp_path / "base", on, "train.steps=6").run()
    identity = (tmp_path / "wandb" / "base.id").read_text()
    trainer(rows, tmp_path / "base", on).run()
    files = sorted((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2 and all(path.stem == f"run-{identity}" for path in files)
    assert all(b"val_bpb" in path.read_bytes() and b"tokens_per_second" in path.read_bytes() for path in files)


def test_trackio_gets_the_same_run_after_a_resume(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))  # it is read at the import
    pytest.importorskip("trackio", reason="needs the extra dev")
    from trackio import Api
    from trackio.sqlite_storage import SQLiteStorage

    config = load_config("nano", ["train.trackio=mine"])
    kept = {step: {"loss": 4.0 / (step + 1), "mfu": None, "tokens": 64 * step, "step": step} for step in range(12)}
    kept[7] |= {"loss": float("nan")}
    # one that is stopped after its checkpoint of step 4, then resumed, and another of the same name
    for folder, steps in (("one", range(6)), ("one", range(4, 12)), ("elsewhere/one", range(3))):
        with trackers.trackers(config, tmp_path / folder / "base", steps[0], write=True) as log:
            for step in steps:
                log(step, kept[step])
                log(step, {"val_bpb": 1.5 + step})  # an evaluation adds to its step
    curves, names = [], []
    for run in Api().runs("mine"):
        names.append(run.name)
        curves.append({})
        for entry in SQLiteStorage.get_logs("mine", run.name, run_id=run.id):
            curves[-1].setdefault(entry["step"], {}).update(entry)
        assert run.config["model.depth"] == 4
    one, other = sorted(curves, key=len, reverse=True)
    assert len(set(names)) == 2 and all(name.startswith("one/base") for name in names)
    assert sorted(one) == list(range(12)) and sorted(other) == list(range(3))
    assert all(one[s]["loss"] == kept[s]["loss"] and one[s]["tokens"] == 64 * s for s in one if s != 7)
    assert all(entry["val_bpb"] == 1.5 + step and "mfu" not in entry for step, entry in one.items())
    assert capfd.readouterr().out == ""  # it prints what it does, and standard output is the command's own


def test_training_goes_on_without_a_trackio_that_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "kept"))
    pytest.importorskip("trackio", reason="needs the extra dev")
    with trackers.trackers(
        load_config("nano", ["train.trackio=registry-mine"]), tmp_path / "base", 0, write=True
    ) as log:
        log(0, {"loss": 1.0})  # a name that trackio keeps for itself
    assert capsys.readouterr().err.count("trackio: ") == 1


def test_nothing_of_a_curve_is_lost_to_a_kill(rows, tmp_path, monkeypatch):  # noqa: F811
    """What was trained is in the file at once, so a process that is killed leaves no hole before its checkpoint."""
    pytest.importorskip("tensorboardX")
    six_steps = trainer(rows, tmp_path / "base", "train.tensorboard=true", "train.steps=6")
    with trackers.trackers(six_steps.config, tmp_path / "base", 0, write=True) as log:
        log(0, {"step": 0, "loss": 2.5, "mfu": None})
        assert scalars(tmp_path / "tensorboard") == {"loss": {0: 2.5}}


class FakeWandb(types.ModuleType):
    """As much of wandb as is used; its runs keep what they are told, or fail."""

    def __init__(self, fails=()):
        super().__init__("wandb")
        self.fails, self.settings, self.logged, self.exit_codes = fails, [], [], []

    def act(self, name):
        if name in self.fails:
            raise RuntimeError("no network\nand more")

    def Settings(self, **options):
        return options

    def init(self, **settings):
        self.act("init")
        self.settings.append(settings)
        return self

    def define_metric(self, name, step_metric):
        assert (name, step_metric) == ("*", "step")

    def log(self, values):
        self.act("log")
        self.logged.append(values)

    def finish(self, exit_code):
        self.act("finish")
        self.exit_codes.append(exit_code)


def test_training_is_the_same_with_and_without_weights_and_biases(rows, tmp_path, monkeypatch, capsys):  # noqa: F811
    wanted = trainer(rows, tmp_path / "plain").run()["params_sha256"]
    assert {p.name for p in tmp_path.iterdir()} == {"plain"}, "both are off by default"
    for name, fails in (("whole", ()), ("log", ("log", "finish")), ("start", ("init",))):
        monkeypatch.setitem(sys.modules, "wandb", fake := FakeWandb(fails))
        assert trainer(rows, tmp_path / name, "train.wandb=mine").run()["params_sha256"] == wanted
        steps = {values["step"] for values in fake.logged}
        assert steps == (set() if fails else set(range(12)))
        if not fails:
            (settings,) = fake.settings
            assert settings["project"] == "mine" and settings["id"] == (tmp_path / "wandb" / f"{name}.id").read_text()
            assert fake.exit_codes == [0] and all(isinstance(v, int | float) for v in fake.logged[0].values())
    said = capsys.readouterr().err
    assert said.count("the training goes on without it") == 2 and "no network;" in said


@pytest.mark.parametrize(("key", "value"), [("tensorboard", "true"), ("wandb", "mine"), ("trackio", "mine")])
def test_what_is_not_installed_is_said_before_anything_runs(key, value, monkeypatch):
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=rf"train\.{key}: .*pip install -e '\.\[{key}\]'"):
        trackers.check_trackers(load_config("nano", [f"train.{key}={value}"]))
    trackers.check_trackers(load_config("nano"))


def test_a_finished_run_needs_no_tracker_for_its_report(finished, tmp_path, monkeypatch):
    run = RunDir(shutil.copytree(finished, tmp_path / "run"))
    config = load_config(run.config, ["train.tensorboard=true"])
    monkeypatch.setattr(trackers.importlib.util, "find_spec", lambda name: None)
    run_stages(config, run, select("report", None), {})
    shutil.rmtree(run.stage("sft"))
    with pytest.raises(UsageError, match="tensorboardX is not installed"):
        run_stages(config, run, select("sft", None), {})


def test_no_library_is_loaded_unless_asked():
    modules = [module for module, _ in trackers.TRACKERS.values()]
    code = f"import json, sys, train.loop; print(json.dumps([m for m in {modules} if m in sys.modules]))"
    assert json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout) == []
