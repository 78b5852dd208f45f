"""Terminal chat, in a pipe and in a terminal."""

import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from small_model import GREETING, QUESTION, write_run

from jaxchat.config import load_config
from jaxchat.engine import Engine
from serve.cli import Chat, chat

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def engine(run):
    return Engine.from_pretrained(run.root, slots=1)


def talk(engine, interactive=False, max_tokens=40):
    return Chat(engine, 0.0, 0, max_tokens, io.StringIO(), interactive)


def test_a_pipe_gets_the_answers_and_nothing_else(run):
    """The command itself, as a shell runs it."""
    lines = f"{QUESTION[0]['content']}\n\n/nonsense\n{GREETING[0]['content']}\n"
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", "--run-dir", run.root, "--chat"],
        input=lines, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[12+30 = 42] That is it.\nHi 🙂 안녕!\n"
    assert "/temperature" in done.stderr and "Traceback" not in done.stderr


def test_the_end_of_the_input_ends_the_chat(run, capsys):
    chat(run, load_config(run.config), source=io.StringIO(GREETING[0]["content"]))
    assert capsys.readouterr().out == "Hi 🙂 안녕!\n"


def test_commands(engine):
    c = talk(engine, interactive=True)
    assert c.command("/temperature 0.5") and c.temperature == 0.5
    assert c.command("/temperature hot") and c.temperature == 0.5
    assert c.command("/temperature -1") and c.temperature == 0.5
    assert c.command("/topk 7") and c.top_k == 7
    c.messages.append({"role": "user", "content": "x"})
    assert c.command("/clear") and c.messages == []
    assert c.command("/help") and "/topk N" in c.out.getvalue()
    assert not c.command("/quit")


def test_tool_calls_are_shown_as_such_and_remembered(engine):
    c = talk(engine, interactive=True)
    c.answer(QUESTION[0]["content"])
    assert "\033[2m[12+30 = 42]\033[0m That is it." in c.out.getvalue()
    assert "tokens/s" in c.out.getvalue()
    assert [part["type"] for part in c.messages[1]["content"]] == ["python", "python_output", "text"]


def test_a_long_conversation_loses_its_oldest_turns_with_a_note(engine, capsys):
    c = talk(engine)
    for _ in range(6):
        c.answer(GREETING[0]["content"])
    assert "oldest" in capsys.readouterr().err
    assert len(c.messages) < 12 and c.out.getvalue().count("\n") == 6


def test_a_message_longer_than_the_context_is_refused_with_the_numbers(engine, capsys):
    c = talk(engine)
    c.answer("word " * 500)
    assert "this model's context holds 128" in capsys.readouterr().err
    assert c.messages == []


def test_ctrl_c_stops_the_answer_not_the_program(engine, monkeypatch):
    c = talk(engine)
    events = engine.events

    def interrupted(request):
        for i, event in enumerate(events(request)):
            if i == 2:
                raise KeyboardInterrupt
            yield event

    monkeypatch.setattr(engine, "events", interrupted)
    c.answer(GREETING[0]["content"])
    assert c.out.getvalue().endswith(" ...\n")
    monkeypatch.undo()
    assert engine.running == 0
    c.command("/clear")
    c.answer(GREETING[0]["content"])
    assert c.out.getvalue().endswith("Hi 🙂 안녕!\n")
