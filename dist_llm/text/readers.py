"""Read the documents of one input file: text, JSON lines, CSV, TSV or Parquet. Reads are lazy, in bounded memory."""

import codecs
import io
import json
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from dist_llm.errors import DataError
from dist_llm.text.compression import CODECS, DecompressedFile
from dist_llm.text.rows import BLANK_LINES, RowFormat, RowTracker, TextDocument, UnreadableError, read_row
from dist_llm.text.tables import DELIMITERS, read_table
from dist_llm.text.walk import get_data_suffix

JSON_LINES = {".jsonl", ".ndjson", ".json"}
BUFFER_BYTES = 1 << 20  # bytes read at once
PARQUET_BATCH_ROWS = 256


def read_file(path: Path, row_format: RowFormat, row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the documents of a file, whose suffix selects the reader.

    Raises OSError or UnreadableError if the file cannot be read, and DataError if its content has another format.
    """
    suffix = get_data_suffix(path)
    if suffix in JSON_LINES:
        return _read_json_lines(path, row_format, row_tracker)
    if suffix == ".parquet":
        return _read_parquet(path, row_format, row_tracker)
    if suffix in DELIMITERS:
        return _read_table(path, DELIMITERS[suffix], row_format, row_tracker)
    if row_format.separator is not None:
        return _read_separated_text(path, row_format.separator, row_tracker)
    return _read_whole_text(path, row_tracker)


def is_text(path: Path) -> bool:
    """Return whether a file is plain text without rows: one document, or documents between separators."""
    return get_data_suffix(path) not in {*JSON_LINES, ".parquet", *DELIMITERS}


@contextmanager
def _open_decompressed(path: Path) -> Iterator[tuple[io.BufferedReader, io.FileIO]]:
    """Yield (the decompressed content of a file, the file on the disk).

    `tell` of the file on the disk gives the bytes read so far, before decompression.
    """
    with ExitStack() as stack:
        disk_file = stack.enter_context(path.open("rb", buffering=0))
        suffix = path.suffix.lower()
        if suffix not in CODECS:
            yield stack.enter_context(io.BufferedReader(disk_file, BUFFER_BYTES)), disk_file
            return
        decompressed_file = stack.enter_context(DecompressedFile(disk_file, suffix))
        yield stack.enter_context(io.BufferedReader(decompressed_file, BUFFER_BYTES)), disk_file


def _read_whole_text(path: Path, row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the file as one document."""
    if not row_tracker.advance_to_next_row():
        return
    with _open_decompressed(path) as (decompressed_file, _):
        _check_encoding(decompressed_file.peek(4))
        content = decompressed_file.read().removeprefix(codecs.BOM_UTF8)
    text = _decode(content, lines_before=0)
    row_tracker.count_good(len(content))
    yield TextDocument(text, str(path))


def _read_separated_text(path: Path, separator: str, row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the documents between separators. Blank documents are left out."""
    bytes_read_before = row_tracker.bytes_read
    with _open_decompressed(path) as (decompressed_file, disk_file):
        _check_encoding(decompressed_file.peek(4))
        for line_number, content in split_documents(decompressed_file, separator):
            row_tracker.bytes_read = bytes_read_before + disk_file.tell()
            if not row_tracker.advance_to_next_row():
                continue
            try:
                text = _decode(content, lines_before=line_number - 1)
            except UnreadableError as error:
                row_tracker.count_bad(f"{path}:{line_number}", str(error), len(content))
                continue
            row_tracker.count_good(len(content))
            yield TextDocument(text, f"{path}:{line_number}")


def split_documents(lines: Iterable[bytes], separator: str) -> Iterator[tuple[int, bytes]]:
    """Yield (number of the first line, content) of each document.

    If a separator is alone on its line, the line and the line break before it are removed with it.
    """
    fragments, first_line = list[bytes](), 1
    for line_number, line in enumerate(lines, start=1):
        if line_number == 1:
            line = line.removeprefix(codecs.BOM_UTF8)
        segments = _split_line(line, separator)
        for segment in segments[:-1]:
            fragments.append(segment)
            if document := _join_document(fragments, ends_before_line_break=not segment):
                yield first_line, document
            fragments, first_line = [], line_number
        if len(segments) > 1 and not segments[-1].strip():
            first_line = line_number + 1
        else:
            fragments.append(segments[-1])
    if document := _join_document(fragments, ends_before_line_break=True):
        yield first_line, document


def _split_line(line: bytes, separator: str) -> list[bytes]:
    """Split a line at separators."""
    if separator == BLANK_LINES:
        return [line] if line.strip() else [b"", b""]
    return line.split(separator.encode())


def _join_document(fragments: list[bytes], ends_before_line_break: bool) -> bytes:
    """Join the fragments of a document. Return an empty string if it is blank."""
    document = b"".join(fragments)
    if ends_before_line_break:
        document = document.removesuffix(b"\n").removesuffix(b"\r")
    return document if document.strip() else b""


def _read_table(path: Path, delimiter: str, row_format: RowFormat, row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the document of each row of a CSV or TSV file."""
    with _open_decompressed(path) as (decompressed_file, disk_file):
        _check_encoding(decompressed_file.peek(4))
        yield from read_table(path, decompressed_file, disk_file, delimiter, row_format, row_tracker)


def _decode(content: bytes, lines_before: int) -> str:
    """Decode bytes of a text file. Raises UnreadableError if they are not UTF-8, or not text."""
    try:
        text = content.decode("utf-8")
        bad_offset = content.find(b"\0")  # valid in UTF-8, but frequent in UTF-16 and binary files
    except UnicodeDecodeError as error:
        bad_offset = error.start
    if bad_offset < 0:
        return text
    line_number = lines_before + content.count(b"\n", 0, bad_offset) + 1
    problem = "a NUL byte" if content[bad_offset] == 0 else "not UTF-8"
    raise UnreadableError(
        f"line {line_number}: {problem}, as in a binary file or in text of another encoding (convert with: iconv -f "
        "ENCODING -t UTF-8)"
    )


def _check_encoding(first_bytes: bytes) -> None:
    """Raise UnreadableError if a file starts with the byte order mark of UTF-16 or UTF-32."""
    if first_bytes.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE, codecs.BOM_UTF32_BE)):
        raise UnreadableError("starts with the byte order mark of UTF-16 or UTF-32; convert it with iconv to UTF-8")


def _read_json_lines(path: Path, row_format: RowFormat, row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the document of each line, which must be a JSON object. Blank lines are skipped."""
    bytes_read_before = row_tracker.bytes_read
    with _open_decompressed(path) as (decompressed_file, disk_file):
        _check_encoding(decompressed_file.peek(4))
        if decompressed_file.peek(64).removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"["):
            raise DataError(f"{path}: is one JSON array; expected one object per line. Convert it with: jq -c '.[]'")
        for line_number, line in enumerate(decompressed_file, start=1):
            if line_number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.isspace():
                continue
            row_tracker.bytes_read = bytes_read_before + disk_file.tell()
            if not row_tracker.advance_to_next_row():
                continue
            try:
                row = json.loads(line.decode("utf-8"))
            except UnicodeDecodeError:
                row_tracker.count_bad(f"{path}:{line_number}", "not UTF-8", len(line))
            except (ValueError, RecursionError) as error:
                row_tracker.count_bad(f"{path}:{line_number}", f"not JSON: {error}", len(line))
            else:
                yield from read_row(row, row_format, f"{path}:{line_number}", row_tracker, len(line))


def _read_parquet(path: Path, row_format: RowFormat, row_tracker: RowTracker) -> Iterator[TextDocument]:
    """Yield the document of each row."""
    import pyarrow
    from pyarrow import parquet

    bytes_read_before, file_bytes, row_number = row_tracker.bytes_read, path.stat().st_size, 0
    try:
        with parquet.ParquetFile(path) as file:
            columns = [
                _find_column(path, file.schema_arrow.names, option, key)
                for option, key in row_format.key_by_option.items()
            ]
            for batch in file.iter_batches(batch_size=PARQUET_BATCH_ROWS, columns=list(dict.fromkeys(columns))):
                # Arrow does not check that strings are UTF-8. Read them as bytes: `read_row` decodes them, and an
                # invalid string makes only its own row bad.
                arrays = [
                    column.cast(pyarrow.large_binary())
                    if pyarrow.types.is_string(column.type) or pyarrow.types.is_large_string(column.type)
                    else column
                    for column in map(batch.column, columns)
                ]
                for values in zip(*(column.to_pylist() for column in arrays), strict=True):
                    row_number += 1
                    if row_tracker.advance_to_next_row():
                        row = dict(zip(columns, values, strict=True))
                        yield from read_row(row, row_format, f"{path}:{row_number}", row_tracker)
                row_tracker.bytes_read = bytes_read_before + file_bytes * row_number // file.metadata.num_rows
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:
        raise UnreadableError(f"not readable as Parquet: {error}") from None


def _find_column(path: Path, names: list[str], option: str, key: str) -> str:
    """Return the column of a key, which may be nested. Raises DataError unless exactly one column has this name."""
    column = next((name for name in (key, key.partition(".")[0]) if name in names), None)
    if column is None:
        raise DataError(f"{path}: no column '{key}'. Give {option} one of: {', '.join(names)}")
    if (count := names.count(column)) > 1:
        raise DataError(f"{path}: {count} columns have the name '{column}'. Rename all but one, or leave the file out.")
    return column
