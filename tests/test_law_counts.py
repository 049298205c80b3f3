"""tools/law_counts.py counts the tests of tests/laws and writes its table into a document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TOOL = REPOSITORY / "tools" / "law_counts.py"
START, END = "<!-- law counts -->\n", "<!-- /law counts -->"


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def table() -> str:
    done = run()
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_readme_has_one_table_to_replace() -> None:
    """The counts are generated at a release; this test does not pin them."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert re.search(rf"{START}\| in version [\d.]+ \| count \|\n.*\| \d+ \|\n{END}", text, re.DOTALL)


def test_the_counts_are_those_of_the_lists(table: str) -> None:
    from tests.laws.bugs import BUGS
    from tests.laws.layouts import LAYOUTS

    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    by_ranks = [int(count) for what, count in rows.items() if what.startswith("... on ")]
    assert int(rows["layouts compared with one process"]) == sum(by_ranks) == len(LAYOUTS)
    assert int(rows["... with three or more mesh dimensions larger than 1"]) >= 12
    assert int(rows["planted bugs; each makes the comparison fail"]) == len(BUGS)


def test_tests_are_counted_as_pytest_selects_them(table: str) -> None:
    """By another way: what the command line says that it selects."""
    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/laws"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    selected = [line for line in done.stdout.splitlines() if "::" in line]
    assert int(rows["tests of `tests/laws` in `make test`"]) == len(selected), done.stdout[-1000:]


def test_the_text_around_is_left_alone_and_a_file_without_a_place_is_refused(table: str, tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(f"before\n{START}old\n{END}\nafter\n")
    assert run("--write", file).returncode == 0
    assert file.read_text() == f"before\n{START}{table}{END}\nafter\n"

    file.write_text("nothing here\n")
    refused = run("--write", file)
    assert refused.returncode == 2
    assert "a.md" in refused.stderr
    assert file.read_text() == "nothing here\n"
