"""Count the layouts, planted bugs and tests of tests/laws for the table in the README; a step of each release.

Prints a Markdown table, whose heading names the version. With --write FILE, replaces the text between the lines
`<!-- law counts -->` and `<!-- /law counts -->` of the file. No test checks the counts in the README.

  python tools/law_counts.py --write README.md
"""

import argparse
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path
from typing import NamedTuple

import pytest

REPOSITORY = Path(__file__).parents[1]
LAWS = REPOSITORY / "tests" / "laws"
MARKED_TEXT = re.compile(r"(<!-- law counts -->\n).*?(<!-- /law counts -->)", re.DOTALL)


def main() -> int:
    """Print the table or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, metavar="FILE", help="update the table in this file")
    file = parser.parse_args().write
    if file is None:
        print(format_table(), end="")
        return 0
    text = file.read_text(encoding="utf-8")
    if (num_pairs := len(MARKED_TEXT.findall(text))) != 1:
        print(f"error: {file}: needs one pair of lines {MARKED_TEXT.pattern!r}, has {num_pairs}", file=sys.stderr)
        return 2
    table = format_table()
    file.write_text(MARKED_TEXT.sub(lambda match: f"{match[1]}{table}{match[2]}", text), encoding="utf-8")
    print(f"{file}: table of counts replaced", file=sys.stderr)
    return 0


def format_table() -> str:
    """Return the counts as a Markdown table."""
    sys.path.insert(0, str(REPOSITORY))
    from dist_llm import __version__
    from tests.laws import covering, moe_bugs  # noqa: F401  # moe_bugs adds its bugs to BUGS
    from tests.laws.bugs import BUGS
    from tests.laws.layouts import ARCHITECTURE_LAYOUTS, COMPILED_LAYOUTS, LAYOUTS
    from tests.laws.run_space import FACTORS

    layouts = {str(layout): layout for layout in LAYOUTS.values()}.values()
    num_layouts_by_ranks = Counter(layout.ranks for layout in layouts)
    test_counts = count_tests()
    counts = {
        f"cases of the covering array; each compatible pair of values of {len(FACTORS)} factors occurs in a case": len(
            covering.load_array()[0]
        ),
        "layouts compared with one process": len(layouts),
        **{f"... on {ranks} ranks": num_layouts_by_ranks[ranks] for ranks in sorted(num_layouts_by_ranks)},
        "... with three or more mesh dimensions larger than 1": sum(
            layout.num_parallel_axes >= 3 for layout in layouts
        ),
        "layouts of other architectures and objectives": len({str(layout) for layout in ARCHITECTURE_LAYOUTS.values()}),
        "layouts with `torch.compile` and recomputation": len({str(layout) for layout in COMPILED_LAYOUTS.values()}),
        "planted bugs; each makes the comparison fail": len(BUGS),
        "tests of `tests/laws` in `make test`": test_counts.num_default,
        "additional tests with `pytest -m slow`, skipped combinations included": test_counts.num_slow,
    }
    heading = [f"| in version {__version__} | count |", "| --- | --- |"]
    return "\n".join([*heading, *(f"| {label} | {count} |" for label, count in counts.items())]) + "\n"


class TestCounts(NamedTuple):
    """How many tests of tests/laws pytest runs by default, and how many have the marker `slow`."""

    num_default: int
    num_slow: int


def count_tests() -> TestCounts:
    """Collect the tests of tests/laws and count them. Raises RuntimeError if pytest cannot collect them."""
    counts: Counter[str] = Counter()

    class TestCounter:
        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            """Count the tests before pytest deselects any."""
            for item in items:
                markers = {marker.name for marker in item.iter_markers()}
                counts["slow" if "slow" in markers else "default" if markers.isdisjoint({"gpu", "slurm"}) else ""] += 1

    with redirect_stdout(StringIO()) as output:
        exit_code = pytest.main(["--collect-only", "-p", "no:cacheprovider", str(LAWS)], [TestCounter()])
    if exit_code != pytest.ExitCode.OK or not counts:
        raise RuntimeError(f"pytest cannot collect {LAWS}:\n{output.getvalue()}")
    return TestCounts(counts["default"], counts["slow"])


if __name__ == "__main__":
    sys.exit(main())
