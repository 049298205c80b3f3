"""A run, from a resolved config to trained weights: build everything, loop, clean up."""

import json
import logging
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dist_llm.checkpoint.store import CheckpointStore, find
from dist_llm.config.load import dump
from dist_llm.config.schema import Config
from dist_llm.data.corpus import Corpus
from dist_llm.data.loader import build_loader, build_streams
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import DataError, UserError
from dist_llm.launch.group import device_of, process_group
from dist_llm.launch.world import World
from dist_llm.observe.console import start_logging, stop_logging
from dist_llm.text.tokenizer import TOKENIZER_FILE, Tokenizer
from dist_llm.train.loop import Trainer
from dist_llm.train.settings import read_vocabulary

log = logging.getLogger("dist_llm")


def train(config: Config, world: World) -> None:
    """Train as the resolved config says, from the newest checkpoint of run.dir if there is one.

    Raises ConfigError or DataError before any process group starts where the input is wrong.
    """
    device = device_of(world)
    corpus = Corpus.of(config.data)
    corpus.check_sizes()
    streams = build_streams(config, corpus)
    vocabulary = read_vocabulary(config, corpus.directory)
    if config.init_from:
        _check_start(Path(config.init_from), corpus)
    directory = Path(config.run.dir)
    files = run_files(config, corpus.directory)
    start_logging(directory / "logs", world)
    try:
        with process_group(world, device):
            if world.main:
                for name, content in files.items():
                    (directory / name).write_bytes(content)
            engine = NativeEngine(config, device)
            loader = build_loader(config, streams, vocabulary, *engine.data_rank, pin=device.type == "cuda")
            store = CheckpointStore(directory / "checkpoints", config.checkpoint.keep)
            trainer = Trainer(config, world, engine, loader, store, files)
            try:
                trainer.run()
            finally:
                loader.close()
            del trainer, engine
    except UserError as error:
        log.error("rank %d on %s: %s", world.rank, world.host, error)  # no traceback: the user can mend it
        raise
    except Exception:
        log.exception("rank %d on %s failed", world.rank, world.host)
        raise
    finally:
        stop_logging()


def _check_start(checkpoint: Path, corpus: Corpus) -> None:
    """Raises CheckpointError or DataError where a run cannot begin with these weights."""
    path = find(checkpoint)
    if Tokenizer.load(path).sha256 != corpus.manifest.tokenizer_sha256:
        raise DataError(f"{corpus.directory}: was prepared with another tokenizer than the one in init_from {path}")


def run_files(config: Config, corpus: Path) -> dict[str, bytes]:
    """The small files kept in the run directory and in each checkpoint."""
    return {
        "config.yaml": dump(config).encode(),
        "environment.json": json.dumps(environment(), indent=2).encode() + b"\n",
        TOKENIZER_FILE: (corpus / TOKENIZER_FILE).read_bytes(),
    }


def environment() -> dict[str, str]:
    """What produced this run: commit, interpreter, packages."""
    packages = ("dist-llm", "torch", "numpy", "pydantic", "tiktoken", "tokenizers")
    facts = {"git_commit": _git_commit(), "python": platform.python_version(), "machine": platform.platform()}
    for package in packages:
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            facts[package] = "not installed"
    if torch.cuda.is_available():
        facts["gpu"] = torch.cuda.get_device_name()
    return facts


def _git_commit() -> str:
    """The commit of this source tree, with `+` where it was changed; `unknown` outside git."""
    here = Path(__file__).parent
    try:
        commit = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+"], cwd=here, capture_output=True, text=True
        )
    except OSError:
        return "unknown"
    return commit.stdout.strip() or "unknown"
