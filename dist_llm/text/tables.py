"""Read rows of CSV and TSV files, with their columns by name."""

import csv
import io
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from dist_llm.errors import DataError
from dist_llm.text.rows import Document, RowKeys, Tally, UnreadableError, read_row

DELIMITERS = {".csv": ",", ".tsv": "\t"}


def read_table(
    path: Path, stream: IO[bytes], raw: io.FileIO, delimiter: str, keys: RowKeys, tally: Tally
) -> Iterator[Document]:
    """Yield one document per row; the first row has the column names. Quoted fields may contain line breaks."""
    start = tally.bytes_read
    csv.field_size_limit(sys.maxsize)
    # Bytes that are not UTF-8 become surrogates here, so that only their row is bad.
    lines = io.TextIOWrapper(stream, "utf-8-sig", errors="surrogateescape", newline="")
    rows = csv.DictReader(lines, delimiter=delimiter, strict=True)
    try:
        for key in keys.all:
            if key not in (rows.fieldnames or ()):
                raise DataError(
                    f"{path}: no column '{key}' in the first line. Give --text-key one of: "
                    f"{', '.join(rows.fieldnames or ())}; or leave the file out with --exclude"
                )
        for row in rows:
            tally.bytes_read = start + raw.tell()
            if tally.claim_next_row():
                yield from read_row(_encode_columns(row, keys), keys, f"{path}:{rows.line_num}", tally)
    except csv.Error as error:
        raise UnreadableError(f"line {rows.line_num}: not readable as {path.suffix}: {error}") from None
    finally:
        lines.detach()  # otherwise it would close the stream of its caller


def _encode_columns(row: dict[str | Any, Any], keys: RowKeys) -> dict[str, Any]:
    """Encode the row's texts to the bytes of the file, which may be invalid UTF-8."""
    texts = {key: row[key] for key in keys.all}
    return {key: text and text.encode("utf-8", "surrogateescape") for key, text in texts.items()}
