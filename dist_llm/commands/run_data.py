"""Shared code of the actions of `dist-llm data`: the config, data history and corpora of a run."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from rich.console import Console

from dist_llm.config.data_sections import CACHE
from dist_llm.config.load import load_saved_config
from dist_llm.config.schema import Config
from dist_llm.data.data_history import HISTORY_FILE, DataHistory, parse_history
from dist_llm.data.mirror import localize_corpus
from dist_llm.errors import DataError

BLOCK_TOKENS = 1 << 16  # tokens that are read at once

console = Console(highlight=False, markup=False, soft_wrap=True)


class OpenedRun(NamedTuple):
    """The config of a run and the history of the data that it reads."""

    config: Config
    history: DataHistory


def open_run(run: Path) -> OpenedRun:
    """Read the config and the data history of a run. Raises DataError if the directory is not a run."""
    path = run / HISTORY_FILE
    if not path.exists():
        raise DataError(f"--run {run}: has no {HISTORY_FILE}; give the run.dir of a `dist-llm train`")
    return OpenedRun(load_saved_config(run), parse_history(path.read_bytes(), str(path)))


def select_corpora(corpora: Sequence[Path], run: Path | None) -> list[Path]:
    """Return the directories of the named corpora, or else of the corpora that a run reads now.

    Raises DataError unless exactly one of `corpora` and `run` is given.
    """
    if (run is None) == (not corpora):
        raise DataError("give either corpora or a run with --run")
    if run is None:
        return [Path(localize_corpus(str(corpus), CACHE)) for corpus in corpora]
    return [Path(source.path) for source in open_run(run).history[-1].spec.sources]
