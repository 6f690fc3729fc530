"""The page of the training invariants has all of them, and names tests that `make test-training` runs."""

import ast
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "training-invariants.md"
ROW = re.compile(r"^\| (\d+) \| .+ \| (.+) \|$", re.MULTILINE)


def marked_tests():
    """Names of the tests in files that are marked as a whole."""
    names = set()
    for path in ROOT.glob("tests/**/test_*.py"):
        text = path.read_text(encoding="utf-8")
        if re.search(r"^pytestmark = \[?\s*pytest\.mark\.training\b", text, re.MULTILINE):
            names |= {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    return {name for name in names if name.startswith("test_")}


def test_each_invariant_is_there_and_names_tests_that_are_run():
    rows = ROW.findall(PAGE.read_text(encoding="utf-8"))
    assert [int(number) for number, _ in rows] == list(range(1, 21))
    tests = marked_tests()
    for number, proofs in rows:
        named = re.findall(r"`(test_\w+)`", proofs)
        assert named, f"invariant {number} names no test"
        assert set(named) <= tests, f"invariant {number}: {set(named) - tests}"
