"""The documents name commands, config keys, files and functions that exist, and their links lead somewhere.

A ```sh block that follows a line `<!-- run -->` also runs.
"""

import ast
import importlib
import itertools
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_llm.cli import build_parser
from dist_llm.config.check import check
from dist_llm.config.load import load_config

from . import commands
from .commands import REPOSITORY

DESIGN_FILE = REPOSITORY / "docs" / "design" / "README.md"
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("[!.]*/*.md")),
    *sorted(DESIGN_FILE.parent.glob("*.md")),
]
SH_BLOCK = re.compile(r"(<!-- run -->\n)?```sh\n(.*?)```", re.DOTALL)
FILE_REFERENCE = re.compile(r"`([\w./-]+\.(?:py|yaml|md|toml|txt))(?::(\w+))?`")


def find_blocks(only_marked: bool) -> list[tuple[str, str]]:
    """Return (document, text) of each ```sh block; with `only_marked`, only of the blocks that are marked to run."""
    return [
        (document.relative_to(REPOSITORY).as_posix(), text)
        for document in DOCUMENTS
        for run_marker, text in SH_BLOCK.findall(document.read_text())
        if run_marker or not only_marked
    ]


def iter_commands(text: str) -> Iterator[list[str]]:
    """Yield the arguments of each command in a block, without comments and leading variables; join continued lines.

    The operators `&&`, `||`, `|` and `&` separate the commands of a line.
    """
    for line in text.replace("\\\n", " ").splitlines():
        tokens = shlex.split(line, comments=True)
        for is_operator, group in itertools.groupby(tokens, lambda token: token in ("&", "|", "||", "&&")):
            arguments = list(itertools.dropwhile(lambda token: re.match(r"[A-Z_]+=", token), group))
            if arguments and not is_operator:
                yield arguments


COMMANDS = [
    (document, arguments) for document, text in find_blocks(only_marked=False) for arguments in iter_commands(text)
]


def test_there_are_commands_to_check() -> None:
    dist_llm_commands = [
        arguments
        for document, arguments in COMMANDS
        if document == "README.md" and extract_dist_llm_arguments(arguments) is not None
    ]
    assert {arguments[-1] for _, arguments in COMMANDS if arguments[0] == "make"} >= {"demo", "test"}
    assert len(dist_llm_commands) >= 5
    assert find_blocks(only_marked=True)


@pytest.mark.parametrize("arguments", [arguments for _, arguments in COMMANDS if arguments[0] == "make"], ids=" ".join)
def test_a_make_target_exists(arguments: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert arguments[-1] in targets


@pytest.mark.parametrize(
    "arguments",
    [arguments for _, arguments in COMMANDS if "dist_llm" in " ".join(arguments).replace("-", "_")],
    ids=" ".join,
)
def test_a_command_parses_and_its_keys_exist(arguments: list[str]) -> None:
    dist_llm_args = extract_dist_llm_arguments(arguments)
    if dist_llm_args is None:
        return  # a path that contains the name
    if "--help" in dist_llm_args:
        return
    options = build_parser().parse_args(dist_llm_args)
    if options.command != "train" or options.help_config is not None:
        return
    overrides = [item for item in options.rest if "=" in item]
    files = [item for item in options.rest if "=" not in item] + [options.config] * bool(options.config)
    config, violations = load_config(REPOSITORY / str(files[0]), overrides)
    assert violations == []
    assert config is not None
    if not options.debug:
        assert check(config, count_ranks(arguments), tokenizer_size=config.model.vocab_size or 0) == []


@pytest.mark.parametrize(
    "arguments",
    [
        arguments
        for _, arguments in COMMANDS
        if arguments[:2] == ["python", "benchmarks/gpu.py"] and "--help" not in arguments
    ],
    ids=" ".join,
)
def test_a_command_of_the_gpu_program_parses(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cases that a document names exist."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(sys, "argv", arguments[1:])
    importlib.import_module("gpu").parse_arguments()


def extract_dist_llm_arguments(arguments: list[str]) -> list[str] | None:
    """Return the arguments of `dist-llm ...` or `... -m dist_llm ...`; None for other commands."""
    for index, argument in enumerate(arguments):
        if argument == "dist-llm" or (argument == "dist_llm" and arguments[index - 1] == "-m"):
            return arguments[index + 1 :]
    return None


def count_ranks(arguments: list[str]) -> int:
    """Return the number of processes that torchrun starts; 1 without torchrun."""
    counts = {flag: int(value) for flag, value in itertools.pairwise(arguments) if value.isdecimal()}
    return counts.get("--nnodes", 1) * counts.get("--nproc-per-node", 1)


# The commands of these documents take at least 15 s.
SLOW_DOCUMENTS = (
    *("docs/checkpoints.md", "docs/corpora.md", "docs/engines.md", "docs/experts.md", "docs/layers.md"),
    "docs/optimizers.md",
)


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(document, marks=pytest.mark.slow if document in SLOW_DOCUMENTS else ())
        for document in sorted({document for document, _ in find_blocks(only_marked=True)})
    ],
)
def test_the_marked_blocks_of_a_page_run(document: str, tmp_path: Path) -> None:
    """The blocks of a document run in sequence, in one directory."""
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    script = "\n".join(text for name, text in find_blocks(only_marked=True) if name == document)
    completed = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", script],
        cwd=tmp_path,
        env=commands.make_environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert completed.returncode == 0, f"{document}:\n{completed.stdout}\n{completed.stderr}"


def relative_name(document: Path) -> str:
    """Return the path of a document from the root of the repository."""
    return document.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative_name)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert find_broken_links(document) == []


def test_a_broken_link_is_reported(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A `key` and more\n```sh\n# a comment\n```\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[x](b.md#a-key-and-more) [x](https://host/a) [x](#no) [x](b.md#no) [x](b.md#a-comment) [x](c.md)\n"
        "```sh\n[x](d.md)\n```\n"
    )
    assert find_broken_links(page) == ["#no", "b.md#no", "b.md#a-comment", "c.md"]


def read_unfenced(document: Path) -> str:
    """Return the text of a page without its fenced blocks, whose comments look like headings."""
    return re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)


def find_broken_links(document: Path) -> list[str]:
    """Return the relative links of a page whose file or heading does not exist."""
    text = read_unfenced(document)
    broken = []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in find_anchors(file)):
            broken.append(link)
    return broken


def find_anchors(document: Path) -> set[str]:
    """Return the anchors of the headings of a page, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", read_unfenced(document), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative_name)
def test_lines_are_short(document: Path) -> None:
    """The limit is 120 characters, except for tables, headings, links and fenced blocks."""
    text = read_unfenced(document)
    long_lines = [line for line in text.splitlines() if len(line) > 120 and not re.match(r"\||#+ |.*\]\(", line)]
    assert long_lines == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=relative_name)
def test_named_files_and_functions_exist(document: Path) -> None:
    for name, symbol in FILE_REFERENCE.findall(document.read_text()):
        paths = [path for path in (REPOSITORY / name, document.parent / name) if path.is_file()]
        if "/" not in name and not paths:
            continue  # a file of a run or of a corpus, such as config.yaml
        assert paths, f"{document.name} names {name}, which does not exist"
        if symbol:
            assert symbol in find_defined_names(paths[0]), (
                f"{document.name} names {name}:{symbol}, which does not exist"
            )


def find_defined_names(file: Path) -> set[str]:
    """Return the functions, classes, methods and module constants of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_tree_in_the_design_matches_the_repository() -> None:
    """Each entry of the tree exists, and each package is an entry."""
    text = re.search(r"```text tree\n(.*?)```", DESIGN_FILE.read_text(), re.DOTALL)
    assert text is not None
    parents: list[str] = []
    entries = set()
    for line in text[1].splitlines():
        depth = (len(line) - len(line.lstrip())) // 2
        name = line.split()[0]
        parents[depth:] = [name]
        entries.add("".join(parents))
    assert [entry for entry in sorted(entries) if not (REPOSITORY / entry).exists()] == []
    packages = {f"dist_llm/{path.parent.name}/" for path in (REPOSITORY / "dist_llm").glob("*/__init__.py")}
    assert packages - entries == set()
