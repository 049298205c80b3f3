"""Build the small files that a run writes to its directory and to each checkpoint: config, environment, tokenizer."""

import json
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dist_llm.checkpoint.checkpoint_folder import CheckpointFolder
from dist_llm.config.load import dump_config
from dist_llm.config.schema import Config
from dist_llm.text.tokenizer import TOKENIZER_FILE

# Files that are copied from the start checkpoint for a later export.
EXPORT_FILES = {TOKENIZER_FILE, "token_ids.json", "generation_config.json"}


def build_run_files(config: Config, corpus_dir: Path, start: CheckpointFolder | Path | None = None) -> dict[str, bytes]:
    """Return the small files {name: content} for the run directory and each checkpoint.

    EXPORT_FILES come from the checkpoint `start`, if there is one. Its tokenizer has the same ids as the tokenizer of
    the corpus, and may have a chat template and other settings.
    """
    files = {
        "config.yaml": dump_config(config).encode(),
        "environment.json": json.dumps(describe_environment(), indent=2).encode() + b"\n",
        TOKENIZER_FILE: (corpus_dir / TOKENIZER_FILE).read_bytes(),
    }
    if start is not None:
        folder = CheckpointFolder(start)
        files |= {name: folder.read(name) for name in sorted({*folder.list_names()} & EXPORT_FILES)}
    return files


def describe_environment() -> dict[str, str]:
    """Return the software of this run: git commit, Python version, package versions, GPU."""
    packages = ("dist-llm", "torch", "numpy", "pydantic", "tiktoken", "tokenizers")
    versions = {"git_commit": _read_git_commit(), "python": platform.python_version(), "machine": platform.platform()}
    for package in packages:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "not installed"
    if torch.cuda.is_available():
        versions["gpu"] = torch.cuda.get_device_name()
    return versions


def _read_git_commit() -> str:
    """Return the git commit of the source tree, with `+` if there are uncommitted changes; `unknown` outside git."""
    source_dir = Path(__file__).parent
    try:
        completed = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"], cwd=source_dir, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return completed.stdout.strip() or "unknown"
