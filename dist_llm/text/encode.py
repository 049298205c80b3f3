"""Filter and tokenize chunks of documents on several processes, with a bounded number of chunks in flight.

Results come back in the order of the chunks, so the corpus does not depend on the number of workers. Workers exit when
their parent process dies, also after SIGKILL.
"""

import multiprocessing
import os
import signal
import threading
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass
from itertools import cycle, repeat
from multiprocessing.connection import Connection
from pathlib import Path
from queue import SimpleQueue
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from dist_llm.data.shard import select_token_dtype
from dist_llm.errors import DataError
from dist_llm.io.hashing import digest64
from dist_llm.text.chunks import Chunk, ResumePoint
from dist_llm.text.corpus_part import SINGLE_PART, CorpusPart
from dist_llm.text.duplicates import KEY_BYTES, compute_key
from dist_llm.text.filters import FilterChain
from dist_llm.text.report import RemovalCounts
from dist_llm.text.tokenizer import Tokenizer

CHUNKS_PER_WORKER = 3  # chunks in flight: one in the encoder, one in the inbox, one result in the pipe

Ids = npt.NDArray[np.unsignedinteger]


@dataclass(frozen=True)
class DocumentEncoderSpec:
    """How to filter, tokenize and split the documents. It is sent to the worker processes."""

    tokenizer_directory: Path
    heldout_fraction: float = 0.0
    filters: tuple[str, ...] = ()
    dedup: str | None = None
    part: CorpusPart = SINGLE_PART

    def build_encoder(self) -> "DocumentEncoder":
        """Load the tokenizer and build the encoder. Raises DataError if there is no tokenizer."""
        return DocumentEncoder(Tokenizer.load(self.tokenizer_directory).speed_up(), self)


@dataclass(frozen=True)
class EncodedChunk:
    """The documents that passed the filters, as a few arrays, which are cheap to send between processes.

    `ids` concatenates the documents. A document begins with the `prefix_ids` of the tokenizer and ends with its `eot`.
    The other arrays have one row per document.
    """

    ids: Ids
    ends: npt.NDArray[np.int64]  # index in `ids` after the last token
    text_bytes: npt.NDArray[np.int64]
    is_heldout: npt.NDArray[np.bool_]
    keys: npt.NDArray[np.uint8]  # [documents, bytes of a key], for deduplication
    removed: RemovalCounts
    prompt_tokens: npt.NDArray[np.int64]  # length of the prompt at the start of the document


class DocumentEncoder:
    """Filters and tokenizes documents, selects the held-out ones, and computes the keys for deduplication."""

    def __init__(self, tokenizer: Tokenizer, spec: DocumentEncoderSpec) -> None:
        self.tokenizer, self.spec = tokenizer, spec
        self.dtype = np.dtype(select_token_dtype(tokenizer.vocab_size))
        self._prefix_ids = np.array(tokenizer.prefix_ids, dtype=np.uint32)
        self._eot_ids = np.array([] if tokenizer.eot is None else [tokenizer.eot], dtype=np.uint32)
        self._filters = FilterChain(spec.filters)

    def __call__(self, chunk: Chunk) -> EncodedChunk:
        """Encode a chunk. Raises DataError, with the origin of the document, for text that cannot be encoded."""
        removed = RemovalCounts()
        ids: list[npt.NDArray[np.uint32]] = []
        texts: list[bytes] = []
        keys: list[npt.NDArray[np.uint8]] = []
        prompt_tokens: list[int] = []
        prompt_chars = chunk.prompt_chars or repeat(0)
        for origin, text, prompt_end in zip(chunk.origins, chunk.texts, prompt_chars, strict=False):
            try:
                filtered = self._filter_text(text, removed)
                if filtered is None:
                    continue
                texts.append(filtered.encode())
                # Encode the prompt and the rest separately, so that no token spans both.
                segments = [segment for segment in (filtered[:prompt_end], filtered[prompt_end:]) if segment]
                encoded = [self.tokenizer.encode(segment) for segment in segments]
                ids.append(np.concatenate([self._prefix_ids, *encoded, self._eot_ids]))
                prompt_tokens.append(len(self._prefix_ids) + len(encoded[0]) if prompt_end else 0)
                if self.spec.dedup:
                    keys.append(compute_key(self.spec.dedup, filtered))
            except DataError as error:
                raise DataError(f"{origin}: {error}") from None
            except Exception as error:
                raise RuntimeError(f"{origin}: cannot be tokenized") from error
        key_bytes = KEY_BYTES[self.spec.dedup] if self.spec.dedup else 0
        no_keys = np.zeros((len(texts), key_bytes), np.uint8)
        return EncodedChunk(
            ids=np.concatenate(ids or [self._eot_ids[:0]]).astype(self.dtype),
            ends=np.cumsum([len(document_ids) for document_ids in ids], dtype=np.int64),
            text_bytes=np.array([len(text) for text in texts], dtype=np.int64),
            is_heldout=np.array([is_heldout(text, self.spec.heldout_fraction) for text in texts], dtype=np.bool_),
            keys=np.concatenate(keys).reshape(-1, key_bytes) if keys else no_keys,
            removed=removed,
            prompt_tokens=np.array(prompt_tokens, dtype=np.int64),
        )

    def _filter_text(self, text: str, removed: RemovalCounts) -> str | None:
        """Return the text to tokenize, or None if the filters remove it or another part owns it."""
        removed_from_text = RemovalCounts()
        filtered = self._filters(text, removed_from_text)
        # The filtered text decides: two texts may differ only in what a filter removes.
        if not self.spec.part.owns_text((text if filtered is None else filtered).encode()):
            return None
        removed.merge(removed_from_text)
        return filtered


def is_heldout(text: bytes, fraction: float) -> bool:
    """Return whether a document is held out. This depends only on its text, so equal documents are in one split."""
    hash64 = int.from_bytes(digest64(text), "big")
    return hash64 < fraction * 2**64


class EncodedResult(NamedTuple):
    """An encoded chunk, and the resume point that the chunk carried."""

    chunk: EncodedChunk
    resume_point: ResumePoint | None


def encode_in_order(
    chunks: Iterable[Chunk], spec: DocumentEncoderSpec, workers: int
) -> Generator[EncodedResult, None, None]:
    """Encode the chunks on `workers` processes, or in this process if `workers` is 1. Yield them in order.

    Raises DataError if a worker dies.
    """
    if workers == 1:
        encoder = spec.build_encoder()
        yield from (EncodedResult(encoder(chunk), chunk.resume_point) for chunk in chunks)
        return
    with ExitStack() as stack:
        pool = [stack.enter_context(closing(_Worker(spec))) for _ in range(workers)]
        # Chunks are submitted and collected round-robin, which keeps their order.
        pending: deque[tuple[_Worker, ResumePoint | None]] = deque()
        for worker, chunk in zip(cycle(pool), chunks, strict=False):
            if len(pending) == CHUNKS_PER_WORKER * workers:
                yield _collect(*pending.popleft())
            worker.submit(chunk)
            pending.append((worker, chunk.resume_point))
        while pending:
            yield _collect(*pending.popleft())


def _collect(worker: "_Worker", resume_point: ResumePoint | None) -> EncodedResult:
    """Wait for the next result of a worker."""
    return EncodedResult(worker.collect(), resume_point)


class _Worker:
    """A worker process with its own pipe.

    The workers of a ProcessPoolExecutor share one pipe. If one of them is killed while it writes, the parent blocks in
    its read forever. With a pipe per worker, the read fails when the worker dies.
    """

    def __init__(self, spec: DocumentEncoderSpec) -> None:
        context = multiprocessing.get_context("spawn")
        self._pipe, worker_pipe = context.Pipe()
        self._process = context.Process(target=_run_worker, args=(worker_pipe, spec), daemon=True)
        self._process.start()
        worker_pipe.close()

    def submit(self, chunk: Chunk) -> None:
        """Send a chunk. This does not block for long, because a thread of the worker empties the pipe."""
        with self._convert_pipe_errors():
            self._pipe.send(chunk)

    def collect(self) -> EncodedChunk:
        """Wait for the result of the oldest chunk that is not collected yet."""
        with self._convert_pipe_errors():
            result: EncodedChunk | DataError | str = self._pipe.recv()
        if isinstance(result, DataError):
            raise result
        if isinstance(result, str):
            raise RuntimeError(f"in a tokenizing process:\n{result}")
        return result

    def close(self) -> None:
        """End the process."""
        self._process.kill()  # a worker has no state to clean up
        self._process.join()
        self._pipe.close()

    @contextmanager
    def _convert_pipe_errors(self) -> Iterator[None]:
        """Convert an error of the pipe within the block to a DataError: the worker died."""
        try:
            yield
        except (EOFError, OSError):  # the pipe closed, maybe within a message
            raise DataError(
                "A tokenizing process died, probably killed for lack of memory. Try fewer --workers."
            ) from None


def _run_worker(pipe: "Connection[Any, Any]", spec: DocumentEncoderSpec) -> None:
    """Encode the chunks that arrive at the pipe, until the parent kills this process."""
    # Ctrl-C signals the whole process group. Only the parent handles it and prints a message.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A thread empties the pipe. Otherwise parent and worker could deadlock: both would block in a write.
    inbox: SimpleQueue[Chunk] = SimpleQueue()
    threading.Thread(target=_fill_inbox, args=(pipe, inbox), daemon=True).start()
    try:
        encoder = spec.build_encoder()
        while True:
            pipe.send(encoder(inbox.get()))
    except OSError:
        os._exit(1)  # the parent closed the pipe
    except Exception as error:
        pipe.send(error if isinstance(error, DataError) else traceback.format_exc())
        while True:  # until the parent has read the error and kills this process
            inbox.get()


def _fill_inbox(pipe: "Connection[Any, Any]", inbox: "SimpleQueue[Chunk]") -> None:
    """Move chunks from the pipe to the inbox. End the process if the parent has died."""
    try:
        while True:
            inbox.put(pipe.recv())
    except (EOFError, OSError):
        os._exit(1)  # the parent died
