"""Run code that a model wrote: limits, no files, no sockets, and its own namespaces where the machine allows it.

Level 1, always: own process and session, `-I -S`, empty environment, an empty scratch folder, limits on memory, time,
files and output, no children, no privileges, death with the parent. Level 2: Landlock and seccomp. Level 3: bubblewrap.
Which levels hold is tried once, by a program that does what they forbid. See `docs/reliability.md`.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
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
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from jaxchat.tools.sandbox_child import LIBRARIES, PACKAGES, READY, abi, libraries

LEVELS = (
    "level 0 of 3: a process with a deadline",
    "level 1 of 3: a process with limits, without children",
    "level 2 of 3: limits, no files and sockets (Landlock, seccomp)",
    "level 3 of 3: limits, no files and sockets (Landlock, seccomp), own namespaces (bubblewrap)",
)
STRICT = 2  # the level that "strict" asks for
SETUP_SECONDS = 30.0  # until a process must have confined itself, on a busy machine
MAX_ENTRIES = 1000  # files and folders in a scratch folder
_TICK = 0.05  # seconds between looks at the scratch folder
_CHUNK = 1 << 16  # bytes read at once
_CHILD = Path(__file__).with_name("sandbox_child.py")


@dataclass(frozen=True)
class Policy:
    """Limits of a program."""

    cpu_seconds: int = 4  # of the processor
    seconds: float = 15.0  # on the clock, from the moment it begins
    memory_bytes: int = 512 << 20  # address space
    output_bytes: int = 64 << 10  # on standard output, and as much on standard error
    disk_bytes: int = 16 << 20  # in the scratch folder; a quarter of it in one file
    open_files: int = 32
    source_bytes: int = 1 << 20


@dataclass(frozen=True)
class Layers:
    """The parts of levels 2 and 3 that confine a process."""

    landlock: bool = False
    seccomp: bool = False
    bubblewrap: bool = False

    @property
    def level(self) -> int:
        """Level 2 needs seccomp and one of the two that hide files."""
        if not self.seccomp or not (self.landlock or self.bubblewrap):
            return 1
        return 3 if self.bubblewrap else 2


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    `status` of a program: "ok" (exit code 0), "error", "killed" (by a signal that was not ours), "timeout", "output" or
    "disk" (too much), "refused" (source too long or no valid Unicode). `status` of a check: "passed", "failed",
    "timeout", "disk" or "refused". `why` is a short reason in English.
    """

    status: str
    stdout: str = ""
    stderr: str = ""
    seconds: float = 0.0
    exit_code: int | None = None
    why: str = ""


class SandboxError(Exception):
    """The process could not be confined, so nothing ran."""


class Sandbox:
    """Runs programs at the strongest level that holds here, or at `level`. `mode` "strict" asks for at least 2.

    Raises `SandboxError` where that level does not hold.
    """

    def __init__(self, policy: Policy | None = None, mode: str = "auto", level: int | None = None):
        found = probe()
        self.level = found.level if level is None else level
        if self.level > found.level:
            raise SandboxError(f"sandbox: {self} does not hold here ({'; '.join(found.missing)})")
        if mode == "strict" and self.level < STRICT:
            raise SandboxError(
                f"sandbox: strict wants {LEVELS[STRICT]}, here holds {found} ({'; '.join(found.missing)}); "
                "take a Linux kernel with Landlock (5.13 or newer) or install bubblewrap"
            )
        self.policy = policy or Policy()
        weaker = Layers(landlock=True, seccomp=True) if self.level == 2 else Layers()
        self.layers = found.layers if self.level == found.level else weaker

    def __str__(self) -> str:
        return LEVELS[self.level]

    def run(self, source: str) -> Outcome:
        """Run a program to its end. "ok" says that it ended with exit code 0, not that it did what it should."""
        if self._refuses([source]):
            return Outcome("refused", why="the source is too long or not valid Unicode")
        with Process("program", {"source": source}, {}, self.policy, self.layers, subprocess.PIPE) as process:
            return process.outcome()

    def check(self, programs: Sequence[str], entry: str, setup: str, tests: str) -> Outcome:
        """Test the function `entry` of the first of `programs` that is valid Python.

        `tests` define `check(candidate)`; `setup` runs before them. Both are trusted and run in another process. Their
        `candidate` sends its arguments to the program's process and gets plain values back.
        """
        if self._refuses(programs):
            return Outcome("refused", why="the source is too long or not valid Unicode")
        token = secrets.token_hex(16)  # so that only the checker can say "passed"
        with contextlib.ExitStack() as stack:
            questions, answers, verdict = (_pipe(stack) for _ in range(3))
            judge = {"setup": setup, "tests": tests, "entry": entry, "token": token}
            ends = {"calls": questions[1], "answers": answers[0], "verdict": verdict[1]}
            # first, so that it is closed to others before the candidate begins
            checker = stack.enter_context(Process("checker", judge, ends, self.policy, self.layers))
            _close(ends)
            job = {"programs": list(programs), "entry": entry}
            ends = {"calls": questions[0], "answers": answers[1]}
            candidate = stack.enter_context(Process("candidate", job, ends, self.policy, self.layers))
            _close(ends)
            return _judged(verdict[0], token, candidate, checker)

    def _refuses(self, programs: Sequence[str]) -> bool:
        most = self.policy.source_bytes
        try:
            return any(len(p) > most or len(p.encode()) > most for p in programs)
        except UnicodeEncodeError:
            return True


def _pipe(stack: contextlib.ExitStack) -> tuple[IO[bytes], IO[bytes]]:
    """Return the ends to read and to write; they are closed at the latest with the stack."""
    outlet, inlet = os.pipe()
    return stack.enter_context(open(outlet, "rb", 0)), stack.enter_context(open(inlet, "wb", 0))


def _close(ends: Mapping[str, IO[bytes]]) -> None:
    for end in ends.values():
        end.close()


def _judged(verdict: IO[bytes], token: str, candidate: Process, checker: Process) -> Outcome:
    """Wait for the checker's verdict. Nothing else can say "passed"."""
    text = b""
    while not (status := candidate.passed_limit()):
        if select.select([verdict], [], [], _TICK)[0]:
            text += (chunk := verdict.read(_CHUNK))
            if not chunk:
                break
    seconds = candidate.seconds
    if status:
        return Outcome(status, seconds=seconds, why="deadline" if status == "timeout" else "scratch folder")
    why = "the checker ended without a verdict"
    with contextlib.suppress(ValueError, TypeError, KeyError):
        message = json.loads(text)
        if message["token"] == token:
            if message["passed"] is True:
                return Outcome("passed", seconds=seconds)
            why = str(message["why"])
    candidate.wait(_TICK)  # if it broke off, it is about to end
    out_of_time = -signal.SIGXCPU in (candidate.exit_code(), checker.exit_code())
    return Outcome("timeout" if out_of_time else "failed", seconds=seconds, why=why)


# ---- one confined process


class Process:
    """One confined process; a context manager that leaves neither process nor files behind.

    `role` and `job` as in `sandbox_child.py`; `ends`: pipes of the job. The process dies with the thread that started
    it. Raises `SandboxError` where it cannot be started or confined.
    """

    def __init__(
        self,
        role: str,
        job: Mapping[str, Any],
        ends: Mapping[str, IO[bytes]],
        policy: Policy,
        layers: Layers,
        output: int = subprocess.DEVNULL,
    ):
        self.policy, self.layers = policy, layers
        try:
            self.scratch = make_scratch()
        except OSError as error:
            raise SandboxError(f"no scratch folder: {error}") from None
        with contextlib.ExitStack() as stack:
            ready, said = _pipe(stack)
            descriptors = {name: end.fileno() for name, end in {**ends, "ready": said}.items()}
            try:
                file = stack.enter_context(tempfile.TemporaryFile())
                file.write(json.dumps({**job, **descriptors, **self._settings(), "role": role}).encode("ascii"))
                file.seek(0)
                self.process = subprocess.Popen(
                    self._command(),
                    stdin=file,
                    stdout=output,
                    stderr=output,
                    env={},
                    cwd="/",
                    pass_fds=tuple(descriptors.values()),
                    start_new_session=True,
                )
            except (OSError, ValueError) as error:
                remove_scratch(self.scratch)
                raise SandboxError(f"cannot start a process: {error}") from None
            said.close()
            try:
                self._await_ready(ready)
            except BaseException:
                self.close()
                raise
        self.began = time.monotonic()

    def _settings(self) -> dict[str, Any]:
        policy, wrapped = self.policy, self.layers.bubblewrap
        limits = {"memory": policy.memory_bytes, "cpu_seconds": policy.cpu_seconds}
        limits |= {"file_bytes": policy.disk_bytes // 4, "open_files": policy.open_files}
        parent = 0 if wrapped else os.getpid()
        return {"limits": limits, "parent": parent, "change_user": not wrapped, **asdict(self.layers)}

    def _command(self) -> list[str]:
        # -X utf8: the environment is empty, so no locale says so; -B: the child could not write byte code anyway
        command = [interpreter(), "-I", "-S", "-B", "-X", "utf8", str(_CHILD), str(self.scratch)]
        wrapper = bubblewrap(str(self.scratch), self.policy.disk_bytes) if self.layers.bubblewrap else []
        return wrapper + command

    def _await_ready(self, pipe: IO[bytes]) -> None:
        text, deadline = b"", time.monotonic() + SETUP_SECONDS
        while text != READY and select.select([pipe], [], [], max(0.0, deadline - time.monotonic()))[0]:
            text += (chunk := pipe.read(500 if text else len(READY)))
            if not chunk:
                break
        if text != READY:
            self.wait(1)
            why = text.decode("utf-8", "replace") or f"it ended with code {self.exit_code()}, saying nothing"
            raise SandboxError(f"the process did not confine itself: {why}")

    def outcome(self) -> Outcome:
        """Collect the output until the process ends or passes a limit."""
        streams = {pipe: bytearray() for pipe in (self.process.stdout, self.process.stderr) if pipe}
        waiting, status = set(streams), ""
        while not status and (waiting or self.exit_code() is None):
            if not waiting:
                self.wait(_TICK)
            for pipe in select.select(list(waiting), [], [], _TICK)[0] if waiting else ():
                chunk = os.read(pipe.fileno(), _CHUNK)
                streams[pipe] += chunk
                if not chunk:
                    waiting.discard(pipe)
                elif len(streams[pipe]) > self.policy.output_bytes:
                    status = "output"
            status = status or self.passed_limit()
        code = self.exit_code()
        if not status:
            by_signal = "timeout" if code == -signal.SIGXCPU else "killed"
            status = "ok" if code == 0 else by_signal if (code or 0) < 0 else "error"
        out, err = (bytes(text[: self.policy.output_bytes]).decode("utf-8", "replace") for text in streams.values())
        return Outcome(status, out, err, self.seconds, code)

    def passed_limit(self) -> str:
        """Return "timeout" or "disk" where it used too much, else ""."""
        if self.seconds > self.policy.seconds:
            return "timeout"
        return "disk" if too_much(self.scratch, self.policy.disk_bytes) else ""

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    def wait(self, seconds: float) -> None:
        """Wait until it ends, for `seconds` at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def exit_code(self) -> int | None:
        """None while it runs; minus the signal that ended it."""
        code = self.process.poll()
        return 128 - code if self.layers.bubblewrap and code is not None and code > 128 else code

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
        remove_scratch(self.scratch)

    def __enter__(self) -> Process:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@functools.cache
def interpreter() -> str:
    """Return the path of Python itself, not of a link in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def bubblewrap(scratch: str, disk_bytes: int) -> list[str]:
    """Return the start of a command that runs in namespaces of its own.

    No network, no other process, and of the file system only shared libraries, Python's standard library, our
    `sandbox_child.py` and an empty scratch folder in memory.
    """
    command = [shutil.which("bwrap") or "bwrap", "--unshare-all", "--unshare-user", "--uid", "65534", "--gid", "65534"]
    command += ["--die-with-parent", "--clearenv", "--cap-drop", "ALL", "--hostname", "sandbox"]
    for path in (*LIBRARIES, os.path.join(os.path.realpath(sys.base_prefix), "lib")):
        if os.path.islink(path):
            command += ["--symlink", os.readlink(path), path]
        else:
            for library in libraries(path):
                command += ["--ro-bind", library, library]
    standard_library = os.path.dirname(os.__file__)
    for path in ("/etc/ld.so.cache", "/usr/share/zoneinfo", interpreter(), standard_library):
        command += ["--ro-bind-try", path, path]
    for path in ("/dev/null", "/dev/zero", "/dev/urandom"):
        command += ["--dev-bind", path, path]
    for packages in (os.path.join(standard_library, name) for name in PACKAGES):
        if os.path.isdir(packages):
            command += ["--tmpfs", packages, "--remount-ro", packages]
    command += ["--ro-bind", str(_CHILD), str(_CHILD)]
    return [*command, "--size", str(disk_bytes), "--tmpfs", scratch, "--chdir", scratch, "--remount-ro", "/"]


# ---- the scratch folder


def make_scratch() -> Path:
    """Create an empty folder in one that only this user may change, so that a program cannot delete or replace it."""
    outer = Path(tempfile.mkdtemp(prefix="jaxchat-sandbox-"))
    outer.chmod(0o711)
    folder = outer / "scratch"
    folder.mkdir(0o700)
    return folder


def too_much(folder: Path, max_bytes: int) -> bool:
    """Return whether more than `max_bytes` or 1,000 entries are there; what cannot be read counts as too much."""
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


def remove_scratch(folder: Path) -> None:
    """Delete what `make_scratch` made and all that is in it, once nobody runs there any more.

    Works for folders nested deeper than a path may be long and for those that nobody may enter. Follows no links.
    """
    outer = folder.parent
    if outer.is_symlink():  # a program of our own user can do that at level 1
        return
    todo, names = [outer], (outer / f"{secrets.token_hex(8)}-{n}" for n in itertools.count())
    while todo:
        top = todo.pop()
        with os.scandir(top) as inside:
            entries = list(inside)
        for entry in entries:
            if not entry.is_dir(follow_symlinks=False):
                os.unlink(entry.path)
                continue
            os.chmod(entry.path, stat.S_IRWXU)
            todo.append(next(names))
            os.rename(entry.path, todo[-1])  # beside the others, not below them: no path grows
        if top != outer:
            os.rmdir(top)
    os.rmdir(outer)


# ---- the level that holds on this machine

# as much time as a busy machine may need; the trial asks for twice the memory
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
def fill():
    for n in range(5):
        with open(str(n), "wb") as file:
            file.write(bytes(%(quarter)d))
attempt("memory", lambda: bytearray(%(memory)d))
attempt("fork", fork)
for path in (%(canary)r, "/etc/passwd", "/usr/lib/os-release"):
    attempt("read", lambda: open(path).read())
attempt("write", lambda: open(%(canary)r, "a").write("x"))
for packages in ("site-packages", "dist-packages"):
    attempt("write", lambda: open(os.path.join(os.path.dirname(os.__file__), packages, "file"), "w").write("x"))
attempt("socket", socket)
if os.getpid() > 9:
    done.append("processes")
attempt("scratch", lambda: open("file", "w").write("x"))
if %(quarter)d:
    attempt("disk", fill)
print(*done)
"""
_FORBIDDEN = {1: {"memory", "fork"}, 2: {"read", "write", "socket"}, 3: {"processes", "disk"}}  # new at each level


@dataclass(frozen=True)
class Probe:
    """Protection on this machine: the level, its layers, and why higher levels are missing."""

    level: int
    layers: Layers
    missing: tuple[str, ...] = ()

    def __str__(self) -> str:
        return LEVELS[self.level]


@functools.cache
def probe() -> Probe:
    """Try the levels from the strongest down, each with a program that does what it forbids."""
    landlock = abi() > 0
    missing = [] if landlock else ["Landlock is not in this kernel"]
    trials = [Layers(landlock=landlock, seccomp=True, bubblewrap=True)]
    trials += [Layers(landlock=True, seccomp=True)] if landlock else []
    for layers in [*trials, Layers()]:
        if not (why := _weakness(layers)):
            return Probe(layers.level, layers, tuple(missing))
        missing.append(f"level {layers.level}: {why}")
    return Probe(0, Layers(), tuple(missing))


def _weakness(layers: Layers) -> str:
    """Return what a process with these layers can do that it should not, or why it does not start; "" if none."""
    if layers.bubblewrap and (why := _bubblewrap_lacks()):
        return why
    with tempfile.TemporaryDirectory(prefix="jaxchat-probe-") as folder:
        os.chmod(folder, 0o755)
        canary = Path(folder) / "canary"
        canary.write_text("somebody else's", encoding="utf-8")
        canary.chmod(0o666)
        quarter = _PROBE_POLICY.disk_bytes // 4 if layers.level >= 3 else 0  # at lower levels we look at the folder
        source = _PROBE % {"memory": 2 * _PROBE_POLICY.memory_bytes, "canary": str(canary), "quarter": quarter}
        try:
            with Process("program", {"source": source}, {}, _PROBE_POLICY, layers, subprocess.PIPE) as process:
                outcome = process.outcome()
        except SandboxError as error:
            return str(error)
    if outcome.status != "ok":
        return f"the trial ended with {outcome.status}: {(outcome.stderr.strip().splitlines() or ['nothing said'])[-1]}"
    done = set(outcome.stdout.split())
    if "scratch" not in done:
        return "the scratch folder cannot be written"
    weak = done & set().union(*(_FORBIDDEN[level] for level in range(1, layers.level + 1)))
    return f"not held: {', '.join(sorted(weak))}" if weak else ""


def _bubblewrap_lacks() -> str:
    """Return why the installed bubblewrap cannot be used; "" where it can."""
    program = shutil.which("bwrap")
    if not program:
        return "bubblewrap is not installed"
    try:
        text = subprocess.run([program, "--help"], capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"bubblewrap does not run: {error}"
    return "" if "--size" in text else "this bubblewrap cannot limit a folder in memory; version 0.8 and newer can"
