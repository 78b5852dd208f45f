"""The process inside the sandbox: it confines itself and then runs what it was given, in one of three roles.

`program`: a program as `__main__`. `candidate`: a program whose function answers calls that come through a pipe.
`checker`: tests that call it through that pipe and judge plain values, in a process that the candidate cannot reach.
"""

from __future__ import annotations

import json
import os
import sys
import types
from collections.abc import Callable
from typing import Any

if __name__ == "__main__":  # a script under -I knows the standard library only
    sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__)))))

from jaxchat.tools.sandbox_landlock import confine_files
from jaxchat.tools.sandbox_limits import limit, renounce
from jaxchat.tools.sandbox_seccomp import confine_calls
from jaxchat.tools.sandbox_values import BadMessage, receive, send

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
