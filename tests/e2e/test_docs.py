"""The documents are true: commands parse and their keys exist, files and functions named are there.

The ```sh blocks of a page that follow a line `<!-- run -->` are run, too.
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

TREE = REPOSITORY / "docs" / "design" / "README.md"
DOCUMENTS = [
    *sorted(REPOSITORY.glob("*.md")),
    *sorted(REPOSITORY.glob("[!.]*/*.md")),
    *sorted(TREE.parent.glob("*.md")),
]
BLOCK = re.compile(r"(<!-- run -->\n)?```sh\n(.*?)```", re.DOTALL)
REFERENCE = re.compile(r"`([\w./-]+\.(?:py|yaml|md|toml|txt))(?::(\w+))?`")


def blocks(run: bool) -> list[tuple[str, str]]:
    """(document, text) of each ```sh block; with `run`, of those to be run."""
    return [
        (document.relative_to(REPOSITORY).as_posix(), text)
        for document in DOCUMENTS
        for marked, text in BLOCK.findall(document.read_text())
        if marked or not run
    ]


def command_lines(text: str) -> Iterator[list[str]]:
    """Each command as words, continued lines joined, comments and variables in front dropped."""
    for line in text.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        words = list(itertools.dropwhile(lambda word: re.match(r"[A-Z_]+=", word), words))
        if words := list(itertools.takewhile(lambda word: word not in ("&", "|", "||", "&&"), words)):
            yield words


COMMANDS = [(document, words) for document, text in blocks(run=False) for words in command_lines(text)]


def test_there_are_commands_to_check() -> None:
    ours = [words for document, words in COMMANDS if document == "README.md" and ours_in(words) is not None]
    assert {words[-1] for _, words in COMMANDS if words[0] == "make"} >= {"demo", "test"}
    assert len(ours) >= 5
    assert blocks(run=True)


@pytest.mark.parametrize("words", [words for _, words in COMMANDS if words[0] == "make"], ids=" ".join)
def test_a_make_target_exists(words: list[str]) -> None:
    targets = re.findall(r"^([\w-]+):", (REPOSITORY / "Makefile").read_text(), re.MULTILINE)
    assert words[-1] in targets


@pytest.mark.parametrize(
    "words", [words for _, words in COMMANDS if "dist_llm" in " ".join(words).replace("-", "_")], ids=" ".join
)
def test_a_command_parses_and_its_keys_exist(words: list[str]) -> None:
    arguments = ours_in(words)
    if arguments is None:
        return  # a path that has the name in it
    if "--help" in arguments:
        return
    options = build_parser().parse_args(arguments)
    if options.command != "train" or options.help_config:
        return
    overrides = [item for item in options.rest if "=" in item]
    files = [item for item in options.rest if "=" not in item] + [options.config] * bool(options.config)
    config, violations = load_config(REPOSITORY / str(files[0]), overrides)
    assert violations == []
    assert config is not None
    if not options.debug:
        assert check(config, ranks_of(words), config.model.vocab_size) == []


@pytest.mark.parametrize(
    "words",
    [words for _, words in COMMANDS if words[:2] == ["python", "benchmarks/gpu.py"] and "--help" not in words],
    ids=" ".join,
)
def test_a_command_of_the_gpu_program_parses(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that is named in a document exists."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "benchmarks"))
    monkeypatch.setattr(sys, "argv", words[1:])
    importlib.import_module("gpu").arguments()


def ours_in(words: list[str]) -> list[str] | None:
    """The arguments of `dist-llm ...` or `... -m dist_llm ...`."""
    for place, word in enumerate(words):
        if word == "dist-llm" or (word == "dist_llm" and words[place - 1] == "-m"):
            return words[place + 1 :]
    return None


def ranks_of(words: list[str]) -> int:
    """How many processes torchrun would start; 1 without it."""
    counts = {flag: int(value) for flag, value in itertools.pairwise(words) if value.isdecimal()}
    return counts.get("--nnodes", 1) * counts.get("--nproc-per-node", 1)


# Their commands take a quarter of a minute and more.
SLOW_DOCUMENTS = ("docs/checkpoints.md", "docs/corpora.md", "docs/engines.md", "docs/optimizers.md")


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    "document",
    [
        pytest.param(document, marks=pytest.mark.slow if document in SLOW_DOCUMENTS else ())
        for document in sorted({document for document, _ in blocks(run=True)})
    ],
)
def test_the_marked_blocks_of_a_page_run(document: str, tmp_path: Path) -> None:
    """One after the other, in one directory."""
    for folder in ("configs", "tools"):
        (tmp_path / folder).symlink_to(REPOSITORY / folder)
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(text for each, text in blocks(run=True) if each == document)],
        cwd=tmp_path,
        env=commands.environment(),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=580,
    )
    assert done.returncode == 0, f"{document}:\n{done.stdout}\n{done.stderr}"


def name_of(document: Path) -> str:
    return document.relative_to(REPOSITORY).as_posix()


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_links_lead_to_files_and_headings(document: Path) -> None:
    assert broken_links(document) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# A `key` and more\n")
    page = tmp_path / "a.md"
    page.write_text(
        "[x](b.md#a-key-and-more) [x](https://host/a) [x](#no) [x](b.md#no) [x](c.md)\n```sh\n[x](d.md)\n```\n"
    )
    assert broken_links(page) == ["#no", "b.md#no", "c.md"]


def broken_links(document: Path) -> list[str]:
    """The relative links of a page whose file or heading does not exist."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    broken = []
    for link in re.findall(r"\]\((?!\w+:)([^)\s]+)\)", text):
        name, _, anchor = link.partition("#")
        file = document.parent / name if name else document
        if not file.exists() or (anchor and anchor not in anchors(file)):
            broken.append(link)
    return broken


def anchors(document: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", document.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_lines_are_short(document: Path) -> None:
    """At most 120 characters, but for tables, links, commands and quoted output."""
    text = re.sub(r"```.*?```", "", document.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if len(line) > 120 and not re.match(r"\||#+ |.*\]\(", line)]
    assert lines == []


@pytest.mark.parametrize("document", DOCUMENTS, ids=name_of)
def test_files_and_functions_named_exist(document: Path) -> None:
    for name, symbol in REFERENCE.findall(document.read_text()):
        places = [place for place in (REPOSITORY / name, document.parent / name) if place.is_file()]
        if "/" not in name and not places:
            continue  # a run's or a corpus's file, such as config.yaml
        assert places, f"{document.name} names {name}, which is not there"
        if symbol:
            assert symbol in defined_in(places[0]), f"{document.name} names {name}:{symbol}, which is not there"


def defined_in(file: Path) -> set[str]:
    """Functions, classes, methods and module constants of a Python file."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
    return names


def test_the_tree_in_the_design_is_the_tree() -> None:
    """Each entry exists, and each package is an entry."""
    text = re.search(r"```text tree\n(.*?)```", TREE.read_text(), re.DOTALL)
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
