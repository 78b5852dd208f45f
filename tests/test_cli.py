"""Terminal chat, in a pipe and in a terminal."""

import io
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from small_model import GREETING, QUESTION, write_run

from jaxchat.engine import Engine
from serve.cli import Chat, printable

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return write_run(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def engine(run):
    return Engine.from_pretrained(run.root, slots=1)


def talk(engine, interactive=False, max_tokens=40):
    return Chat(engine, {"temperature": 0.0, "top_k": 0, "max_tokens": max_tokens}, io.StringIO(), interactive)


def test_a_pipe_gets_the_answers_and_nothing_else(run):
    """The command itself, as a shell runs it."""
    lines = f"{QUESTION[0]['content']}\n\n/help\n{GREETING[0]['content']}\n"
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", "--run-dir", run.root, "--chat"],
        input=lines, capture_output=True, text=True, cwd=ROOT, timeout=120, env=os.environ | {"JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout == "[12+30 = 42] That is it.\nHi 🙂 안녕!\n"
    assert "/temperature" in done.stderr and "Traceback" not in done.stderr


def test_commands(engine):
    c = talk(engine, interactive=True)
    for line in ("/temperature 0.5", "/temperature hot", "/temperature -1", "/topk 7", "/topk -1"):
        assert c.command(line)
    assert c.settings == {"temperature": 0.5, "top_k": 7, "max_tokens": 40}
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


def test_the_model_cannot_steer_the_terminal():
    assert printable("a\n\tb 안녕 🙂") == "a\n\tb 안녕 🙂"
    assert printable("\033[2J\r\x07\x9b") == "\ufffd[2J" + "\ufffd" * 3
    assert printable("a\u202eb\u2066") == "a\ufffdb\ufffd" and printable("👩‍🚀 مرحبا שלום") == "👩‍🚀 مرحبا שלום"


def test_bytes_that_are_no_text_do_not_end_the_chat(run):
    """Also where the locale knows only ASCII."""
    done = subprocess.run(
        [sys.executable, ROOT / "launch.py", "--run-dir", run.root, "--chat"],
        input=b"\xff\xfe\n" + GREETING[0]["content"].encode(), capture_output=True, cwd=ROOT, timeout=120,
        env=os.environ | {"JAX_PLATFORMS": "cpu", "LC_ALL": "C", "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.decode().endswith("Hi 🙂 안녕!\n") and done.stdout.count(b"\n") >= 2


# makes the terminal on its standard input its own, so that Ctrl-C there reaches it, and becomes the command
ENTER = """
import fcntl, os, sys, termios
os.setsid()
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """A program in a terminal of its own, as a person has it before them."""

    def __init__(self, command, **options):
        pty = pytest.importorskip("pty", reason="this system has no pseudo-terminals")
        self.screen, inside = pty.openpty()
        command = [sys.executable, "-c", ENTER, *map(str, command)]
        self.program = subprocess.Popen(command, stdin=inside, stdout=inside, stderr=inside, **options)
        os.close(inside)
        self.seen = ""

    def type(self, text):
        os.write(self.screen, text.encode())

    def wait_for(self, text, seconds=60):
        """All that came up to and with `text`."""
        end = time.monotonic() + seconds
        while text not in self.seen:
            assert time.monotonic() < end, f"no {text!r} in {self.seen!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    self.seen += os.read(self.screen, 4096).decode(errors="replace")
                except OSError:  # the program has gone
                    assert text in self.seen, f"no {text!r} in {self.seen!r}"
        part, self.seen = self.seen[: self.seen.index(text) + len(text)], self.seen[self.seen.index(text) + len(text) :]
        return part


def test_a_terminal(run):
    """Prompt, stream, Ctrl-C at the prompt and in an answer, and the end of the input."""
    command = [sys.executable, ROOT / "launch.py", "--run-dir", run.root, "--chat", "--set", "serve.temperature=0",
               "--set", "serve.max_tokens=100"]  # fmt: skip
    terminal = Terminal(command, cwd=ROOT, env=os.environ | {"JAX_PLATFORMS": "cpu", "LANG": "C.UTF-8"})
    try:
        terminal.wait_for("/help lists the commands")
        terminal.wait_for("> ")
        terminal.type("half a line")
        terminal.wait_for("half a line")  # it reads; Ctrl-C between the prompt and that is Python's to lose
        time.sleep(0.3)
        terminal.type("\x03")
        terminal.wait_for("> ")
        terminal.type(QUESTION[0]["content"] + "\r")
        assert "[12+30 = 42]\033[0m That is it." in terminal.wait_for("tokens/s")
        terminal.wait_for("> ")
        terminal.type("/help\r")
        assert "/temperature X" in terminal.wait_for("Ctrl-C stops an answer")
        terminal.wait_for("> ")
        for command in ("/temperature 9\r", "/topk 0\r"):  # answers about as long as they may be
            terminal.type(command)
            terminal.wait_for("> ")
        for i in range(160):  # whenever it comes, before, in or after the answer, it ends no more than the answer
            terminal.type("go on\r")
            terminal.wait_for("go on\r\n")
            time.sleep(0.003 * (i % 20))
            terminal.type("\x03")
            if " ...\r\n" in terminal.wait_for("\n> "):
                break
        else:
            raise AssertionError("no answer was stopped")
        terminal.type("\r/temperature 0\r\r/temperature 0\r")  # a late Ctrl-C may still clear a line
        terminal.wait_for("mtemperature 0")
        terminal.wait_for("> ")
        time.sleep(0.3)
        terminal.type("\x04")
        assert terminal.program.wait(30) == 0
    finally:
        terminal.program.kill()


def test_ctrl_c_stops_the_answer_not_the_program(engine):
    """A real signal in the middle of real decoding."""
    c = talk(engine)
    written = c.out.write

    def interrupt(text):
        if len(c.out.getvalue()) == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return written(text)

    c.out.write = interrupt
    c.answer(GREETING[0]["content"])
    assert c.out.getvalue().endswith(" ...\n") and "안녕!" not in c.out.getvalue()
    assert engine.running == 0 and c.messages[-1]["role"] == "assistant"
    del c.out.write
    c.command("/clear")
    c.answer(GREETING[0]["content"])
    assert c.out.getvalue().endswith("Hi 🙂 안녕!\n")
    with pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
