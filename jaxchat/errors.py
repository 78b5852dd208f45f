"""Errors meant for the person at the keyboard, each with the exit code of the contract.

A message says what is wrong, where, and what to do. `launch.py` prints it as one line and exits.
Any other exception is a bug and shows a traceback.
"""


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


def first_line(error: object, most: int = 200) -> str:
    """Return the first line of an error's text without its full stop, or its class where it has none."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:most].rstrip(".")
