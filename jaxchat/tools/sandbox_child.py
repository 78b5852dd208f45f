"""The process inside the sandbox: it confines itself and then runs what it was given, in one of three roles.

`program`: a program as `__main__`. `candidate`: a program whose function answers calls that come through a pipe.
`checker`: tests that call it through that pipe and judge plain values, in a process that the candidate cannot reach.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import json
import os
import resource
import signal
import struct
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

# Plain data across a pipe that a hostile program writes into: never pickled, never evaluated, bounded in size.
#
# A value is JSON; what JSON lacks is an object with one key that names its type. Numbers, strings, booleans, None,
# lists,
# tuples, dicts, sets, bytes, complex, Decimal and Fraction keep their type (a subclass becomes its base). Any other
# iterable arrives as an iterator over its items, so it equals no list; any other object as one that equals only itself.


MAX_BYTES = 1 << 20  # of one message
MAX_DEPTH = 50  # of nested containers
MAX_ITEMS = 200_000  # of one container
_JSON_INT = 1 << 63  # larger whole numbers travel in hexadecimal: Python bounds the decimal digits it converts


class BadMessage(Exception):
    """What came through the pipe is no message."""


class Opaque:
    """Stands for an object that cannot travel."""

    __hash__ = None  # type: ignore[assignment]  # it would be another hash than the real object's


def send(descriptor: int, message: Any) -> None:
    """Write one message. `BadMessage` where it is too large or nested too deep, `OSError` where nobody reads."""
    try:
        data = json.dumps(pack(message), separators=(",", ":")).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise BadMessage(str(error)) from None
    if len(data) > MAX_BYTES:
        raise BadMessage(f"a message of {len(data)} bytes; at most {MAX_BYTES}")
    view = memoryview(len(data).to_bytes(4, "big") + data)
    while view:
        view = view[os.write(descriptor, view) :]


def receive(descriptor: int) -> Any:
    """Read one message. `EOFError` where the other side is gone, `BadMessage` for anything that `send` never writes."""
    size = int.from_bytes(_read(descriptor, 4), "big")
    if size > MAX_BYTES:
        raise BadMessage(f"a message of {size} bytes; at most {MAX_BYTES}")
    data = _read(descriptor, size)
    try:
        return unpack(json.loads(data.decode("ascii")))
    except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise BadMessage(str(error)) from None


def _read(descriptor: int, size: int) -> bytes:
    data = b""
    while len(data) < size:
        piece = os.read(descriptor, size - len(data))
        if not piece:
            raise EOFError("the pipe is closed")
        data += piece
    return data


def pack(value: Any, depth: int = 0) -> Any:
    """What JSON can write; `ValueError` for what is too deep or has too many items."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")
    if value is None or value is True or value is False:
        return value
    if isinstance(value, int):
        value = int.__pos__(value)
        return value if -_JSON_INT < value < _JSON_INT else {"int": hex(value)}
    if isinstance(value, float):
        return float.__pos__(value)
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (bytes, bytearray)):
        return {"bytearray" if isinstance(value, bytearray) else "bytes": bytes(value).hex()}
    if isinstance(value, dict):
        return {"dict": [[pack(k, depth + 1), pack(v, depth + 1)] for k, v in _some(dict.items(value))]}
    kind: Any
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            items = [pack(item, depth + 1) for item in _some(kind.__iter__(value))]
            return items if kind is list else {kind.__name__: items}
    for module, name in (("decimal", "Decimal"), ("fractions", "Fraction")):
        number = getattr(sys.modules.get(module), name, None)
        if number is not None and isinstance(value, number):
            return {name: str(value)} if name == "Decimal" else {name: [pack(value.numerator), pack(value.denominator)]}
    if hasattr(value, "__iter__"):
        return {"iterator": [pack(item, depth + 1) for item in _some(value)]}
    return {"object": None}


def _some(items: Any) -> Any:
    for count, item in enumerate(itertools.islice(items, MAX_ITEMS + 1)):
        if count == MAX_ITEMS:
            raise ValueError("too many items")
        yield item


def _fraction(parts: Any) -> Any:
    from fractions import Fraction

    numerator, denominator = map(unpack, parts)
    if type(numerator) is not int or type(denominator) is not int:
        raise ValueError("not a fraction")
    return Fraction(numerator, denominator)


def _decimal(text: Any) -> Any:
    from decimal import Decimal

    if not isinstance(text, str) or len(text) > 1000:
        raise ValueError("not a decimal number")
    return Decimal(text)


def _float_pair(parts: Any) -> complex:
    real, imaginary = parts
    if type(real) is not float or type(imaginary) is not float:
        raise ValueError("not a complex number")
    return complex(real, imaginary)


_KINDS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "complex": _float_pair,
    "bytes": bytes.fromhex,
    "bytearray": bytearray.fromhex,
    "dict": lambda pairs: {unpack(key): unpack(value) for key, value in pairs},
    "tuple": lambda items: tuple(map(unpack, items)),
    "set": lambda items: set(map(unpack, items)),
    "frozenset": lambda items: frozenset(map(unpack, items)),
    "iterator": lambda items: iter([unpack(item) for item in items]),
    "Decimal": _decimal,
    "Fraction": _fraction,
    "object": lambda _: Opaque(),
}


def unpack(value: Any) -> Any:
    """The value that `pack` was given; `ValueError`, `TypeError` or `KeyError` for anything else."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return _KINDS[kind](content)
    return value


# Layer 1 of the sandbox, from within: limits, no privileges, no children, death with the parent.


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


# Layer 2 of the sandbox, files: a Landlock rule set that leaves read-only Python and the scratch folder.
#
# Source: the kernel's userspace-api/landlock.rst and linux/landlock.h. The numbers of the three system calls are the
# same on every architecture.


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


# Layer 2 of the sandbox, system calls: a seccomp filter that allows what computing needs and refuses all else.
#
# Not on the list, among others: socket and its kin, ptrace, process_vm_readv, fork, clone, execve, mount, unshare,
# setns, bpf, io_uring, keyctl, memfd_create, chmod, chown, utime, setxattr (Landlock does not hold the last four),
# prctl.
# Source of the numbers: the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).


ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}  # column of CALLS, AUDIT_ARCH of the kernel

# system call -> number on (x86_64, aarch64); -1: does not exist there
CALLS: dict[str, tuple[int, int]] = {
    "read": (0, 63), "write": (1, 64), "readv": (19, 65), "writev": (20, 66), "pread64": (17, 67),
    "pwrite64": (18, 68), "preadv": (295, 69), "pwritev": (296, 70), "lseek": (8, 62), "close": (3, 57),
    "close_range": (436, 436), "dup": (32, 23), "dup2": (33, -1), "dup3": (292, 24), "fcntl": (72, 25),
    "flock": (73, 32), "open": (2, -1), "openat": (257, 56), "openat2": (437, 437), "stat": (4, -1), "fstat": (5, 80),
    "lstat": (6, -1), "newfstatat": (262, 79), "statx": (332, 291), "fstatfs": (138, 44), "access": (21, -1),
    "faccessat": (269, 48), "faccessat2": (439, 439), "readlink": (89, -1), "readlinkat": (267, 78),
    "getdents": (78, -1), "getdents64": (217, 61), "getcwd": (79, 17), "chdir": (80, 49), "fchdir": (81, 50),
    "unlink": (87, -1), "unlinkat": (263, 35), "rename": (82, -1), "renameat": (264, 38), "renameat2": (316, 276),
    "mkdir": (83, -1), "mkdirat": (258, 34), "rmdir": (84, -1), "ftruncate": (77, 46), "fsync": (74, 82),
    "fdatasync": (75, 83), "fadvise64": (221, 223), "pipe": (22, -1), "pipe2": (293, 59), "poll": (7, -1),
    "ppoll": (271, 73), "select": (23, -1), "pselect6": (270, 72), "epoll_create1": (291, 20), "epoll_ctl": (233, 21),
    "epoll_wait": (232, -1), "epoll_pwait": (281, 22), "eventfd2": (290, 19), "mmap": (9, 222), "munmap": (11, 215),
    "mremap": (25, 216), "mprotect": (10, 226), "madvise": (28, 233), "brk": (12, 214), "futex": (202, 98),
    "set_robust_list": (273, 99), "rseq": (334, 293), "sched_yield": (24, 124), "sched_getaffinity": (204, 123),
    "getcpu": (309, 168), "rt_sigaction": (13, 134), "rt_sigprocmask": (14, 135), "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136), "rt_sigsuspend": (130, 133), "rt_sigtimedwait": (128, 137),
    "sigaltstack": (131, 132), "restart_syscall": (219, 128), "pause": (34, -1), "alarm": (37, -1),
    "setitimer": (38, 103), "getitimer": (36, 102), "nanosleep": (35, 101), "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113), "clock_getres": (229, 114), "gettimeofday": (96, 169), "time": (201, -1),
    "times": (100, 153), "getpid": (39, 172), "getppid": (110, 173), "gettid": (186, 178), "getuid": (102, 174),
    "geteuid": (107, 175), "getgid": (104, 176), "getegid": (108, 177), "getresuid": (118, 148),
    "getresgid": (120, 150), "getgroups": (115, 158), "getpgrp": (111, -1), "getpgid": (121, 155),
    "getsid": (124, 156), "getpriority": (140, 141), "uname": (63, 160), "sysinfo": (99, 179), "getrusage": (98, 165),
    "getrandom": (318, 278), "getrlimit": (97, 163), "umask": (95, 166), "exit": (60, 93), "exit_group": (231, 94),
    "wait4": (61, 260), "waitid": (247, 95), "prlimit64": (302, 261), "tgkill": (234, 131), "kill": (62, 129),
    "ioctl": (16, 29), "clone3": (435, 435),
}  # fmt: skip

_LOAD, _JUMP_IF_EQUAL, _RETURN = 0x20, 0x15, 0x06  # BPF_LD|W|ABS, BPF_JMP|JEQ|K, BPF_RET|K
_ALLOW, _REFUSE, _KILL = 0x7FFF0000, 0x00050000, 0x80000000  # SECCOMP_RET_ALLOW, _ERRNO, _KILL_PROCESS
_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
_PR_SET_SECCOMP, _FILTER_MODE = 22, 2

# ioctl commands: TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX (none writes to a terminal or names a process)
_IOCTL = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
# fcntl commands: all but those that name an owner to be signalled and that change pipes, leases and seals
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)


def supported() -> bool:
    """Whether there is a table for this processor; the kernel is asked only by installing the filter."""
    return os.uname().machine in ARCHITECTURES


def confine_calls() -> None:
    """Install the filter in this process, for good; needs no_new_privs. Raises `OSError`."""
    if not supported():
        raise OSError(errno.ENOTSUP, f"no table of system calls for {os.uname().machine}")
    code = filter_program(*ARCHITECTURES[os.uname().machine], os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_SECCOMP, _FILTER_MODE, ctypes.c_char_p(program), 0, 0):
        number = ctypes.get_errno()
        raise OSError(number, f"seccomp: {os.strerror(number)}")


def filter_program(column: int, architecture: int, pid: int) -> bytes:
    """The filter as instructions of classic BPF, 8 bytes each."""
    code = [
        _instruction(_LOAD, _ARCHITECTURE),
        _instruction(_JUMP_IF_EQUAL, architecture, 1, 0),
        _instruction(_RETURN, _KILL),  # another table of numbers (32-bit calls) would mean other calls
        _instruction(_LOAD, _NUMBER),
    ]
    # allowed for some values of one argument (its number, then the values); only the low 32 bits count in all of them
    conditions = {
        "prlimit64": (0, (0,)),  # of this process
        "kill": (0, (pid,)),
        "tgkill": (0, (pid,)),
        "ioctl": (1, _IOCTL),
        "fcntl": (1, _FCNTL),
    }
    for name, (argument, values) in conditions.items():
        code += [
            _instruction(_JUMP_IF_EQUAL, CALLS[name][column], 0, 2 * len(values) + 2),
            _instruction(_LOAD, _ARGUMENTS + 8 * argument),
            *(i for value in values for i in _if_equal(value, _ALLOW)),
            _instruction(_RETURN, _REFUSE | errno.EPERM),
        ]
    code += _if_equal(CALLS["clone3"][column], _REFUSE | errno.ENOSYS)  # glibc then says what clone says: EPERM
    for name, numbers in CALLS.items():
        if name not in conditions and name != "clone3" and numbers[column] >= 0:
            code += _if_equal(numbers[column], _ALLOW)
    return b"".join([*code, _instruction(_RETURN, _REFUSE | errno.EPERM)])


def _if_equal(value: int, action: int) -> list[bytes]:
    return [_instruction(_JUMP_IF_EQUAL, value, 0, 1), _instruction(_RETURN, action)]


def _instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
    return struct.pack("=HBBI", code, if_true, if_false, value)


if __name__ == "__main__":  # a script under -I knows the standard library only
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))


READY = b"ready"  # said before the program begins; anything else is why it cannot


class CandidateFailed(BaseException):
    """The candidate raised, or never defined the function. No `Exception`: tests cannot take it for their own."""


def main(role: str, scratch: str, settings: dict[str, int], python_path: list[str]) -> None:
    """Confine this process as `settings` say (file descriptors, limits, layers) and play the role."""
    ready = settings["ready"]
    try:
        payload = json.loads(_whole_file(settings["payload"]))
        os.chdir(scratch)
        limit(settings["memory"], settings["cpu"], settings["file"], settings["files"])
        renounce(scratch, settings["parent"], bool(settings["change_user"]))
        if settings["landlock"]:
            confine_files(python_path)
        if settings["seccomp"]:
            confine_calls()
    except (OSError, ValueError, MemoryError) as error:
        os.write(ready, f"{type(error).__name__}: {error}".encode()[:400])
        os._exit(1)
    for name in [name for name in sys.modules if name.split(".")[0] == "jaxchat"]:
        del sys.modules[name]  # a program finds the standard library and nothing of ours
    os.write(ready, READY)
    os.close(ready)
    ROLES[role](payload, settings)


def _whole_file(descriptor: int) -> str:
    with open(descriptor, encoding="utf-8") as file:
        return file.read()


def _program(source: str, settings: dict[str, int]) -> None:
    module = types.ModuleType("__main__")
    sys.modules["__main__"] = module
    try:
        exec(compile(source, "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        import traceback

        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        sys.exit(1)


def _candidate(payload: dict[str, Any], settings: dict[str, int]) -> None:
    """Answer every call with ["returned", value] or ["raised", name of the exception]."""
    function, fault = _define(payload["programs"], payload["entry"])
    while True:
        try:
            positional, named = receive(settings["calls"])
        except EOFError:
            return
        if function is None:
            send(settings["answers"], ["raised", fault])
            continue
        try:
            answer = ["returned", function(*positional, **named)]
            send(settings["answers"], answer)
        except BaseException as error:
            send(settings["answers"], ["raised", type(error).__name__[:100]])


def _define(programs: list[str], entry: str) -> tuple[Callable[..., Any] | None, str]:
    """(function, "") of the first program that is valid Python, or (None, what is wrong with it)."""
    module = types.ModuleType("candidate")
    sys.modules["candidate"] = module
    fault = "nothing"
    for program in programs:
        try:
            code = compile(program, "candidate.py", "exec", dont_inherit=True)
        except BaseException as error:
            fault = type(error).__name__
            continue
        try:
            exec(code, module.__dict__)
            return module.__dict__[entry], ""
        except BaseException as error:
            return None, type(error).__name__[:100]
    return None, fault


def _checker(payload: dict[str, str], settings: dict[str, int]) -> None:
    """Write {"passed", "why", "token"} to the descriptor `verdict`; `setup` and `tests` are the data set's own text."""
    calls = 0

    def candidate(*positional: Any, **named: Any) -> Any:
        nonlocal calls
        calls += 1
        send(settings["calls"], [list(positional), named])
        message = receive(settings["answers"])
        if not isinstance(message, list) or len(message) != 2 or message[0] not in ("returned", "raised"):
            raise BadMessage("no answer")
        if message[0] == "raised":
            raise CandidateFailed(str(message[1])[:100])
        return message[1]

    namespace: dict[str, Any] = {"__name__": "tests"}
    if "random" in payload["tests"]:
        import random

        random.seed(0)  # the same cases for every candidate
    try:
        exec(compile(payload["setup"], "setup.py", "exec", dont_inherit=True), namespace)
        namespace[payload["entry"]] = candidate  # some tests call the function by its name
        exec(compile(payload["tests"], "tests.py", "exec", dont_inherit=True), namespace)
        namespace["check"](candidate)
        verdict = {"passed": calls > 0, "why": "" if calls else "no test called the function"}
    except CandidateFailed as error:
        verdict = {"passed": False, "why": f"raised {error}"}
    except (BadMessage, EOFError, OSError) as error:
        verdict = {"passed": False, "why": f"broke off: {str(error)[:200]}"}
    except BaseException as error:  # a failed assertion, or an operation that the answer's type does not have
        verdict = {"passed": False, "why": f"test failed: {type(error).__name__}"}
    os.write(settings["verdict"], json.dumps(verdict | {"token": payload["token"]}).encode())


ROLES: dict[str, Callable[[Any, dict[str, int]], None]] = {
    "program": _program,
    "candidate": _candidate,
    "checker": _checker,
}

if __name__ == "__main__":
    sys.path.pop(0)
    arguments = sys.argv[1:]
    sys.argv = ["program.py"]
    main(arguments[0], arguments[1], {k: int(v) for k, _, v in (a.partition("=") for a in arguments[2:])}, sys.path)
