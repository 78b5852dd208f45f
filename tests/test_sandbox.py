"""The sandbox: every layer holds what it promises, whoever runs it, and nothing of a run stays behind."""

import io
import json
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hostile_programs import (
    ALONE,
    CANDIDATES,
    EFFECTIVE_AT_1,
    POLICY,
    PROGRAMS,
    RIGHT,
    check_all,
    run_all,
    surroundings,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxchat.tools import sandbox, sandbox_child
from jaxchat.tools.sandbox import Probe, Sandbox, SandboxError
from jaxchat.tools.sandbox_child import BadMessage, Opaque

ROOT = Path(__file__).resolve().parent.parent
LEVELS = (1, 2, 3)


def box(level, policy=POLICY):
    if sandbox.probe().level < level:
        pytest.skip(f"{sandbox.LEVELS[level]} does not hold here: {sandbox.probe().missing}")
    return Sandbox(policy, level=level)


def running(folder):
    """Process ids of sandboxes whose scratch folder is in `folder`."""
    mark = f"sandbox_child.py\0{folder}/".encode()
    return [path.parent.name for path in Path("/proc").glob("[0-9]*/cmdline") if mark in _read(path)]


def _read(path):
    try:
        return path.read_bytes()
    except OSError:
        return b""


@pytest.fixture
def places(monkeypatch):
    """What hostile programs look for. Afterwards no process and no file of a sandbox is left."""
    around, temporary = (Path(tempfile.mkdtemp(prefix=name)) for name in ("around-", "temporary-"))
    temporary.chmod(0o755)
    data = around / "solutions"
    data.write_text(RIGHT, encoding="utf-8")
    data.chmod(0o644)
    monkeypatch.setenv("SECRET", "of the parent")
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    with surroundings(around, data) as found:
        yield found
    assert not list(temporary.iterdir())
    assert not running(temporary)
    shutil.rmtree(around)
    temporary.rmdir()


# ---- the layers, tried by what they forbid


def unheld(level, results):
    """Programs that got something, or ended as they should not."""
    return {
        name: found for name, found in results.items() if "GOT" in found[1] or found[0] not in PROGRAMS[name][1].split()
    }


@pytest.mark.parametrize("level", LEVELS)
def test_hostile_programs_get_nothing(level, places):
    box(level)
    names = [name for name in PROGRAMS if PROGRAMS[name][0] <= level]
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda n: run_all(level, places, [n]), names))
    results = {name: found for part in parts for name, found in part.items()}
    assert len(results) >= 20 and not unheld(level, results)


def test_they_are_no_straw_men(places):
    """At level 1, which does not hold them, these programs do get what they want."""
    box(1)
    results = run_all(1, places, EFFECTIVE_AT_1)
    assert [name for name, (_, out, _) in results.items() if "GOT" not in out] == []


@pytest.mark.parametrize("level", LEVELS)
def test_no_candidate_fakes_a_pass(level, places):
    box(level)
    with ThreadPoolExecutor(4) as pool:
        parts = list(pool.map(lambda n: check_all(level, [n]), [n for n in CANDIDATES if n != ALONE]))
    parts.append(check_all(level, [ALONE]))
    results = {name: found for part in parts for name, found in part.items()}
    assert results.pop("right") == ("passed", "")
    assert {status for status, _ in results.values()} <= {"failed", "timeout", "refused"}
    assert len(results) == len(CANDIDATES) >= 20
    assert {results[name][0] for name in ("endless call", "asleep")} == {"timeout"}
    assert {n for n, (s, _) in results.items() if s == "refused"} == {"lone surrogates", "10 MB of source"}


def test_as_a_user_without_rights():
    """Root has other means than a plain user, and other dangers; this is the same again as nobody."""
    if os.geteuid() != 0:
        pytest.skip("these tests already run as a plain user")
    python, nobody = "/usr/bin/python3", {"user": 65534, "group": 65534, "extra_groups": [], "cwd": "/"}
    program = ROOT / "tests" / "hostile_programs.py"
    command = [python, "-c", f"import sys; assert sys.version_info >= (3, 11); open({str(program)!r})"]
    if not os.path.exists(python) or subprocess.run(command, **nobody, capture_output=True).returncode:
        pytest.skip(f"nobody cannot run {python} (3.11 or newer) here, or cannot read these tests")
    command = [python, "-B", str(program), str(program)]
    done = subprocess.run(command, **nobody, env={"SECRET": "of the parent"}, capture_output=True, timeout=300)
    assert done.returncode == 0, done.stderr.decode()
    found = {int(level): part for level, part in json.loads(done.stdout.splitlines()[-1]).items()}
    assert isinstance(found[1], list), found[1]
    for level, part in found.items():
        if isinstance(part, str):  # that level does not hold for nobody here
            continue
        programs, candidates = part
        assert len(programs) >= 20 and not unheld(level, programs), level
        assert candidates.pop("right")[0] == "passed"
        assert not [name for name, (status, _) in candidates.items() if status == "passed"]


@pytest.mark.parametrize("level", LEVELS)
def test_it_dies_with_its_parent(level, tmp_path):
    box(level)
    program = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]\n"
        "from jaxchat.tools.sandbox import Sandbox\n"
        f"print('on', flush=True); Sandbox(level={level}).run('import time; time.sleep(60)')\n"
    )
    environment = os.environ | {"TMPDIR": str(tmp_path)}
    parent = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=environment)
    try:
        assert parent.stdout.readline() == b"on\n"
        deadline = time.monotonic() + 20
        # the last one to appear sleeps; the ones before are of the probe
        while not running(tmp_path) and time.monotonic() < deadline:
            time.sleep(0.05)
        time.sleep(0.5)
        assert running(tmp_path)
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not running(tmp_path)


# ---- levels


def test_the_level_found_is_the_level_used(monkeypatch):
    found = sandbox.probe()
    assert found.level >= 1, found.missing  # Linux without even that would be news
    assert Sandbox().level == found.level and len(found.missing) == 3 - found.level
    assert all(Sandbox(level=level).level == level for level in range(found.level + 1))
    monkeypatch.setattr(sandbox, "probe", lambda: Probe(1, ("Landlock is not in this kernel",)))
    with pytest.raises(SandboxError, match="strict wants level 2.*Landlock is not in this kernel"):
        Sandbox(mode="strict")
    with pytest.raises(SandboxError, match="level 3 of 3.*does not hold here"):
        Sandbox(level=3)
    assert Sandbox(mode="auto").level == 1


@pytest.mark.skipif(sandbox.probe().level < 1, reason="nothing to break")
def test_a_layer_that_is_installed_and_does_not_work_is_not_used(monkeypatch):
    """A bwrap that fails, one that makes no namespace, and what level 2 must hold without its parts."""
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        fake = Path(folder) / "bwrap"
        monkeypatch.setattr(sandbox.shutil, "which", lambda name: str(fake))
        fake.write_text("#!/bin/sh\necho no permission to create a namespace >&2\nexit 1\n")
        fake.chmod(0o755)
        assert "no permission to create a namespace" in sandbox.weakness(3)
        found = sandbox.probe.__wrapped__()
        assert found.level < 3 and "level 3" in found.missing[0]
        # one that runs the command and makes no namespace
        fake.write_text('#!/bin/sh\nwhile [ "$1 $2" != "--remount-ro /" ]; do shift; done\nshift 2; exec "$@"\n')
        assert sandbox.weakness(3).startswith("the trial ended with disk")
    monkeypatch.undo()
    child = sandbox._CHILD.read_text(encoding="utf-8")
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        monkeypatch.setattr(sandbox, "_CHILD", Path(folder) / "child.py")
        text = child.replace("confine_files(sys.path)", "pass").replace("    confine_calls()", "    pass")
        sandbox._CHILD.write_text(text, encoding="utf-8")
        assert sandbox.weakness(2) == "not held: read, socket, write"


def test_a_process_that_cannot_be_confined_runs_nothing(monkeypatch, tmp_path):
    def run():
        sandbox.Process("program", {"source": "print('ran')"}, {}, POLICY, 1)

    monkeypatch.setattr(sandbox, "asdict", lambda policy: {})
    with pytest.raises(SandboxError, match="did not confine itself"):
        run()
    monkeypatch.setattr(sandbox, "interpreter", lambda: str(tmp_path / "none"))
    with pytest.raises(SandboxError, match="cannot start a process"):
        run()


# ---- what programs may do


@pytest.mark.parametrize("level", LEVELS)
def test_ordinary_programs_run(level, places):
    ordinary = """
import bisect, collections, copy, csv, dataclasses, datetime, decimal, enum, fractions, functools, hashlib, heapq, io
import itertools, json, math, operator, os, random, re, statistics, string, sys, tempfile, textwrap, time, typing
import unicodedata, zlib, bz2, lzma, array, struct, calendar, pprint, sqlite3, ssl
@dataclasses.dataclass
class P:
    x: int = 1
print(P(), math.pi, hashlib.sha256(b"x").hexdigest()[:8], random.random() < 1, "한국어", __name__)
print(statistics.mean([1, 2]), sqlite3.connect(":memory:").execute("select 6 * 7").fetchone())
with open("file.txt", "w") as f: f.write("kept")
os.mkdir("sub"); os.rename("file.txt", "sub/file.txt")
print(open("sub/file.txt").read(), os.listdir(), sys.stdin.read() == "", len(os.urandom(4)), os.cpu_count() > 0)
with tempfile.TemporaryFile(dir=".") as f: f.write(b"x")
time.sleep(0.01)
sys.exit(3)
"""
    outcome = box(level).run(ordinary)
    assert (outcome.status, outcome.exit_code, outcome.stderr) == ("error", 3, "")
    assert outcome.stdout.splitlines() == [
        "P(x=1) 3.141592653589793 2d711642 True 한국어 __main__", "1.5 (42,)", "kept ['sub'] True 4 True",
    ]  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
def test_outcomes(level, places):
    held = box(level)
    assert held.run("print(1 + 1)") == sandbox.Outcome("ok", "2\n", "", pytest.approx(0, abs=15), 0)
    failed = held.run("def f():\n    raise ValueError('so')\nf()")
    assert failed.status == "error" and failed.exit_code == 1 and failed.stderr.endswith("ValueError: so\n")
    assert str(ROOT) not in failed.stderr  # no path of ours
    assert "SyntaxError" in held.run("def").stderr
    killed = held.run("import os; os.kill(os.getpid(), 9)")
    assert (killed.status, killed.exit_code) == ("killed", -signal.SIGKILL)
    much = held.run("import sys\nsys.stdout.write('y' * 10**6)")
    assert much.status == "output" and len(much.stdout) == POLICY.output_bytes
    assert held.run("\0").status == "error" and held.run("\ud800").status == held.run(" " * 2**21).status == "refused"


def test_many_at_once(places):
    with ThreadPoolExecutor(6) as pool:
        outcomes = list(pool.map(lambda n: Sandbox(POLICY).run(f"print({n})").stdout, range(12)))
    assert outcomes == [f"{n}\n" for n in range(12)]


# ---- checks


def check(source, tests, setup="", entry="f", level=None):
    return Sandbox(POLICY, level=level).check([source], entry, setup, tests)


def test_values_keep_their_types_on_the_way_there_and_back():
    tests = """
def check(candidate):
    for value in (1, -(10**40), True, None, 0.5, float("inf"), -0.0, "한\\ud800", b"b", 2j, (1, [2]), {(1,): {3}},
                  frozenset({1}), [], bytearray(b"c")):
        found = candidate(value)
        assert found == value and type(found) is type(value) and repr(found) == repr(value)
    assert candidate(True) is True and candidate(None) is None
"""
    assert check("f = lambda x: x", tests).status == "passed"


@pytest.mark.parametrize(
    "answer, expression, passes",
    [
        ("__import__('collections').Counter('aab')", "candidate() == {'a': 2, 'b': 1}", True),
        ("__import__('collections').OrderedDict(a=1)", "candidate() == {'a': 1}", True),
        ("__import__('collections').namedtuple('P', 'x')(1)", "candidate() == (1,)", True),
        ("__import__('decimal').Decimal('15')", "candidate() == 15", True),
        ("__import__('fractions').Fraction(1, 2)", "candidate() == 0.5", True),
        ("map(str, [1, 2])", "tuple(candidate()) == ('1', '2')", True),
        ("map(str, [1, 2])", "candidate() == ['1', '2']", False),
        ("range(3)", "list(candidate()) == [0, 1, 2]", True),
        ("object()", "candidate() == candidate()", False),
        ("int", "candidate() is int", False),
        ("'abc'", "candidate() + 1", False),
    ],
)
def test_answers_of_other_types(answer, expression, passes):
    found = check(f"f = lambda: {answer}", f"def check(candidate):\n    assert {expression}\n")
    assert (found.status == "passed") is passes, found


def test_the_first_program_that_is_python_counts():
    tests = "def check(candidate):\n    assert candidate() == 1\n"
    assert Sandbox(POLICY).check(["def f( return", "f = lambda: 1", "f = lambda: 2"], "f", "", tests).status == "passed"
    # one that is, and fails, is not followed by the next
    assert Sandbox(POLICY).check(["1 / 0", "f = lambda: 1"], "f", "", tests).why == "raised ZeroDivisionError"


def test_tests_that_judge_nothing_are_not_passed():
    assert check("f = lambda: 1", "def check(candidate): pass").why == "no test called the function"
    swallowing = "def check(candidate):\n    try: candidate()\n    except Exception: pass\n"
    assert check("def f(): raise ValueError", swallowing).why == "raised ValueError"
    assert check("f = lambda: 1", "x = 1").why == "test failed: KeyError"


def test_setup_and_the_function_by_its_name():
    tests = "def check(candidate):\n    print('noise')\n    assert helper(candidate(1)) == helper(f(1)) == 4\n"
    setup = "def helper(x): return 2 * x\ndef f(x): return 0\n"
    assert check("def helper(x): return 0\ndef f(x): return x + 1", tests, setup).status == "passed"


def test_cases_drawn_at_random_are_the_same_every_time():
    tests = "import random\ndef check(candidate):\n    assert candidate(random.random()) == "
    seen = __import__("random").Random(0).random()
    assert check("f = lambda x: x", tests + repr(seen)).status == "passed"


# ---- data through the pipe

plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters()) | st.binary(),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.tuples(inner, inner)
        | st.dictionaries(st.text(max_size=3) | st.integers(), inner, max_size=3)
    ),
    max_leaves=12,
)


def through(value):
    """What comes out of the pipe."""
    stream = io.BytesIO()
    sandbox_child.send(stream, value)
    stream.seek(0)
    return sandbox_child.receive(stream)


def message(data):
    return io.BytesIO(len(data).to_bytes(4, "big") + data)


@settings(max_examples=150, deadline=None)
@given(plain)
def test_data_comes_out_as_it_went_in(value):
    found = through(value)
    assert found == value and repr(found) == repr(value)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=60) | st.text(st.sampled_from('[]{}":,0123eE.-naNulItrydictsefxo '), max_size=40))
def test_noise_is_a_bad_message_and_nothing_else(noise):
    try:
        found = sandbox_child.receive(message(noise if isinstance(noise, bytes) else noise.encode()))
    except BadMessage:
        return
    through(found)  # plain data


@pytest.mark.parametrize(
    "content",
    [
        {"set": [[1]]}, {"dict": [[[], 1]]}, {"dict": [[[]], [1]]}, {"dict": [1]}, {"int": 5}, {"int": "xyz"},
        {"Decimal": "no"}, {"Fraction": [1, 0]}, {"Fraction": "1/0"}, {"complex": [{}, {}]},
        {"bytes": "0"}, {"tuple": 1}, {"list": 1, "set": 2}, {}, {"__class__": []}, {"eval": "1"},
    ],
)  # fmt: skip
def test_messages_that_nobody_sends(content):
    with pytest.raises(BadMessage):
        sandbox_child.receive(message(json.dumps(content).encode()))


def test_limits_of_a_message():
    deep: list = []
    for _ in range(60):
        deep = [deep]
    for value in (deep, "x" * (1 << 21), [None] * 300_000, iter(int, 1)):
        with pytest.raises(BadMessage):
            through(value)
    with pytest.raises(BadMessage, match="1073741824 bytes"):
        sandbox_child.receive(io.BytesIO((1 << 30).to_bytes(4, "big")))
    with pytest.raises(EOFError):
        sandbox_child.receive(io.BytesIO())


def test_types_that_stand_for_others():
    class Liar(int):
        def __eq__(self, other):
            return True

        __hash__ = int.__hash__

    assert type(through(Liar(7))) is int and through(Liar(7)) != 8
    assert through(Decimal("1.50")) == Decimal("1.5") and through(Fraction(2, 6)) == Fraction(1, 3)
    assert isinstance(through(object()), Opaque) and through(object()) != through(object())
    assert math.isnan(through(float("nan")))


# ---- the parts


def judge(code, architecture, number, arguments=()):
    """What the filter says of a call: an interpreter of the few instructions of classic BPF that it uses."""
    data = struct.pack("=IIQ6Q", number, architecture, 0, *(list(arguments) + [0] * 6)[:6])
    instructions, at, value = [struct.unpack("=HBBI", code[i : i + 8]) for i in range(0, len(code), 8)], 0, 0
    while True:
        operation, if_true, if_false, operand = instructions[at]
        at += 1
        if operation == 0x20:
            value = struct.unpack_from("=I", data, operand)[0]
        elif operation == 0x15:
            at += if_true if value == operand else if_false
        else:
            assert operation == 0x06
            return operand


@pytest.mark.parametrize("machine", sandbox_child.ARCHITECTURES)
def test_the_filter_allows_the_table_and_nothing_else(machine):
    """Both processors, whichever runs this."""
    column, architecture = sandbox_child.ARCHITECTURES[machine]
    code = sandbox_child.filter_program(column, architecture, 1234)
    assert len(code) // 8 <= 4096  # the kernel's limit
    allow, refuse = 0x7FFF0000, 0x00050001
    conditional = {"prlimit64", "kill", "tgkill", "ioctl", "fcntl", "clone3"}
    numbers = {calls[column]: name for name, calls in sandbox_child.CALLS.items() if calls[column] >= 0}
    for number in range(600):
        if numbers.get(number) not in conditional:
            assert judge(code, architecture, number) == (allow if number in numbers else refuse), number
        assert judge(code, architecture, number | 0x40000000) == refuse
    assert judge(code, 0x40000003, 20) == 0x80000000  # 32-bit x86: the process is killed
    for name, arguments, verdict in [
        ("clone3", [], 0x00050000 | 38), ("kill", [1234, 9], allow), ("tgkill", [1234, 9], allow),
        *((name, [pid, 0], refuse) for name in ("kill", "tgkill") for pid in (0, 1, 1233, 2**32 - 1)),
        ("prlimit64", [0], allow), ("prlimit64", [99], refuse), ("fcntl", [3, 1030], allow),
        ("ioctl", [0, 0x5412], refuse),  # TIOCSTI types into a terminal
        ("fcntl", [3, 8], refuse),  # F_SETOWN
    ]:  # fmt: skip
        assert judge(code, architecture, sandbox_child.CALLS[name][column], arguments) == verdict, (name, arguments)


@pytest.mark.parametrize("header, column", [("x86_64-linux-gnu/asm/unistd_64.h", 0), ("asm-generic/unistd.h", 1)])
def test_the_numbers_of_calls_are_the_kernels(header, column):
    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip(f"no {path}")
    # some calls are given by another name: __NR3264_fcntl
    real = {name: int(number) for name, number in re.findall(r"#define __NR(?:3264)?_(\w+) (\d+)", path.read_text())}
    real |= {"newfstatat": 79} if column else {}  # __NR3264_fstatat
    table = {name: calls[column] for name, calls in sandbox_child.CALLS.items() if calls[column] >= 0}
    assert table == {name: real[name] for name in table}


def test_landlock_leaves_no_packages(tmp_path):
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "json").mkdir()
    (tmp_path / "os.py").touch()
    found = dict(sandbox_child.readable([str(tmp_path)]))
    assert found[str(tmp_path)] == sandbox_child.READ_DIR  # names, no content
    assert str(tmp_path / "json") in found and str(tmp_path / "os.py") in found
    assert not [path for path in found if "-packages" in path]
    writable = [path for path, rights in found.items() if rights & sandbox_child.WRITE_FILE]
    assert writable == ["/dev/null"]


def test_users_of_the_sandbox_are_nobodys():
    import pwd

    users = range(sandbox_child.FIRST_USER, sandbox_child.FIRST_USER + sandbox_child.USERS)
    assert not [entry for entry in pwd.getpwall() if entry.pw_uid in users]
    assert users.stop < 1 << 16  # user namespaces of containers often end there


def test_scratch_folders(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    folder = sandbox.make_scratch()
    assert not sandbox.too_much(folder, 1 << 20)
    (folder / "file").write_bytes(os.urandom(1 << 16))
    assert sandbox.too_much(folder, 1 << 15) and not sandbox.too_much(folder, 1 << 20)
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "kept").touch()
    (folder / "link").symlink_to(outside)
    here = os.getcwd()
    try:
        os.chdir(folder)
        for _ in range(2000):  # no path can be that long
            os.mkdir("x" * 20)
            os.chdir("x" * 20)
    finally:
        os.chdir(here)
    assert sandbox.too_much(folder, 1 << 30)
    sandbox.remove_scratch(folder)
    assert list(tmp_path.iterdir()) == [outside] and list(outside.iterdir()) == [outside / "kept"]


@pytest.mark.parametrize("page", ["docs/reliability.md", "docs/ko/reliability.md"])
def test_the_example_of_the_page_runs(page, capsys):
    if sandbox.probe().level < 2:
        pytest.skip("needs level 2")
    for example in re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S):
        exec(compile(example, page, "exec"), {})
        assert capsys.readouterr().out.split()[-2:] == ["ok", "42"]
