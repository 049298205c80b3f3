"""Adopt token files of other programs: build a corpus whose manifest points at the files. No token is copied.

Each file is read once. This pass computes the hash, checks and counts the ids, and writes the document offsets beside
the manifest. The corpus is written to `OUT.<random>.partial` and renamed to `OUT` when it is complete.
"""

import os
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TextIO

import numpy as np

from dist_llm.data.shard import ADOPTED, SPLITS, CorpusManifest, DType, Shard, Split
from dist_llm.errors import DataError
from dist_llm.io import urls
from dist_llm.io.atomic import create_atomically, write_durably
from dist_llm.io.urls import as_path, is_remote
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.build_tokenizer import build_tokenizer
from dist_llm.text.progress import ProgressMeter
from dist_llm.text.token_files import TokenFileScan, check_size, locate_data_file, read_header
from dist_llm.text.tokenizer import Tokenizer

NO_EOT = -1  # stands for the end-of-document id if the tokenizer has none; real ids are never negative
REMOTE_HINT = "Check the URL, the network and your credentials."


def adopt(options: AdoptOptions, log_stream: TextIO | None = None) -> CorpusManifest:
    """Build the corpus that `options` describe. Print progress and a summary to `log_stream` (default: stderr).

    Raises DataError for each error that the user can fix: options, files, ids, tokenizer, `OUT`, a full disk.
    """
    _check_options(options)
    tokenizer = build_tokenizer(options.tokenizer, options.split_pattern)
    out = Path(os.path.realpath(options.out))
    try:
        with ProgressMeter(log_stream or sys.stderr, _sum_file_bytes(options), activity="checking") as meter:
            with create_atomically(out, shared=True) as partial:
                partial.mkdir(parents=True)
                run = _AdoptRun(options, tokenizer, partial, meter)
                manifest = run.write_corpus()
            _print_summary(options, manifest, meter, sorted(run.files_with_leading_eot))
    except OSError as error:
        path, reason = error.filename or out, error.strerror or error
        raise DataError(f"{path}: cannot be written: {reason}. Nothing of this run was saved.") from None
    return manifest


def _check_options(options: AdoptOptions) -> None:
    is_bin = options.format == "bin"
    rules = (
        (bool(options.data), "--data: give at least one file"),
        (options.workers >= 1, "--workers: must be at least 1"),
        (not options.tokenizer.startswith("bpe:"), f"--tokenizer {options.tokenizer}: give the one that made the ids"),
        (is_bin or options.dtype is None, f"--dtype: {options.format} files store their dtype; leave the option out"),
        (not is_bin or options.dtype is not None, "--dtype: required, because bin files do not store their dtype"),
        (
            options.eot_position is None or options.format != "megatron",
            "--eot-position: the .idx of a megatron file has the document boundaries; leave the option out",
        ),
        (not options.out.exists(), f"{options.out}: exists. Choose another --out, or remove it first."),
    )
    for is_satisfied, message in rules:
        if not is_satisfied:
            raise DataError(message)


def _sum_file_bytes(options: AdoptOptions) -> int | None:
    """Return the size of all files in bytes, or None if a file is remote."""
    locations = [locate_data_file(options.format, location) for location in (*options.data, *options.heldout)]
    return None if any(map(is_remote, locations)) else sum(map(_get_file_bytes, locations))


def _get_file_bytes(location: str) -> int:
    try:
        return as_path(location).stat().st_size
    except OSError as error:
        raise DataError(
            f"{location}: cannot be read: {error.strerror}. Check the paths of --data and --heldout."
        ) from None


class _AdoptRun:
    """Scans all files once, in a pool of threads, and writes the corpus. Hashing and numpy release the GIL."""

    def __init__(self, options: AdoptOptions, tokenizer: Tokenizer, directory: Path, meter: ProgressMeter) -> None:
        self.options, self.tokenizer, self.directory, self.meter = options, tokenizer, directory, meter
        self.text_bytes_of_id = np.zeros(tokenizer.vocab_size, np.uint16)
        for token, text in tokenizer.get_token_bytes().items():
            self.text_bytes_of_id[token] = len(text)
        self._lock, self._bytes_read, self._num_documents = Lock(), 0, 0
        default_position = "start" if options.format == "llmc" else "end"
        self._eot_at_start = (options.eot_position or default_position) == "start"
        self._has_document_bounds = False  # whether any file has document boundaries
        self.files_with_leading_eot: list[str] = []  # probably a wrong --eot-position

    def write_corpus(self) -> CorpusManifest:
        """Write the tokenizer and the document offsets, then the manifest."""
        self.tokenizer.save(self.directory)
        files: list[tuple[Split, int, str]] = []
        files += [("train", index, location) for index, location in enumerate(self.options.data)]
        files += [("heldout", index, location) for index, location in enumerate(self.options.heldout)]
        pool = ThreadPoolExecutor(self.options.workers)
        try:
            adopted_files = list(pool.map(lambda file: self._adopt_file(*file), files))
        finally:
            pool.shutdown(cancel_futures=True)
        manifest = CorpusManifest(
            dtype=self._get_common_dtype([(shard.file, dtype) for shard, dtype in adopted_files]),
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_sha256=self.tokenizer.sha256,
            source=(f"{ADOPTED}{self.options.format} files",),
            shards={
                split: tuple(
                    shard
                    for (file_split, *_), (shard, _) in zip(files, adopted_files, strict=True)
                    if file_split == split
                )
                for split in SPLITS
            },
            document_bounds=self._has_document_bounds,
        )
        manifest.save(self.directory)
        return manifest

    def _get_common_dtype(self, files: list[tuple[str, DType]]) -> DType:
        """Return the dtype of the ids of all (location, dtype). Raises DataError if two differ."""
        (first_location, first_dtype), *other_files = files
        for location, dtype in other_files:
            if dtype != first_dtype:
                raise DataError(
                    f"{location}: ids of {dtype}, but those of {first_location} are {first_dtype}. All files of a "
                    "corpus need one dtype: adopt them as two corpora, or convert one kind."
                )
        return first_dtype

    def _adopt_file(self, split: Split, shard_index: int, file_argument: str) -> tuple[Shard, DType]:
        """Scan one file and write its document offsets. Return its manifest entry and the dtype of its ids."""
        location = locate_data_file(self.options.format, file_argument)
        if not is_remote(location):
            location = os.path.abspath(as_path(location))
            scan, sha256_digest = self._scan_file(location)
        else:
            scan, sha256_digest = urls.with_retries(location, lambda: self._scan_file(location), lambda: REMOTE_HINT)
        starts = scan.compute_starts(self._eot_at_start)
        offsets_file = f"{split}-{shard_index:05d}.offsets"
        write_durably(self.directory / offsets_file, starts.astype("<u8").tobytes())
        with self._lock:
            self._num_documents += len(starts)
            self._has_document_bounds |= scan.has_document_bounds
            if scan.has_leading_eot and not self._eot_at_start:
                self.files_with_leading_eot.append(location)
        shard = Shard(
            file=location,
            tokens=scan.num_tokens,
            documents=len(starts),
            text_bytes=scan.text_bytes,
            sha256=sha256_digest,
            skip_bytes=scan.header.skip_bytes,
            offsets=offsets_file,
        )
        return shard, scan.header.dtype

    def _scan_file(self, location: str) -> tuple[TokenFileScan, str]:
        """Read a file; check and count its ids. Return (the scan, SHA-256). Raises RemoteError if a URL fails."""
        blocks, digest = _iter_blocks(location), sha256()
        first_block = next(blocks, b"")
        header = read_header(self.options.format, location, first_block, self.options.dtype, _read_all)
        if not is_remote(location):
            check_size(location, header, _get_file_bytes(location))  # fail before the long pass over the content
        eot = NO_EOT if self.tokenizer.eot is None else self.tokenizer.eot
        scan = TokenFileScan(location, header, eot, self.text_bytes_of_id)
        for block in chain([first_block], blocks):
            digest.update(block)
            scan.add(block)
            with self._lock:
                self._bytes_read += len(block)
                self.meter.update(self._bytes_read, self._bytes_read, self._num_documents)
        scan.check()
        return scan, digest.hexdigest()


def _iter_blocks(location: str) -> Iterator[bytes]:
    if is_remote(location):
        yield from urls.iter_blocks(location)
        return
    try:
        with as_path(location).open("rb") as file:
            while block := file.read(urls.BLOCK_BYTES):
                yield block
    except OSError as error:
        raise DataError(
            f"{location}: cannot be read: {error.strerror}. A Megatron .bin needs its .idx beside it."
        ) from None


def _read_all(location: str) -> bytes:
    return b"".join(_iter_blocks(location))


def _print_summary(
    options: AdoptOptions, manifest: CorpusManifest, meter: ProgressMeter, files_with_leading_eot: list[str]
) -> None:
    num_tokens, text_bytes, num_documents = (
        sum(count(split) for split in SPLITS)
        for count in (manifest.count_tokens, manifest.count_text_bytes, manifest.count_documents)
    )
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    meter.print_line(
        f"adopted into {options.out}: {len(shards)} files, {num_documents:,} documents, {num_tokens:,} tokens of "
        f"{manifest.vocab_size:,} ids, {text_bytes / num_tokens:.2f} bytes per token, "
        f"{manifest.count_tokens('heldout') / num_tokens:.2%} held out, {meter.seconds:.1f} s"
    )
    if single_document_files := [shard.file for shard in shards if shard.documents == 1]:
        meter.print_line(
            f"  {len(single_document_files)} of the files are a single document, such as {single_document_files[0]}: "
            "do they have <|endoftext|>?"
        )
    if not manifest.has_document_bounds:
        meter.print_line(
            "  no file has document boundaries: data.document_mask and data.windows document or packed are refused"
        )
    if files_with_leading_eot:
        meter.print_line(
            f"  {len(files_with_leading_eot)} of the files begin with <|endoftext|> and do not end with it, such as "
            f"{files_with_leading_eot[0]}: if it begins documents there, adopt again with --eot-position start"
        )
