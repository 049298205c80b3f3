"""Token files of other programs to a corpus that points at them: no token is copied, and training sees no difference.

Each file is read once: its hash is taken, its ids are checked and counted, and where documents begin is written
beside the manifest. The corpus is written to `OUT.<random>.partial` and renamed to `OUT` when complete.
"""

import os
import shutil
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from itertools import chain
from pathlib import Path
from threading import Lock
from typing import TextIO
from uuid import uuid4

import numpy as np

from dist_llm.data import remote
from dist_llm.data.remote import as_path, is_remote, sync_directory
from dist_llm.data.shard import ADOPTED, SPLITS, DType, Manifest, Shard, Split
from dist_llm.errors import DataError
from dist_llm.text.adopt_options import AdoptOptions
from dist_llm.text.foreign import Ids, check_size, data_file, read_header
from dist_llm.text.progress import Meter
from dist_llm.text.tokenizer import Tokenizer
from dist_llm.text.vocabulary import build_tokenizer

NO_END = -1  # no id: the tokenizer has none that ends a document
WAY_OUT = "Check the URL, the network and your credentials."


def adopt(options: AdoptOptions, stream: TextIO | None = None) -> Manifest:
    """Make the corpus that `options` describe; progress and a summary go to `stream` (default: stderr).

    Raises DataError for whatever the user can mend: options, files, ids, tokenizer, `OUT`, a full disk.
    """
    _check(options)
    tokenizer = build_tokenizer(options.tokenizer, options.split_pattern, lambda: ())
    out = Path(os.path.realpath(options.out))
    partial = out.with_name(f"{out.name}.{uuid4().hex}.partial")
    try:
        partial.mkdir(parents=True)
        try:
            with Meter(stream or sys.stderr, _total_bytes(options), "checking") as meter:
                run = _Run(options, tokenizer, partial, meter)
                manifest = run.fill()
                sync_directory(partial)
                partial.rename(out)
                sync_directory(out.parent)
                _summarise(options, manifest, meter, sorted(run.look_begun))
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        where, why = error.filename or partial, error.strerror or error
        raise DataError(f"{where}: cannot be written: {why}. Nothing of this run was kept.") from None
    return manifest


def _check(options: AdoptOptions) -> None:
    typed = options.format == "bin"
    rules = (
        (bool(options.data), "--data: give at least one file"),
        (options.workers >= 1, "--workers: must be at least 1"),
        (not options.tokenizer.startswith("bpe:"), f"--tokenizer {options.tokenizer}: give the one that made the ids"),
        (typed or options.dtype is None, f"--dtype: {options.format} files tell their type; leave the option out"),
        (not typed or options.dtype is not None, "--dtype: must be given, since bin files do not tell their type"),
        (
            options.eot_position is None or options.format != "megatron",
            "--eot-position: the .idx of a megatron file tells where documents begin; leave the option out",
        ),
        (not options.out.exists(), f"{options.out}: exists. Choose another --out, or remove it first."),
    )
    for holds, rule in rules:
        if not holds:
            raise DataError(rule)


def _total_bytes(options: AdoptOptions) -> int | None:
    """Of all files; None where some are far away."""
    places = [data_file(options.format, place) for place in (*options.data, *options.heldout)]
    return None if any(map(is_remote, places)) else sum(map(_size, places))


def _size(place: str) -> int:
    try:
        return as_path(place).stat().st_size
    except OSError as error:
        raise DataError(f"{place}: cannot be read: {error.strerror}. Check the paths given to --data.") from None


class _Run:
    """One pass over the files, several at a time: hashing and numpy let other threads run meanwhile."""

    def __init__(self, options: AdoptOptions, tokenizer: Tokenizer, directory: Path, meter: Meter) -> None:
        self.options, self.tokenizer, self.directory, self.meter = options, tokenizer, directory, meter
        self.text_bytes = np.zeros(tokenizer.vocab_size, np.uint16)
        for token, text in tokenizer.token_bytes().items():
            self.text_bytes[token] = len(text)
        self._lock, self._read, self._documents = Lock(), 0, 0
        default = "start" if options.format == "llmc" else "end"
        self._eot_begins = (options.eot_position or default) == "start"
        self._bounds = False  # whether any file says where documents begin
        self.look_begun: list[str] = []  # files whose separators seem to stand on the other side

    def fill(self) -> Manifest:
        """Write tokenizer, offsets and, last, the manifest."""
        self.tokenizer.save(self.directory)
        work: list[tuple[Split, int, str]] = [("train", *each) for each in enumerate(self.options.data)]
        work += [("heldout", *each) for each in enumerate(self.options.heldout)]
        pool = ThreadPoolExecutor(self.options.workers)
        try:
            done = list(pool.map(lambda each: self._adopt(*each), work))
        finally:
            pool.shutdown(cancel_futures=True)
        manifest = Manifest(
            dtype=self._one_type([(shard.file, dtype) for shard, dtype in done]),
            vocab_size=self.tokenizer.vocab_size,
            tokenizer_sha256=self.tokenizer.sha256,
            source=(f"{ADOPTED}{self.options.format} files",),
            shards={
                s: tuple(shard for (split, *_), (shard, _) in zip(work, done, strict=True) if split == s)
                for s in SPLITS
            },
            document_bounds=self._bounds,
        )
        manifest.save(self.directory)
        return manifest

    def _one_type(self, files: list[tuple[str, DType]]) -> DType:
        (first, dtype), *rest = files
        for place, other in rest:
            if other != dtype:
                raise DataError(
                    f"{place}: ids of {other}, but those of {first} are {dtype}. The files of one corpus share one "
                    "type: adopt them as two, or convert one kind."
                )
        return dtype

    def _adopt(self, split: Split, number: int, given: str) -> tuple[Shard, DType]:
        place = data_file(self.options.format, given)
        if not is_remote(place):
            place = os.path.abspath(as_path(place))
            ids, digest = self._scan(place)
        else:
            ids, digest = remote.with_retries(place, lambda: self._scan(place), lambda: WAY_OUT)
        starts = ids.starts(self._eot_begins)
        offsets = f"{split}-{number:05d}.offsets"
        with (self.directory / offsets).open("wb") as file:
            file.write(starts.astype("<u8").tobytes())
            file.flush()
            os.fsync(file.fileno())
        with self._lock:
            self._documents += len(starts)
            self._bounds |= ids.has_document_bounds
            if ids.looks_begun and not self._eot_begins:
                self.look_begun.append(place)
        shard = Shard(place, ids.tokens, len(starts), ids.text_bytes, digest, ids.header.skip_bytes, offsets)
        return shard, ids.header.dtype

    def _scan(self, place: str) -> tuple[Ids, str]:
        """The file's ids, checked and counted, and its hash. Raises RemoteError for a URL's troubles."""
        stream, digest = _blocks(place), sha256()
        head = next(stream, b"")
        header = read_header(self.options.format, place, head, self.options.dtype, _whole)
        if not is_remote(place):
            check_size(place, header, _size(place))  # now, and not after an hour
        eot = NO_END if self.tokenizer.eot is None else self.tokenizer.eot
        ids = Ids(place, header, eot, self.text_bytes)
        for block in chain([head], stream):
            digest.update(block)
            ids.add(block)
            with self._lock:
                self._read += len(block)
                self.meter.update(self._read, self._read, self._documents)
        ids.check()
        return ids, digest.hexdigest()


def _blocks(place: str) -> Iterator[bytes]:
    if is_remote(place):
        yield from remote.iter_blocks(place)
        return
    try:
        with as_path(place).open("rb") as file:
            while block := file.read(remote.BLOCK_BYTES):
                yield block
    except OSError as error:
        raise DataError(
            f"{place}: cannot be read: {error.strerror}. A Megatron .bin needs its .idx beside it."
        ) from None


def _whole(place: str) -> bytes:
    return b"".join(_blocks(place))


def _summarise(options: AdoptOptions, manifest: Manifest, meter: Meter, look_begun: list[str]) -> None:
    tokens, texts, documents = (
        sum(measure(split) for split in SPLITS)
        for measure in (manifest.tokens, manifest.text_bytes, manifest.documents)
    )
    shards = [shard for split in SPLITS for shard in manifest.shards[split]]
    meter.say(
        f"adopted into {options.out}: {len(shards)} files, {documents:,} documents, {tokens:,} tokens of "
        f"{manifest.vocab_size:,} ids, {texts / tokens:.2f} bytes per token, "
        f"{manifest.tokens('heldout') / tokens:.2%} held out, {meter.seconds:.1f} s"
    )
    if whole := [shard.file for shard in shards if shard.documents == 1]:
        meter.say(f"  {len(whole)} of the files are one document each, as {whole[0]}: is <|endoftext|> in them?")
    if not manifest.has_document_bounds:
        meter.say(
            "  no file says where documents begin: data.document_mask and data.windows document or packed are refused"
        )
    if look_begun:
        meter.say(
            f"  {len(look_begun)} of the files begin with <|endoftext|> and do not end with it, as {look_begun[0]}: "
            "if it begins documents there, adopt again with --eot-position start"
        )
