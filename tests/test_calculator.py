"""The calculator: worked results, the formatter, and everything it must refuse."""

import time

import pytest

from jaxchat.tools.calculator import MAX_CHARS, calculate


@pytest.mark.parametrize(
    ("expression", "result"),
    [
        ("17+25", "42"),
        ("12 * 3", "36"),
        ("6/3", "2"),
        ("7/2", "3.5"),
        ("1/3", "0.3333333333"),
        ("2/3*100", "66.66666667"),
        ("0.1+0.2", "0.3"),
        ("2.50*4", "10"),
        ("-(3-10)*2", "14"),
        ("--5", "5"),
        ("1,000*3", "3000"),
        ("100000000000/3", "33333333330"),
        ("1/300000", "0.000003333333333"),
        (".5*4", "2"),
        ("99999999999999999999*2", "199999999999999999998"),
        ("'strawberry'.count('r')", "3"),
        ('"banana".count("an") + 1', "3"),
        ("'1,000'.count(',')", "1"),
    ],
)
def test_worked_results(expression, result):
    assert calculate(expression) == result


@pytest.mark.parametrize(
    "expression",
    [
        "", "   ", "2**9", "9**9**9", "7//2", "7%2", "1/0", "0/0", "1e5", "0x10", "1_000", "1j", "True", "x", "1;2",
        "(1", "1 2", "1,2", "10,00", "1+", "+5", "1<2", "1 if 1 else 2", "[1]", "abs(-1)", "__import__('os')",
        "(1).real", "(lambda: 1)()", "'a'*1000", "'a'+'b'", "'abc'", "'abc'.upper()", "'abc'.count('')",
        "'abc'.count('a', 1)", "'abc'.count(1)", "1.count('a')", "b'a'.count(b'a')", "f'{1}'.count('1')",
        "'\\x61'.count('a')", "'a' 'b'.count('a').count", "1\x002", "1\n+2", "１+1", "(" * 150 + "1" + ")" * 40,
        "(" * 90 + "1" + ")" * 90 + "(", "9" * 31, "1/" + "9" * 40, "1" * (MAX_CHARS + 1),
    ],
)  # fmt: skip
def test_refuses(expression):
    assert calculate(expression) is None


def test_every_short_hostile_text_is_cheap_and_never_raises():
    start = time.perf_counter()
    for text in ("-" * MAX_CHARS, "9*" * 99 + "9", "(" * MAX_CHARS, "'" * MAX_CHARS, "1/" * 99 + "3", "." * 200):
        assert calculate(text) is None or len(calculate(text)) < 40
    assert time.perf_counter() - start < 1.0
