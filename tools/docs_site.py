"""MkDocs hooks that add pages to the documentation site and adapt links. mkdocs.yml names this file (`make docs`).

The hooks add the README as the home page, CONTRIBUTING, CHANGELOG, the page on benchmarks, the list of config keys, and
an API page for each package. Links between documents become links between pages.
"""

import os
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = Path(__file__).parents[1]
# {page of the site: document outside docs/}
DOCUMENT_OF_PAGE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
PAGE_OF_DOCUMENT = {document: page for page, document in DOCUMENT_OF_PAGE.items()}
# The public modules of each package, which get API documentation.
API_MODULES = {
    "config": "schema load check derive sequence_lengths",
    "losses": "cross_entropy fused_linear_cross_entropy",
    "optim": "build_optimizer adamw muon sgd schedule gradient_clipping loss_scale",
    "models": "decoder encoder_decoder block attention attention_mask init",
    "objectives": "batch build_objective",
    "data": "corpus data_history loader plan order shard",
    "text": "prepare adopt tokenizer filters",
    "launch": "world process_group stop watchdog run_lock",
    "observe": "metrics flops",
    "parallel": "mesh parallelize fsdp tensor_parallel context_parallel pipeline_parallel activation_budget",
    "checkpoint": "checkpoint_state store checkpoint_write manifest",
    "convert": "weights",
    "engines": "base native deepspeed_engine accelerate_engine",
    "training": "settings run trainer callback evaluator step evaluate",
}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")  # text, target, anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not files of docs/ (a MkDocs event)."""
    pages = {page: (REPOSITORY / document).read_text(encoding="utf-8") for page, document in DOCUMENT_OF_PAGE.items()}
    pages["config.md"] = make_config_page()
    package_links = "".join(f"- [{package}](api/{package}.md)\n" for package in API_MODULES)
    pages["api.md"] = f"# Python API\n\n::: dist_llm.api\n\n## Packages\n\n{package_links}"
    pages |= {f"api/{package}.md": make_api_page(package, modules.split()) for package, modules in API_MODULES.items()}
    for page, text in pages.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Replace links to documents by links to their pages, and links to other files by their text (a MkDocs event)."""
    uri = page.file.src_uri
    document = PurePosixPath(DOCUMENT_OF_PAGE.get(uri, f"docs/{uri}"))

    def replace_link(match: re.Match[str]) -> str:
        target = os.path.normpath(document.parent / match[2])
        target_page = PAGE_OF_DOCUMENT.get(target, target.removeprefix("docs/"))
        if target_page not in files.src_uris and (REPOSITORY / target).exists():
            return match[1]
        return f"[{match[1]}]({os.path.relpath(target_page, PurePosixPath(uri).parent)}{match[3] or ''})"

    segments = FENCE.split(markdown)  # text and fenced blocks in turn
    return "".join(segment if index % 2 else LINK.sub(replace_link, segment) for index, segment in enumerate(segments))


def make_api_page(package: str, modules: list[str]) -> str:
    """Return the page of a package, on which mkdocstrings shows the docstrings of the public modules."""
    return f"# {package}\n\n" + "\n".join(f"::: dist_llm.{package}.{module}\n" for module in modules)


def make_config_page() -> str:
    """Return the page with a table of the keys of each config section."""
    lines = "\n".join(iter_config_lines())
    return f"# Config keys\n\nAs `dist-llm train --help-config` lists them.\n\n{lines}\n"


def iter_config_lines() -> Iterator[str]:
    """Yield a heading for each section, and a table row for each key."""
    sys.path.insert(0, str(REPOSITORY))
    from dist_llm.config.describe import describe_keys

    section = None
    for key, kind, default, description in sorted(
        describe_keys(), key=lambda row: ("." in row[0], row[0].split(".")[0])
    ):
        section_of_key = key.rpartition(".")[0]
        if section_of_key != section:
            yield from (
                "",
                f"## {section_of_key or 'Top level'}",
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
            )
            section = section_of_key
        cells = [f"`{key}`", kind, f"`{default}`", description]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
