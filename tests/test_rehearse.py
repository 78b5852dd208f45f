"""A rehearsal: real tiny ones through the command, and the arithmetic on a record made by hand."""

import itertools
import json
import signal
import time
import types

import pytest
from whole_run import arguments, finish, start

import launch
from jaxchat.config import load_config
from jaxchat.errors import UsageError
from jaxchat.log import read_metrics
from jaxchat.run_dir import RunDir
from jaxchat.scaling import resolve
from jaxchat.sharding import make_mesh
from jaxchat.tokenizer import train_tokenizer
from jaxchat.train_state import check_attention
from train import rehearse
from train.plan import disk_parts

# so few steps that none of them is saved on its way: at this size a save takes longer than all of them
SELDOM = ["train.checkpoint_every=1000", "rl.checkpoint_every=1000"]
STAGES = ["tokenizer", "prepare", "pretrain", "sft", "rl", "eval", "report", "export"]


def rehearsal(corpus, run_dir, *more, overrides=()):
    sets = [part for override in [*SELDOM, *overrides] for part in ("--set", override)]
    return arguments(corpus, run_dir, "--rehearse", *sets, *more)


def test_stages_that_would_go_well_end_with_0_and_leave_nothing(corpus, tmp_path, capsys):
    args = rehearsal(
        corpus, tmp_path / "runs" / "tiny", "--json", "--stages", "pretrain", overrides=["data.column=story"]
    )
    assert launch.main(args) == 0  # the sample that it writes has a column of its own
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["ok"] and not found["problems"] and list(found["stages"]) == STAGES[:3]
    assert found["measured"]["pretrain"]["rehearsed_steps"] >= 8 and found["measured"]["answer"]["tokens"] > 0
    assert found["total"]["usd"] == 0 and found["total"]["disk_bytes"] > 0 and not list(tmp_path.iterdir())


@pytest.mark.slow
def test_every_stage_is_rehearsed_and_nothing_is_left(corpus, tmp_path):
    code, out, err = finish(start(rehearsal(corpus, tmp_path / "runs" / "tiny", "--json")), timeout=600)
    assert code == 0, err
    found = json.loads(out)
    assert found["ok"] and not found["problems"] and found["directory"] is None
    assert list(found["stages"]) == STAGES
    assert found["total"]["seconds"] == pytest.approx(sum(s["seconds"] for s in found["stages"].values()))
    assert found["total"]["usd"] == 0 and found["total"]["disk_bytes"] > 0
    measured = found["measured"]
    assert measured["pretrain"]["rehearsed_steps"] >= 8 and measured["pretrain"]["steps"] == 24
    assert measured["pretrain"]["mfu"] is None or measured["pretrain"]["mfu"] > 0
    assert measured["rl"]["rehearsed_steps"] == 2 and measured["rl"]["answers"] == 4
    assert measured["peak_memory_bytes"] > 0 and measured["answer"]["tokens"] > 0
    assert {"word_problems", "identity", "bits_per_byte"} <= set(measured["eval"]["exams"]["rl"])
    for name in ("pretrain", "sft", "rl"):
        assert measured[name]["checkpoint_bytes"] > 0 and measured[name]["checkpoint_seconds"] > 0
    assert not list(tmp_path.iterdir())


def test_what_is_missing_is_listed_and_ends_with_1(corpus, tmp_path, monkeypatch, capsys):
    """No hub, no room, no data of SFT, RL and an exam: all stages but RL still run, on made-up text."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # says so at once instead of trying again
    monkeypatch.setattr(rehearse, "SAMPLE_BYTES", 200_000)
    monkeypatch.setattr(rehearse, "MOST_CONVERSATIONS", 100)
    monkeypatch.setattr("shutil.disk_usage", lambda path: types.SimpleNamespace(free=0))
    overrides = ['rl.environment="gsm8k"', 'sft.mixture=["gsm8k","mmlu","identity:60"]', 'eval.exams=["gsm8k"]']
    overrides += ['data.source="hf:nobody/nothing"', f'data.cache_dir="{tmp_path}/cache"']
    args = rehearsal(corpus, tmp_path / "tiny", "--keep", "--json", overrides=overrides)
    del args[args.index("--data") : args.index("--data") + 2]
    assert launch.main(args) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not found["ok"] and list(found["stages"]) == [stage for stage in STAGES if stage != "rl"]
    kinds = {(problem["kind"], problem["stage"]) for problem in found["problems"]}
    assert {("disk", "pretrain"), ("hub", "prepare"), ("data", "sft"), ("data", "rl"), ("data", "eval")} <= kinds
    assert any(str(tmp_path / "tiny") + " " in problem["text"] for problem in found["problems"])  # the real run's place
    kept = [path for path in tmp_path.iterdir() if path.name != "cache"]
    assert [str(path) for path in kept] == [found["directory"]]
    assert (kept[0] / "report.md").exists() and (kept[0] / "export" / "hf").is_dir()


def test_a_signal_ends_it_with_75_and_nothing_is_left(corpus, tmp_path):
    process = start(rehearsal(corpus, tmp_path / "tiny"))
    deadline = time.monotonic() + 300
    while not any(read_metrics(path) for path in tmp_path.glob("*/base/metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    code, out, err = finish(process)
    assert code == 75 and not out and "Traceback" not in err
    assert not list(tmp_path.iterdir())


def test_a_failing_stage_is_listed_and_the_others_go_on(corpus, tmp_path, capsys, monkeypatch):
    def broken(config, run, one_batch=False):
        raise RuntimeError("the exams' machine is on fire")

    monkeypatch.setattr("train.evaluate.run", broken)
    args = rehearsal(corpus, tmp_path / "tiny", "--json", overrides=["sft.mixture=[]"])
    assert launch.main(args) == 1
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert [(p["kind"], p["stage"]) for p in found["problems"]] == [("failed", "eval")]
    assert list(found["stages"]) == ["tokenizer", "prepare", "pretrain", "export"]  # the report needs the exams
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("more", [["--set", "model.detph=3"], ["--set", 'sft.mixture=["foo"]'], ["--processes", "2"]])
def test_a_bad_configuration_ends_with_2_as_everywhere(corpus, tmp_path, more):
    assert launch.main([*rehearsal(corpus, tmp_path / "tiny"), *more]) == 2
    assert not list(tmp_path.iterdir())


def test_made_up_text_fills_a_vocabulary_and_is_the_same_every_time():
    documents, again = ([*itertools.islice(rehearse.made_up_documents(8192), 1000)] for _ in range(2))
    assert documents == again
    assert train_tokenizer(documents, 8192, 2_000_000, 10_000).vocab_size == 8192


def config(*overrides):
    return resolve(load_config("nano", ["train.steps=1000", "train.checkpoint_every=200", *overrides]))


def test_slow_attention_does_not_stop_a_rehearsal(monkeypatch):
    """It is listed as a problem, and what else would go wrong is found in the same rehearsal."""
    large = resolve(load_config("d20"))
    monkeypatch.setattr("jaxchat.train_state.trusted_backend", lambda *_: ("xla", "it cannot run"))
    monkeypatch.setattr("jaxchat.train_state.platform", lambda _: "gpu")
    with pytest.raises(UsageError):
        check_attention(large, make_mesh(large.mesh))
    assert check_attention(rehearse.smaller(large, 1, 1), make_mesh(large.mesh)) == "it cannot run"


def test_time_of_a_training(tmp_path):
    """What the rehearsal took, 996 more steps, and three more evaluations; the first step and evaluation compiled."""
    found = rehearse.Rehearsal(config(), RunDir(tmp_path), {})
    steps = [{"step_seconds": seconds} for seconds in (9.0, 0.5, 0.5, 0.5)]
    (tmp_path / "base" / "4").mkdir(parents=True)
    (tmp_path / "base" / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    timings = {"validate": [6.0, 1.0], "never": [6.0], "written": [2.0]}
    loop = found.measure_loop("base", {"timings": timings}, 20.0, 1000, 512, {"validate": 5, "sample": 3})
    assert loop["run_seconds"] == pytest.approx(20 + 996 * 0.5 + 3 * 1)
    assert (loop["tokens_per_second"], loop["checkpoint_seconds"], loop["mfu"]) == (1024, 2.0, None)
    assert rehearse.times(1000, 200, 400) == 5 and rehearse.times(1000, 0) == 1 and rehearse.times(1000, 300, 400) == 6


def test_the_whole_run_from_what_was_measured(tmp_path):
    found = rehearse.Rehearsal(config(), RunDir(tmp_path), {})
    found.measured |= {"attention": {"fallback": ""}}
    found.measured["prepare"] = {"seconds": 5.0, "run_seconds": 50.0}
    result, parts = found.result(), {p.name: p.bytes for p in disk_parts(config())}
    assert result["ok"] and result["total"]["seconds"] == result["stages"]["prepare"]["seconds"] == 50
    assert result["stages"]["prepare"]["disk_bytes"] == parts["rows"] + parts["token shards"]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({}, None),
        ({"attention": {"backend": "xla", "fallback": "no cuDNN"}}, "attention"),
        ({"pretrain": {"checkpoint_seconds": 101.0}}, "save"),
    ],
)
def test_what_would_go_wrong(tmp_path, change, kind):
    loop = {"steps": 1000, "step_seconds": 0.5, "checkpoint_seconds": 3.0}
    found = rehearse.Rehearsal(config(), RunDir(tmp_path), {})
    found.measured |= {"attention": {"backend": "blocked", "fallback": ""}, "pretrain": loop}
    found.measured |= {key: found.measured[key] | value for key, value in change.items()}
    found.compare()
    assert [problem["kind"] for problem in found.problems] == ([kind] if kind else [])
