"""Measure the speed of `dist-llm prepare`, end to end, relative to tiktoken.Encoding.encode_ordinary_batch.

ours   the complete command in this process and its workers: read and parse files, tokenize, hash, split off held-out
       text, write the shards durably, publish the corpus
bare   `encode_ordinary_batch` of the same tokenizer on the same texts in memory, 16 MB at a time, with as many threads
       as ours has workers; the result is dropped

Both use the same cores. They take turns in the order ours, bare, bare, ours, so that a change in the speed of the
machine affects both alike. A pair is one run of each.

The text is the source code of the standard library of Python (--text), repeated up to --megabytes. The tokenizer
is bpe:16384 (--tokenizer), trained on the text before the first measurement. Cases: jsonl, documents of
--document-bytes; text, plain files of about 1 MB.

Prints one JSON line per case and pair on stdout, then a table on stderr. `ratio` is MB/s of text of ours over bare; the
goal is at least 0.8. `cpu_ratio` compares the CPU seconds of all processes instead of the elapsed time; on a busy
machine it is more reliable. Ours includes the start of the workers, which dominates for few --megabytes. For a quick
trial: --megabytes 8 --pairs 2.
"""

import argparse
import io
import json
import os
import platform
import resource
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import tiktoken

from dist_llm.io.atomic import write_durably
from dist_llm.text.bpe_tokenizer import BPETokenizer
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.inputs import iter_documents, open_inputs
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.text.rows import RowTracker

CLAIM = 0.8  # the minimum ratio
FILE_CHARS = 1_000_000
TOKENIZER_TRAINING_CHARS = 20_000_000
BATCH_CHARS = 16_000_000  # in one call of encode_ordinary_batch
COLUMNS = (("ours", " MB/s"), ("bare", " MB/s"), ("ratio", ""), ("cpu_ratio", ""))


def main() -> None:
    """Measure the cases, and print the rows and the table."""
    options = make_parser().parse_args()
    if hasattr(os, "sched_setaffinity") and options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.workers = options.workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows = [row for case in options.case or ("jsonl", "text") for row in measure_case(case, options, Path(scratch))]
    sys.stdout.flush()
    print_report(options, rows)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--case", action="append", choices=("jsonl", "text"), help="may be repeated; default: both")
    parser.add_argument("--megabytes", type=int, default=64, help="size of the text of a case; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=4, help="measured pairs of a case; default: %(default)s")
    parser.add_argument(
        "--document-bytes", type=int, default=4000, help="size of a document of the case jsonl; default: %(default)s"
    )
    parser.add_argument("--text", default="python-stdlib", help="source, as for prepare --source; default: %(default)s")
    parser.add_argument("--tokenizer", default="bpe:16384", help="as for prepare; default: %(default)s")
    parser.add_argument("--workers", type=int, help="workers of ours, and threads of bare; default: one per core")
    parser.add_argument("--cores", type=int, help="number of cores to use; default: all that this process may use")
    parser.add_argument(
        "--scratch", type=Path, help="where to write, about twice --megabytes; default: the temporary directory"
    )
    return parser


def measure_case(case: str, options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, object]]:
    """Measure one case pair by pair; print and yield the row of each pair."""
    tokenizer = build_tokenizer(
        options.tokenizer, training_texts=lambda: iter_texts(options.text, TOKENIZER_TRAINING_CHARS, FILE_CHARS)
    )
    if not isinstance(tokenizer, BPETokenizer):
        raise SystemExit(
            f"error: --tokenizer {options.tokenizer}: tiktoken cannot run it. Use a byte-level BPE tokenizer"
        )
    (scratch / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(scratch / "tokenizer")
    document_chars = options.document_bytes if case == "jsonl" else FILE_CHARS
    texts = list(iter_texts(options.text, options.megabytes * 1_000_000, document_chars))
    source = write_texts(case, texts, scratch / case)
    run_functions = {
        "ours": make_prepare_run(source, scratch, options.workers),
        "bare": make_tokenizer_run(tokenizer, texts, options.workers),
    }
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for pair_index in range(options.pairs):
        order = ("ours", "bare") if pair_index % 2 == 0 else ("bare", "ours")
        times = {name: measure_run(run_functions[name]) for name in order}
        (seconds, cpu_seconds), (bare_seconds, bare_cpu_seconds) = times["ours"], times["bare"]
        row: dict[str, object] = {
            "case": case,
            "pair": pair_index + 1,
            "documents": len(texts),
            "megabytes": round(megabytes, 1),
            "ours": round(megabytes / seconds, 2),
            "bare": round(megabytes / bare_seconds, 2),
            "ratio": round(bare_seconds / seconds, 4),
            "cpu_ratio": round(bare_cpu_seconds / cpu_seconds, 4),
        }
        print(json.dumps(row), flush=True)
        yield row


def iter_texts(source: str, num_chars: int, document_chars: int) -> Iterator[str]:
    """Yield documents of `document_chars` characters, `num_chars` in total; the source is repeated as needed."""
    text = "".join(document.text for document in iter_documents(open_inputs([source]), RowTracker(1.0)))
    text *= -(-num_chars // max(len(text), 1))
    for start in range(0, num_chars, document_chars):
        yield text[start : min(start + document_chars, num_chars)]


def write_texts(case: str, texts: list[str], folder: Path) -> Path:
    """Write the texts as files of the case. The writes are durable, so the disk is idle when a measurement starts."""
    folder.mkdir()
    if case == "jsonl":
        contents = {"rows.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)}
    else:
        contents = {f"{index:05d}.txt": text for index, text in enumerate(texts)}
    for name, content in contents.items():
        write_durably(folder / name, content.encode())
    return folder


def make_prepare_run(source: Path, scratch: Path, workers: int) -> Callable[[], None]:
    """Return a function that prepares the corpus; its attribute `clean` removes the corpus after the measurement."""

    def run_once() -> None:
        options = PrepareOptions(
            source=(str(source),), tokenizer=str(scratch / "tokenizer"), out=scratch / "corpus", workers=workers
        )
        prepare(options, io.StringIO())

    def clean() -> None:
        shutil.rmtree(scratch / "corpus", ignore_errors=True)

    run_once.clean = clean  # type: ignore[attr-defined]
    return run_once


def make_tokenizer_run(tokenizer: BPETokenizer, texts: list[str], threads: int) -> Callable[[], None]:
    """Return a function that encodes the texts with tiktoken.

    It encodes in batches, since the lists of ids take about 12 bytes per byte of text.
    """
    encoding = tiktoken.Encoding(
        "bare",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    batch_size = max(1, BATCH_CHARS // len(texts[0]))
    batches = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]

    def run_once() -> None:
        for batch in batches:
            encoding.encode_ordinary_batch(batch, num_threads=threads)

    return run_once


def measure_run(run_once: Callable[[], None]) -> tuple[float, float]:
    """Return (elapsed seconds, CPU seconds of this process and of children that have ended) of one run."""
    start_time, cpu_seconds_before = time.perf_counter(), read_cpu_seconds()
    run_once()
    elapsed = time.perf_counter() - start_time, read_cpu_seconds() - cpu_seconds_before
    getattr(run_once, "clean", lambda: None)()
    return elapsed


def read_cpu_seconds() -> float:
    """Return the CPU time of this process and of its ended children."""
    usages = [resource.getrusage(target) for target in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_report(options: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Print the conditions of the measurement and the table."""
    load = os.getloadavg()[0]
    print(
        f"{options.text}, {options.tokenizer}, {options.workers} workers, {len(os.sched_getaffinity(0))} cores, load "
        f"average {load:.1f} at the end, Python {platform.python_version()}, tiktoken {tiktoken.__version__}",
        file=sys.stderr,
    )
    print(f"{'case':8}{'':12}{'median':>10}{'min':>10}{'max':>10}", file=sys.stderr)
    for case in dict.fromkeys(row["case"] for row in rows):
        for name, unit in COLUMNS:
            column = [float(str(row[name])) for row in rows if row["case"] == case]
            cells = "".join(f"{value:>10.2f}" for value in (statistics.median(column), min(column), max(column)))
            print(f"{case:8}{name + unit:12}{cells}", file=sys.stderr)
    print(f"the claim: a ratio of at least {CLAIM}", file=sys.stderr)


if __name__ == "__main__":
    main()
