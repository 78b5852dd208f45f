"""Layer 2 of the sandbox, files: a Landlock rule set that leaves read-only Python and the scratch folder.

Source: the kernel's userspace-api/landlock.rst and linux/landlock.h. The numbers of the three system calls are the same
on every architecture.
"""

from __future__ import annotations

import ctypes
import os
import struct
import sys
from collections.abc import Iterator

_CREATE, _ADD_RULE, _RESTRICT = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14
SCRATCH = WRITE_FILE | READ_FILE | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER | TRUNCATE
FILE_RIGHTS = WRITE_FILE | READ_FILE | TRUNCATE  # of those above, what a rule on a plain file may hold

PACKAGES = ("site-packages", "dist-packages")  # what others installed, exams' solutions among it: not for programs
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


def abi() -> int:
    """Version of the kernel's Landlock, 0 where there is none."""
    try:
        return max(0, ctypes.CDLL(None, use_errno=True).syscall(_CREATE, None, ctypes.c_size_t(0), _VERSION))
    except (OSError, AttributeError):  # no Linux
        return 0


def confine_files(python_path: list[str]) -> None:
    """Leave this process, for good, its working folder and the standard library in `python_path`; needs no_new_privs.

    No TCP either (from version 4), and no signals to others (from 6). Raises `OSError`.
    """
    version = abi()
    if version < 1:
        raise OSError("Landlock is not in this kernel")
    files = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1  # every right that the version knows
    attributes = struct.pack("=QQQ", files, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call(_CREATE, attributes, ctypes.c_size_t(len(attributes)), 0)
    try:
        for path, rights in [(".", SCRATCH), *readable(python_path)]:
            _allow(ruleset, path, rights & files)
        _call(_RESTRICT, ruleset, 0)
    finally:
        os.close(ruleset)


def readable(python_path: list[str]) -> Iterator[tuple[str, int]]:
    """(path, rights) of what programs may read: the standard library without packages, shared libraries, zones."""
    for directory in python_path:
        if os.path.isdir(directory):
            yield directory, READ_DIR  # the importer lists it; what lies in it is named one by one
            for entry in os.scandir(directory):
                if entry.name not in PACKAGES:
                    yield entry.path, READ_FILE | READ_DIR
        else:
            yield directory, READ_FILE  # pythonXY.zip
    own = os.path.join(sys.base_prefix, "lib")
    for directory in {os.path.realpath(path) for path in (*LIBRARIES, own)}:
        for path in libraries(directory):
            yield path, READ_FILE | READ_DIR
    yield "/etc/ld.so.cache", READ_FILE
    yield "/usr/share/zoneinfo", READ_FILE | READ_DIR
    yield "/dev/null", READ_FILE | WRITE_FILE
    yield "/dev/zero", READ_FILE
    yield "/dev/urandom", READ_FILE


def libraries(directory: str) -> list[str]:
    """Shared libraries in a directory, and its folders that hold nothing else."""
    if not os.path.isdir(directory):
        return []
    return [e.path for e in os.scandir(directory) if ".so" in e.name or e.name.endswith("-linux-gnu")]


def _allow(ruleset: int, path: str, rights: int) -> None:
    try:
        descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
    except OSError:  # not here, so there is nothing to allow
        return
    try:
        if not os.path.isdir(path):
            rights &= FILE_RIGHTS
        _call(_ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
    finally:
        os.close(descriptor)


def _call(number: int, *arguments: object) -> int:
    result = ctypes.CDLL(None, use_errno=True).syscall(number, *arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"Landlock: {os.strerror(code)}")
    return result
