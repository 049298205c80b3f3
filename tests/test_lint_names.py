"""The lint of names reports retired words, and the checked packages have none."""

from pathlib import Path

import pytest

from tools.lint_names import CHECKED, ROOT, check_path


@pytest.mark.parametrize("name", CHECKED)
def test_a_checked_package_has_no_retired_word(name: str) -> None:
    assert (ROOT / name).exists()
    assert list(check_path(ROOT / name)) == []


@pytest.mark.parametrize(
    ("source", "line", "identifier"),
    [
        ("def glance():\n    pass\n", 1, "glance"),
        ("class Between:\n    pass\n", 1, "Between"),
        ("def load(told):\n    pass\n", 1, "told"),
        ("x = 1\nheld = x\n", 2, "held"),
        ("for every in ():\n    pass\n", 1, "every"),
        ("sizes = [place for place in ()]\n", 1, "place"),
        ("class A:\n    def __init__(self):\n        self._taken = 1\n", 3, "_taken"),
        ("whole_BSD = 1\n", 1, "whole_BSD"),
        ("import math as words\n", 1, "words"),
        ("try:\n    pass\nexcept ValueError as found:\n    pass\n", 3, "found"),
        ("if (mine := 1):\n    pass\n", 1, "mine"),
        ("class A:\n    parts: int\n", 2, "parts"),
    ],
    ids=[
        "function",
        "class",
        "argument",
        "variable",
        "loop",
        "comprehension",
        "attribute",
        "shape suffix",
        "import alias",
        "exception",
        "walrus",
        "annotation",
    ],
)
def test_a_planted_retired_word_is_reported(source: str, line: int, identifier: str, tmp_path: Path) -> None:
    file = tmp_path / "planted.py"
    file.write_text(source)
    reports = list(check_path(tmp_path))
    assert reports
    assert all(report.startswith(f"{file.resolve().as_posix()}:{line}: {identifier}: ") for report in reports)


def test_a_retired_file_name_is_reported(tmp_path: Path) -> None:
    (tmp_path / "chance.py").write_text("")
    (report,) = check_path(tmp_path)
    assert "chance.py:0: chance: a retired word" in report


def test_uses_and_parts_of_names_are_not_reported(tmp_path: Path) -> None:
    """A use may be a name of a library. A retired word within a longer name has a context."""
    (tmp_path / "fine.py").write_text("import state\nmodel_parts = state.held + len(state.parts)\nstate.load(told=1)\n")
    assert list(check_path(tmp_path)) == []
