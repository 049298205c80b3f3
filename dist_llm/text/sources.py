"""Where text comes from: each source yields documents lazily, in a fixed order, in bounded memory.

A row that is no document (malformed UTF-8 or JSON, a text key that is missing or not a string) is
skipped, counted and located in the `Tally`; a file that cannot be read at all is a DataError.
"""

import codecs
import io
import json
import os
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dist_llm.errors import DataError
from dist_llm.text.tokenizer import well_formed

STDLIB = "python-stdlib"
STDLIB_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}
JSON_LINES = {".jsonl", ".ndjson", ".json"}
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 1 << 20
PARQUET_ROWS = 256
LOCATIONS_KEPT = 5
ENOUGH_ROWS = 10_000


@dataclass(frozen=True)
class Document:
    """One text, always encodable as UTF-8, and the `file:line` it came from."""

    text: str
    origin: str


@dataclass
class Tally:
    """What one pass over the sources has met so far."""

    max_bad_rate: float
    rows: int = 0
    bad_rows: int = 0
    bytes_read: int = 0  # of files as they lie on the disk, compressed or not
    locations: list[str] = field(default_factory=list)

    def bad(self, location: str, reason: str) -> None:
        """Count a bad row. Raises DataError once so many of so many rows were bad that it is no accident."""
        self.rows += 1
        self.bad_rows += 1
        if len(self.locations) < LOCATIONS_KEPT:
            self.locations.append(f"{location}: {reason}")
        if self.rows >= ENOUGH_ROWS:
            self.check()

    def check(self) -> None:
        """Raise DataError if the share of bad rows is above the limit."""
        if self.bad_rows > self.max_bad_rate * self.rows:
            raise DataError(
                f"{self.bad_rows:,} of {self.rows:,} rows are bad, more than --max-bad-rate {self.max_bad_rate:g}. "
                "Mend them, check --text-key, or raise the rate. The first:\n  " + "\n  ".join(self.locations)
            )


class Source(Protocol):
    """Something with documents in it. `size_bytes` is None where it cannot be known."""

    @property
    def size_bytes(self) -> int | None: ...

    def documents(self, tally: Tally) -> Iterator[Document]: ...


def open_sources(specs: Sequence[str], text_key: str = "text", hf_split: str = "train") -> list[Source]:
    """The sources that the specs name. Raises DataError for one that is not there, before any is read."""
    return [_open_source(spec, text_key, hf_split) for spec in specs]


def size_bytes(sources: Sequence[Source]) -> int | None:
    """The size of all the sources, or None if that of one is unknown."""
    sizes = [source.size_bytes for source in sources]
    return None if None in sizes else sum(size for size in sizes if size is not None)


def documents(sources: Iterable[Source], tally: Tally) -> Iterator[Document]:
    """All documents of the sources, in order."""
    for source in sources:
        yield from source.documents(tally)


def _open_source(spec: str, text_key: str, hf_split: str) -> Source:
    if spec == STDLIB:
        root = Path(sysconfig.get_path("stdlib"))
        return FileSource(tuple(path for path in _walk(root, STDLIB_LEFT_OUT) if path.suffix == ".py"), text_key)
    if spec.startswith("hf:"):
        return HubSource(spec, text_key, hf_split)
    path = Path(spec)
    if path.is_dir():
        return FileSource(tuple(_walk(path)), text_key)
    if path.exists():
        return FileSource((path,), text_key)
    raise DataError(f"--source {spec}: no such file or folder. Other sources are {STDLIB} and hf:NAME[:CONFIG].")


def _walk(root: Path, left_out: Iterable[str] = ()) -> list[Path]:
    """The files below `root`, hidden ones left out, sorted by relative path; linked folders are not entered."""
    found = []
    for folder, folders, files in os.walk(root):
        skipped = {"__pycache__", *left_out}
        folders[:] = [name for name in folders if name not in skipped and not name.startswith(".")]
        found += [Path(folder, name) for name in files if not name.startswith(".")]
    return sorted((path for path in found if path.is_file()), key=lambda path: path.relative_to(root).as_posix())


@dataclass(frozen=True)
class FileSource:
    """Files read one after the other, each as its suffix says."""

    files: tuple[Path, ...]
    text_key: str

    @property
    def size_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.files)

    def documents(self, tally: Tally) -> Iterator[Document]:
        for path in self.files:
            before = tally.bytes_read
            try:
                yield from self._read(path, tally)
                tally.bytes_read = before + path.stat().st_size
            except OSError as error:
                raise DataError(f"{path}: cannot be read: {error}. Fetch it again or leave it out.") from None

    def _read(self, path: Path, tally: Tally) -> Iterator[Document]:
        suffix = path.suffix.lower()
        if suffix in COMPRESSION:
            suffix = Path(path.stem).suffix.lower()
        if suffix in JSON_LINES:
            return _json_lines(path, self.text_key, tally)
        if suffix == ".parquet":
            return _parquet(path, self.text_key, tally)
        return _whole_text(path, tally)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[io.BufferedReader, io.FileIO]]:
    """The content of a file, decompressed, and the raw file below, whose `tell` is the progress."""
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb", buffering=0))
        codec = COMPRESSION.get(path.suffix.lower())
        if codec is None:
            yield stack.enter_context(io.BufferedReader(raw, BUFFER_BYTES)), raw
            return
        # pyarrow, not gzip and zstandard: it reads both, many frames in a file, and notices a truncated one.
        import pyarrow

        unpacked = stack.enter_context(pyarrow.CompressedInputStream(pyarrow.PythonFile(raw, "r"), codec))
        yield stack.enter_context(io.BufferedReader(unpacked, BUFFER_BYTES)), raw


def _whole_text(path: Path, tally: Tally) -> Iterator[Document]:
    """One file, one document."""
    with _opened(path) as (stream, _):
        content = stream.read().removeprefix(codecs.BOM_UTF8)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        tally.bad(f"{path}:{line}", "not UTF-8")
        return
    tally.rows += 1
    yield Document(text, str(path))


def _json_lines(path: Path, text_key: str, tally: Tally) -> Iterator[Document]:
    """One object a line; blank lines are no rows."""
    start = tally.bytes_read
    with _opened(path) as (stream, raw):
        if stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise DataError(f"{path}: one JSON array; expected one object a line. Convert it with: jq -c '.[]'")
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            tally.bytes_read = start + raw.tell()
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                tally.bad(f"{path}:{number}", "not UTF-8")
            except (ValueError, RecursionError) as error:
                tally.bad(f"{path}:{number}", f"not JSON: {error}")
            else:
                yield from _row_document(row, text_key, f"{path}:{number}", tally)


def _parquet(path: Path, text_key: str, tally: Tally) -> Iterator[Document]:
    """One row of the text column, one document."""
    import pyarrow
    from pyarrow import parquet

    start, size, number = tally.bytes_read, path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            if text_key not in file.schema_arrow.names:
                columns = ", ".join(file.schema_arrow.names)
                raise DataError(f"{path}: no column '{text_key}'. Give --text-key one of: {columns}")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=[text_key]):
                column = batch.column(0)
                # Arrow does not check that strings are UTF-8; decoding them here keeps the fault to its row.
                if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type):
                    column = column.cast(pyarrow.large_binary())
                for value in column.to_pylist():
                    number += 1
                    yield from _row_document({text_key: value}, text_key, f"{path}:{number}", tally)
                tally.bytes_read = start + size * number // file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise DataError(f"{path}: cannot be read as Parquet: {error}. Fetch it again or leave it out.") from None


class HubSource:
    """A Hugging Face dataset, streamed. Opening it already asks the hub, so that a wrong name fails early."""

    size_bytes = None

    def __init__(self, spec: str, text_key: str, hf_split: str) -> None:
        import datasets

        self.spec, self.text_key = spec, text_key
        name, _, config = spec.removeprefix("hf:").partition(":")
        with self._explained():
            self._rows = datasets.load_dataset(name, config or None, split=hf_split, streaming=True)

    def documents(self, tally: Tally) -> Iterator[Document]:
        rows = enumerate(self._rows, start=1)
        while True:
            with self._explained():
                number, row = next(rows, (0, None))
            if row is None:
                return
            yield from _row_document(row, self.text_key, f"{self.spec}:{number}", tally)

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


def _row_document(row: Any, text_key: str, origin: str, tally: Tally) -> Iterator[Document]:
    """The document of a row; none, and a bad row, where it has no text."""
    text = row.get(text_key) if isinstance(row, dict) else None
    if isinstance(text, bytes):
        try:
            text = text.decode("utf-8")
        except UnicodeDecodeError:
            return tally.bad(origin, "not UTF-8")
    if not isinstance(text, str):
        missing = isinstance(row, dict) and text_key not in row
        return tally.bad(origin, f"no key '{text_key}'" if missing else f"no string under '{text_key}'")
    tally.rows += 1
    yield Document(well_formed(text), origin)
