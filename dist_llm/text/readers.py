"""The documents of one file, as its format says, lazily and in bounded memory."""

import codecs
import io
import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.text.rows import Document, Keys, Tally, UnreadableError, row_document

JSON_LINES = {".jsonl", ".ndjson", ".json"}
COMPRESSION = {".gz": "gzip", ".zst": "zstd"}
BUFFER_BYTES = 1 << 20
PARQUET_ROWS = 256


def read_file(path: Path, keys: Keys, tally: Tally) -> Iterator[Document]:
    """Its documents. Raises OSError where it cannot be read, DataError where it is not what its suffix says."""
    suffix = path.suffix.lower()
    if suffix in COMPRESSION:
        suffix = Path(path.stem).suffix.lower()
    if suffix in JSON_LINES:
        return _json_lines(path, keys, tally)
    if suffix == ".parquet":
        return _parquet(path, keys, tally)
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
    if not tally.takes_next():
        return
    with _opened(path) as (stream, _):
        _refuse_other_encoding(stream.peek(4))
        content = stream.read().removeprefix(codecs.BOM_UTF8)
    text = _decoded(content, 0)
    tally.good(len(content))
    yield Document(text, str(path))


def _decoded(content: bytes, lines_before: int) -> str:
    """The text of some bytes of a text file. Raises UnreadableError where they are not UTF-8, or are no text."""
    try:
        text = content.decode("utf-8")
        bad = content.find(b"\0")  # valid UTF-8, but what UTF-16 and binary files are full of
    except UnicodeDecodeError as error:
        bad = error.start
    if bad < 0:
        return text
    line = lines_before + content.count(b"\n", 0, bad) + 1
    what = "a NUL byte" if content[bad] == 0 else "not UTF-8"
    raise UnreadableError(
        f"line {line}: {what}, as in a binary file or in text of another encoding (convert that with: iconv -f "
        "ENCODING -t UTF-8)"
    )


def _refuse_other_encoding(start: bytes) -> None:
    """Raises UnreadableError where a file starts with the byte order mark of UTF-16 or UTF-32."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UnreadableError("starts with the byte order mark of UTF-16 or UTF-32; convert it with iconv to UTF-8")


def _json_lines(path: Path, keys: Keys, tally: Tally) -> Iterator[Document]:
    """One object a line; blank lines are no rows."""
    start = tally.bytes_read
    with _opened(path) as (stream, raw):
        _refuse_other_encoding(stream.peek(4))
        if stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise DataError(f"{path}: one JSON array; expected one object a line. Convert it with: jq -c '.[]'")
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            tally.bytes_read = start + raw.tell()
            if not tally.takes_next():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                tally.bad(f"{path}:{number}", "not UTF-8", len(line))
            except (ValueError, RecursionError) as error:
                tally.bad(f"{path}:{number}", f"not JSON: {error}", len(line))
            else:
                yield from row_document(row, keys, f"{path}:{number}", tally, len(line))


def _parquet(path: Path, keys: Keys, tally: Tally) -> Iterator[Document]:
    """One row of the text column, one document."""
    import pyarrow
    from pyarrow import parquet

    start, size, number = tally.bytes_read, path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            for option, key in (("--text-key", keys.text), ("--prompt-key", keys.prompt)):
                if key and key not in file.schema_arrow.names:
                    names = ", ".join(file.schema_arrow.names)
                    raise DataError(f"{path}: no column '{key}'. Give {option} one of: {names}")
                if (count := file.schema_arrow.names.count(key)) > 1:
                    raise DataError(f"{path}: {count} columns are called '{key}'. Rename all but one, or leave it out.")
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=keys.all):
                # Arrow does not check that strings are UTF-8; decoding them here keeps the fault to its row.
                columns = [
                    column.cast(pyarrow.large_binary())
                    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
                    else column
                    for column in map(batch.column, keys.all)
                ]
                for values in zip(*(column.to_pylist() for column in columns), strict=True):
                    number += 1
                    if tally.takes_next():
                        row = dict(zip(keys.all, values, strict=True))
                        yield from row_document(row, keys, f"{path}:{number}", tally)
                tally.bytes_read = start + size * number // file.metadata.num_rows
    except pyarrow.ArrowException as error:
        raise UnreadableError(f"not readable as Parquet: {error}") from None
