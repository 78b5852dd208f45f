"""The calculator a model may call inside an answer.

What a model writes is hostile input: it is parsed with `ast` and interpreted here, never evaluated. Allowed are
decimal numbers, + - * / ( ), unary minus, and `.count` on short strings (`"strawberry".count("r")`). Arithmetic is
exact (fractions), so 0.1+0.2 is 0.3 and the cost is bounded by the length of the expression.
"""

from __future__ import annotations

import ast
import operator
import re
from decimal import Context, Decimal
from fractions import Fraction

MAX_CHARS = 200  # of an expression, strings included; bounds parsing time, nesting and the size of every number
MAX_WHOLE = 10**30  # larger results are refused: no text wants them
MIN_FRACTION = Fraction(1, 10**12)  # smaller results would be written as a row of zeros
SIGNIFICANT_DIGITS = 10

_STRING = re.compile(r"'[^'\"\\\n]*'|\"[^'\"\\\n]*\"")
# What may stand outside of strings. Names, exponents, hexadecimal numbers, ** and // never reach the parser.
_OUTSIDE = re.compile(r"(?:[0-9+\-/(). ']|\*(?!\*)|\.count)*", re.ASCII)
_THOUSANDS = re.compile(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?![\d,])", re.ASCII)
_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def calculate(expression: str) -> str | None:
    """Return the value of an expression as text; None where it is not allowed, not valid or not finite.

    Whole numbers are written without ".0", others rounded to at most 10 significant digits ("0.3333333333"), never
    with an exponent. Commas between thousands ("1,000*3") are understood.
    """
    expression = expression.strip()
    if not expression or len(expression) > MAX_CHARS:
        return None
    outside = _STRING.sub("''", expression)
    if outside == expression:
        expression = outside = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), expression)
    if not _OUTSIDE.fullmatch(outside) or "//" in outside:
        return None
    try:
        return format_number(_value(ast.parse(expression, mode="eval").body, expression.encode()))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def format_number(value: Fraction) -> str | None:
    """Return a number as tool outputs write it; None outside of the range that is worth writing."""
    if abs(value) >= MAX_WHOLE or 0 < abs(value) < MIN_FRACTION:
        return None
    if value.denominator == 1:
        return str(value.numerator)
    rounded = Context(prec=SIGNIFICANT_DIGITS).divide(Decimal(value.numerator), Decimal(value.denominator))
    text = format(rounded, "f")
    return text.rstrip("0").rstrip(".") if "." in text else text


def _value(node: ast.expr, source: bytes) -> Fraction:
    """Interpret the allowed nodes of one line of UTF-8; `ValueError` for any other."""
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        # the decimal that was written, not the binary number nearest to it
        return Fraction(source[node.col_offset : node.end_col_offset].decode())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand, source)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATORS:
        left, right = _value(node.left, source), _value(node.right, source)
        return _OPERATORS[type(node.op)](left, right)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "count":
        text, part = (_text(n) for n in (node.func.value, *node.args))  # ValueError unless exactly one argument
        return Fraction(text.count(part))
    raise ValueError("not allowed in a calculation")


def _text(node: ast.expr) -> str:
    """Return a string that is not empty; `ValueError` for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value:
        return node.value
    raise ValueError("not a string")
