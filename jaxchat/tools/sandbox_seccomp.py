"""Layer 2 of the sandbox, system calls: a seccomp filter that allows what computing needs and refuses all else.

Not on the list, among others: socket and its kin, ptrace, process_vm_readv, fork, clone, execve, mount, unshare, setns,
bpf, io_uring, keyctl, memfd_create, chmod, chown, utime, setxattr (Landlock does not hold the last four), prctl.
Source of the numbers: the kernel's asm/unistd_64.h (x86_64) and asm-generic/unistd.h (aarch64).
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct

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
