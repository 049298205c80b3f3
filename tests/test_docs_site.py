"""The documentation site builds in strict mode: no broken link, no page outside the navigation, no missing module."""

import importlib
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(importlib.util.find_spec("mkdocs") is None, reason="mkdocs is in the extra `docs`")


def build_site(config: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of a MkDocs config in strict mode, without --quiet, which would hide warnings from strict mode."""
    return subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--config-file", config, "--site-dir", folder],
        cwd=REPOSITORY,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        timeout=240,
    )


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the documentation site, built once."""
    folder = tmp_path_factory.mktemp("site")
    completed = build_site(REPOSITORY / "mkdocs.yml", folder)
    assert completed.returncode == 0, completed.stderr
    return folder


@pytest.mark.parametrize(
    ("link", "is_broken"),
    [("b.md#title", False), ("c.md", True), ("b.md#other", True)],
    ids=["correct", "missing page", "missing heading"],
)
def test_a_planted_broken_link_fails_the_build(link: str, is_broken: bool, tmp_path: Path) -> None:
    validation = re.search(r"^validation:\n(?:  .*\n)+", (REPOSITORY / "mkdocs.yml").read_text(), re.MULTILINE)
    assert validation is not None
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "index.md").write_text(f"[link]({link})\n")
    (tmp_path / "docs" / "b.md").write_text("# Title\n")
    (tmp_path / "mkdocs.yml").write_text(f"site_name: a\nplugins: []\n{validation[0]}")
    completed = build_site(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert (completed.returncode != 0) == is_broken, completed.stderr


def test_every_document_is_a_page(site: Path) -> None:
    documents = {path.relative_to(REPOSITORY / "docs") for path in (REPOSITORY / "docs").rglob("*.md")}
    pages = {path.relative_to(site).with_suffix(".md") for path in site.rglob("*.html")}
    assert {path for path in documents if path.name != "README.md"} <= pages
    assert {Path(name) for name in ("index.md", "design/index.md", "contributing.md", "benchmarks.md")} <= pages


def test_links_between_documents_become_links_between_pages(site: Path) -> None:
    assert 'href="getting-started.html"' in (site / "index.html").read_text()
    assert 'href="index.html#why-trust-it"' in (site / "layouts.html").read_text()
    assert 'href="../speed.html"' in (site / "design" / "tensor-parallelism.html").read_text()
    assert 'href="gpu.html#compile-for-a-gpu-without-one"' in (site / "benchmarks.html").read_text()


def test_links_to_files_that_are_no_pages_keep_their_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """A link to a file that does not exist remains a link, so that strict mode reports it."""
    monkeypatch.syspath_prepend(str(REPOSITORY / "tools"))
    hooks = importlib.import_module("docs_site")
    page = SimpleNamespace(file=SimpleNamespace(src_uri="index.md"))
    files = SimpleNamespace(src_uris={"index.md": 0, "data.md": 0, "architecture.svg": 0})
    text = "[a](LICENSE) [b](docs/data.md#x) ![c](docs/architecture.svg) [d](gone.md) [e](https://host/f)\n"
    fence = "```sh\n[f](docs/data.md)\n```\n"
    assert hooks.on_page_markdown(text + fence, page, None, files) == (
        "a [b](data.md#x) ![c](architecture.svg) [d](gone.md) [e](https://host/f)\n" + fence
    )


def test_generated_pages_have_the_keys_and_the_docstrings(site: Path) -> None:
    keys = set(re.findall(r"<code>([a-z_.0-9]+)</code>", (site / "config.html").read_text()))
    assert {"optim.lr", "parallel.dp_shard", "precision", "base", "model.from"} <= keys
    assert "The public Python API" in (site / "api.html").read_text()
    assert "The device mesh of all ranks" in (site / "api" / "parallel.html").read_text()
