"""Read the rows of CSV and TSV files. The first row has the column names."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dist_llm.errors import DataError
from dist_llm.text.rows import RowCounts, RowKeys, TextDocument, UnreadableError, read_row

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(
    path: Path, content_file: IO[bytes], raw_file: io.FileIO, delimiter: str, keys: RowKeys, row_counts: RowCounts
) -> Iterator[TextDocument]:
    """Yield the document of each row. Quoted fields may contain line breaks."""
    bytes_read_before = row_counts.bytes_read
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates here. `read_row` gets them back as bytes and counts their row as bad.
    lines = io.TextIOWrapper(content_file, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for key in keys.names:
            if key not in (rows.fieldnames or ()):
                raise DataError(
                    f"{path}: no column '{key}' in the first line. Give --text-key one of: "
                    f"{', '.join(rows.fieldnames or ())}; or leave the file out with --exclude"
                )
        for row in rows:
            row_counts.bytes_read = bytes_read_before + raw_file.tell()
            if row_counts.claim_next_row():
                yield from read_row(_encode_columns(row, keys), keys, f"{path}:{rows.line_num}", row_counts)
    except csv.Error as error:
        raise UnreadableError(f"line {rows.line_num}: not readable as {path.suffix}: {error}") from None
    finally:
        lines.detach()  # otherwise `lines` would close the file of the caller


def _encode_columns(row: dict[str | Any, Any], keys: RowKeys) -> dict[str, Any]:
    """Return the texts of a row as the bytes of the file, which may be invalid UTF-8."""
    texts = {key: row[key] for key in keys.names}
    return {key: text and text.encode("utf-8", "surrogateescape") for key, text in texts.items()}
