"""Run code that a model wrote: limits, no files, no sockets, and its own namespaces where the machine allows it.

Level 1, always: own process and session, `-I -S`, empty environment, an empty scratch folder, limits on memory, time,
files and output, no children, no privileges, death with the parent. Level 2: Landlock and seccomp. Level 3: bubblewrap.
Which levels hold is tried once, by a program that does what they forbid. See `docs/reliability.md`.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from jaxchat.tools.sandbox_child import LIBRARIES, PACKAGES, READY, libraries, send

LEVELS = (
    "level 0 of 3: a process with a deadline",
    "level 1 of 3: a process with limits, without children",
    "level 2 of 3: limits, no files and sockets (Landlock, seccomp)",
    "level 3 of 3: limits, no files and sockets (Landlock, seccomp), own namespaces (bubblewrap)",
)
STRICT = 2  # the level that "strict" asks for
SETUP_SECONDS = 30.0  # until a process must have confined itself, on a busy machine
MAX_ENTRIES = 1000  # files and folders in a scratch folder
MAX_FAILURES = 3  # calls in a row that may end without an answer
MAX_CALL = 32 << 10  # bytes of a call's arguments: a pipe holds them all, so nobody waits for a reader
MAX_ANSWER = 4 << 10  # bytes of the answer to a call
_TICK = 0.05  # seconds between checks of the limits
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
        self.policy, self.level = policy or Policy(), found.level if level is None else level
        if self.level > found.level:
            raise SandboxError(f"sandbox: {self} does not hold here ({'; '.join(found.missing)})")
        if mode == "strict" and self.level < STRICT:
            raise SandboxError(
                f"sandbox: strict wants {LEVELS[STRICT]}, here holds {self} ({'; '.join(found.missing)}); "
                "take a Linux kernel with Landlock (5.13 or newer) or install bubblewrap"
            )

    def __str__(self) -> str:
        return LEVELS[self.level]

    def run(self, source: str) -> Outcome:
        """Run a program to its end. "ok" says that it ended with exit code 0, not that it did what it should."""
        if self._refuses([source]):
            return Outcome("refused", why="the source is too long or not valid Unicode")
        with self._process("program", {"source": source}, {}) as process:
            return process.outcome()

    def check(self, programs: Sequence[str], entry: str, setup: str, tests: str) -> Outcome:
        """Test the function `entry` of the first of `programs` that is valid Python.

        `tests` define `check(candidate)`; `setup` runs before them. Both are trusted and run in another process. Their
        `candidate` sends its arguments to the program's process and gets plain values back.
        """
        if self._refuses(programs):
            return Outcome("refused", why="the source is too long or not valid Unicode")
        token = secrets.token_hex(16)  # so that only the checker can say "passed"
        judge = {"setup": setup, "tests": tests, "entry": entry, "token": token}
        job = {"programs": list(programs), "entry": entry}
        with contextlib.ExitStack() as stack:
            calls, answers = _pipe(stack), _pipe(stack)
            # first, so that its pipes and its token are closed to others before the candidate begins
            checker = stack.enter_context(self._process("checker", judge, {"calls": calls[1], "answers": answers[0]}))
            candidate = stack.enter_context(self._process("candidate", job, {"calls": calls[0], "answers": answers[1]}))
            checker.began = candidate.began
            outcome = checker.outcome(candidate)
            candidate.wait(_TICK)  # if it broke off, it is about to end
            if outcome.status in ("timeout", "disk") or candidate.exit_code() == -signal.SIGXCPU:
                status = "disk" if outcome.status == "disk" else "timeout"
                return Outcome(status, seconds=outcome.seconds, why=status)
        try:
            verdict = json.loads(outcome.stdout)
            passed, why = verdict["passed"] is True and verdict["token"] == token, str(verdict["why"])
        except (ValueError, TypeError, KeyError):
            passed, why = False, "the checker ended without a verdict"
        return Outcome("passed" if passed else "failed", seconds=outcome.seconds, why=why)

    def call(self, source: str, entry: str, calls: Sequence[Sequence[Any]]) -> list[tuple[str, Any]]:
        """Call the function `entry` of a program with every list of arguments, each call with the policy's seconds.

        Returns ("returned", number) or (what went wrong, None). One process answers the calls in turn. A call that ends
        it or passes a limit is tried once more in a fresh one, since earlier calls used up its time too. After
        `MAX_FAILURES` calls in a row without an answer the rest is "not called".
        """
        results: list[tuple[str, Any]] = []
        failed = 0
        while len(results) < len(calls) and failed < MAX_FAILURES:
            first = len(results)
            with contextlib.ExitStack() as stack:
                requests, answers = _pipe(stack), _pipe(stack)
                ends, job = {"calls": requests[0], "answers": answers[1]}, {"programs": [source], "entry": entry}
                process = stack.enter_context(self._process("candidate", job, ends))
                for arguments in calls[first:]:
                    if len(json.dumps(list(arguments))) > MAX_CALL:
                        results.append(("too long", None))
                        continue
                    process.began = time.monotonic()
                    try:
                        send(requests[1], [list(arguments), {}])
                        results.append(process.number(answers[0].fileno()))
                        failed = 0
                    except (OSError, EOFError, ValueError, TypeError) as error:  # ended, or out of form
                        if len(results) == first:
                            failed += 1
                            process.wait(1)
                            slow = isinstance(error, TimeoutError) or process.exit_code() == -signal.SIGXCPU
                            results.append(("timeout" if slow else "ended", None))
                        break
        return results + [("not called", None)] * (len(calls) - len(results))

    def _process(self, role: str, job: Mapping[str, Any], ends: Mapping[str, IO[bytes]]) -> contextlib.closing[Process]:
        return contextlib.closing(Process(role, job, ends, self.policy, self.level))

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


class Process:
    """One confined process; `close` ends it and leaves neither process nor files behind.

    `role` and `job` as in `sandbox_child.py`; `ends`: pipes of the job, which are closed here once it has them. The
    process dies with the thread that started it. Raises `SandboxError` where it cannot be started or confined.
    """

    def __init__(self, role: str, job: Mapping[str, Any], ends: Mapping[str, IO[bytes]], policy: Policy, level: int):
        self.policy, self.level = policy, level
        with contextlib.ExitStack() as stack:
            try:
                self.scratch = make_scratch()
                stack.callback(remove_scratch, self.scratch)
                # output goes to files without a name: they need no thread that reads, and have the size limit of a file
                given, self.out, self.err = (stack.enter_context(tempfile.TemporaryFile()) for _ in range(3))
                # a socket: another process of this user cannot open it through /proc, as it could a pipe
                ready, said = (stack.enter_context(end) for end in socket.socketpair())
                own = {
                    "role": role,
                    "level": level,
                    "policy": asdict(policy),
                    "parent": os.getpid() if level < 3 else 0,
                }
                descriptors = {name: end.fileno() for name, end in ends.items()} | {"ready": said.fileno()}
                given.write(json.dumps({**job, **own, **descriptors}).encode("ascii"))
                given.seek(0)
                # -X utf8: the environment is empty, so no locale says so; -B: byte code could not be written anyway
                command = [interpreter(), "-I", "-S", "-B", "-X", "utf8", str(_CHILD), str(self.scratch)]
                self.process = subprocess.Popen(
                    [*bubblewrap(self.scratch, policy.disk_bytes), *command] if level == 3 else command,
                    stdin=given,
                    stdout=subprocess.DEVNULL if role == "candidate" else self.out,
                    stderr=self.err if role == "program" else subprocess.DEVNULL,
                    env={},
                    cwd="/",
                    pass_fds=tuple(descriptors.values()),
                    start_new_session=True,
                )
            except OSError as error:
                raise SandboxError(f"cannot start a process: {error}") from None
            stack.callback(self._kill)
            said.close()
            for file in (given, *ends.values()):
                file.close()
            readable, _, _ = select.select([ready], [], [], SETUP_SECONDS)
            if (text := ready.recv(500) if readable else b"no answer") != READY:
                self.wait(1)
                why = text.decode("utf-8", "replace") or self._text(self.err) or f"it ended with {self.exit_code()}"
                raise SandboxError(f"the process did not confine itself: {why.strip()[:400]}")
            ready.close()
            self.close = stack.pop_all().close
        self.began = time.monotonic()

    def outcome(self, partner: Process | None = None) -> Outcome:
        """Wait until the process ends, or until it or its partner passes a limit."""
        while True:
            code = self.exit_code()
            status = self.passed_limit() or (partner.passed_limit() if partner else "")
            if status or code is not None:
                break
            self.wait(_TICK)
        if not status:
            by_signal = "timeout" if code == -signal.SIGXCPU else "killed"
            status = "ok" if code == 0 else by_signal if (code or 0) < 0 else "error"
        return Outcome(status, self._text(self.out), self._text(self.err), time.monotonic() - self.began, code)

    def passed_limit(self) -> str:
        """Return "timeout", "output" or "disk" where it used too much, else ""."""
        if time.monotonic() - self.began > self.policy.seconds:
            return "timeout"
        if any(os.fstat(file.fileno()).st_size > self.policy.output_bytes for file in (self.out, self.err)):
            return "output"
        return "disk" if too_much(self.scratch, self.policy.disk_bytes) else ""

    def number(self, descriptor: int) -> tuple[str, Any]:
        """Return a candidate's answer to one call: ("returned", number) or (what else it did, None).

        Hostile code writes it, so nothing but short plain JSON is read. Raises `TimeoutError` where it passes a limit,
        `OSError`, `ValueError` or `TypeError` for anything else.
        """
        data = b""
        while len(data) < 4 or len(data) < 4 + int.from_bytes(data[:4], "big"):
            if select.select([descriptor], [], [], _TICK)[0]:
                data += (chunk := os.read(descriptor, MAX_ANSWER))
                if not chunk or len(data) > MAX_ANSWER:
                    raise EOFError if not chunk else ValueError
            elif why := self.passed_limit():
                raise TimeoutError(why)
        kind, value = json.loads(data[4:])
        if kind != "returned":
            return f"raised {re.sub('[^A-Za-z_]', '', str(value))[:40]}", None
        return ("returned", value) if isinstance(value, int | float) else ("returned no number", None)

    def _text(self, file: IO[bytes]) -> str:
        # the file's position is the process's own
        return os.pread(file.fileno(), self.policy.output_bytes, 0).decode("utf-8", "replace")

    def wait(self, seconds: float) -> None:
        """Wait until it ends, for `seconds` at most."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)

    def exit_code(self) -> int | None:
        """Return None while it runs; minus the signal that ended it."""
        code = self.process.poll()
        return 128 - code if self.level == 3 and code is not None and code > 128 else code

    def _kill(self) -> None:
        """Kill the whole group and wait for its end."""
        with contextlib.suppress(ProcessLookupError, PermissionError):  # some systems say so of a group that is gone
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.kill()
        self.process.wait()


def interpreter() -> str:
    """Return the path of Python itself, not of a link in a virtual environment."""
    return os.path.realpath(getattr(sys, "_base_executable", "") or sys.executable)


def bubblewrap(scratch: Path, disk_bytes: int) -> list[str]:
    """Return the start of a command that runs in namespaces of its own.

    No network, no other process, and of the file system only shared libraries, Python's standard library, our
    `sandbox_child.py` and an empty scratch folder in memory (`--size` needs version 0.8).
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
    command += ["--ro-bind", str(_CHILD), str(_CHILD), "--size", str(disk_bytes)]
    return [*command, "--tmpfs", str(scratch), "--chdir", str(scratch), "--remount-ro", "/"]


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
    """Delete what `make_scratch` made and all that is in it, once nobody runs there any more; follows no links."""
    outer = folder.parent
    if outer.is_symlink():  # a program of our own user can do that at level 1
        return
    try:
        shutil.rmtree(outer)
    except (OSError, RecursionError):  # folders that nobody may enter, or more of them than Python nests calls
        for command in (["chmod", "-R", "u+rwx"], ["rm", "-rf"]):
            subprocess.run([*command, str(outer)], stderr=subprocess.DEVNULL, check=False)


# ---- the level that holds on this machine

# as much time as a busy machine may need; the trial asks for twice the memory
_PROBE_POLICY = Policy(cpu_seconds=10, seconds=30.0, memory_bytes=256 << 20)
_PROBE = """
import os
def attempt(name, action):
    try:
        action()
        print(name)
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
    print("processes")
attempt("scratch", lambda: open("file", "w").write("x"))
if %(quarter)d:
    attempt("disk", fill)
"""
_FORBIDDEN = {1: {"memory", "fork"}, 2: {"read", "write", "socket"}, 3: {"processes", "disk"}}  # new at each level


@dataclass(frozen=True)
class Probe:
    """Protection on this machine: the strongest level, and why higher ones are missing."""

    level: int
    missing: tuple[str, ...] = ()


@functools.cache
def probe() -> Probe:
    """Try the levels from the strongest down, each with a program that does what it forbids."""
    missing: list[str] = []
    for level in (3, 2, 1):
        if not (why := weakness(level)):
            return Probe(level, tuple(missing))
        missing.append(f"level {level}: {why}")
    return Probe(0, tuple(missing))


def weakness(level: int) -> str:
    """Return what a process of this level can do that it should not, or why it does not start; "" if none."""
    with tempfile.TemporaryDirectory(prefix="jaxchat-probe-") as folder:
        os.chmod(folder, 0o755)
        canary = Path(folder) / "canary"
        canary.write_text("somebody else's", encoding="utf-8")
        canary.chmod(0o666)
        quarter = _PROBE_POLICY.disk_bytes // 4 if level == 3 else 0  # at lower levels we look at the folder
        source = _PROBE % {"memory": 2 * _PROBE_POLICY.memory_bytes, "canary": str(canary), "quarter": quarter}
        try:
            with contextlib.closing(Process("program", {"source": source}, {}, _PROBE_POLICY, level)) as process:
                outcome = process.outcome()
        except SandboxError as error:
            return str(error)
    if outcome.status != "ok":
        return f"the trial ended with {outcome.status}: {outcome.stderr.strip()[-200:]}"
    done = set(outcome.stdout.split())
    if "scratch" not in done:
        return "the scratch folder cannot be written"
    weak = done & set().union(*(_FORBIDDEN[n] for n in range(1, level + 1)))
    return f"not held: {', '.join(sorted(weak))}" if weak else ""
