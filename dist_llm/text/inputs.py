"""Open the files and datasets that `prepare --source` names, and read their documents.

An input yields its documents lazily, in a fixed order and in bounded memory. An unreadable file raises DataError, or is
skipped and counted with --skip-unreadable. dist_llm/text/rows.py handles bad rows.
"""

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_llm.errors import DataError
from dist_llm.text.readers import is_text, read_file
from dist_llm.text.report import InputFileCounts
from dist_llm.text.rows import RowFormat, RowTracker, TextDocument, UnreadableError, read_row
from dist_llm.text.walk import FileRules, FolderWalk

DEFAULT_ROW_FORMAT, DEFAULT_RULES = RowFormat(), FileRules()
# A folder with all files of one of these groups was written by datasets.save_to_disk.
SAVED_DATASET_FILES = (("dataset_dict.json",), ("state.json", "dataset_info.json"))
STDLIB = "python-stdlib"
STDLIB_EXCLUDED_FOLDERS = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Input(Protocol):
    """An input of `prepare`: a local file (LocalFile) or a dataset (HFDataset).

    `spec` is the value of `--source` that names the input. `size_bytes` is None if the size is unknown. `fingerprint`
    changes with the content; it is None if changes cannot be detected.
    """

    @property
    def spec(self) -> str: ...

    @property
    def size_bytes(self) -> int | None: ...

    @property
    def fingerprint(self) -> list[str | int] | None: ...

    def iter_documents(self, row_tracker: RowTracker) -> Iterator[TextDocument]: ...


def open_inputs(
    specs: Sequence[str],
    row_format: RowFormat = DEFAULT_ROW_FORMAT,
    hf_split: str = "train",
    rules: FileRules = DEFAULT_RULES,
    file_counts: InputFileCounts | None = None,
) -> list[Input]:
    """Open the files and datasets that `specs` name. `file_counts` counts the files that are read and skipped.

    `hf_split` selects the split of a dataset from the hub, and of a folder that `datasets.save_to_disk` wrote.

    Raises DataError for a missing or unreadable input, before any input is read.
    """
    walk = FolderWalk(rules, InputFileCounts() if file_counts is None else file_counts)
    inputs = [item for spec in specs for item in _open_input(spec, row_format, hf_split, walk)]
    walk.check()
    if row_format.separator and not any(isinstance(item, LocalFile) and is_text(item.path) for item in inputs):
        raise DataError("--separator: only for text files, but the sources have none; leave the option out")
    return inputs


def sum_size_bytes(inputs: Sequence[Input]) -> int | None:
    """Return the total size of all inputs, or None if one size is unknown."""
    sizes = [item.size_bytes for item in inputs]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def iter_documents(inputs: Iterable[Input], row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the documents of all inputs, in order."""
    for item in inputs:
        yield from item.iter_documents(row_tracker)


def _open_input(spec: str, row_format: RowFormat, hf_split: str, walk: FolderWalk) -> Sequence[Input]:
    """Open the inputs of one --source. Raises DataError if it does not exist."""
    if spec == STDLIB:
        # A walk of its own, because --include and --exclude do not apply to the standard library, and the files that
        # it skips are not worth reporting. `walk` counts the files that are read.
        root = Path(sysconfig.get_path("stdlib"))
        python_walk = FolderWalk(FileRules(include=("*.py",)), InputFileCounts())
        paths = python_walk.walk_folder(root, STDLIB_EXCLUDED_FOLDERS)
        return [LocalFile(path, row_format, spec) for path in paths if walk.select_file(path)]
    if spec.startswith("hf:"):
        return [HFDataset(spec, row_format, hf_split)]
    path = Path(spec)
    if any(all((path / name).is_file() for name in names) for names in SAVED_DATASET_FILES):
        return [HFDataset(spec, row_format, hf_split)]
    if path.is_dir():
        return [LocalFile(file_path, row_format, spec) for file_path in walk.walk_folder(path)]
    if path.exists():
        return [LocalFile(path, row_format, spec)] if walk.select_file(path) else []
    raise DataError(f"--source {spec}: no such file or folder. Other sources are {STDLIB} and hf:NAME[:CONFIG].")


@dataclass(frozen=True)
class LocalFile:
    """A file on a local disk. Its suffix selects the reader."""

    path: Path
    row_format: RowFormat
    spec: str = ""

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def fingerprint(self) -> list[str | int]:
        """Path, size and modification time. If all three are equal, the content is assumed to be unchanged."""
        stat = self.path.stat()
        return [str(self.path), stat.st_size, stat.st_mtime_ns]

    def iter_documents(self, row_tracker: RowTracker) -> Iterator[TextDocument]:
        bytes_read_before = row_tracker.bytes_read
        try:
            yield from read_file(self.path, self.row_format, row_tracker)
        except (OSError, UnreadableError) as error:
            row_tracker.skip_file(self.path, self.size_bytes, str(error))
        # A reader updates `bytes_read` only at each row. The file is finished, so count all of its bytes.
        row_tracker.bytes_read = bytes_read_before + self.size_bytes


class HFDataset:
    """A dataset streamed from the Hugging Face hub, or a folder that `datasets.save_to_disk` wrote.

    The constructor contacts the hub, so that a wrong name fails early.
    """

    size_bytes = None
    fingerprint = None  # changes cannot be detected, so a resumed run reads the dataset again

    def __init__(self, spec: str, row_format: RowFormat, hf_split: str) -> None:
        import datasets

        self.spec, self.row_format = spec, row_format
        name, _, config = spec.removeprefix("hf:").partition(":")
        with self._explain_errors():
            if spec.startswith("hf:"):
                self._rows = datasets.load_dataset(name, config or None, split=hf_split, streaming=True)
            else:
                saved = datasets.load_from_disk(spec)
                self._rows = saved[hf_split] if isinstance(saved, datasets.DatasetDict) else saved

    def iter_documents(self, row_tracker: RowTracker) -> Iterator[TextDocument]:
        rows = enumerate(self._rows, start=1)
        while True:
            with self._explain_errors():
                row_number, row = next(rows, (0, None))
            if row is None:
                return
            if row_tracker.advance_to_next_row():
                yield from read_row(row, self.row_format, f"{self.spec}:{row_number}", row_tracker)

    @contextmanager
    def _explain_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the hub, the network and the data raise exceptions of many types
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise DataError(
                f"--source {self.spec}: cannot be streamed: {type(error).__name__}: {reason}. Check the name, the "
                "config, --hf-split and the network; or download it and give the folder, as hf:FOLDER."
            ) from None
