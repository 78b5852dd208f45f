"""Plain data across a pipe that a hostile program writes into: never pickled, never evaluated, bounded in size.

A value is JSON; what JSON lacks is an object with one key that names its type. Numbers, strings, booleans, None, lists,
tuples, dicts, sets, bytes, complex, Decimal and Fraction keep their type (a subclass becomes its base). Any other
iterable arrives as an iterator over its items, so it equals no list; any other object as one that equals only itself.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable
from typing import Any

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
