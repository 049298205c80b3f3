"""Count what tests/laws covers, from the tests themselves. Part of a release: CONTRIBUTING.md.

Prints a table whose heading names the version. With --write FILE, replaces the text between the lines
`<!-- law counts -->` and `<!-- /law counts -->` of that file. No test pins the counts.

  python tools/law_counts.py --write README.md
"""

import argparse
import re
import sys
from collections import Counter
from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[1]
LAWS = REPOSITORY / "tests" / "laws"
BETWEEN = re.compile(r"(<!-- law counts -->\n).*?(<!-- /law counts -->)", re.DOTALL)


def main() -> int:
    """Print the table or write it."""
    top = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    top.add_argument("--write", type=Path, metavar="FILE", help="the file whose table to replace")
    file = top.parse_args().write
    if file is None:
        print(table(), end="")
        return 0
    text = file.read_text(encoding="utf-8")
    if (places := len(BETWEEN.findall(text))) != 1:
        print(f"error: {file}: must have one pair of lines {BETWEEN.pattern!r}, has {places}", file=sys.stderr)
        return 2
    rows = table()
    file.write_text(BETWEEN.sub(lambda match: f"{match[1]}{rows}{match[2]}", text), encoding="utf-8")
    print(f"{file}: table of counts replaced", file=sys.stderr)
    return 0


def table() -> str:
    """The counts as a table in Markdown."""
    sys.path.insert(0, str(REPOSITORY))
    from dist_llm import __version__
    from tests.laws import covering
    from tests.laws.bugs import BUGS
    from tests.laws.layouts import CHOSEN, FAMILIES, LAYOUTS
    from tests.laws.space import FACTORS

    layouts = {str(layout): layout for layout in LAYOUTS}.values()
    ranks = Counter(layout.ranks for layout in layouts)
    default, slow = collected()
    counts = {
        f"cases of the covering array; each compatible pair of values of {len(FACTORS)} factors occurs in a case": len(
            covering.load()[0]
        ),
        "layouts compared with one process": len(layouts),
        **{f"... on {number} ranks": ranks[number] for number in sorted(ranks)},
        "... with three or more mesh dimensions larger than 1": sum(layout.axes >= 3 for layout in layouts),
        "layouts of other architectures and objectives": len({str(layout) for layout in FAMILIES}),
        "layouts with `torch.compile` and recomputation": len({str(layout) for layout in CHOSEN}),
        "planted bugs; each makes the comparison fail": len(BUGS),
        "tests of `tests/laws` in `make test`": default,
        "additional tests with `pytest -m slow`, skipped combinations included": slow,
    }
    heading = [f"| in version {__version__} | count |", "| --- | --- |"]
    return "\n".join([*heading, *(f"| {what} | {number} |" for what, number in counts.items())]) + "\n"


def collected() -> tuple[int, int]:
    """How many tests of tests/laws pytest collects: those that run by default, and those with the marker `slow`."""
    found: Counter[str] = Counter()

    class Collected:
        @pytest.hookimpl(tryfirst=True)
        def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
            """Called before deselection."""
            for item in items:
                markers = {marker.name for marker in item.iter_markers()}
                found["slow" if "slow" in markers else "default" if markers.isdisjoint({"gpu", "slurm"}) else ""] += 1

    with redirect_stdout(StringIO()) as said:
        code = pytest.main(["--collect-only", "-p", "no:cacheprovider", str(LAWS)], [Collected()])
    if code != pytest.ExitCode.OK or not found:
        raise RuntimeError(f"pytest cannot collect {LAWS}:\n{said.getvalue()}")
    return found["default"], found["slow"]


if __name__ == "__main__":
    sys.exit(main())
