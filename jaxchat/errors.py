"""Errors meant for the person at the keyboard, each with the exit code of the contract.

A message says what is wrong, where, and what to do. `launch.py` prints it as one line and exits.
Any other exception is a bug and shows a traceback.
"""

import errno
import shlex
import signal
import tempfile
import traceback
from pathlib import Path
from typing import Any, NoReturn

from jaxchat import INSTALLED, ROOT

program = "jaxchat" if INSTALLED else "python launch.py"  # as messages call it; the command `jaxchat` sets its own


class JaxchatError(Exception):
    """Base of every expected failure."""

    exit_code = 1


class UsageError(JaxchatError):
    """Bad arguments or configuration."""

    exit_code = 2


class DataError(JaxchatError):
    """Data missing, damaged, unreadable or unreachable."""

    exit_code = 3


class OutOfMemoryError(JaxchatError):
    """The device has too little memory for the configured batch."""

    exit_code = 4


class DivergedError(JaxchatError):
    """Training produced NaN or Inf too often."""

    exit_code = 5


class InterruptedRun(BaseException):
    """Stopped by a signal; the same command resumes. Not an `Exception`, so that no handler takes it for a fault."""

    exit_code = 75


def terminated(number: int, frame: Any) -> NoReturn:
    """Handle a signal that ends the process."""
    raise InterruptedRun(f"stopped by {signal.Signals(number).name}; the same command goes on from here")


OWN = ("jaxchat", "train", "serve")
LIBRARIES = ("gradio", "jax", "jaxlib", "orbax", "pyarrow", "safetensors", "tensorstore")
ADVICE = {errno.ENOSPC: "make room", errno.EDQUOT: "make room", errno.EMFILE: "raise the limit: ulimit -n 4096"}
ADVICE |= dict.fromkeys((errno.EACCES, errno.EPERM, errno.EROFS), "give a place that you may write to")


def explained(error: BaseException) -> tuple[str, int] | None:
    """Return what to tell a person of a failure, at most three lines, and the exit code.

    None for a fault of our own, whose traceback is wanted. That of a library's error is put into a file.
    """
    if isinstance(error, JaxchatError | InterruptedRun):
        return str(error), error.exit_code
    if isinstance(error, KeyboardInterrupt):
        return "interrupted; the same command goes on from here", InterruptedRun.exit_code
    if isinstance(error, ModuleNotFoundError) and (error.name or "").partition(".")[0] not in OWN:
        return f"{error.name} is not installed here; run {install_command()}", UsageError.exit_code
    if isinstance(error, OSError):
        advice = ADVICE.get(error.errno or 0, "see whether it is there and can be used")
        place = error.filename or "file system"
        if INSTALLED and str(place).startswith(str(ROOT.parent)):
            advice = "this installation of jaxchat lacks a part of it; install it again"
        return f"{place}: {error.strerror or error}; {advice} and give the same command again", DataError.exit_code
    if isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error):  # training says what fits: train/loop.py
        keys = "train.device_batch_rows, eval.batch_rows (exams) or serve.slots (serve)"
        advice = f"take a smaller tier, or lower {keys}; an export needs no accelerator (JAX_PLATFORMS=cpu)"
        return f"out of memory: {advice}", OutOfMemoryError.exit_code
    if type(error).__module__.partition(".")[0] not in LIBRARIES:
        return None
    with tempfile.NamedTemporaryFile("w", prefix="jaxchat-", suffix=".log", delete=False, encoding="utf-8") as file:
        traceback.print_exception(error, file=file)
    return f"{type(error).__name__}: {first_line(error)}\nAll of it: {file.name}", JaxchatError.exit_code


def first_line(error: object, most: int = 200) -> str:
    """Return the first line of an error's text without its full stop, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most].rstrip(".")


def command_line(words: str, *paths: str | Path) -> str:
    """Return a command line of this program, for a message; `paths` are quoted where a shell needs it."""
    return " ".join([program, words, *(shlex.quote(str(path)) for path in paths)])


def install_command(extra: str = "") -> str:
    """Return how to install what is required, or an extra of pyproject.toml, into a clone or an installation."""
    if not (ROOT / "pyproject.toml").exists():
        return f"pip install 'jaxchat[{extra}]'" if extra else "pip install jaxchat"
    clone = "." if Path.cwd() == ROOT else ROOT
    return f"pip install -e '{clone}[{extra}]'" if extra else "pip install -r requirements.txt"
