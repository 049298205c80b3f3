"""Raw text to a corpus of token shards, all or nothing.

The corpus is written to `OUT.partial` and renamed to `OUT` when complete and durable; a killed run
leaves only the former, which the next one removes. `OUT.lock` keeps a second run away and is
released by the kernel when its holder dies.
"""

import fcntl
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TextIO

from dist_llm.data.shard import MANIFEST, SPLITS, Manifest, ShardWriter, Split, smallest_dtype
from dist_llm.errors import DataError
from dist_llm.text.encode import encode_in_order, is_heldout
from dist_llm.text.options import PrepareOptions, add_arguments, options_from
from dist_llm.text.progress import Meter
from dist_llm.text.sources import Document, Source, Tally, documents, open_sources, size_bytes
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.text.vocabulary import build_tokenizer

__all__ = ["PrepareOptions", "add_arguments", "options_from", "prepare"]


def prepare(options: PrepareOptions, stream: TextIO | None = None) -> Manifest:
    """Make the corpus that `options` describe; progress and a summary go to `stream` (default: stderr).

    Raises DataError for whatever the user can mend: options, sources, tokenizer, rows, `OUT`, a full disk.
    """
    _check(options)
    sources = open_sources(options.source, options.text_key, options.hf_split)
    out = Path(os.path.realpath(options.out))
    partial, old = out.with_name(out.name + ".partial"), out.with_name(out.name + ".old")
    try:
        with _sole_run(out):
            _recover(out, partial, old)
            _refuse_to_destroy(out, options.overwrite)
            try:
                partial.mkdir()
                with Meter(stream or sys.stderr, size_bytes(sources)) as meter:
                    run = _Run(options, sources, partial, meter)
                    manifest = run.fill()
                    _publish(partial, out, old)
                    run.summarise(manifest)
            finally:
                shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        where, why = error.filename or partial, error.strerror or error
        raise DataError(f"{where}: cannot be written: {why}. Nothing of this run was kept.") from None
    return manifest


def _check(options: PrepareOptions) -> None:
    rules = (
        (bool(options.source), "--source: give at least one"),
        (0 <= options.heldout_fraction < 1, "--heldout-fraction: must be at least 0 and below 1"),
        (0 <= options.max_bad_rate <= 1, "--max-bad-rate: must be from 0 to 1"),
        (options.workers >= 1, "--workers: must be at least 1"),
        (options.shard_tokens >= 1, "--shard-tokens: must be at least 1"),
        (options.bpe_train_bytes >= 1, "--bpe-train-bytes: must be at least 1"),
    )
    for holds, rule in rules:
        if not holds:
            raise DataError(rule)


class _Run:
    """One pass from sources to a filled directory."""

    def __init__(self, options: PrepareOptions, sources: list[Source], directory: Path, meter: Meter) -> None:
        self.options, self.sources, self.directory, self.meter = options, sources, directory, meter
        self.tally = Tally(options.max_bad_rate)
        self.empty_documents = 0

    def fill(self) -> Manifest:
        """Write tokenizer, shards and, last, the manifest."""
        if self.options.tokenizer.startswith("bpe:"):
            self.meter.say(f"training {self.options.tokenizer} ...")
        tokenizer = build_tokenizer(self.options.tokenizer, self.options.split_pattern, self._training_texts)
        tokenizer.save(self.directory)
        manifest = self._write_shards(tokenizer)
        self.tally.check()
        if not manifest.tokens("train"):
            raise DataError(
                f"--source {' '.join(self.options.source)}: no text to train on, in {self.tally.rows:,} rows "
                f"({self.empty_documents:,} empty, {manifest.documents('heldout'):,} held out). Give more text."
            )
        manifest.save(self.directory)
        return manifest

    def _write_shards(self, tokenizer: Tokenizer) -> Manifest:
        options, dtype = self.options, smallest_dtype(tokenizer.vocab_size)
        chunks = encode_in_order(self._documents(), self.directory, options.heldout_fraction, options.workers)
        text_bytes = written = 0
        with closing(chunks), ExitStack() as stack:
            writers = {
                split: stack.enter_context(ShardWriter(self.directory, split, dtype, options.shard_tokens))
                for split in SPLITS
            }
            for chunk in chunks:
                for document in chunk:
                    split: Split = "heldout" if document.heldout else "train"
                    writers[split].add(document.ids, document.text_bytes)
                text_bytes, written = text_bytes + int(chunk.text_bytes.sum()), written + len(chunk.ends)
                self.meter.update(self.tally.bytes_read, text_bytes, written)
            shards = {split: writer.close() for split, writer in writers.items()}
        return Manifest(
            dtype=dtype,
            vocab_size=tokenizer.vocab_size,
            tokenizer_sha256=tokenizer.sha256,
            source=options.source,
            shards=shards,
            bad_rows=self.tally.bad_rows,
        )

    def _documents(self) -> Iterator[Document]:
        for document in documents(self.sources, self.tally):
            if document.text:
                yield document
            else:
                self.empty_documents += 1

    def _training_texts(self) -> Iterator[str]:
        """The first `bpe_train_bytes` of text that is not held out."""
        left = self.options.bpe_train_bytes
        for document in documents(self.sources, Tally(self.options.max_bad_rate)):
            text = document.text.encode()
            if is_heldout(text, self.options.heldout_fraction):
                continue
            yield document.text if len(text) <= left else text[:left].decode(errors="ignore")
            left -= len(text)
            if left <= 0:
                return

    def summarise(self, manifest: Manifest) -> None:
        """Say what came of it."""
        tokens, texts, count = (
            sum(measure(split) for split in SPLITS)
            for measure in (manifest.tokens, manifest.text_bytes, manifest.documents)
        )
        self.meter.say(
            f"prepared {self.options.out}: {count:,} documents, {tokens:,} tokens of {manifest.vocab_size:,} ids, "
            f"{texts / tokens:.2f} bytes per token, {sum(map(len, manifest.shards.values()))} shards, "
            f"{manifest.documents('heldout') / count:.2%} held out, {self.tally.bad_rows:,} bad rows, "
            f"{self.empty_documents:,} empty, {self.meter.seconds:.1f} s, "
            f"{texts / 1e6 / self.meter.seconds:.1f} MB/s"
        )
        for location in self.tally.locations:
            self.meter.say(f"  skipped {location}")


@contextmanager
def _sole_run(out: Path) -> Iterator[None]:
    """Hold `OUT.lock`. Raises DataError where another run holds it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    lock = out.with_name(out.name + ".lock")
    while True:
        with lock.open("w") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise DataError(f"{out}: another prepare is writing it. Wait for it or choose another --out.") from None
            # A run that just ended may have removed the file between our open and our lock.
            if not lock.exists() or not os.path.samestat(os.fstat(file.fileno()), lock.stat()):
                continue
            try:
                yield
            finally:
                lock.unlink(missing_ok=True)
            return


def _recover(out: Path, partial: Path, old: Path) -> None:
    """Clear what a killed run left: its unfinished corpus, or the old one moved aside for the new."""
    if old.exists() and not out.exists():
        old.rename(out)
    for leftover in (partial, old):
        if leftover.exists():
            shutil.rmtree(leftover)


def _refuse_to_destroy(out: Path, overwrite: bool) -> None:
    if not out.exists():
        return
    if not overwrite:
        raise DataError(f"{out}: exists. Choose another --out, or give --overwrite to replace it.")
    if not (out / MANIFEST).is_file():
        raise DataError(f"{out}: not a prepared corpus, so --overwrite will not replace it. Choose another --out.")


def _publish(partial: Path, out: Path, old: Path) -> None:
    _sync(partial)
    if out.exists():
        out.rename(old)
    partial.rename(out)
    _sync(out.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
