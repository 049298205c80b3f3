"""Measure the speed of `dist-llm prepare`, end to end, relative to tiktoken's encode_ordinary_batch alone.

Ours is the work of the whole command in this process and its workers: read and parse the file, tokenize, hash, split
off held-out text, write the shards durably, publish. The bare side has the same texts in memory and calls
`encode_ordinary_batch` of the same tokenizer, with as many threads as ours has workers, on 16 MB at a time, and drops
the result. Both have the same cores. They take turns in the order ours, bare, bare, ours, so that a change in the
machine's speed affects both alike.

Without --text and --tokenizer the text is the source code of Python's standard library, and the tokenizer is bpe:16384,
trained on it before the first measurement. Cases: jsonl, documents of about --document-bytes each; text, plain files of
about 1 MB. --megabytes of text are written; the source repeats as often as needed.

Prints one JSON line per case and pair on stdout, then a table on stderr; for a trial: --megabytes 8 --pairs 2. The
claim is a ratio of at least 0.8: MB/s of text of ours over the bare side's. `cpu_ratio` compares CPU seconds of all
processes in place of elapsed time: it is more reliable on a machine that others use. Ours includes the start of the
workers, which dominates with few --megabytes.
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
from dist_llm.text.input_files import iter_documents, open_inputs
from dist_llm.text.prepare import PrepareOptions, prepare
from dist_llm.text.rows import RowCounts

CLAIM = 0.8  # the smallest ratio that we promise
FILE_CHARS = 1_000_000
TRAIN_CHARS = 20_000_000
BATCH_CHARS = 16_000_000  # in one call of the bare side
COLUMNS = (("ours", " MB/s"), ("bare", " MB/s"), ("ratio", ""), ("cpu_ratio", ""))


def main() -> None:
    """Run and print the cases."""
    options = make_parser().parse_args()
    if hasattr(os, "sched_setaffinity") and options.cores:
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    options.workers = options.workers or len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory(dir=options.scratch) as scratch:
        rows = [row for case in options.case or ("jsonl", "text") for row in run(case, options, Path(scratch))]
    sys.stdout.flush()
    print_report(options, rows)


def make_parser() -> argparse.ArgumentParser:
    """Make the parser of the command line."""
    raw = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=raw)
    parser.add_argument("--case", action="append", choices=("jsonl", "text"), help="may be repeated; default: both")
    parser.add_argument("--megabytes", type=int, default=64, help="text of each case; default: %(default)s")
    parser.add_argument("--pairs", type=int, default=4, help="pairs measured of each case; default: %(default)s")
    parser.add_argument("--document-bytes", type=int, default=4000, help="of the jsonl case; default: %(default)s")
    parser.add_argument("--text", default="python-stdlib", help="as for prepare --source; default: %(default)s")
    parser.add_argument("--tokenizer", default="bpe:16384", help="as for prepare; default: %(default)s")
    parser.add_argument("--workers", type=int, help="of ours, and threads of the bare side; default: one per core")
    parser.add_argument("--cores", type=int, help="use that many cores alone; default: all that this process may use")
    parser.add_argument("--scratch", type=Path, help="where to write, about twice --megabytes; default: the system's")
    return parser


def run(case: str, options: argparse.Namespace, scratch: Path) -> Iterator[dict[str, object]]:
    """Measure one case pair by pair, and print each."""
    tokenizer = build_tokenizer(options.tokenizer, None, lambda: iter_texts(options.text, TRAIN_CHARS, FILE_CHARS))
    if not isinstance(tokenizer, BPETokenizer):
        raise SystemExit(f"--tokenizer {options.tokenizer}: tiktoken alone cannot run it; give one of byte-level BPE")
    (scratch / "tokenizer").mkdir(exist_ok=True)
    tokenizer.save(scratch / "tokenizer")
    size = options.document_bytes if case == "jsonl" else FILE_CHARS
    texts = list(iter_texts(options.text, options.megabytes * 1_000_000, size))
    source = write_texts(case, texts, scratch / case)
    sides = {
        "ours": make_prepare_run(source, scratch, options.workers),
        "bare": make_tokenizer_run(tokenizer, texts, options.workers),
    }
    megabytes = sum(len(text.encode()) for text in texts) / 1e6
    for number in range(options.pairs):
        order = ("ours", "bare") if number % 2 == 0 else ("bare", "ours")
        times = {name: measure_run(sides[name]) for name in order}
        (seconds, cpu), (bare_seconds, bare_cpu) = times["ours"], times["bare"]
        row: dict[str, object] = {
            "case": case,
            "pair": number + 1,
            "documents": len(texts),
            "megabytes": round(megabytes, 1),
            "ours": round(megabytes / seconds, 2),
            "bare": round(megabytes / bare_seconds, 2),
            "ratio": round(bare_seconds / seconds, 4),
            "cpu_ratio": round(bare_cpu / cpu, 4),
        }
        print(json.dumps(row), flush=True)
        yield row


def iter_texts(spec: str, total: int, size: int) -> Iterator[str]:
    """Yield `total` characters of the source in documents of `size`, repeated as needed, from memory."""
    text = "".join(document.text for document in iter_documents(open_inputs([spec]), RowCounts(1.0)))
    text *= -(-total // max(len(text), 1))
    for start in range(0, total, size):
        yield text[start : min(start + size, total)]


def write_texts(case: str, texts: list[str], folder: Path) -> Path:
    """Write the texts in the form of the case, durably, so that the disk is idle when a measurement starts."""
    folder.mkdir()
    if case == "jsonl":
        contents = {"rows.jsonl": "".join(json.dumps({"text": text}) + "\n" for text in texts)}
    else:
        contents = {f"{number:05d}.txt": text for number, text in enumerate(texts)}
    for name, content in contents.items():
        write_durably(folder / name, content.encode())
    return folder


def make_prepare_run(source: Path, scratch: Path, workers: int) -> Callable[[], None]:
    """Return a function that runs one prepare, and whose `clean` removes the corpus after the measurement."""

    def run_once() -> None:
        options = PrepareOptions((str(source),), str(scratch / "tokenizer"), scratch / "corpus", workers=workers)
        prepare(options, io.StringIO())

    def clean() -> None:
        shutil.rmtree(scratch / "corpus", ignore_errors=True)

    run_once.clean = clean  # type: ignore[attr-defined]
    return run_once


def make_tokenizer_run(tokenizer: BPETokenizer, texts: list[str], threads: int) -> Callable[[], None]:
    """Return a function that runs tiktoken alone, on batches, since its lists take about 12 bytes per byte of text."""
    encoding = tiktoken.Encoding(
        "bare",
        pat_str=tokenizer.pattern,
        mergeable_ranks=tokenizer.ranks,
        special_tokens=tokenizer.special_tokens,
    )
    size = max(1, BATCH_CHARS // len(texts[0]))
    batches = [texts[start : start + size] for start in range(0, len(texts), size)]

    def run_once() -> None:
        for batch in batches:
            encoding.encode_ordinary_batch(batch, num_threads=threads)

    return run_once


def measure_run(side: Callable[[], None]) -> tuple[float, float]:
    """Return elapsed seconds, and CPU seconds of this process and of children that have ended."""
    start_time, start_cpu = time.perf_counter(), cpu_seconds()
    side()
    elapsed = time.perf_counter() - start_time, cpu_seconds() - start_cpu
    getattr(side, "clean", lambda: None)()
    return elapsed


def cpu_seconds() -> float:
    usages = [resource.getrusage(target) for target in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def print_report(options: argparse.Namespace, rows: list[dict[str, object]]) -> None:
    """Print the table and what was measured."""
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
