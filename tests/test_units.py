"""Numbers for people: nouns that are counted, and no message that counts one of them in the plural."""

import ast
import re
from pathlib import Path

import vitq
from vitq.units import counted, in_decimals

ROOT = Path(vitq.__file__).parent
NOUNS = "images?|layers?|files?|threads?|plans?|steps?|parts?|pairs?|places?|tensors?"


def test_no_number_is_shown_as_nothing():
    shown = {0.01234: "0.0123", 1.5: "1.5000", 0.0001: "0.0001", 0.00001234: "1.2e-05", -0.00002: "-2e-05", 0.0: "0.0000"}
    assert {value: in_decimals(value) for value in shown} == shown


def test_nouns_are_counted():
    for noun, plural in {"image": "images", "class": "classes", "pass": "passes"}.items():
        assert [counted(number, noun) for number in (0, 1, 2)] == [f"0 {plural}", f"1 {noun}", f"2 {plural}"]


def counts(source: str) -> list[str]:
    """The f-strings of a module in which a number that is one of many (`len`, `num_...`) is followed by a noun in the plural."""
    found = []
    for text in (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.JoinedStr)):
        for value, after in zip(text.values, text.values[1:], strict=False):
            number = ast.unparse(value.value) if isinstance(value, ast.FormattedValue) else ""
            noun = isinstance(after, ast.Constant) and re.match(rf" ({NOUNS})\b", str(after.value))
            if noun and re.search(r"^len\(|num_(images|listed)$|\.steps$|threads$", number):
                found.append(f"{number}{after.value}")
    return found


def test_commands_count_nouns():
    assert counts('f"{len(x)} images"') and not counts('f"{counted(len(x), 1)} and {x} images"')  # so that it can fail
    assert [fault for path in (ROOT / "cli").glob("*.py") for fault in counts(path.read_text())] == []
