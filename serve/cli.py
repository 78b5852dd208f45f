"""Terminal chat: `python launch.py --run-dir runs/nano --chat`, or `echo question | python launch.py ... --chat`."""

from __future__ import annotations

import dataclasses
import sys
import time
from dataclasses import dataclass, field
from typing import Any, TextIO

from jaxchat.config import Config
from jaxchat.engine import Engine, Request
from jaxchat.errors import UsageError
from jaxchat.paths import RunDir

HELP = """  /temperature X   0 takes the likeliest word each time, 1 is lively (now {temperature:g})
  /topk N          choose among the N likeliest tokens, 0 among all (now {top_k})
  /clear           forget the conversation
  /quit            leave (also Ctrl-D); Ctrl-C stops an answer"""


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
        """Obey a line that starts with a slash; False to leave."""
        name, _, value = line.partition(" ")
        if name in ("/quit", "/exit"):
            return False
        if name == "/clear":
            self.messages.clear()
            self._note("conversation forgotten")
        elif name == "/temperature" and (number := _number(value, float)) is not None and 0 <= number <= 10:
            self.temperature = number
            self._note(f"temperature {number:g}")
        elif name == "/topk" and (number := _number(value, int)) is not None and number >= 0:
            self.top_k = int(number)
            self._note(f"top-k {self.top_k}")
        else:
            self._note(HELP.format(temperature=self.temperature, top_k=self.top_k))
        return True

    def answer(self, text: str) -> None:
        """Stream the answer to one user message; Ctrl-C keeps what has come so far."""
        self.messages.append({"role": "user", "content": text})
        try:
            request = self._request()
        except UsageError as error:
            self.messages.pop()
            self._note(str(error))
            return
        parts: list[dict[str, str]] = []
        begin, shown = time.perf_counter(), ""
        try:
            for event in self.engine.events(request):
                if event.kind == "done":
                    break
                if not parts or parts[-1]["type"] != event.kind:
                    self._write(self._frame(parts[-1]["type"] if parts else "", event.kind))
                    parts.append({"type": event.kind, "text": ""})
                parts[-1]["text"] += event.text
                shown += event.text
                self._write(event.text)
        except KeyboardInterrupt:
            self._write(" ...")
        self._write(self._frame(parts[-1]["type"] if parts else "", "") + "\n")
        if self.interactive and shown:
            rate = len(self.engine.tokenizer.encode(shown)) / max(time.perf_counter() - begin, 1e-9)
            self._write(f"\033[2m{rate:.0f} tokens/s\033[0m\n")
        self.messages.append({"role": "assistant", "content": parts or ""})

    def _request(self) -> Request:
        """The conversation as a prompt; one too long for the context loses its oldest turns, and says so."""
        room = self.engine.capacity - min(32, self.engine.capacity // 2)
        dropped = 0
        while True:
            request = self.engine.chat_request(
                self.messages, max_tokens=self.max_tokens, temperature=self.temperature, top_k=self.top_k
            )
            if len(request.tokens) <= room or len(self.messages) == 1:
                break
            del self.messages[:2]
            dropped += 2
        if len(request.tokens) > self.engine.capacity:
            raise UsageError(
                f"the message has {len(request.tokens)} tokens; this model's context holds {self.engine.capacity}"
            )
        if dropped:
            self._note(f"the context is full: the oldest {dropped} messages are forgotten")
        return request

    def _frame(self, before: str, after: str) -> str:
        """Tool calls stand in brackets, so that nobody takes them for the model's own words."""
        dim, plain = ("\033[2m", "\033[0m") if self.interactive else ("", "")
        opening = {"python": f"{dim}[", "python_output": " = ", "text": "", "": ""}[after]
        closing = {"python": "" if after == "python_output" else f"]{plain} ", "python_output": f"]{plain} "}
        return closing.get(before, "") + opening

    def _note(self, text: str) -> None:
        if self.interactive:
            self._write(f"\033[2m{text}\033[0m\n")
        else:
            print(text, file=sys.stderr)

    def _write(self, text: str) -> None:
        self.out.write(text)
        self.out.flush()


def chat(run: RunDir, config: Config, stage: str | None = None, source: TextIO | None = None) -> None:
    """Talk to a finished run until the input ends. In a pipe, only the answers go to standard output."""
    source = source or sys.stdin
    engine = Engine.from_pretrained(run.root, stage, slots=1)
    serve = config.serve
    interactive = source.isatty() and sys.stdout.isatty()
    talk = Chat(engine, serve.temperature, serve.top_k, serve.max_tokens, sys.stdout, interactive)
    if not interactive:
        talk = dataclasses.replace(talk, temperature=0.0)  # a script wants the same answer every time
    if interactive:
        print(f"{config.tier} in {run.root}; /help lists the commands")
    while True:
        try:
            line = input("\n> ") if interactive else source.readline()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            continue
        if not interactive and not line:
            break
        line = line.strip()
        if line.startswith("/"):
            if not talk.command(line):
                break
        elif line:
            talk.answer(line)


def _number(text: str, kind: type) -> Any:
    try:
        return kind(text.strip())
    except ValueError:
        return None
