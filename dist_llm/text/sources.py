"""Where text comes from: each source yields documents lazily, in a fixed order, in bounded memory.

A file that cannot be read at all is a DataError; for a row that cannot, see dist_llm/text/rows.py.
"""

import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from dist_llm.errors import DataError
from dist_llm.text.readers import is_text, read_file
from dist_llm.text.report import InputTable
from dist_llm.text.rows import Document, Keys, Tally, UnreadableError, row_document
from dist_llm.text.walk import FileRules, Walk

KEYS, RULES = Keys(), FileRules()
SAVED_DATASET = (("dataset_dict.json",), ("state.json", "dataset_info.json"))  # by datasets.save_to_disk
STDLIB = "python-stdlib"
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


class Source(Protocol):
    """One input file or dataset; `spec` as the user named it.

    `size_bytes` is None where it cannot be known, `state` where changes cannot.
    """

    @property
    def spec(self) -> str: ...

    @property
    def size_bytes(self) -> int | None: ...

    @property
    def state(self) -> list[str | int] | None: ...

    def documents(self, tally: Tally) -> Iterator[Document]: ...


def open_sources(
    specs: Sequence[str],
    keys: Keys = KEYS,
    hf_split: str = "train",
    rules: FileRules = RULES,
    table: InputTable | None = None,
) -> list[Source]:
    """The files and datasets that the specs name; `table` counts what is read and what is skipped.

    Raises DataError for one that is not there or cannot be read, before any is read.
    """
    walk = Walk(rules, InputTable() if table is None else table)
    found = [source for spec in specs for source in _open_source(spec, keys, hf_split, walk)]
    walk.check()
    if keys.separator and not any(isinstance(each, FileSource) and is_text(each.path) for each in found):
        raise DataError("--separator: cuts text files, and the sources have none; leave the option out")
    return found


def size_bytes(sources: Sequence[Source]) -> int | None:
    """The size of all the sources, or None if that of one is unknown."""
    sizes = [source.size_bytes for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def documents(sources: Iterable[Source], tally: Tally) -> Iterator[Document]:
    """All documents of the sources, in order."""
    for source in sources:
        yield from source.documents(tally)


def _open_source(spec: str, keys: Keys, hf_split: str, walk: Walk) -> Sequence[Source]:
    if spec == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        code = Walk(FileRules(include=("*.py",)), InputTable())
        return [FileSource(path, keys, spec) for each in code.folder(root, STDLIB_LEFT_OUT) for path in walk.file(each)]
    if spec.startswith("hf:"):
        return [HubSource(spec, keys, hf_split)]
    path = Path(spec)
    if any(all((path / name).is_file() for name in names) for names in SAVED_DATASET):
        return [HubSource(spec, keys, hf_split)]
    if path.is_dir():
        return [FileSource(each, keys, spec) for each in walk.folder(path)]
    if path.exists():
        return [FileSource(each, keys, spec) for each in walk.file(path)]
    raise DataError(f"--source {spec}: no such file or folder. Other sources are {STDLIB} and hf:NAME[:CONFIG].")


@dataclass(frozen=True)
class FileSource:
    """One file, read as its suffix says."""

    path: Path
    keys: Keys
    spec: str = ""

    @property
    def size_bytes(self) -> int:
        return self.path.stat().st_size

    @property
    def state(self) -> list[str | int]:
        """Path, size and time of the last change: as long as these are the same, so is the text."""
        found = self.path.stat()
        return [str(self.path), found.st_size, found.st_mtime_ns]

    def documents(self, tally: Tally) -> Iterator[Document]:
        before = tally.bytes_read
        try:
            yield from read_file(self.path, self.keys, tally)
        except (OSError, UnreadableError) as error:
            tally.skip_file(self.path, self.size_bytes, str(error))
        tally.bytes_read = before + self.size_bytes


class HubSource:
    """A Hugging Face dataset, streamed, or the folder of a saved one.

    Opening it already asks the hub, so that a wrong name fails early.
    """

    size_bytes = None
    state = None  # it may have changed, and nothing says so: a run that goes on reads it again

    def __init__(self, spec: str, keys: Keys, hf_split: str) -> None:
        import datasets

        self.spec, self.keys = spec, keys
        name, _, config = spec.removeprefix("hf:").partition(":")
        with self._explained():
            if spec.startswith("hf:"):
                self._rows = datasets.load_dataset(name, config or None, split=hf_split, streaming=True)
            else:
                saved = datasets.load_from_disk(spec)
                self._rows = saved[hf_split] if isinstance(saved, datasets.DatasetDict) else saved

    def documents(self, tally: Tally) -> Iterator[Document]:
        rows = enumerate(self._rows, start=1)
        while True:
            with self._explained():
                number, row = next(rows, (0, None))
            if row is None:
                return
            if tally.takes_next():
                yield from row_document(row, self.keys, f"{self.spec}:{number}", tally)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the hub, the network and the data each raise their own kinds
            reason = (str(error).strip().splitlines() or [""])[0][:200]
            raise DataError(
                f"--source {self.spec}: cannot be streamed: {type(error).__name__}: {reason}. Check the name, the "
                "config, --hf-split and the network; or download it and give the folder, as hf:FOLDER."
            ) from None
