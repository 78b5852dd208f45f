"""Terminal chat with a finished run; also in a pipe: `echo question | python launch.py chat runs/nano`."""

from __future__ import annotations

import contextlib
import io
import signal
import sys
import time
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType
from typing import Any, TextIO

from jaxchat.checkpoint import recorded
from jaxchat.config import Config
from jaxchat.engine import Engine, Event, trained_stages
from jaxchat.engine.device import least_rows
from jaxchat.errors import UsageError
from jaxchat.log import progress
from jaxchat.run_dir import RunDir

from .worker import fitting_request

HELP = """  /temperature X   0 takes the likeliest token each time, 1 is lively (now {temperature:g})
  /topk N          choose among the N likeliest tokens, 0 among all (now {top_k})
  /clear           forget the conversation
  /quit            leave (also Ctrl-D); Ctrl-C stops an answer"""
COMMANDS = ("/temperature", "/topk", "/clear", "/quit", "/exit", "/help")
BIDI_CONTROLS = {"LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI"}
DIM, PLAIN = "\033[2m", "\033[0m"


@dataclass
class Chat:
    """A conversation in a terminal or a pipe."""

    engine: Engine
    settings: dict[str, Any]  # of every request: temperature, top_k, min_p, max_tokens
    out: TextIO
    interactive: bool
    messages: list[dict[str, Any]] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Run a line that starts with a slash; False to leave."""
        name, _, value = line.partition(" ")
        text = HELP.format(**self.settings)
        with contextlib.suppress(ValueError):  # a wrong number shows the help
            if name == "/clear":
                self.messages.clear()
                text = "conversation forgotten"
            elif name == "/temperature" and 0 <= float(value) <= 10:
                self.settings["temperature"] = float(value)
                text = f"temperature {float(value):g}"
            elif name == "/topk" and int(value) >= 0:
                self.settings["top_k"] = int(value)
                text = f"top-k {int(value)}"
        if name not in ("/quit", "/exit"):
            self._note(text)
        return name not in ("/quit", "/exit")

    def answer(self, text: str) -> None:
        """Stream the answer to one user message; Ctrl-C keeps what has come so far."""
        messages = [*self.messages, {"role": "user", "content": text}]
        try:
            request, dropped = fitting_request(self.engine, messages, **self.settings)
        except UsageError as error:
            self._note(str(error))
            return
        if dropped:
            self._note(f"the context is full: the oldest {dropped} messages are forgotten")
        pressed: list[int] = []  # by Ctrl-C: an exception while decoding would lose the engine's state
        dim, undim = (DIM, PLAIN) if self.interactive else ("", "")
        begin, before, handle = time.perf_counter(), "", self.engine.submit(request)
        with ctrl_c(lambda number, frame: pressed.append(number)):
            while not handle.done:
                if pressed:
                    self.engine.cancel(handle)
                for event in [Event("done")] if pressed else [event for _, event in self.engine.step()]:
                    if event.kind != before:  # tool calls are in brackets, as [12+30 = 42]
                        if before == "python" and event.kind == "python_output":
                            self._write(" = ")
                        else:
                            self._write(f"]{undim} " if before.startswith("python") else "")
                            self._write(f"{dim}[" if event.kind.startswith("python") else "")
                    before = event.kind
                    self._write(printable(event.text))
            self._write(" ...\n" if pressed else "\n")
        if self.interactive and handle.made:
            self._note(f"{handle.made / max(time.perf_counter() - begin, 1e-9):.0f} tokens/s")
        self.messages = [*messages[dropped:], {"role": "assistant", "content": handle.parts}]

    def _note(self, text: str) -> None:
        if self.interactive:
            self._write(f"{DIM}{text}{PLAIN}\n")
        else:
            print(text, file=sys.stderr)

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(run: RunDir, config: Config) -> None:
    """Talk to a finished run until the input ends. In a pipe, only the answers go to standard output."""
    for stream in (sys.stdin, sys.stdout, sys.stderr):  # whatever the locale says; no byte of the input is an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    engine = Engine.from_pretrained(run.root, slots=least_rows(), weights=config.serve.weights)
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    settings = {name: getattr(config.serve, name) for name in ("temperature", "top_k", "min_p", "max_tokens")}
    if not interactive:
        settings["temperature"] = 0.0  # a script wants the same answer every time
    talk = Chat(engine, settings, sys.stdout, interactive)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history in `input`
        with progress("compiling", None) as bar:
            engine.programs.warm_up(bar.reach, background=True)
        print(f"{config.tier} in {run.root}; /help lists the commands")
        stage = trained_stages(run)[0]
        record = recorded(run, stage)
        if record.get("status") == "running" and "imported" not in record:
            print(f"{DIM}its training is not finished; the command that began it continues it{PLAIN}")
        if stage == "base":
            print(f"{DIM}a model without SFT: it continues what you type, and answers nothing{PLAIN}")
    # a Ctrl-C that comes just after an answer ends nothing
    with ctrl_c(lambda number, frame: None) if interactive else contextlib.nullcontext():
        for line in typed() if interactive else map(str.strip, iter(sys.stdin.readline, "")):
            if line.startswith("/") and (interactive or line.split(" ")[0] in COMMANDS):  # in a pipe it may be a text
                if not talk.command(line):
                    break
            elif line:
                talk.answer(line)
    engine.programs.stop_compiling()


def typed() -> Iterator[str]:
    """Yield the lines that a person types; Ctrl-C at the prompt clears the line."""
    while True:
        try:
            with ctrl_c(signal.default_int_handler):
                line = input("\n> ")
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print()
            continue
        yield line.strip()


@contextlib.contextmanager
def ctrl_c(handler: Callable[[int, FrameType | None], Any]) -> Iterator[None]:
    before = signal.signal(signal.SIGINT, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def printable(text: str) -> str:
    """Replace the control characters by which a model's text could steer the terminal or reverse its lines."""

    def steers(c: str) -> bool:
        return unicodedata.category(c) == "Cc" or unicodedata.bidirectional(c) in BIDI_CONTROLS

    return "".join("\ufffd" if c not in "\n\t" and steers(c) else c for c in text)
