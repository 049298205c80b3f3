"""MkDocs hooks: pages of the site that are not files of docs/, and links that leave docs/.

The site gets the README as its home page, CONTRIBUTING, CHANGELOG, the page on benchmarks, the list of config keys, and
an API page for each package. mkdocs.yml names this file; `make docs` runs it.
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
# Documents outside docs/, by the page that they become.
OUTSIDE = {
    "index.md": "README.md",
    "contributing.md": "CONTRIBUTING.md",
    "changelog.md": "CHANGELOG.md",
    "benchmarks.md": "benchmarks/README.md",
}
PAGE_OF = {document: page for page, document in OUTSIDE.items()}
# The public modules of each package.
API = {
    "config": "schema load check derive lengths",
    "losses": "cross_entropy fused_linear_cross_entropy",
    "optim": "build_optimizer adamw muon sgd schedule gradient_clipping loss_scale",
    "models": "decoder encoder_decoder block attention attention_mask init",
    "objectives": "batch build_objective",
    "data": "corpus data_history loader plan order shard",
    "text": "prepare adopt tokenizer filters",
    "launch": "world group stop watchdog run_lock",
    "observe": "metrics flops",
    "parallel": "mesh parallelize fsdp tensor_parallel context_parallel pipeline_parallel activation_budget",
    "checkpoint": "checkpoint_state store checkpoint_write manifest",
    "convert": "weights",
    "engines": "base native deepspeed_engine accelerate_engine",
    "training": "settings run trainer step score evaluate",
}
FENCE = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[([^\]]*)\]\((?!\w+:|#)([^)\s#]+)(#[^)\s]*)?\)")  # text, target, anchor


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the generated pages."""
    pages = {page: (REPOSITORY / document).read_text(encoding="utf-8") for page, document in OUTSIDE.items()}
    pages["config.md"] = config_page()
    packages = "".join(f"- [{package}](api/{package}.md)\n" for package in API)
    pages["api.md"] = f"# Python API\n\n::: dist_llm.api\n\n## Packages\n\n{packages}"
    pages |= {f"api/{package}.md": api_page(package, modules.split()) for package, modules in API.items()}
    for page, text in pages.items():
        if page not in files.src_uris:
            files.append(File.generated(config, page, content=text))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Point links between documents at the pages that they become; of links to other files, keep the text."""
    uri = page.file.src_uri
    document = PurePosixPath(OUTSIDE.get(uri, f"docs/{uri}"))

    def site_link(match: re.Match[str]) -> str:
        target = os.path.normpath(document.parent / match[2])
        target_page = PAGE_OF.get(target, target.removeprefix("docs/"))
        if target_page not in files.src_uris and (REPOSITORY / target).exists():
            return match[1]
        return f"[{match[1]}]({os.path.relpath(target_page, PurePosixPath(uri).parent)}{match[3] or ''})"

    return "".join(
        part if number % 2 else LINK.sub(site_link, part) for number, part in enumerate(FENCE.split(markdown))
    )


def api_page(package: str, modules: list[str]) -> str:
    """The page of a package: its public modules, documented by their docstrings."""
    return f"# {package}\n\n" + "\n".join(f"::: dist_llm.{package}.{module}\n" for module in modules)


def config_page() -> str:
    """A table of the keys of each section, as `dist-llm train --help-config` lists them."""
    return "# Config keys\n\nAs `dist-llm train --help-config` lists them.\n\n" + "\n".join(config_lines()) + "\n"


def config_lines() -> Iterator[str]:
    """A heading for each section, and a row for each key."""
    sys.path.insert(0, str(REPOSITORY))
    from dist_llm.config.load import describe

    section = None
    for key, kind, default, description in sorted(describe(), key=lambda row: ("." in row[0], row[0].split(".")[0])):
        here = key.rpartition(".")[0]
        if here != section:
            yield from (
                "",
                f"## {here or 'Top level'}",
                "",
                "| key | type | default | meaning |",
                "| --- | --- | --- | --- |",
            )
            section = here
        cells = [f"`{key}`", kind, f"`{default}`", description]
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"
