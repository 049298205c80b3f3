"""Write and read small files of text, and files of a run that consist of text: metrics, config, tokenizer."""

import base64
import csv
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from dist_llm.config.check import check
from dist_llm.config.load import dump_config, load_config
from dist_llm.observe.metrics import MetricsFile
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.inputs import iter_documents, open_inputs
from dist_llm.text.report import InputFileCounts, PrepareReport
from dist_llm.text.rows import RowFormat, RowTracker
from dist_llm.training.resume import EarlierSteps

from .checkpoint_files import (
    make_config,
)

ROWS = [{"text": f"row {number} é\n", "n": number} for number in range(20)]


def write_parquet(directory: Path) -> None:
    """Write ROWS as a Parquet file."""
    parquet.write_table(pyarrow.Table.from_pylist(ROWS), directory / "x.parquet")


def make_write_table(name: str, delimiter: str) -> Callable[[Path], None]:
    """Return a function that writes ROWS as a table with this delimiter."""

    def write(directory: Path) -> None:
        with (directory / name).open("w", newline="") as file:
            writer = csv.DictWriter(file, ["text", "n"], delimiter=delimiter)
            writer.writeheader()
            writer.writerows(ROWS)

    return write


def encode_json_lines() -> bytes:
    """Return ROWS in the format JSON lines."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in ROWS)


def make_write_bytes(name: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    """Return a function that writes `content()` to the file `name` of a folder."""

    def write(directory: Path) -> None:
        (directory / name).write_bytes(content())

    return write


def read_text(directory: Path, **keys: Any) -> None:
    """Read all documents of the files in a folder; `keys` are those of RowFormat."""
    inputs = open_inputs([str(directory)], RowFormat(**keys))
    row_tracker = RowTracker(max_bad_rate=1.0)
    for document in iter_documents(inputs, row_tracker):
        document.text.encode()
    row_tracker.check()


def read_metrics(directory: Path) -> None:
    """Read metrics.jsonl as a resumed run does."""
    EarlierSteps.read(directory, step=3, config=make_config()).compare([{"step": 4, "loss": 1.0}])
    MetricsFile(directory / "metrics.jsonl", resumed_step=3).close()


def encode_metrics() -> bytes:
    """Return the rows of eight steps and of an event in the format of metrics.jsonl."""
    rows = [{"step": step, "loss": 5.0 / step, "lr": 1e-3} for step in range(1, 9)]
    return b"".join(json.dumps(row).encode() + b"\n" for row in [*rows[:4], {"step": 4, "event": "x"}, *rows[4:]])


def write_metrics(directory: Path) -> None:
    """Write the metrics and the config of a run."""
    (directory / "metrics.jsonl").write_bytes(encode_metrics())
    (directory / "config.yaml").write_text(dump_config(make_config()))


def read_yaml(directory: Path) -> None:
    """Load and check config.yaml."""
    config, _ = load_config(directory / "config.yaml")
    if config is not None:
        list(check(config, world_size=1, tokenizer_size=257))


def write_yaml(directory: Path) -> None:
    """Write a config file with a base file, an anchor and a flow mapping."""
    (directory / "base.yaml").write_text(dump_config(make_config()))
    (directory / "config.yaml").write_text("base: base.yaml\ndata: &d {path: x, seq_len: 64}\noptim: {lr: 3e-4}\n")


def write_tiktoken(directory: Path) -> None:
    """Write a vocabulary of the 256 bytes in the format of tiktoken."""
    lines = (base64.b64encode(bytes([byte])) + f" {byte}\n".encode() for byte in range(256))
    (directory / "x.tiktoken").write_bytes(b"".join(lines))


def make_read_tokenizer(name: str) -> Callable[[Path], object]:
    """Return a function that reads the tokenizer in the file `name` of a folder."""
    return lambda directory: build_tokenizer(str(directory / name)).encode("some text")


def write_report(directory: Path) -> None:
    """Write the report of `dist-llm prepare`."""
    file_counts = InputFileCounts()
    file_counts.add("read", directory / "x.jsonl", 100)
    PrepareReport({"source": ["x"]}, rows=10, bad_rows=1, inputs=file_counts, unreadable={"y": (3, "gone")}).save(
        directory
    )
