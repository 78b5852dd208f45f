"""The parser of command lines: errors of the contract, and no flag half forgotten."""

from __future__ import annotations

import argparse
from typing import Any, NoReturn

from jaxchat.errors import UsageError


class Once(argparse.Action):
    """Store a value; a second one is refused, except that of `--data`, which is read as well."""

    before: str | None = None

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option: str | None = None) -> None:
        if self.before is not None and option != "--data":
            raise UsageError(f"{option}: is given twice, {self.before} and {values}; give it once")
        self.before = str(values) if self.before is None else f"{self.before} + {values}"
        setattr(namespace, self.dest, self.before if option == "--data" else values)


class Parser(argparse.ArgumentParser):
    """Raises `UsageError` instead of printing the usage, also for a flag that is given twice."""

    def __init__(self, **settings: Any):
        super().__init__(**settings)
        self.register("action", None, Once)

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; see {self.prog} --help")
