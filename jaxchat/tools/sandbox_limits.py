"""Layer 1 of the sandbox, from within: limits, no privileges, no children, death with the parent."""

from __future__ import annotations

import ctypes
import errno
import os
import resource
import signal
import struct
import sys

_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_KEEP_CAPABILITIES, _SET_NO_NEW_PRIVILEGES = 1, 4, 8, 38  # of prctl
_CAPABILITIES_VERSION = 0x20080522
_READ_ANYTHING = 1 << 2  # CAP_DAC_READ_SEARCH
_CAPSET = {"x86_64": 126, "aarch64": 91}
FIRST_USER, USERS = 62_000, 3_000  # user ids that nobody has; a sandbox of root takes one by its process id


def limit(memory: int, seconds: int, file_bytes: int, open_files: int) -> None:
    """Resource limits of this process, for good. A limit that the system does not know is left out: the probe tells."""
    for name, soft, hard in (
        ("AS", memory, memory),
        ("CPU", seconds, seconds + 1),  # SIGXCPU first, which tells it from other deaths
        ("FSIZE", file_bytes, file_bytes),
        ("NOFILE", open_files, open_files),
        ("NPROC", 0, 0),  # no child and no thread: a user's other processes count too, so no other number has a meaning
        ("CORE", 0, 0),
        ("MSGQUEUE", 0, 0),
        ("MEMLOCK", 0, 0),
    ):
        if (number := getattr(resource, f"RLIMIT_{name}", None)) is not None:
            try:
                resource.setrlimit(number, (soft, hard))
            except (ValueError, OSError):
                continue


def renounce(scratch: str, parent: int, change_user: bool) -> None:
    """No new privileges, no capabilities, another user than root; die with the parent; memory closed to others.

    `parent`: its process id, 0 where it cannot be seen. Raises `OSError` where Linux refuses.
    """
    if sys.platform != "linux":
        return
    libc = ctypes.CDLL(None, use_errno=True)
    _control(libc, _SET_NO_NEW_PRIVILEGES, 1)
    if os.geteuid() == 0 and change_user:
        _leave_root(libc, scratch)
    elif os.geteuid() == 0:
        _set_capabilities(libc, 0)
    # after the change of the user, which resets both
    _control(libc, _SET_DEATH_SIGNAL, int(signal.SIGKILL))
    _control(libc, _SET_DUMPABLE, 0)
    if parent and os.getppid() != parent:  # died before the line above
        os._exit(1)


def _leave_root(libc: ctypes.CDLL, scratch: str) -> None:
    """Root's processes know no limit on children, and own the machine's files: become a user that owns nothing.

    The right to read is kept only where the standard library cannot be read otherwise (Python under /root); without
    the right to change the user (some containers) only the capabilities go, and the probe finds the rest.
    """
    user = FIRST_USER + os.getpid() % USERS
    _control(libc, _SET_KEEP_CAPABILITIES, 1)
    try:
        os.chown(scratch, user, user)
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    except OSError as error:
        if error.errno not in (errno.EPERM, errno.EINVAL):
            raise
        _set_capabilities(libc, 0)
        return
    _set_capabilities(libc, 0 if os.access(os.__file__, os.R_OK) else _READ_ANYTHING)


def _set_capabilities(libc: ctypes.CDLL, capabilities: int) -> None:
    machine = os.uname().machine
    if machine not in _CAPSET:
        raise OSError(errno.ENOTSUP, f"root's capabilities cannot be dropped on {machine}; run as another user")
    header = struct.pack("=Ii", _CAPABILITIES_VERSION, 0)
    data = struct.pack("=6I", capabilities, capabilities, 0, 0, 0, 0)
    if libc.syscall(_CAPSET[machine], header, data):
        raise OSError(ctypes.get_errno(), f"capset: {os.strerror(ctypes.get_errno())}")


def _control(libc: ctypes.CDLL, option: int, value: int) -> None:
    if libc.prctl(option, value, 0, 0, 0):
        raise OSError(ctypes.get_errno(), f"prctl {option}: {os.strerror(ctypes.get_errno())}")
