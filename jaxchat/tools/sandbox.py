"""Running a model's code: a process with limits, without files and sockets, in namespaces of its own.

Layer 1, always: own process and session, `-I -S`, empty environment, an empty scratch folder, limits on memory, time,
files and output, no children, no privileges, death with the parent. Layer 2: Landlock and seccomp. Layer 3: bubblewrap.
Which of them hold here is tried once, by a program that does what they forbid. See `docs/reliability.md`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import secrets
import select
import shutil
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxchat.tools.sandbox_child import LIBRARIES, PACKAGES, READY, abi, libraries

# The scratch folder of a sandbox: made, watched, and removed whatever lies in it.


MAX_ENTRIES = 1000  # files and folders


def too_much(folder: Path, max_bytes: int) -> bool:
    """Whether more than `max_bytes` or 1,000 entries lie in it; what cannot be looked at counts as too much."""
    total = entries = 0
    folders = [str(folder)]
    while folders:
        try:
            with os.scandir(folders.pop()) as inside:
                for entry in inside:
                    entries += 1
                    total += entry.stat(follow_symlinks=False).st_blocks * 512
                    if total > max_bytes or entries > MAX_ENTRIES:
                        return True
                    if entry.is_dir(follow_symlinks=False):
                        folders.append(entry.path)
        except FileNotFoundError:  # deleted meanwhile
            continue
        except OSError:  # a path longer than the system allows, a folder that cannot be entered
            return True
    return False


def make() -> Path:
    """A new empty folder inside one that only this user may change: its owner can neither delete nor replace it."""
    outer = Path(tempfile.mkdtemp(prefix="jaxchat-sandbox-"))
    outer.chmod(0o711)
    folder = outer / "scratch"
    folder.mkdir(0o700)
    return folder


def remove(folder: Path) -> None:
    """Delete what `make` made with all that lies in it, once nobody runs there any more.

    Also folders nested deeper than a path may be long, and those that nobody may enter. Links are never followed.
    """
    outer, serial = folder.parent, 0
    if outer.is_symlink():
        return
    todo = [str(outer)]
    while todo:
        top = todo.pop()
        with os.scandir(top) as inside:
            entries = list(inside)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, stat.S_IRWXU)
            moved = entry.path
            if top != str(outer):
                serial += 1
                moved = str(outer / str(serial))  # beside the others instead of below: no path grows
                os.rename(entry.path, moved)
            todo.append(moved)
        if top != str(outer):
            os.rmdir(top)
    os.rmdir(outer)


# Processes in a sandbox, from outside: what they may use, how they start, and their end.


SETUP_SECONDS = 30.0  # until a process must have confined itself, on however busy a machine
_CHILD = Path(__file__).with_name("sandbox_child.py")
_DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom")


@dataclass(frozen=True)
class Policy:
    """What a program may use."""

    cpu_seconds: int = 4  # of the processor
    seconds: float = 15.0  # on the clock, from the moment it begins
    memory_bytes: int = 512 << 20  # address space
    output_bytes: int = 64 << 10  # on standard output, and as much on standard error
    disk_bytes: int = 16 << 20  # in the scratch folder; a quarter of it in one file
    open_files: int = 32
    source_bytes: int = 1 << 20


@dataclass(frozen=True)
class Layers:
    """What holds a process beside its limits (layer 1): the parts of layers 2 and 3."""

    landlock: bool = False
    seccomp: bool = False
    bubblewrap: bool = False

    @property
    def level(self) -> int:
        """Files, sockets and calls are held by Landlock and seccomp, or by bubblewrap's file system and seccomp."""
        if not self.seccomp or not (self.landlock or self.bubblewrap):
            return 1
        return 3 if self.bubblewrap else 2


class SandboxError(Exception):
    """The process could not be confined, so nothing ran."""


class Process:
    """One confined process; a context manager that leaves neither process nor files behind.

    `role` and `payload` as in `sandbox_child.py`; `pipes`: further settings of it whose values are descriptors that the
    process gets. It dies with the thread that started it. Raises `SandboxError` where it cannot be started or confined.
    """

    def __init__(
        self,
        role: str,
        payload: Any,
        policy: Policy,
        layers: Layers,
        pipes: dict[str, int] | None = None,
        output: int = subprocess.DEVNULL,
    ):
        self.layers, self.policy = layers, policy
        pipes = pipes or {}
        try:
            self.scratch = make()
        except OSError as error:
            raise SandboxError(f"no scratch folder: {error}") from None
        ready, said = os.pipe()
        try:
            with tempfile.TemporaryFile() as file:
                file.write(json.dumps(payload).encode("ascii"))
                file.seek(0)
                settings = pipes | self._limits() | {"payload": file.fileno(), "ready": said}
                self.process = subprocess.Popen(
                    self._command(role, settings),
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    env={},
                    cwd="/",
                    pass_fds=(file.fileno(), said, *pipes.values()),
                    start_new_session=True,
                )
        except (OSError, ValueError) as error:
            os.close(ready)
            os.close(said)
            remove(self.scratch)
            raise SandboxError(f"cannot start a process: {error}") from None
        os.close(said)
        try:
            self._await_ready(ready)
        except BaseException:
            self.close()
            raise
        finally:
            os.close(ready)
        self.began = time.monotonic()

    def _limits(self) -> dict[str, int]:
        policy, wrapped = self.policy, self.layers.bubblewrap
        return {
            "memory": policy.memory_bytes,
            "cpu": policy.cpu_seconds,
            "file": policy.disk_bytes // 4,
            "files": policy.open_files,
            "landlock": int(self.layers.landlock),
            "seccomp": int(self.layers.seccomp),
            "change_user": int(not wrapped),
            "parent": 0 if wrapped else os.getpid(),
        }

    def _command(self, role: str, settings: dict[str, int]) -> list[str]:
        flags = [f"{name}={value}" for name, value in settings.items()]
        # -X utf8: the environment is empty, so no locale says so; -B: the child could not write byte code anyway
        child = [interpreter(), "-I", "-S", "-B", "-X", "utf8", str(_CHILD), role, str(self.scratch), *flags]
        return [*bubblewrap(str(self.scratch), self.policy.disk_bytes), *child] if self.layers.bubblewrap else child

    def _await_ready(self, descriptor: int) -> None:
        said = b""
        deadline = time.monotonic() + SETUP_SECONDS
        while select.select([descriptor], [], [], max(0.0, deadline - time.monotonic()))[0]:
            piece = os.read(descriptor, 500)
            said += piece
            if not piece:
                break
        if not said.startswith(READY):  # at level 1 a program may add to it
            self.wait(1)
            why = said.decode("utf-8", "replace") or f"it ended with code {self.exit_code()}, saying nothing"
            raise SandboxError(f"the process did not confine itself: {why}")

    def wait(self, seconds: float) -> None:
        """Until it ends, so long at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        code = self.process.poll()
        return 128 - code if self.layers.bubblewrap and code is not None and code > 128 else code

    def fills_the_disk(self) -> bool:
        return too_much(self.scratch, self.policy.disk_bytes)

    def close(self) -> None:
        """Kill the whole group, wait for its end, remove the files."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        except PermissionError:  # some systems say so of a group that is gone
            self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe:
                pipe.close()
        remove(self.scratch)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def interpreter() -> str:
    """Python itself, not a link to it in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def bubblewrap(scratch: str, disk_bytes: int) -> list[str]:
    """The beginning of a command that runs in namespaces of its own: no network, no other process, of the file system
    only shared libraries, Python's standard library, this folder of ours and an empty scratch folder in memory."""
    program = shutil.which("bwrap") or "bwrap"
    command = [program, "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--die-with-parent", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"]
    own = os.path.join(os.path.realpath(sys.base_prefix), "lib")
    for path in (*LIBRARIES, own):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        elif os.path.isdir(path):
            for library in libraries(path):
                command += ["--ro-bind", library, library]
    command += ["--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache"]
    command += ["--ro-bind-try", "/usr/share/zoneinfo", "/usr/share/zoneinfo"]
    for path in _DEVICES:
        command += ["--dev-bind", path, path]
    for path in (interpreter(), *_standard_library()):
        command += ["--ro-bind-try", path, path]
    for path in _standard_library():
        for packages in (os.path.join(path, name) for name in PACKAGES):
            if os.path.isdir(packages):
                command += ["--tmpfs", packages, "--remount-ro", packages]
    package = _CHILD.parent.parent
    for path in (str(package / "__init__.py"), str(_CHILD.parent)):
        command += ["--ro-bind", path, path]
    scratch_folder = ["--size", str(disk_bytes), "--tmpfs", scratch, "--chdir", scratch]
    return [*command, *scratch_folder, "--remount-ro", "/"]


def _standard_library() -> Sequence[str]:
    return [path for path in (os.path.dirname(os.__file__),) if os.path.isdir(path)]


def bubblewrap_lacks() -> str:
    """Why the installed bubblewrap cannot be used; "" where it can."""
    program = shutil.which("bwrap")
    if not program:
        return "bubblewrap is not installed"
    try:
        said = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not run: {error}"
    return "" if "--size" in said else "this bubblewrap cannot limit a folder in memory; version 0.8 and newer can"


__all__ = ["LEVELS", "Layers", "Outcome", "Policy", "Probe", "Sandbox", "SandboxError", "probe"]

LEVELS = (
    "level 0 of 3: a process with a deadline",
    "level 1 of 3: a process with limits, without children",
    "level 2 of 3: limits, no files and sockets (Landlock, seccomp)",
    "level 3 of 3: limits, no files and sockets (Landlock, seccomp), own namespaces (bubblewrap)",
)
STRICT = 2  # the level that "strict" asks for
_DEFAULT = Policy()
_TICK = 0.05  # seconds between looks at the scratch folder
_PIECE = 1 << 16
# as much time as a machine under load may need; the memory test asks for twice the limit
_PROBE_POLICY = Policy(cpu_seconds=10, seconds=30.0, memory_bytes=256 << 20)
_PROBE = """
import os
done = []
def attempt(name, action):
    try:
        action()
        done.append(name)
    except (OSError, MemoryError):
        pass
def fork():
    if os.fork() == 0:
        os._exit(0)
    os.wait()
def socket():
    from _socket import socket
    socket()
attempt("memory", lambda: bytearray(%(memory)d))
attempt("fork", fork)
attempt("read", lambda: open(%(canary)r).read())
attempt("write", lambda: open(%(canary)r, "a").write("x"))
for path in ("/etc/passwd", "/usr/lib/os-release"):
    attempt("read", lambda: open(path).read())
for packages in ("site-packages", "dist-packages"):
    attempt("write", lambda: open(os.path.join(os.path.dirname(os.__file__), packages, "file"), "w").write("x"))
attempt("socket", socket)
if os.getpid() > 9:
    done.append("processes")
attempt("scratch", lambda: open("file", "w").write("x"))
def fill():
    for n in range(5):
        with open(str(n), "wb") as file:
            file.write(bytes(%(quarter)d))
if %(quarter)d:
    attempt("disk", fill)
print(*done)
"""

_HELD = {1: {"memory", "fork"}, 2: {"read", "write", "socket"}, 3: {"processes", "disk"}}  # of the trial, by level


@dataclass(frozen=True)
class Outcome:
    """How a run ended.

    `status`: of a program "ok" (exit code 0), "error", "killed" (by a signal that was not ours), "timeout", "output" or
    "disk" (too much), "refused" (source too long or no valid Unicode); of a check "passed", "failed", "timeout", "disk"
    or "refused". `why`: a short reason in English.
    """

    status: str
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    why: str = ""


@dataclass(frozen=True)
class Probe:
    """What holds on this machine: the level, its parts, and why the next ones are missing."""

    level: int
    layers: Layers
    missing: tuple[str, ...] = field(default=())

    def __str__(self) -> str:
        return LEVELS[self.level]


class Sandbox:
    """`level`: the strongest that holds here, or the one asked for. `mode` "strict" wants at least 2.

    Raises `SandboxError` where that cannot be had.
    """

    def __init__(self, policy: Policy = _DEFAULT, mode: str = "auto", level: int | None = None):
        found = probe()
        if level is not None and level > found.level:
            raise SandboxError(f"sandbox: {LEVELS[level]} does not hold here ({'; '.join(found.missing)})")
        if mode == "strict" and (found.level if level is None else level) < STRICT:
            raise SandboxError(
                f"sandbox: strict wants {LEVELS[STRICT]}, here holds {found} ({'; '.join(found.missing)}); "
                "take a Linux kernel with Landlock (5.13 or newer) or install bubblewrap"
            )
        self.policy = policy
        self.layers = found.layers if level in (None, found.level) else _WEAKER[level or 0]
        self.level = found.level if level is None else level

    def __str__(self) -> str:
        return LEVELS[self.level]

    def run(self, source: str) -> Outcome:
        """Run a program to its end. "ok" says that it ended with exit code 0, not that it did what it should."""
        if (data := _encoded([source], self.policy)) is None:
            return Outcome("refused", why="the source is too long or not valid Unicode")
        with Process("program", data[0], self.policy, self.layers, output=subprocess.PIPE) as process:
            return _watch(process)

    def check(self, programs: Sequence[str], entry: str, setup: str, tests: str) -> Outcome:
        """Whether the function `entry` of the first of `programs` that is valid Python passes `tests`.

        `tests` define `check(candidate)`; `setup` runs before them. Both are trusted to judge, and run in a process of
        their own, where `candidate` sends its arguments to the process of the program and gets plain values back.
        """
        if (data := _encoded(programs, self.policy)) is None:
            return Outcome("refused", why="the source is too long or not valid Unicode")
        token = secrets.token_hex(16)  # so that nothing but the checker can say "passed"
        judge = {"setup": setup, "tests": tests, "entry": entry, "token": token}
        with _Pipe() as calls, _Pipe() as answers, _Pipe() as verdict:
            ends = {"calls": calls.inlet, "answers": answers.outlet, "verdict": verdict.inlet}
            # first, so that it is closed to others before the candidate begins
            with Process("checker", judge, self.policy, self.layers, ends) as checker:
                for end in (calls, verdict):
                    end.close_inlet()
                answers.close_outlet()
                ends = {"calls": calls.outlet, "answers": answers.inlet}
                payload = {"programs": data, "entry": entry}
                with Process("candidate", payload, self.policy, self.layers, ends) as candidate:
                    calls.close_outlet()
                    answers.close_inlet()
                    return _judged(verdict.outlet, token, candidate, checker)


class _Pipe:
    """A pipe whose ends are closed once, at the latest with the block."""

    def __init__(self) -> None:
        self.outlet, self.inlet = os.pipe()

    def close_outlet(self) -> None:
        self.outlet = self._closed(self.outlet)

    def close_inlet(self) -> None:
        self.inlet = self._closed(self.inlet)

    @staticmethod
    def _closed(end: int) -> int:
        if end >= 0:
            os.close(end)
        return -1

    def __enter__(self) -> _Pipe:
        return self

    def __exit__(self, *_: object) -> None:
        self.close_outlet()
        self.close_inlet()


def _encoded(programs: Sequence[str], policy: Policy) -> list[str] | None:
    """The programs, or None where one cannot be written as UTF-8 or is too long."""
    try:
        too_long = any(len(p) > policy.source_bytes or len(p.encode()) > policy.source_bytes for p in programs)
    except UnicodeEncodeError:
        return None
    return None if too_long else list(programs)


def _watch(process: Process) -> Outcome:
    """Read what it says until it ends or passes a limit."""
    streams = {pipe.fileno(): bytearray() for pipe in (process.process.stdout, process.process.stderr) if pipe}
    waiting, policy, status = set(streams), process.policy, ""
    while not status and (waiting or process.exit_code() is None):
        if process.seconds > policy.seconds:
            status = "timeout"
        elif process.fills_the_disk():
            status = "disk"
        elif not waiting:
            process.wait(_TICK)
        for descriptor in select.select(list(waiting), [], [], _TICK)[0] if waiting else ():
            piece = os.read(descriptor, _PIECE)
            streams[descriptor] += piece
            if not piece:
                waiting.discard(descriptor)
            elif len(streams[descriptor]) > policy.output_bytes:
                status = "output"
    code = process.exit_code()
    if not status:
        status = (
            "ok" if code == 0 else "timeout" if code == -signal.SIGXCPU else "killed" if (code or 0) < 0 else "error"
        )
    out, err = (bytes(text[: policy.output_bytes]).decode("utf-8", "replace") for text in streams.values())
    return Outcome(status, out, err, process.seconds, code)


def _judged(verdict: int, token: str, candidate: Process, checker: Process) -> Outcome:
    """Wait for the checker's verdict; only that can say "passed"."""
    said = b""
    while True:
        if candidate.seconds > candidate.policy.seconds:
            return Outcome("timeout", seconds=candidate.seconds, why="deadline")
        if candidate.fills_the_disk():
            return Outcome("disk", seconds=candidate.seconds, why="scratch folder")
        if select.select([verdict], [], [], _TICK)[0]:
            piece = os.read(verdict, _PIECE)
            if not piece:
                break
            said += piece
    seconds = candidate.seconds
    try:
        found = json.loads(said)
        if found["token"] != token:
            raise ValueError("somebody else's")
    except (ValueError, TypeError, KeyError):
        found = {"passed": False, "why": "the checker ended without a verdict"}
    if found["passed"] is True:
        return Outcome("passed", seconds=seconds)
    candidate.wait(_TICK)  # where it has broken off, it is about to end
    out_of_time = -signal.SIGXCPU in (candidate.exit_code(), checker.exit_code())
    return Outcome("timeout" if out_of_time else "failed", seconds=seconds, why=str(found["why"]))


_WEAKER = (Layers(), Layers(), Layers(landlock=True, seccomp=True))  # what is used of a level that is forced


@functools.cache
def probe() -> Probe:
    """Try the layers from the strongest on, each with a program that does what it forbids."""
    missing = [] if abi() else ["Landlock is not in this kernel"]
    landlock = not missing
    for layers in (
        Layers(landlock=landlock, seccomp=True, bubblewrap=True),
        Layers(landlock=True, seccomp=True),
        Layers(),
    ):
        if layers.landlock and not landlock:
            continue
        why = _weakness(layers)
        if not why:
            return Probe(layers.level, layers, tuple(missing))
        missing.append(f"level {layers.level}: {why}")
    return Probe(0, Layers(), tuple(missing))


def _weakness(layers: Layers) -> str:
    """What a process with these layers can do that it should not, or why it does not start; "" where it holds."""
    if layers.bubblewrap and (why := bubblewrap_lacks()):
        return why
    with tempfile.TemporaryDirectory(prefix="jaxchat-probe-") as folder:
        os.chmod(folder, 0o755)
        canary = Path(folder) / "canary"
        canary.write_text("somebody else's", encoding="utf-8")
        canary.chmod(0o666)
        quarter = _PROBE_POLICY.disk_bytes // 4 if layers.level >= 3 else 0  # below, what is written is looked at
        program = _PROBE % {"memory": 2 * _PROBE_POLICY.memory_bytes, "canary": str(canary), "quarter": quarter}
        try:
            with Process("program", program, _PROBE_POLICY, layers, output=subprocess.PIPE) as process:
                outcome = _watch(process)
        except SandboxError as error:
            return str(error)
    if outcome.status != "ok":
        return f"the trial ended with {outcome.status}: {(outcome.stderr.strip().splitlines() or ['nothing said'])[-1]}"
    held = _HELD[1] | (_HELD[2] if layers.level >= 2 else set()) | (_HELD[3] if layers.level >= 3 else set())
    weak = sorted(held & set(outcome.stdout.split()))
    if "scratch" not in outcome.stdout.split():
        return "the scratch folder cannot be written"
    return f"not held: {', '.join(weak)}" if weak else ""
