"""Tokenize documents on many processes, in order, with a bounded number in flight.

The chunks come back in the order they went out, so the result does not depend on the number of
workers. Workers die with the process that started them, however it dies.
"""

import hashlib
import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import cycle
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any

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
    """Encode with the saved tokenizer on `workers` processes; with one, in this process.

    Raises DataError where a process dies.
    """
    chunks = _chunks(documents)
    if workers == 1:
        yield from map(Encoder(Tokenizer.load(tokenizer_directory), heldout_fraction), chunks)
        return
    with ExitStack() as stack:
        team = [stack.enter_context(closing(_Worker(tokenizer_directory, heldout_fraction))) for _ in range(workers)]
        # Chunks are dealt out in turn and collected in turn: that alone keeps them in order.
        pending: deque[_Worker] = deque()
        for worker, chunk in zip(cycle(team), chunks, strict=False):
            if len(pending) == CHUNKS_PER_WORKER * workers:
                yield pending.popleft().collect()
            worker.hand(chunk)
            pending.append(worker)
        while pending:
            yield pending.popleft().collect()


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


class _Worker:
    """A process with a pipe of its own.

    Not a ProcessPoolExecutor: its workers share a pipe, so one that is killed while it writes leaves
    the parent reading for ever. Here the pipe ends with the process, whichever end dies.
    """

    def __init__(self, tokenizer_directory: Path, heldout_fraction: float) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, far_end = context.Pipe()
        arguments = (far_end, tokenizer_directory, heldout_fraction)
        self._process = context.Process(target=_work, args=arguments, daemon=True)
        self._process.start()
        far_end.close()

    def hand(self, chunk: list[Document]) -> None:
        """Give it a chunk; returns at once, since a thread over there takes what comes."""
        with self._explained():
            self._pipe.send(chunk)

    def collect(self) -> EncodedChunk:
        """The result of the oldest chunk not yet collected."""
        with self._explained():
            result: EncodedChunk | str = self._pipe.recv()
        if isinstance(result, str):
            raise RuntimeError(f"in a tokenizing process:\n{result}")
        return result

    def close(self) -> None:
        self._process.kill()  # it owns nothing that needs an orderly end
        self._process.join()
        self._pipe.close()

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (EOFError, OSError):  # the pipe ended, maybe within a message
            raise DataError(
                "A tokenizing process died, most likely killed for want of memory. Try fewer --workers."
            ) from None


def _work(pipe: "Connection[Any, Any]", tokenizer_directory: Path, heldout_fraction: float) -> None:
    # Ctrl-C reaches the whole group; the parent alone decides, and says one thing.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A thread empties the pipe, or parent and worker could both wait for the other to read.
    inbox: SimpleQueue[list[Document]] = SimpleQueue()
    threading.Thread(target=_receive, args=(pipe, inbox), daemon=True).start()
    try:
        encoder = Encoder(Tokenizer.load(tokenizer_directory), heldout_fraction)
        while True:
            pipe.send(encoder(inbox.get()))
    except OSError:
        os._exit(1)  # the pipe's other end is gone
    except Exception:
        pipe.send(traceback.format_exc())
        while True:  # until the parent has read that and ends this process
            inbox.get()


def _receive(pipe: "Connection[Any, Any]", inbox: "SimpleQueue[list[Document]]") -> None:
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)  # the parent is gone, even if killed
