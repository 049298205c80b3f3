"""Read the rows of CSV and TSV files. The first row has the column names."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dist_llm.errors import DataError
from dist_llm.text.rows import RowFormat, RowTracker, TextDocument, UnreadableError, read_row

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(
    path: Path,
    decompressed_file: IO[bytes],
    disk_file: io.FileIO,
    delimiter: str,
    row_format: RowFormat,
    row_tracker: RowTracker,
) -> Iterator[TextDocument]:
    """Yield the document of each row. Quoted fields may contain line breaks.

    `disk_file` is the file below `decompressed_file`. Its offset gives the bytes read so far, before decompression.
    """
    bytes_read_before = row_tracker.bytes_read
    csv.field_size_limit(sys.maxsize)
    # The csv module reads only strings, so bytes that are not UTF-8 become surrogates. `_encode_columns` turns them
    # back into bytes, and `read_row` counts their row as bad.
    lines = io.TextIOWrapper(decompressed_file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for option, key in row_format.key_by_option.items():
            if key not in (rows.fieldnames or ()):
                raise DataError(
                    f"{path}: no column '{key}' in the first line. Give {option} one of: "
                    f"{', '.join(rows.fieldnames or ())}; or leave the file out (in a folder, with --exclude)"
                )
        for row in rows:
            row_tracker.bytes_read = bytes_read_before + disk_file.tell()
            if row_tracker.advance_to_next_row():
                yield from read_row(
                    _encode_columns(row, row_format), row_format, f"{path}:{rows.line_num}", row_tracker
                )
    except csv.Error as error:
        raise UnreadableError(f"line {rows.line_num}: not readable as {path.suffix}: {error}") from None
    finally:
        lines.detach()  # otherwise `lines` would close the file of the caller


def _encode_columns(row: dict[str | Any, Any], row_format: RowFormat) -> dict[str, Any]:
    """Return the text and the prompt of a row as the bytes that the file has, which may not be UTF-8."""
    texts = {key: row[key] for key in row_format.keys}
    return {key: text and text.encode("utf-8", "surrogateescape") for key, text in texts.items()}
