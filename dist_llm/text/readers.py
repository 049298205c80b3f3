"""Read the documents of one file in its format, lazily and in bounded memory."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.text.compression import CODECS, DecompressedFile
from dist_llm.text.rows import BLANK_LINES, Document, RowKeys, Tally, UnreadableError, read_row
from dist_llm.text.tables import DELIMITERS, read_table
from dist_llm.text.walk import get_data_suffix

JSON_LINES = {".jsonl", ".ndjson", ".json"}
BUFFER_BYTES = 1 << 20
PARQUET_ROWS = 256


def read_file(path: Path, keys: RowKeys, tally: Tally) -> Iterator[Document]:
    """Yield the documents of a file. Raises OSError if it cannot be read, DataError if its content does not fit its
    suffix."""
    suffix = get_data_suffix(path)
    if suffix in JSON_LINES:
        return _read_json_lines(path, keys, tally)
    if suffix == ".parquet":
        return _read_parquet(path, keys, tally)
    if suffix in DELIMITERS:
        return _read_table(path, DELIMITERS[suffix], keys, tally)
    if keys.separator is not None:
        return _read_separated_text(path, keys.separator, tally)
    return _read_whole_text(path, tally)


def is_text(path: Path) -> bool:
    """Return whether a file is text without rows: one document, or documents between separators."""
    return get_data_suffix(path) not in {*JSON_LINES, ".parquet", *DELIMITERS}


@contextmanager
def _open_decompressed(path: Path) -> Iterator[tuple[io.BufferedReader, io.FileIO]]:
    """Open a file's decompressed content, and the raw file, whose `tell` is the progress."""
    with ExitStack() as stack:
        raw = stack.enter_context(path.open("rb", buffering=0))
        codec = path.suffix.lower()
        if codec not in CODECS:
            yield stack.enter_context(io.BufferedReader(raw, BUFFER_BYTES)), raw
            return
        unpacked = stack.enter_context(DecompressedFile(raw, codec))
        yield stack.enter_context(io.BufferedReader(unpacked, BUFFER_BYTES)), raw


def _read_whole_text(path: Path, tally: Tally) -> Iterator[Document]:
    """Yield the file as one document."""
    if not tally.claim_next_row():
        return
    with _open_decompressed(path) as (stream, _):
        _check_encoding(stream.peek(4))
        content = stream.read().removeprefix(codecs.BOM_UTF8)
    text = _decode(content, 0)
    tally.count_good(len(content))
    yield Document(text, str(path))


def _read_separated_text(path: Path, separator: str, tally: Tally) -> Iterator[Document]:
    """Yield the documents between separators, except blank ones."""
    start = tally.bytes_read
    with _open_decompressed(path) as (stream, raw):
        _check_encoding(stream.peek(4))
        for number, content in split_documents(stream, separator):
            tally.bytes_read = start + raw.tell()
            if not tally.claim_next_row():
                continue
            try:
                text = _decode(content, number - 1)
            except UnreadableError as error:
                tally.count_bad(f"{path}:{number}", str(error), len(content))
                continue
            tally.count_good(len(content))
            yield Document(text, f"{path}:{number}")


def split_documents(lines: Iterable[bytes], separator: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, content) of each document in some lines.

    A separator on its own line is removed together with that line and the line break before it.
    """
    mark, fragments, first = separator.encode(), list[bytes](), 1
    for number, line in enumerate(lines, start=1):
        if number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        segments = _split_line(line, separator, mark)
        for segment in segments[:-1]:
            fragments.append(segment)
            if document := _join_document(fragments, not segment):
                yield first, document
            fragments, first = [], number
        if len(segments) > 1 and not segments[-1].strip():
            first = number + 1
        else:
            fragments.append(segments[-1])
    if document := _join_document(fragments, True):
        yield first, document


def _split_line(line: bytes, separator: str, mark: bytes) -> list[bytes]:
    """Split a line at separators."""
    if separator == BLANK_LINES:
        return [line] if line.strip() else [b"", b""]
    return line.split(mark)


def _join_document(fragments: list[bytes], own_line: bool) -> bytes:
    document = b"".join(fragments)
    if own_line:
        document = document.removesuffix(b"\n").removesuffix(b"\r")
    return document if document.strip() else b""


def _read_table(path: Path, delimiter: str, keys: RowKeys, tally: Tally) -> Iterator[Document]:
    with _open_decompressed(path) as (stream, raw):
        _check_encoding(stream.peek(4))
        yield from read_table(path, stream, raw, delimiter, keys, tally)


def _decode(content: bytes, lines_before: int) -> str:
    """Decode bytes of a text file. Raises UnreadableError if they are not UTF-8, or not text."""
    try:
        text = content.decode("utf-8")
        bad = content.find(b"\0")  # valid in UTF-8, but frequent in UTF-16 and binary files
    except UnicodeDecodeError as error:
        bad = error.start
    if bad < 0:
        return text
    line = lines_before + content.count(b"\n", 0, bad) + 1
    what = "a NUL byte" if content[bad] == 0 else "not UTF-8"
    raise UnreadableError(
        f"line {line}: {what}, as in a binary file or in text of another encoding (convert with: iconv -f "
        "ENCODING -t UTF-8)"
    )


def _check_encoding(start: bytes) -> None:
    """Raise UnreadableError if a file starts with the byte order mark of UTF-16 or UTF-32."""
    if start.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UnreadableError("starts with the byte order mark of UTF-16 or UTF-32; convert it with iconv to UTF-8")


def _read_json_lines(path: Path, keys: RowKeys, tally: Tally) -> Iterator[Document]:
    """Yield one document per line with an object; blank lines are not rows."""
    start = tally.bytes_read
    with _open_decompressed(path) as (stream, raw):
        _check_encoding(stream.peek(4))
        if stream.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise DataError(f"{path}: is one JSON array; expected one object per line. Convert it with: jq -c '.[]'")
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            tally.bytes_read = start + raw.tell()
            if not tally.claim_next_row():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                tally.count_bad(f"{path}:{number}", "not UTF-8", len(line))
            except (ValueError, RecursionError) as error:
                tally.count_bad(f"{path}:{number}", f"not JSON: {error}", len(line))
            else:
                yield from read_row(row, keys, f"{path}:{number}", tally, len(line))


def _read_parquet(path: Path, keys: RowKeys, tally: Tally) -> Iterator[Document]:
    """Yield one document per row of the text column."""
    import pyarrow
    from pyarrow import parquet

    start, size, number = tally.bytes_read, path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            options = zip(("--text-key", "--prompt-key"), keys.all, strict=False)
            columns = [_find_column(path, file.schema_arrow.names, *each) for each in options]
            for batch in file.iter_batches(batch_size=PARQUET_ROWS, columns=list(dict.fromkeys(columns))):
                # Arrow does not check that strings are UTF-8; decode them here, so that only their row is bad.
                arrays = [
                    column.cast(pyarrow.large_binary())
                    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
                    else column
                    for column in map(batch.column, columns)
                ]
                for values in zip(*(column.to_pylist() for column in arrays), strict=True):
                    number += 1
                    if tally.claim_next_row():
                        row = dict(zip(columns, values, strict=True))
                        yield from read_row(row, keys, f"{path}:{number}", tally)
                tally.bytes_read = start + size * number // file.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UnreadableError(f"not readable as Parquet: {error}") from None


def _find_column(path: Path, names: list[str], option: str, key: str) -> str:
    """Return the column of a key, which may be nested. Raises DataError unless there is exactly one."""
    column = next((name for name in (key, key.partition(".")[0]) if name in names), None)
    if column is None:
        raise DataError(f"{path}: no column '{key}'. Give {option} one of: {', '.join(names)}")
    if (count := names.count(column)) > 1:
        raise DataError(f"{path}: {count} columns have the name '{column}'. Rename all but one, or leave the file out.")
    return column
