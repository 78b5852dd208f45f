"""The page that follows a run: reads its directory while it trains, and after.

It needs no network and imports JAX only when somebody opens the chat. What it shows is in the run directory, so the
training may run in another process, on another machine, or be over.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import hmac
import http.client
import ipaddress
import json
import math
import re
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from jaxchat.config import load_config
from jaxchat.errors import DataError, InterruptedRun, JaxchatError, UsageError
from jaxchat.log import say
from jaxchat.run_dir import TRAINED, RunDir, read_json, saved_steps

from . import bind

POINTS = 400  # of one curve, at most
MESSAGES = 60  # the newest ones are shown
SILENT_SECONDS = 120.0  # without a word, besides twenty steps, after which a training may be dead
LENS_SECONDS = 120  # after which a question about a token is given up
LOCAL = ("localhost", "127.0.0.1", "[::1]")  # names of this machine in the address of a browser
PAGE = Path(__file__).with_name("watch.html")
RUNNING, ENDED = "running", "ended"


class Lines:
    """A file of JSON objects, one a line, that another process writes; `read` takes in what is new.

    A cut last line waits for its rest. A file that was replaced or shortened is read again from its start.
    """

    def __init__(self, path: Path):
        self.path = path
        self.clear()

    def clear(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.count, self.changed, self._read, self._file = 0, 0.0, 0, 0

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def read(self) -> None:
        try:
            stat = self.path.stat()
            if stat.st_ino != self._file or stat.st_size < self._read:
                self.clear()
                self._file = stat.st_ino
            self.changed = stat.st_mtime
            if stat.st_size == self._read:
                return
            with open(self.path, "rb") as file:
                file.seek(self._read)
                data = file.read()
        except OSError:  # not there yet, or not any more
            self.clear()
            return
        whole = data[: data.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                if isinstance(record := json.loads(line), dict):
                    self.count += 1
                    self.add(record)


class Curves(Lines):
    """The curves of a `metrics.jsonl` as columns of numbers: of a long run, records would fill the memory."""

    def clear(self) -> None:
        super().clear()
        self.last: dict[str, Any] = {}
        self.columns: dict[str, tuple[array[float], array[float]]] = {}  # name -> steps, values; NaN where not finite
        self.step_seconds: list[float] = []  # of the newest steps

    def add(self, record: dict[str, Any]) -> None:
        self.last = record
        step = record.get("step")
        if not isinstance(step, int):
            return
        for name, value in record.items():
            if value is None or (isinstance(value, int | float) and name not in ("step", "tokens")):
                steps, values = self.columns.setdefault(name, (array("d"), array("d")))
                steps.append(step + 1)
                values.append(math.nan if value is None else value)
        self.step_seconds = [*self.step_seconds[-19:], record.get("step_seconds") or 0.0]

    def thinned(self) -> dict[str, list[list[float | None]]]:
        """Return [step, value] points; each is the mean of the steps it stands for, null where none is finite."""
        return {name: _thinned(*column) for name, column in self.columns.items() if any(map(math.isfinite, column[1]))}


def _thinned(steps: Sequence[float], values: Sequence[float]) -> list[list[float | None]]:
    width = -(-len(steps) // POINTS)
    points: list[list[float | None]] = []
    for i in range(0, len(steps), width):
        finite = [value for value in values[i : i + width] if math.isfinite(value)]
        mean = float(f"{sum(finite) / len(finite):.6g}") if finite else None
        points.append([steps[min(i + width, len(steps)) - 1], mean])
    return points


class Watched:
    """What there is to see of one run directory, now."""

    def __init__(self, root: Path):
        self.run = RunDir(root)
        self.messages = Lines(self.run.messages)
        self.curves = {folder: Curves(self.run.stage(folder) / "metrics.jsonl") for folder in TRAINED}

    def refresh(self) -> None:
        for lines in (self.messages, *self.curves.values()):
            lines.read()

    def newest(self, key: str) -> Any:
        """Return the value of this key in the newest message that has it; None where none does."""
        return next((m[key] for m in reversed(self.messages.records) if key in m), None)

    def state(self) -> dict[str, Any]:
        """Return everything but the curves, as JSON; `error` says why something cannot be shown."""
        self.refresh()
        state: dict[str, Any] = {"run": self.run.root.resolve().name, "path": str(self.run.root.resolve())}
        records, error = dict[str, Any](), ""
        try:
            records = self.run.records()
        except JaxchatError as damaged:  # half written on another machine's disk, or of another version
            error = str(damaged)
        state |= {"error": error, "found": bool(records or self.messages.records), "status": self.status(records)}
        state |= {"stages": self.stages(records, state["status"]), "now": self.now(records), "exams": self.exams()}
        hours = sum(stage["seconds"] or 0 for stage in state["stages"]) / 3600
        price = self.newest("usd_per_hour")
        state["cost"] = None if price is None else price * hours
        state["memory"] = self.newest("memory_bytes")
        state["messages"] = [m for m in self.messages.records if m.get("text")][-MESSAGES:]
        state["samples"] = self.samples()
        state["versions"] = {folder: f"{c.count}-{c.changed}" for folder, c in self.curves.items() if c.count}
        state["trained"] = any(saved_steps(self.run.stage(folder)) for folder in TRAINED)
        return state

    def status(self, records: Mapping[str, Any]) -> str:
        """Return "waiting" (nothing there), "training", "silent" (for too long), "stopped" or "done"."""
        messages = self.messages.records
        if not messages:
            running = any(record["status"] == RUNNING for record in records.values())
            return "silent" if running else "done" if records else "waiting"
        newest: dict[str, Any] = next((m for m in reversed(messages) if ENDED in m or "stage" in m), {})
        if end := newest.get(ENDED):
            return "done" if end == "done" else "stopped"
        pace = max((sum(c.step_seconds) for c in self.curves.values() if c.step_seconds), default=0.0)
        quiet = time.time() - max(self.messages.changed, *(c.changed for c in self.curves.values()))
        return "silent" if quiet > SILENT_SECONDS + pace else "training"

    def stages(self, records: Mapping[str, Any], status: str) -> list[dict[str, Any]]:
        """Return name, status and seconds of every stage, the wanted ones that have not begun among them."""
        begun: dict[str, Any] = next((m for m in reversed(self.messages.records) if "stage" in m), {})
        names = [*records, *(name for name in self.newest("stages") or () if name not in records)]
        rows = []
        for name in names:
            record = records.get(name, {})
            seconds = record.get("seconds")
            if record.get("status") == RUNNING and status == "training" and begun.get("stage") == name:
                seconds += max(0.0, time.time() - begun["time"])
            rows.append({"name": name, "status": record.get("status", "waiting"), "seconds": seconds})
        return rows

    def now(self, records: Mapping[str, Any]) -> dict[str, Any] | None:
        """Return where the training is: of the stage that trains, or the last one that did."""
        folders = [folder for folder, curves in self.curves.items() if curves.last and TRAINED[folder] in records]
        if not folders:
            return None
        folder, curves = folders[-1], self.curves[folders[-1]]
        steps = next((m["steps"] for m in reversed(self.messages.records) if m.get("folder") == folder), None)
        last, seconds = curves.last, sorted(curves.step_seconds)
        step = last.get("step", -1) + 1
        left = None if steps is None or not seconds else max(0, steps - step) * seconds[len(seconds) // 2]
        shown = {key: last.get(key) for key in ("loss", "tokens", "tokens_per_second", "mfu")}
        return {"folder": folder, "step": step, "steps": steps, "seconds_left": left, **shown}

    def exams(self) -> dict[str, dict[str, Any]]:
        """Return the scores of every stage's exams: {folder: {name: {"metric", "interval"}}}."""
        result: dict[str, dict[str, Any]] = {}
        for folder in TRAINED:
            with contextlib.suppress(DataError, AttributeError, KeyError, TypeError):
                scores = read_json(self.run.eval(folder))["tasks"].items()
                result[folder] = {k: {"metric": s["metric"], "interval": s.get("interval")} for k, s in scores}
        return result

    def samples(self) -> list[dict[str, Any]]:
        """Return folder and step of all samples taken while training, and whether that checkpoint is kept."""
        found = []
        for folder in TRAINED:
            kept = saved_steps(self.run.stage(folder))
            for path in sorted((self.run.stage(folder) / "samples").glob("step_*.json")):
                with contextlib.suppress(ValueError):
                    step = int(path.stem.removeprefix("step_"))
                    found.append({"folder": folder, "step": step, "kept": step in kept})
        return found


class Watch:
    """The page of one run, and the chat with it once somebody asks for that."""

    def __init__(self, run: Path, beside: Path | None, keys: Sequence[str], host: str):
        self.watched, self.beside = Watched(run), Watched(beside) if beside else None
        self.keys, self.host = [key.encode() for key in keys], host
        self.chat: ASGIApp | None = None
        self.chat_error = ""
        self._chat_task: asyncio.Task[None] | None = None
        self._lens = asyncio.Lock()  # one question at a time
        self._end = asyncio.Event()
        routes = [
            Route("/", lambda request: RedirectResponse("/watch")),
            Route("/watch", lambda request: HTMLResponse(PAGE.read_text(encoding="utf-8"))),
            Route("/watch/state", self.state),
            Route("/watch/curves", self.curves),
            Route("/watch/sample", self.sample),
            Route("/watch/lens", self.lens, methods=["POST"]),
            Route("/watch/chat", self.start_chat, methods=["POST"]),
        ]
        self._pages = Starlette(routes=routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app: ASGIApp = self._pages
        if scope["type"] in ("http", "websocket"):
            watching = scope["path"] == "/watch" or scope["path"].startswith("/watch/")
            if refusal := self._refuse(scope) if watching or not self.chat else None:
                app = refusal
            elif self.chat and not watching:
                app = self.chat
        await app(scope, receive, send)

    def _refuse(self, scope: Scope) -> Response | None:
        """Return the answer to who has no key, or to a page of another site; None for everybody else."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.keys:
            scheme, _, value = headers.get("authorization", "").partition(" ")
            with contextlib.suppress(binascii.Error, ValueError):
                value = (
                    base64.b64decode(value, validate=True).decode().partition(":")[2] if scheme == "Basic" else value
                )
            if not any(hmac.compare_digest(key, value.encode()) for key in self.keys):
                return Response("the password is an API key", 401, {"WWW-Authenticate": 'Basic realm="jaxchat"'})
        elif re.sub(r":\d+$", "", headers.get("host", "")) not in (*LOCAL, self.host):
            return Response("this page is for this machine only", 403)  # a name that another site gave this address
        if scope.get("method") == "POST" and headers.get("sec-fetch-site", "same-origin") not in (
            "same-origin",
            "none",
        ):
            return Response("not from another page", 403)
        return None

    # Routes; they read files, each for milliseconds

    def state(self, request: Request) -> Response:
        chat = "on" if self.chat else "starting" if self._chat_task else "off"
        chats = {"chat": chat, "chat_error": self.chat_error}
        return JSONResponse(
            self.watched.state() | chats | {"beside": self.beside and self.beside.run.root.resolve().name}
        )

    def curves(self, request: Request) -> Response:
        """Answer with the curves of one stage, of this run and of the one beside it."""
        folder = request.query_params.get("stage", "base")
        found = []
        for watched in filter(None, (self.watched, self.beside)):
            watched.refresh()
            found.append(watched.curves[folder].thinned() if folder in watched.curves else {})
        return JSONResponse({"run": found[0], "beside": found[1] if len(found) > 1 else None})

    def sample(self, request: Request) -> Response:
        folder, step = request.query_params.get("stage", ""), request.query_params.get("step", "")
        if folder not in TRAINED or not step.isdecimal():
            return JSONResponse({"error": "there is no such sample"}, 404)
        try:
            return JSONResponse(read_json(self.watched.run.stage(folder) / "samples" / f"step_{int(step):06d}.json"))
        except DataError as error:
            return JSONResponse({"error": str(error)}, 404)

    async def lens(self, request: Request) -> Response:
        """Ask a process of low priority on the CPU what `jaxchat.lens` says."""
        try:
            question = await request.json()
            folder, step, ids = question["stage"], int(question["step"]), [int(i) for i in question["ids"]]
            if folder not in TRAINED or not ids:
                raise ValueError
        except (ValueError, KeyError, TypeError):
            return JSONResponse({"error": "write {stage, step, ids}"}, 400)
        command = [sys.executable, "-m", "jaxchat.lens", str(self.watched.run.root.resolve()), folder, str(step)]
        async with self._lens:
            pipe = asyncio.subprocess.PIPE
            process = await asyncio.create_subprocess_exec(
                *command, stdin=pipe, stdout=pipe, stderr=pipe, cwd=Path(__file__).parent.parent
            )
            try:
                output, errors = await asyncio.wait_for(process.communicate(json.dumps(ids).encode()), LENS_SECONDS)
            except TimeoutError:
                process.kill()
                return JSONResponse({"error": f"no answer within {LENS_SECONDS} s"}, 503)
        with contextlib.suppress(ValueError):
            return JSONResponse(json.loads(output))
        last = (errors.decode(errors="replace").strip().splitlines() or ["it was killed; too little memory?"])[-1]
        return JSONResponse({"error": last}, 500)

    async def start_chat(self, request: Request) -> Response:
        """Load the model into this process; the chat page is at / as soon as it is there."""
        state = self.watched.state()
        if state["status"] == "training" or not state["trained"]:
            return JSONResponse({"error": "there is nobody to talk to before the training ends"}, 409)
        if not self._chat_task:
            self.chat_error = ""
            self._chat_task = asyncio.create_task(self._chat())
        return JSONResponse({"chat": "starting"})

    async def _chat(self) -> None:
        try:
            app, worker = await asyncio.to_thread(make_chat, self.watched.run, self.host, self.keys)
            try:
                async with app.router.lifespan_context(app):
                    await asyncio.wrap_future(worker.loaded)
                    self.chat = app
                    await self._end.wait()
            finally:
                self.chat = None
                await asyncio.to_thread(worker.close)
        except Exception as error:
            self.chat_error = str(error) or type(error).__name__
        finally:
            self._chat_task = None

    async def close(self) -> None:
        self._end.set()
        if self._chat_task:
            await asyncio.wait([self._chat_task], timeout=5)


def make_chat(run: RunDir, host: str, keys: Sequence[bytes]) -> tuple[Any, Any]:
    """Return the service of a finished run as an app, and its worker, which loads the model."""
    from jaxchat.config import replaced
    from jaxchat.engine import trained_stages
    from jaxchat.scaling import resolve

    from .app import load, make_app
    from .service import Service
    from .worker import Worker

    trained_stages(run)
    config = replaced(resolve(load_config(run.config)), "serve", host=host, api_keys=tuple(k.decode() for k in keys))
    worker = Worker(lambda worker: load(run, config, worker))
    service = Service(config, worker)

    def make_page() -> Any:
        from .page import mounted_page

        return mounted_page(run, service)

    return make_app(service, make_page), worker


class Server(uvicorn.Server):
    """Uvicorn that ends the chat before itself."""

    def __init__(self, watch: Watch):
        settings = {"log_level": "warning", "access_log": False, "lifespan": "off", "server_header": False}
        super().__init__(uvicorn.Config(watch, timeout_graceful_shutdown=1, **settings))  # type: ignore[arg-type]
        self._watch = watch

    async def shutdown(self, sockets: Any = None) -> None:
        await self._watch.close()
        await super().shutdown(sockets)


def watch(run: Path, host: str, port: int, keys: Sequence[str], beside: Path | None = None) -> None:
    """Serve the page until told to stop, unless it is open at that address already.

    `UsageError` where the address cannot be had, or is not safe to open.
    """
    local = host == "localhost"
    with contextlib.suppress(ValueError):
        local = local or ipaddress.ip_address(host).is_loopback
    if not local and not keys:
        raise UsageError(f"--host {host}: set a key in JAXCHAT_API_KEYS, or stay on 127.0.0.1; others could read this")
    try:
        listening = bind(host, port)
    except UsageError:
        if open_already(host, port, run):
            say(f"watching {run}: http://{host}:{port}/watch, opened before")
            return
        raise
    address = f"http://{host}:{listening.getsockname()[1]}/watch"
    waiting = "" if RunDir(run).stages.exists() else " (there is no run yet; the page waits for it)"
    say(f"watching {run}: {address}{waiting}   (Ctrl-C closes the page)")
    with contextlib.suppress(KeyboardInterrupt, InterruptedRun), listening:
        Server(Watch(run, beside, keys, host)).run(sockets=[listening])


def open_already(host: str, port: int, run: Path) -> bool:
    """Return whether the page of this run answers there."""
    with contextlib.suppress(OSError, ValueError):
        connection = http.client.HTTPConnection(host, port, timeout=3)
        connection.request("GET", "/watch/state")
        return bool(json.loads(connection.getresponse().read()).get("path") == str(run.resolve()))
    return False
