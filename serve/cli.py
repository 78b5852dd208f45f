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
from jaxchat.engine import Engine
from jaxchat.engine.device import least_rows
from jaxchat.engine.loading import trained_stages
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
    temperature: float
    top_k: int
    max_tokens: int
    out: TextIO
    interactive: bool
    messages: list[dict[str, Any]] = field(default_factory=list)

    def command(self, line: str) -> bool:
        """Run a line that starts with a slash; False to leave."""
        name, _, value = line.partition(" ")
        with contextlib.suppress(ValueError):  # a wrong number shows the help
            if name in ("/quit", "/exit"):
                return False
            if name == "/clear":
                self.messages.clear()
                self._note("conversation forgotten")
                return True
            if name == "/temperature" and 0 <= (temperature := float(value)) <= 10:
                self.temperature = temperature
                self._note(f"temperature {temperature:g}")
                return True
            if name == "/topk" and (top_k := int(value)) >= 0:
                self.top_k = top_k
                self._note(f"top-k {top_k}")
                return True
        self._note(HELP.format(temperature=self.temperature, top_k=self.top_k))
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to one user message; Ctrl-C keeps what has come so far."""
        messages = [*self.messages, {"role": "user", "content": text}]
        settings = {"max_tokens": self.max_tokens, "temperature": self.temperature, "top_k": self.top_k}
        try:
            request, dropped = fitting_request(self.engine, messages, **settings)
        except UsageError as error:
            self._note(str(error))
            return
        if dropped:
            self._note(f"the context is full: the oldest {dropped} messages are forgotten")
        parts: list[dict[str, str]] = []
        begin = time.perf_counter()
        events = self.engine.events(request)
        with interruptible() as stopped, contextlib.closing(events):  # type: ignore[type-var]
            for event in events:
                if event.kind == "done" or stopped():
                    break
                if not parts or parts[-1]["type"] != event.kind:
                    self._write(self._bracket(parts[-1]["type"] if parts else "", event.kind))
                    parts.append({"type": event.kind, "text": ""})
                parts[-1]["text"] += event.text
                self._write(printable(event.text))
            self._write(" ..." if stopped() else "")
        self._write(self._bracket(parts[-1]["type"] if parts else "", "") + "\n")
        if self.interactive and parts:
            tokens = sum(len(self.engine.tokenizer.encode(part["text"])) for part in parts)
            self._note(f"{tokens / max(time.perf_counter() - begin, 1e-9):.0f} tokens/s")
        self.messages = [*messages[dropped:], {"role": "assistant", "content": parts}]

    def _bracket(self, before: str, after: str) -> str:
        """Return the text between parts of an answer: tool calls are in brackets, as [12+30 = 42]."""
        dim, plain = (DIM, PLAIN) if self.interactive else ("", "")
        if before == "python" and after == "python_output":
            return " = "
        return (f"]{plain} " if before.startswith("python") else "") + (f"{dim}[" if after.startswith("python") else "")

    def _note(self, text: str) -> None:
        if self.interactive:
            self._write(f"{DIM}{text}{PLAIN}\n")
        else:
            print(text, file=sys.stderr)

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(run: RunDir, config: Config, stage: str | None = None, source: TextIO | None = None) -> None:
    """Talk to a finished run until the input ends. In a pipe, only the answers go to standard output."""
    source = source or sys.stdin
    for stream in (source, sys.stdout, sys.stderr):  # whatever the locale says; no byte of the input is an error
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(encoding="utf-8", errors="replace")
    engine = Engine.from_pretrained(run.root, stage, slots=least_rows(), weights=config.serve.weights)
    interactive = source.isatty() and sys.stdout.isatty()
    temperature = config.serve.temperature if interactive else 0.0  # a script wants the same answer every time
    talk = Chat(engine, temperature, config.serve.top_k, config.serve.max_tokens, sys.stdout, interactive)
    if interactive:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  # arrow keys and history in `input`
        with progress("compiling", None) as bar:
            engine.warm_up(bar.reach, background=True)
        print(f"{config.tier} in {run.root}; /help lists the commands")
        for line in notes(run, stage or trained_stages(run)[0]):
            print(f"{DIM}{line}{PLAIN}")
    # a Ctrl-C that comes just after an answer ends nothing
    with ctrl_c(lambda number, frame: None) if interactive else contextlib.nullcontext():
        for line in lines(source, interactive):
            if line.startswith("/") and (interactive or line.split(" ")[0] in COMMANDS):  # in a pipe it may be a text
                if not talk.command(line):
                    break
            elif line:
                talk.answer(line)
    engine.stop_compiling()


def notes(run: RunDir, stage: str) -> list[str]:
    """Return a note on the answers of this stage."""
    record = recorded(run, stage)
    unfinished = "imported" not in record and record.get("status") == "running"
    return [
        *(["its training is not finished; the same launch.py command continues it"] if unfinished else []),
        *(["a model without SFT: it continues what you type, and answers nothing"] if stage == "base" else []),
    ]


def lines(source: TextIO, interactive: bool) -> Iterator[str]:
    """Yield lines to the end of the input; Ctrl-C at the prompt clears the line."""
    if not interactive:
        yield from (line.strip() for line in iter(source.readline, ""))
        return
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
def interruptible() -> Iterator[Callable[[], bool]]:
    """Within, Ctrl-C only makes the yielded function return True.

    An exception in the middle of a decoding step would lose the engine's state, which that step consumes.
    """
    pressed: list[int] = []
    with ctrl_c(lambda number, frame: pressed.append(number)):
        yield lambda: bool(pressed)


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
