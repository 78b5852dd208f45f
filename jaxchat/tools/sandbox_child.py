"""The process inside the sandbox: it confines itself, then runs hostile code in one of three roles.

`program` runs a text as `__main__`. `candidate` answers calls of one function that come through a pipe. `checker` runs
tests that make these calls and judge the answers, in a process that the candidate cannot reach.

This file runs as a script under `python -I -S` and imports the standard library only. The job comes as JSON on standard
input, see `Process` in `sandbox.py`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import itertools
import json
import os
import random
import resource
import signal
import struct
import sys
import traceback
import types
from collections.abc import Callable, Iterable, Iterator
from decimal import Decimal
from fractions import Fraction
from typing import IO, Any

READY = b"ready"  # written when the process is confined; anything else is the reason why it is not

# ---- values across a pipe into which a hostile program writes: never pickled, never evaluated, bounded in size

MAX_BYTES = 1 << 20  # of one message
MAX_DEPTH = 50  # of nested containers


class BadMessage(Exception):
    """A message is malformed, too large or nested too deep."""


class Opaque:
    """Stands for an object that cannot be sent; equals only itself."""

    __hash__ = None  # type: ignore[assignment]  # it would differ from the hash of the real object


# Values are JSON. What JSON lacks is an object with one key, the name of its type here:
# (type, what is sent of a value, how it is built again); `each` packs the items of a container
_KINDS: dict[str, tuple[type, Callable[[Any, Callable[[Any], Any]], Any], Callable[[Any], Any]]] = {
    "int": (int, lambda value, each: hex(value), lambda text: int(text, 16)),  # Python bounds decimal digits
    "complex": (complex, lambda value, each: [value.real, value.imag], lambda parts: complex(*parts)),
    "bytes": (bytes, lambda value, each: value.hex(), bytes.fromhex),
    "bytearray": (bytearray, lambda value, each: value.hex(), bytearray.fromhex),
    "Decimal": (Decimal, lambda value, each: str(value), Decimal),
    "Fraction": (Fraction, lambda value, each: str(value), Fraction),
    "dict": (
        dict,
        lambda value, each: [each(value.keys()), each(value.values())],
        lambda parts: dict(zip(*unpack(parts), strict=True)),
    ),
    "tuple": (tuple, lambda value, each: each(value), lambda items: tuple(unpack(items))),
    "set": (set, lambda value, each: each(value), lambda items: set(unpack(items))),
    "frozenset": (frozenset, lambda value, each: each(value), lambda items: frozenset(unpack(items))),
    "iterator": (Iterable, lambda value, each: each(value), lambda items: iter(unpack(items))),
    "object": (object, lambda value, each: None, lambda _: Opaque()),
}


def pack(value: Any, depth: int = 0) -> Any:
    """Return the value as JSON types, a subclass as its base class; `ValueError` where it is too deep."""
    if depth > MAX_DEPTH:
        raise ValueError("nested too deep")

    def each(items: Any) -> list[Any]:
        # an item takes two bytes or more, so no message holds as many as are taken here
        return [pack(item, depth + 1) for item in itertools.islice(items, MAX_BYTES // 2)]

    if value is None or isinstance(value, bool | float | str) or (isinstance(value, int) and abs(value) < 1 << 63):
        return value
    if isinstance(value, list):
        return each(value)
    name, encode = next((name, encode) for name, (kind, encode, _) in _KINDS.items() if isinstance(value, kind))
    return {name: encode(value, each)}


def unpack(value: Any) -> Any:
    """Return the value that `pack` was given; `ValueError`, `TypeError`, `KeyError` or others for anything else."""
    if isinstance(value, list):
        return [unpack(item) for item in value]
    if isinstance(value, dict):
        ((kind, content),) = value.items()
        return _KINDS[kind][2](content)
    return value


def send(stream: IO[bytes], message: Any) -> None:
    """Write one message. `BadMessage` where it is too large or too deep, `OSError` where nobody reads."""
    try:
        data = json.dumps(pack(message), separators=(",", ":")).encode("ascii")
    except (ValueError, RecursionError) as error:
        raise BadMessage(str(error)) from None
    if len(data) > MAX_BYTES:
        raise BadMessage(f"a message of {len(data)} bytes; at most {MAX_BYTES}")
    stream.write(len(data).to_bytes(4, "big") + data)
    stream.flush()


def receive(stream: IO[bytes]) -> Any:
    """Read one message. `EOFError` where the other side is gone, `BadMessage` for what `send` never writes."""
    if len(head := stream.read(4)) < 4:
        raise EOFError("the pipe is closed")
    size = int.from_bytes(head, "big")
    if size > MAX_BYTES:
        raise BadMessage(f"a message of {size} bytes; at most {MAX_BYTES}")
    try:
        return unpack(json.loads(stream.read(size).decode("ascii")))
    except (ValueError, TypeError, KeyError, RecursionError, ArithmeticError) as error:
        raise BadMessage(str(error)) from None


# ---- level 1: limits, no privileges, no children, death with the parent

_LIBC = ctypes.CDLL(None, use_errno=True)
_SET_DEATH_SIGNAL, _SET_DUMPABLE, _SET_KEEP_CAPABILITIES, _SET_SECCOMP, _SET_NO_NEW_PRIVILEGES = 1, 4, 8, 22, 38
_CAPABILITIES_VERSION = 0x20080522
_READ_ANYTHING = 1 << 2  # CAP_DAC_READ_SEARCH
_CAPSET = {"x86_64": 126, "aarch64": 91}
FIRST_USER, USERS = 62_000, 3_000  # user ids that nobody has; a sandbox of root takes one by its process id


def _call(function: str, *arguments: Any) -> int:
    """Call a function of the C library; `OSError` where it fails."""
    result: int = getattr(_LIBC, function)(*arguments)
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{function} {arguments[0]}: {os.strerror(code)}")
    return result


def limit(policy: dict[str, Any]) -> None:
    """Set resource limits, for good. Limits that this system lacks are left out: the probe finds that."""
    for name, soft, hard in (
        ("AS", policy["memory_bytes"], policy["memory_bytes"]),
        ("CPU", policy["cpu_seconds"], policy["cpu_seconds"] + 1),  # SIGXCPU first: that death means a timeout
        ("FSIZE", policy["disk_bytes"] // 4, policy["disk_bytes"] // 4),
        ("NOFILE", policy["open_files"], policy["open_files"]),
        ("NPROC", 0, 0),  # no child and no thread: other processes of the user count too, so only 0 has a meaning
        ("CORE", 0, 0),
        ("MSGQUEUE", 0, 0),
        ("MEMLOCK", 0, 0),
    ):
        with contextlib.suppress(AttributeError, ValueError, OSError):
            resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (soft, hard))


def drop_privileges(scratch: str, parent: int) -> None:
    """Stop being root, drop capabilities, gain none, die with the parent, close memory to other processes.

    `parent`: its process id, or 0 inside bubblewrap, which has changed the user. Raises `OSError` where Linux refuses.
    """
    if sys.platform != "linux":
        return
    machine, keep = os.uname().machine, 0
    _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    if os.geteuid() == 0:
        if parent:
            # Root knows no limit on children, so this becomes a user that owns nothing. It keeps the right to read only
            # where Python lies in a folder of root. Some containers forbid the change: then the probe finds the rest.
            user = FIRST_USER + os.getpid() % USERS
            _call("prctl", _SET_KEEP_CAPABILITIES, 1, 0, 0, 0)
            try:
                os.chown(scratch, user, user)
                os.setgroups([])
                os.setresgid(user, user, user)
                os.setresuid(user, user, user)
                keep = 0 if os.access(os.__file__, os.R_OK) else _READ_ANYTHING
            except OSError as error:
                if error.errno not in (errno.EPERM, errno.EINVAL):
                    raise
        if machine not in _CAPSET:
            raise OSError(errno.ENOTSUP, f"capabilities cannot be dropped on {machine}; do not run as root")
        header, data = struct.pack("=Ii", _CAPABILITIES_VERSION, 0), struct.pack("=6I", keep, keep, 0, 0, 0, 0)
        _call("syscall", _CAPSET[machine], header, data)
    # after the change of the user, which resets both
    _call("prctl", _SET_DEATH_SIGNAL, int(signal.SIGKILL), 0, 0, 0)
    _call("prctl", _SET_DUMPABLE, 0, 0, 0, 0)
    if parent and os.getppid() != parent:  # it died before the death signal was set
        os._exit(1)


# ---- level 2, files: a Landlock rule set that leaves the standard library, read-only, and the scratch folder
#
# Source: the kernel's userspace-api/landlock.rst and linux/landlock.h. The three system calls have the same numbers on
# every processor.

_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_VERSION, _PATH_BENEATH = 1, 1

WRITE_FILE, READ_FILE, READ_DIR = 1 << 1, 1 << 2, 1 << 3
REMOVE_DIR, REMOVE_FILE, MAKE_DIR, MAKE_REG = 1 << 4, 1 << 5, 1 << 7, 1 << 8
REFER, TRUNCATE = 1 << 13, 1 << 14
FILE_RIGHTS = WRITE_FILE | READ_FILE | TRUNCATE  # those that a rule on a plain file may hold
SCRATCH = FILE_RIGHTS | READ_DIR | REMOVE_DIR | REMOVE_FILE | MAKE_DIR | MAKE_REG | REFER

PACKAGES = ("site-packages", "dist-packages")  # installed packages may hold the exam's solutions
LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64")


def abi() -> int:
    """Return the version of the kernel's Landlock, 0 where there is none."""
    try:
        return max(0, _LIBC.syscall(_CREATE_RULESET, None, ctypes.c_size_t(0), _VERSION))
    except (OSError, AttributeError):  # no Linux
        return 0


def confine_files(python_path: list[str]) -> None:
    """Leave this process its working folder and the standard library, for good; needs no_new_privs.

    No TCP either (from Landlock 4), no signals to others (from 6). Raises `OSError`.
    """
    version = abi()
    if version < 1:
        raise OSError("Landlock is not in this kernel")
    rights_known = (1 << {1: 13, 2: 14, 3: 15, 4: 15}.get(version, 16)) - 1
    attributes = struct.pack("=QQQ", rights_known, 0b11, 0b11)[: 8 if version < 4 else 16 if version < 6 else 24]
    ruleset = _call("syscall", _CREATE_RULESET, attributes, ctypes.c_size_t(len(attributes)), 0)
    for path, rights in [(".", SCRATCH), *readable(python_path)]:
        try:
            descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:  # not on this machine
            continue
        rights &= rights_known if os.path.isdir(path) else rights_known & FILE_RIGHTS
        _call("syscall", _ADD_RULE, ruleset, _PATH_BENEATH, struct.pack("=Qi", rights, descriptor), 0)
        os.close(descriptor)
    _call("syscall", _RESTRICT_SELF, ruleset, 0)
    os.close(ruleset)


def readable(python_path: list[str]) -> Iterator[tuple[str, int]]:
    """Yield (path, rights) of what programs may read: standard library without packages, shared libraries, zones."""
    for directory in python_path:
        if not os.path.isdir(directory):
            yield directory, READ_FILE  # pythonXY.zip
            continue
        yield directory, READ_DIR  # the importer lists it; its entries are allowed one by one
        for entry in os.scandir(directory):
            if entry.name not in PACKAGES:
                yield entry.path, READ_FILE | READ_DIR
    for directory in {os.path.realpath(path) for path in (*LIBRARIES, os.path.join(sys.base_prefix, "lib"))}:
        for path in libraries(directory):
            yield path, READ_FILE | READ_DIR
    yield "/usr/share/zoneinfo", READ_FILE | READ_DIR
    yield "/dev/null", READ_FILE | WRITE_FILE
    for path in ("/etc/ld.so.cache", "/dev/zero", "/dev/urandom"):
        yield path, READ_FILE


def libraries(directory: str) -> list[str]:
    """Return the shared libraries in a directory, and its folders that hold nothing else."""
    if not os.path.isdir(directory):
        return []
    return [e.path for e in os.scandir(directory) if ".so" in e.name or e.name.endswith("-linux-gnu")]


# ---- level 2, system calls: a seccomp filter that allows what computing needs and refuses the rest
#
# Not in the table, among others: socket and its kin, ptrace, process_vm_readv, fork, clone, execve, mount, unshare,
# setns, bpf, io_uring, keyctl, memfd_create, prctl, and those that Landlock does not check: chmod, chown, utime,
# setxattr.
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
_FILTER_MODE = 2

# TCGETS, FIONREAD, FIONBIO, FIONCLEX, FIOCLEX: none writes to a terminal or names a process
_IOCTL = (0x5401, 0x541B, 0x5421, 0x5450, 0x5451)
# all but those that name an owner to be signalled and that change pipes, leases and seals
_FCNTL = (0, 1, 2, 3, 4, 5, 6, 7, 1030, 1032)


def confine_calls() -> None:
    """Install the filter in this process, for good; needs no_new_privs. Raises `OSError`."""
    machine = os.uname().machine
    if machine not in ARCHITECTURES:
        raise OSError(errno.ENOTSUP, f"no table of system calls for {machine}")
    code = filter_program(*ARCHITECTURES[machine], os.getpid())
    buffer = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("HxxxxxxP", len(code) // 8, ctypes.addressof(buffer))  # struct sock_fprog
    _call("prctl", _SET_SECCOMP, _FILTER_MODE, ctypes.c_char_p(program), 0, 0)


def filter_program(column: int, architecture: int, pid: int) -> bytes:
    """Return the filter for process `pid` as instructions of classic BPF, 8 bytes each."""

    def instruction(code: int, value: int, if_true: int = 0, if_false: int = 0) -> bytes:
        return struct.pack("=HBBI", code, if_true, if_false, value)

    def if_equal(value: int, action: int) -> list[bytes]:
        return [instruction(_JUMP_IF_EQUAL, value, 0, 1), instruction(_RETURN, action)]

    code = [
        instruction(_LOAD, _ARCHITECTURE),
        instruction(_JUMP_IF_EQUAL, architecture, 1, 0),
        instruction(_RETURN, _KILL),  # another table of numbers (32-bit calls) would mean other calls
        instruction(_LOAD, _NUMBER),
    ]
    # calls allowed for some values of one argument: (its number, the values); only its low 32 bits count in all of them
    own = (pid,)
    conditions = {
        "prlimit64": (0, (0,)),
        "kill": (0, own),
        "tgkill": (0, own),
        "ioctl": (1, _IOCTL),
        "fcntl": (1, _FCNTL),
    }
    for name, numbers in CALLS.items():
        if name in conditions:
            argument, values = conditions[name]
            code += [
                instruction(_JUMP_IF_EQUAL, numbers[column], 0, 2 * len(values) + 2),
                instruction(_LOAD, _ARGUMENTS + 8 * argument),
                *(i for value in values for i in if_equal(value, _ALLOW)),
                instruction(_RETURN, _REFUSE | errno.EPERM),
            ]
        elif name == "clone3":
            code += if_equal(numbers[column], _REFUSE | errno.ENOSYS)  # glibc then tries clone, which says EPERM
        elif numbers[column] >= 0:
            code += if_equal(numbers[column], _ALLOW)
    return b"".join([*code, instruction(_RETURN, _REFUSE | errno.EPERM)])


# ---- the three roles


class CandidateFailed(BaseException):
    """The candidate raised or has no such function. Not an `Exception`, so that tests cannot catch it as their own."""


def main(scratch: str) -> None:
    """Confine this process as the job says, report that, and play the job's role."""
    job = json.load(sys.stdin)
    try:
        with open(os.devnull) as nothing:
            os.dup2(nothing.fileno(), 0)
        os.chdir(scratch)
        limit(job["policy"])
        drop_privileges(scratch, job["parent"])
        if job["level"] == 2 or (job["level"] == 3 and abi()):
            confine_files(sys.path)
        if job["level"] >= 2:
            confine_calls()
    except (OSError, ValueError, MemoryError) as error:
        os.write(job["ready"], f"{type(error).__name__}: {error}".encode()[:400])
        os._exit(1)
    os.write(job["ready"], READY)
    os.close(job["ready"])
    {"program": run_program, "candidate": answer_calls, "checker": run_tests}[job["role"]](job)


def run_program(job: dict[str, Any]) -> None:
    module = sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        exec(compile(job["source"], "program.py", "exec", dont_inherit=True), module.__dict__)
    except SystemExit:
        raise
    except BaseException as error:
        traceback.print_exception(error.with_traceback(error.__traceback__ and error.__traceback__.tb_next))
        sys.exit(1)


def answer_calls(job: dict[str, Any]) -> None:
    """Answer every call with ["returned", value] or ["raised", name of the exception]."""
    calls, answers = open(job["calls"], "rb"), open(job["answers"], "wb")
    function, fault = define(job["programs"], job["entry"])
    while True:
        try:
            positional, named = receive(calls)
        except EOFError:
            return
        try:
            send(answers, ["raised", fault] if function is None else ["returned", function(*positional, **named)])
        except BaseException as error:
            send(answers, ["raised", type(error).__name__[:100]])


def define(programs: list[str], entry: str) -> tuple[Callable[..., Any] | None, str]:
    """Return (function `entry`, "") of the first program that is valid Python, or (None, what is wrong with it)."""
    module, fault = types.ModuleType("candidate"), "nothing"
    sys.modules["candidate"] = module
    for program in programs:
        try:
            code = compile(program, "candidate.py", "exec", dont_inherit=True)
            break
        except BaseException as error:
            fault = type(error).__name__
    else:
        return None, fault
    try:
        exec(code, module.__dict__)
        return module.__dict__[entry], ""
    except BaseException as error:
        return None, type(error).__name__[:100]


def run_tests(job: dict[str, Any]) -> None:
    """Write {"passed", "why", "token"} to standard output. `setup` and `tests` come from the data set."""
    calls, answers = open(job["calls"], "wb"), open(job["answers"], "rb")
    verdict = os.dup(1)
    os.dup2(2, 1)  # what the tests print is no verdict
    count = 0

    def candidate(*positional: Any, **named: Any) -> Any:
        nonlocal count
        count += 1
        send(calls, [list(positional), named])
        message = receive(answers)
        if not isinstance(message, list) or len(message) != 2 or message[0] not in ("returned", "raised"):
            raise BadMessage("no answer")
        if message[0] == "raised":
            raise CandidateFailed(str(message[1])[:100])
        return message[1]

    namespace: dict[str, Any] = {"__name__": "tests"}
    random.seed(0)  # the same cases for every candidate
    try:
        exec(compile(job["setup"], "setup.py", "exec", dont_inherit=True), namespace)
        namespace[job["entry"]] = candidate  # some tests call the function by its name
        exec(compile(job["tests"], "tests.py", "exec", dont_inherit=True), namespace)
        namespace["check"](candidate)
        why = "" if count else "no test called the function"
    except CandidateFailed as error:
        why = f"raised {error}"
    except (BadMessage, EOFError, OSError) as error:
        why = f"broke off: {str(error)[:200]}"
    except BaseException as error:  # a failed assertion, or an operation that the answer's type does not have
        why = f"test failed: {type(error).__name__}"
    os.write(verdict, json.dumps({"passed": not why, "why": why, "token": job["token"]}).encode())


if __name__ == "__main__":
    scratch_folder, sys.argv = sys.argv[1], ["program.py"]
    main(scratch_folder)
