"""A run, from a resolved config to trained weights: build everything, loop, clean up."""

import json
import logging
import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from dist_llm.checkpoint.store import CheckpointStore
from dist_llm.config.load import dump
from dist_llm.config.schema import Config
from dist_llm.data.corpus import Corpus
from dist_llm.data.loader import Loader, build_order
from dist_llm.engines.native import NativeEngine
from dist_llm.errors import UserError
from dist_llm.launch.group import device_of, process_group
from dist_llm.launch.world import World
from dist_llm.objectives.causal import causal
from dist_llm.observe.console import start_logging, stop_logging
from dist_llm.text.tokenizer import TOKENIZER_FILE
from dist_llm.train.loop import Trainer

log = logging.getLogger("dist_llm")


def train(config: Config, world: World) -> None:
    """Train as the resolved config says, from the newest checkpoint of run.dir if there is one.

    Raises ConfigError or DataError before any process group starts where the input is wrong.
    """
    device = device_of(world)
    corpus = Corpus.of(config.data)
    corpus.check_sizes()
    order = build_order(config.data, corpus, config.run.seed)
    directory = Path(config.run.dir)
    files = run_files(config, corpus.directory)
    start_logging(directory / "logs", world)
    try:
        with process_group(world, device):
            if world.main:
                for name, content in files.items():
                    (directory / name).write_bytes(content)
            engine = NativeEngine(config, device)
            loader = Loader(corpus, order, causal, config.data, *engine.data_rank, pin=device.type == "cuda")
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
