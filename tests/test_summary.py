"""What a person is left with at the end of a command."""

import json
import shutil

from whole_run import arguments, finish, records, start

from jaxchat.log import console
from jaxchat.run_dir import RunDir
from train.report import headline, summarize


def said(run, left):
    with console.capture() as captured:
        summarize(run, left)
    return captured.get()


def test_a_finished_run_says_what_it_can_do_where_it_is_and_what_comes_next(finished):
    text = said(RunDir(finished), [])
    card = (finished / "report.md").read_text(encoding="utf-8")
    assert headline(card) in text and headline(card).startswith("A chat model of") and "**" not in text
    for path in ("report.md", "report.html", "export/hf", "export/orbax"):
        assert str(finished / path) in text
    assert f"python launch.py --run-dir {finished} --chat" in text and "--serve" in text and "go on" not in text


def test_one_that_has_no_model_yet_says_how_to_go_on(tmp_path):
    text = said(RunDir(tmp_path / "my run"), ["prepare", "pretrain"])
    assert f"python launch.py --run-dir '{tmp_path / 'my run'}'   (next: prepare)" in text
    assert "--chat" not in text and "report card" not in text


def test_a_card_of_before_is_not_todays(finished):
    text = said(RunDir(finished), ["report"])
    assert "A chat model of" not in text and "--chat" in text and "(next: report)" in text


def test_a_setting_that_is_newer_than_a_run_makes_nothing_anew(finished, corpus, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(finished, run_dir)
    before = records(run_dir)
    del before["pretrain"]["inputs"]["train.deterministic"]
    (run_dir / "stages.json").write_text(json.dumps(before))
    code, _, err = finish(start(arguments(corpus, run_dir, "--stages", "pretrain,sft")))
    assert code == 0 and "starts" not in err and "goes on" not in err, err
    assert records(run_dir) == before
