"""Reject retired words as identifiers, so that each concept has one name, the standard term of the field.

    python tools/lint_names.py                 # check the packages below
    python tools/lint_names.py dist_llm/data   # check other files or folders

The program checks names where they are defined: functions, classes, arguments, variables, attributes, import aliases
and file names. It does not check uses, so names of libraries may appear. Exit code 1: a name is retired.
"""

import ast
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# The folders and files that are checked.
CHECKED = ("dist_llm", "benchmarks", "tests", "tools/law_counts.py", "tools/lint_names.py")

# {retired word: what to write instead}
RETIRED = {
    **dict.fromkeys(("told", "asked", "meant", "noted", "agreed"), "the value itself, such as stop_signal"),
    **dict.fromkeys(("held", "Held"), "state, or in_flight"),
    **dict.fromkeys(("taken", "given", "gotten", "made", "moved", "kept", "gone"), "the noun of the value"),
    **dict.fromkeys(("Taken", "Facts", "Watch", "Garbage", "Between", "Owners", "Boxes"), "a noun of its job"),
    **dict.fromkeys(("shares", "Shares"), "shards, or weights"),
    **dict.fromkeys(("copies", "Copies"), "replicas"),
    **dict.fromkeys(("pieces", "parts"), "chunks, segments, shards or model_parts"),
    **dict.fromkeys(("place", "places"), "index, position, offset, coordinate or path"),
    **dict.fromkeys(("look", "glance", "weigh", "settle", "tell", "say", "beat"), "a verb with its object"),
    **dict.fromkeys(("mine", "others", "theirs", "ours"), "local, peers or owned"),
    **dict.fromkeys(("every", "whole", "some", "most"), "by_rank, full or a plural noun"),
    **dict.fromkeys(("words", "found", "odd", "wanted"), "the noun of the value, such as mismatches"),
    **dict.fromkeys(("visible", "Visibility", "survivors"), "mask, AttentionMask or depth_scale"),
    **dict.fromkeys(("summed", "exchanged"), "the collective, such as all_gather"),
    **dict.fromkeys(("numbered", "chance"), "element_ids, counter_rng"),
    **dict.fromkeys(("got", "want", "wants"), "actual and expected"),
    **dict.fromkeys(("said", "heard"), "output, message or lines"),
    **dict.fromkeys(("caught",), "excinfo, warning_messages"),
    **dict.fromkeys(("straight", "begun", "here", "there", "who", "whom"), "the noun of the value"),
}

# Exceptions: config keys, keys of files, and names that an interface of another library requires.
ALLOWED = {
    ("dist_llm/config/schema.py", "every"),
    ("dist_llm/checkpoint/checkpoint_folder.py", "tell"),  # a method of io.IOBase, which torch calls
    ("dist_llm/text/duplicates.py", "words"),  # the words of a text
    ("dist_llm/text/gopher.py", "words"),  # the words of a text
    ("dist_llm/text/report.py", "kept"),  # a key of report.json
}


def main() -> int:
    """Check the files of the command line, or CHECKED; print one line per retired name."""
    paths = [Path(argument) for argument in sys.argv[1:]] or [ROOT / name for name in CHECKED]
    reports = [report for path in paths for report in check_path(path)]
    print("\n".join(reports) if reports else "names: no retired word")
    return int(bool(reports))


def check_path(path: Path) -> Iterator[str]:
    """Yield a report for each retired name in a file, or in all Python files of a folder."""
    for file in [path] if path.is_file() else sorted(path.rglob("*.py")):
        file = file.resolve()
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.as_posix()
        identifiers = [(0, file.stem), *iter_definitions(ast.parse(file.read_text(encoding="utf-8")))]
        for line, identifier in identifiers:
            word = strip_suffix(identifier)
            if word in RETIRED and (name, word) not in ALLOWED:
                yield f"{name}:{line}: {identifier}: a retired word; write {RETIRED[word]}"


def strip_suffix(identifier: str) -> str:
    """Remove leading and trailing underscores, and a shape suffix such as _BSD."""
    word, _, suffix = identifier.strip("_").rpartition("_")
    return word if word and suffix and suffix.upper() == suffix else identifier.strip("_")


def iter_definitions(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield (line, identifier) for each name that the module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.attr
        elif isinstance(node, ast.Import | ast.ImportFrom):
            yield from _iter_aliases(node.lineno, node.names)
        elif isinstance(node, ast.ExceptHandler | ast.MatchAs | ast.MatchStar) and node.name:
            yield node.lineno, node.name


def _iter_aliases(line: int, names: Iterable[ast.alias]) -> Iterator[tuple[int, str]]:
    """Yield (line, alias) for each alias of an import."""
    return ((line, alias.asname) for alias in names if alias.asname)


if __name__ == "__main__":
    sys.exit(main())
