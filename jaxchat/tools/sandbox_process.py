"""Processes in a sandbox, from outside: what they may use, how they start, and their end."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxchat.tools import sandbox_scratch
from jaxchat.tools.sandbox_child import READY
from jaxchat.tools.sandbox_landlock import LIBRARIES, PACKAGES, libraries

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
            self.scratch = sandbox_scratch.make()
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
            sandbox_scratch.remove(self.scratch)
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
        return sandbox_scratch.too_much(self.scratch, self.policy.disk_bytes)

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
        sandbox_scratch.remove(self.scratch)

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
