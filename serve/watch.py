"""The page that follows a run: reads its directory while it trains, and after.

It needs no network and imports JAX only when somebody opens the chat. What it shows is in the run directory, so the
training may run in another process, on another machine, or be over.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hmac
import http.client
import ipaddress
import json
import logging
import math
import os
import re
import sys
import time
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
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
RUNNING, ENDED = "running", "ended"  # status of a record in stages.json; key of the message at the end


class Lines:
    """A file of JSON objects, one a line, that another process writes; `read` takes in what is new.

    A cut last line waits for its rest. A file that was replaced by one that begins as the old one (scores were added to
    its last line, or a newer copy has come) goes on; any other is read again from its start.
    """

    def __init__(self, path: Path):
        self.path = path
        self.clear()

    def clear(self) -> None:
        self.records: list[dict[str, Any]] = []
        self.changed, self._read, self._file, self._last = 0.0, 0, 0, b""

    def add(self, record: dict[str, Any]) -> None:
        self.records.append(record)

    def read(self) -> None:
        try:
            with open(self.path, "rb") as file:
                stat = os.fstat(file.fileno())
                if stat.st_ino != self._file or stat.st_size < self._read:
                    file.seek(self._read - len(self._last))
                    if self._last and file.readline().startswith(self._last.rstrip(b"}\n")):
                        self._read -= len(self._last)
                    else:
                        self.clear()
                self._file, self.changed = stat.st_ino, stat.st_mtime
                file.seek(self._read)
                for line in file:
                    if not line.endswith(b"\n"):
                        break
                    with contextlib.suppress(ValueError, RecursionError):
                        if isinstance(record := json.loads(line), dict):
                            self.add(record)
                    self._read, self._last = self._read + len(line), line
        except OSError:  # not there yet, or not any more
            self.clear()


class Curves(Lines):
    """The curves of a `metrics.jsonl` as arrays: of a long run, its records would fill the memory."""

    def clear(self) -> None:
        super().clear()
        self.last: dict[str, Any] = {}
        self.curves: dict[str, array[float]] = {}  # step and value in turns, NaN where there is none
        self.step_seconds: list[float] = []  # of the newest steps

    def add(self, record: dict[str, Any]) -> None:
        step = record.get("step")
        if not isinstance(step, int):
            return
        new = record.keys() - self.last.keys() if self.last.get("step") == step else record.keys()
        for name in new - {"step", "tokens"}:
            if record[name] is None or isinstance(record[name], int | float):
                value = math.nan if record[name] is None else record[name]
                self.curves.setdefault(name, array("d")).extend((step + 1, value))
        self.last = record
        self.step_seconds = [*self.step_seconds[-19:], record.get("step_seconds") or 0.0]

    def points(self) -> dict[str, list[list[float | None]]]:
        """Return the points of every curve that has a finite one."""
        found = {name: thinned(*np.array(curve).reshape(-1, 2).T) for name, curve in self.curves.items()}
        return {name: points for name, points in found.items() if any(value is not None for _, value in points)}


def thinned(steps: np.ndarray, values: np.ndarray) -> list[list[float | None]]:
    """Return at most `POINTS` pairs of step and value: the last step and the mean of as many steps as are one point.

    The value is null where no step has a finite one.
    """
    width = 2 ** max(0, math.ceil(math.log2(len(steps) / POINTS)))
    starts, finite = np.arange(0, len(steps), width), np.isfinite(values)
    totals, counts = (np.add.reduceat(x, starts) for x in (np.where(finite, values, 0), finite.astype(int)))
    last = steps[np.minimum(starts + width, len(steps)) - 1]
    triples = zip(last.tolist(), totals.tolist(), counts.tolist(), strict=True)
    return [[int(step), float(f"{total / count:.6g}") if count else None] for step, total, count in triples]


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
        return self.told(key).get(key)

    def told(self, *keys: str) -> dict[str, Any]:
        """Return the newest message with one of these keys, {} where none has."""
        return next((m for m in reversed(self.messages.records) if any(key in m for key in keys)), {})

    def state(self) -> dict[str, Any]:
        """Return everything but the curves, as JSON; `error` says why something cannot be shown."""
        self.refresh()
        state: dict[str, Any] = {"run": self.run.root.resolve().name, "path": str(self.run.root.resolve())}
        records, error = dict[str, Any](), ""
        try:
            records = self.run.records()
        except (JaxchatError, OSError) as damaged:  # half written on another machine's disk, or of another version
            error = str(damaged)
        status = self.status(records)
        state |= {"error": error, "status": status, "stages": self.stages(records, status), "now": self.now(records)}
        hours = sum(stage["seconds"] or 0 for stage in state["stages"]) / 3600
        state |= {"cost": (self.newest("usd_per_hour") or 0) * hours, "memory": self.newest("memory_bytes")}
        state |= {"exams": self.exams(), "samples": self.samples()}
        state["messages"] = [m for m in self.messages.records if m.get("text")][-MESSAGES:]
        state["versions"] = {folder: c.changed for folder, c in self.curves.items() if c.last}
        state["trained"] = any(saved_steps(self.run.stage(folder)) for folder in TRAINED)
        return state

    def status(self, records: Mapping[str, Any]) -> str:
        """Return "waiting" (nothing there), "training", "silent" (for too long), "stopped" or "done"."""
        if not self.messages.records:  # of an older version
            kinds = {record["status"] for record in records.values()}
            return "silent" if RUNNING in kinds else "stopped" if kinds - {"done"} else "done" if kinds else "waiting"
        if end := self.told(ENDED, "stage").get(ENDED):
            return "done" if end == "done" else "stopped"
        pace = max((sum(c.step_seconds) for c in self.curves.values() if c.step_seconds), default=0.0)
        quiet = time.time() - max(self.messages.changed, *(c.changed for c in self.curves.values()))
        return "silent" if quiet > SILENT_SECONDS + pace else "training"

    def stages(self, records: Mapping[str, Any], status: str) -> list[dict[str, Any]]:
        """Return name, status and seconds of every stage, the wanted ones that have not begun among them."""
        begun = self.told("stage")
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
        begun = self.told("folder")
        steps = begun.get("steps") if begun.get("folder") == folder else None
        last, seconds = curves.last, sorted(curves.step_seconds)
        step = last.get("step", -1) + 1
        left = None if steps is None or not seconds else max(0, steps - step) * seconds[len(seconds) // 2]
        shown = {key: last.get(key) for key in ("loss", "tokens", "tokens_per_second", "mfu")}
        return {"folder": folder, "step": step, "steps": steps, "seconds_left": left, **shown}

    def exams(self) -> dict[str, dict[str, Any]]:
        """Return the scores of every stage's exams: {folder: {name: {"metric", "interval"}}}."""
        result: dict[str, dict[str, Any]] = {}
        for folder in TRAINED:
            with contextlib.suppress(DataError, OSError, AttributeError, KeyError, TypeError):
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
        watching = scope["path"].split("/")[1] == "watch"
        app = self._refuse(scope) or (self._pages if watching else self.chat or self._pages)
        await app(scope, receive, send)

    def _refuse(self, scope: Scope) -> Response | None:
        """Return the answer to who has no key, or to a page of another site; None for everybody else."""
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        if self.keys:
            scheme, _, value = headers.get("authorization", "").partition(" ")
            if scheme == "Basic":
                with contextlib.suppress(ValueError):
                    value = base64.b64decode(value, validate=True).decode().partition(":")[2]
            if not any(hmac.compare_digest(key, value.encode()) for key in self.keys):
                return Response("the password is an API key", 401, {"WWW-Authenticate": 'Basic realm="jaxchat"'})
        elif re.sub(r":\d+$", "", headers.get("host", "")) not in (*LOCAL, self.host):
            return Response("this page is for this machine only", 403)  # a name that another site gave this address
        site = headers.get("sec-fetch-site", "none")
        if site not in ("same-origin", "none") and (scope["type"] == "websocket" or scope["method"] == "POST"):
            return Response("not from another page", 403)
        return None

    # Routes; they read files for milliseconds, one after the other

    async def state(self, request: Request) -> Response:
        chat = "on" if self.chat else "starting" if self._chat_task else "off"
        beside = self.beside and self.beside.run.root.resolve().name
        return JSONResponse(self.watched.state() | {"chat": chat, "chat_error": self.chat_error, "beside": beside})

    async def curves(self, request: Request) -> Response:
        """Answer with the curves of one stage, of this run and of the one beside it."""
        folder = request.query_params.get("stage", "base")
        found = []
        for watched in filter(None, (self.watched, self.beside)):
            watched.refresh()
            found.append(watched.curves[folder].points() if folder in watched.curves else {})
        return JSONResponse({"run": found[0], "beside": found[1] if len(found) > 1 else None})

    async def sample(self, request: Request) -> Response:
        folder, step = request.query_params.get("stage", ""), request.query_params.get("step", "")
        if folder not in TRAINED or not step.isdecimal():
            return JSONResponse({"error": "there is no such sample"}, 404)
        try:
            return JSONResponse(read_json(self.watched.run.stage(folder) / "samples" / f"step_{int(step):06d}.json"))
        except (DataError, OSError) as error:
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
                return JSONResponse({"error": f"no answer within {LENS_SECONDS} s"}, 503)
            finally:
                with contextlib.suppress(ProcessLookupError):  # it has ended, as it should
                    process.kill()
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
            async with app.router.lifespan_context(app):
                await asyncio.wrap_future(worker.loaded)
                self.chat = app
                await asyncio.Event().wait()  # until this process ends
        except Exception as error:
            self.chat_error = str(error) or type(error).__name__
        finally:
            self._chat_task = None


def make_chat(run: RunDir, host: str, keys: Sequence[bytes]) -> tuple[Any, Any]:
    """Return the service of a finished run as an app, and its worker, which loads the model."""
    from jaxchat.config import replaced
    from jaxchat.engine import trained_stages
    from jaxchat.scaling import resolve

    from .app import make_service

    trained_stages(run)
    config = replaced(resolve(load_config(run.config)), "serve", host=host, api_keys=tuple(k.decode() for k in keys))
    app, service = make_service(run, config)
    return app, service.worker


class Server(uvicorn.Server):
    """Uvicorn that ends the process, and with it the chat."""

    def __init__(self, watch: Watch):
        settings = {"log_level": "warning", "access_log": False, "lifespan": "off", "server_header": False}
        super().__init__(uvicorn.Config(watch, timeout_graceful_shutdown=1, **settings))  # type: ignore[arg-type]

    async def shutdown(self, sockets: Any = None) -> None:
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # requests that are cut off are no faults
        await super().shutdown(sockets)
        if "jax" in sys.modules:  # threads of the chat may be compiling for seconds; there is nothing to lose
            os._exit(0)


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
        if open_already(host, port, run, keys):
            say(f"watching {run}: http://{host}:{port}/watch, opened before")
            return
        raise
    address = f"http://{host}:{listening.getsockname()[1]}/watch"
    waiting = "" if RunDir(run).stages.exists() else " (there is no run yet; the page waits for it)"
    say(f"watching {run}: {address}{waiting}   (Ctrl-C closes the page)")
    with contextlib.suppress(KeyboardInterrupt, InterruptedRun), listening:
        Server(Watch(run, beside, keys, host)).run(sockets=[listening])


def open_already(host: str, port: int, run: Path, keys: Sequence[str]) -> bool:
    """Return whether the page of this run answers there."""
    with contextlib.suppress(OSError, ValueError):
        connection = http.client.HTTPConnection(host, port, timeout=3)
        connection.request("GET", "/watch/state", headers={"Authorization": f"Bearer {keys[0]}"} if keys else {})
        return bool(json.loads(connection.getresponse().read()).get("path") == str(run.resolve()))
    return False
