"""tools/law_counts.py counts the tests of tests/laws and writes its table into a document."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
TOOL = REPOSITORY / "tools" / "law_counts.py"
START, END = "<!-- law counts -->\n", "<!-- /law counts -->"


def run_tool(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Run tools/law_counts.py."""
    return subprocess.run([sys.executable, TOOL, *map(str, arguments)], capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def table() -> str:
    """The output of tools/law_counts.py, which is a table."""
    completed = run_tool()
    assert completed.returncode == 0, completed.stderr
    return completed.stdout


def test_the_readme_has_one_table_to_replace() -> None:
    """The counts are generated at a release; this test does not pin them."""
    text = (REPOSITORY / "README.md").read_text(encoding="utf-8")
    assert text.count(START) == text.count(END) == 1
    assert re.search(rf"{START}\| in version [\d.]+ \| count \|\n.*\| \d+ \|\n{END}", text, re.DOTALL)


def test_the_counts_match_the_lists(table: str) -> None:
    from tests.laws import moe_bugs, window_bugs  # noqa: F401  # they add their bugs to BUGS
    from tests.laws.bugs import BUGS
    from tests.laws.layouts import LAYOUTS

    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    counts_by_ranks = [int(count) for label, count in rows.items() if label.startswith("... on ")]
    assert int(rows["layouts compared with one process"]) == sum(counts_by_ranks) == len(LAYOUTS)
    assert int(rows["... with three or more mesh dimensions larger than 1"]) >= 12
    assert int(rows["planted bugs; each makes the comparison fail"]) == len(BUGS)


def test_the_number_of_tests_matches_pytest(table: str) -> None:
    """Compare with the tests that `pytest --collect-only` selects."""
    rows = dict(line.strip("| ").split(" | ") for line in table.splitlines()[2:])
    completed = subprocess.run(
        [sys.executable, "-m", "pytest", "--collect-only", "tests/laws"],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        timeout=240,
    )
    selected = [line for line in completed.stdout.splitlines() if "::" in line]
    assert int(rows["tests of `tests/laws` in `make test`"]) == len(selected), completed.stdout[-1000:]


def test_write_keeps_the_text_around_the_table(table: str, tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text(f"before\n{START}old\n{END}\nafter\n")
    assert run_tool("--write", file).returncode == 0
    assert file.read_text() == f"before\n{START}{table}{END}\nafter\n"


def test_write_refuses_a_file_without_markers(tmp_path: Path) -> None:
    file = tmp_path / "a.md"
    file.write_text("nothing here\n")
    refused = run_tool("--write", file)
    assert refused.returncode == 2
    assert "a.md" in refused.stderr
    assert file.read_text() == "nothing here\n"
