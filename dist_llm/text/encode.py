"""Tokenize documents on many processes, in order, with a bounded number in flight.

The chunks come back in the order they went out, so the result does not depend on the number of
workers. Workers die with the process that started them, however it dies.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from dist_llm.data.shard import smallest_dtype
from dist_llm.errors import DataError
from dist_llm.text.sources import Document
from dist_llm.text.tokenizer import Tokenizer

CHUNK_CHARS = 1 << 20
DOCUMENT_OVERHEAD_CHARS = 64  # so that a chunk of tiny documents is not a million objects
CHUNKS_PER_WORKER = 3  # one at work, one waiting, one coming back

Ids = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class EncodedDocument:
    """The ids of one document, `<|endoftext|>` last."""

    ids: Ids
    text_bytes: int
    heldout: bool


@dataclass(frozen=True)
class EncodedChunk:
    """Many documents, as few arrays: cheap to send between processes."""

    ids: Ids
    ends: npt.NDArray[np.int64]
    text_bytes: npt.NDArray[np.int64]
    heldout: npt.NDArray[np.bool_]

    def __iter__(self) -> Iterator[EncodedDocument]:
        start = 0
        columns = self.ends.tolist(), self.text_bytes.tolist(), self.heldout.tolist()
        for end, text_bytes, heldout in zip(*columns, strict=True):
            yield EncodedDocument(self.ids[start:end], text_bytes, heldout)
            start = end


class Encoder:
    """Turns documents into ids and says which are held out."""

    def __init__(self, tokenizer: Tokenizer, heldout_fraction: float) -> None:
        self.tokenizer, self.heldout_fraction = tokenizer, heldout_fraction
        self.dtype = np.dtype(smallest_dtype(tokenizer.vocab_size))
        self._end = np.array([tokenizer.eot], dtype=self.dtype)

    def __call__(self, chunk: list[Document]) -> EncodedChunk:
        ids: list[Ids] = []
        texts = [document.text.encode() for document in chunk]
        for document in chunk:
            try:
                ids += [self.tokenizer.encode(document.text).astype(self.dtype), self._end]
            except Exception as error:
                raise RuntimeError(f"{document.origin}: cannot be tokenized") from error
        return EncodedChunk(
            np.concatenate(ids),
            np.cumsum([len(each) + 1 for each in ids[::2]]),
            np.array([len(text) for text in texts]),
            np.array([is_heldout(text, self.heldout_fraction) for text in texts]),
        )


def is_heldout(text: bytes, fraction: float) -> bool:
    """Whether a document belongs to the held-out split: a function of its text alone, so copies stay together."""
    draw = int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "big")
    return draw < fraction * 2**64


def encode_in_order(
    documents: Iterable[Document], tokenizer_directory: Path, heldout_fraction: float, workers: int
) -> Generator[EncodedChunk, None, None]:
    """Encode with the saved tokenizer on `workers` processes; with one, in this process."""
    chunks = _chunks(documents)
    if workers == 1:
        yield from map(Encoder(Tokenizer.load(tokenizer_directory), heldout_fraction), chunks)
        return
    pool = ProcessPoolExecutor(
        workers,
        mp_context=multiprocessing.get_context("spawn"),
        initializer=_start_worker,
        initargs=(tokenizer_directory, heldout_fraction),
    )
    try:
        yield from _window(pool, chunks, CHUNKS_PER_WORKER * workers)
    except BrokenProcessPool:
        raise DataError(
            "A tokenizing process died, most likely killed for want of memory. Try fewer --workers."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _window(pool: ProcessPoolExecutor, chunks: Iterable[list[Document]], size: int) -> Iterator[EncodedChunk]:
    pending: deque[Future[EncodedChunk]] = deque()
    for chunk in chunks:
        if len(pending) == size:
            yield pending.popleft().result()
        pending.append(pool.submit(_encode, chunk))
    while pending:
        yield pending.popleft().result()


def _chunks(documents: Iterable[Document]) -> Iterator[list[Document]]:
    chunk: list[Document] = []
    chars = 0
    for document in documents:
        chunk.append(document)
        chars += len(document.text) + DOCUMENT_OVERHEAD_CHARS
        if chars >= CHUNK_CHARS:
            yield chunk
            chunk, chars = [], 0
    if chunk:
        yield chunk


_encoder: Encoder


def _start_worker(tokenizer_directory: Path, heldout_fraction: float) -> None:
    global _encoder
    # Ctrl-C reaches the whole group; the parent alone decides, and says one thing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_die_with_parent, daemon=True).start()
    _encoder = Encoder(Tokenizer.load(tokenizer_directory), heldout_fraction)


def _die_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _encode(chunk: list[Document]) -> EncodedChunk:
    return _encoder(chunk)
