"""Windows that do not cross documents: one document each, or several whole documents packed into one.

A document longer than a window is cut into several windows. If the objective predicts the next token, consecutive ones
overlap by one token, so that each token except a document's first is a target once. Documents are packed in groups that
are consecutive in the corpus. Only the number of windows per group is stored; the windows of a group are recomputed
when one is read.
"""

from bisect import bisect_left, insort
from functools import lru_cache

import numpy as np

from dist_llm.config.lengths import Lengths
from dist_llm.data.corpus import Corpus, Document
from dist_llm.data.order import Ints
from dist_llm.objectives.examples import TokenWindow

GROUP_DOCUMENTS = 1024  # documents packed together; fewer mean more padding, more make reads slower
CACHED_GROUPS = 64

Spans = list[tuple[int, int]]  # (first token, number of tokens) of each segment of a window


class PackedWindows:
    """The windows of a corpus, in corpus order. Opening reads the offsets of all documents."""

    def __init__(self, corpus: Corpus, size: Lengths, packed: bool) -> None:
        self.corpus, self.size, self.packed = corpus, size, packed
        self.groups = [
            (shard, first)
            for shard in range(len(corpus.shards))
            for first in range(0, max(corpus.shards[shard].documents, 1), GROUP_DOCUMENTS)
        ]
        self.ends: Ints = np.cumsum([len(self._build_windows(*group)) for group in self.groups], dtype=np.int64)
        self.count = int(self.ends[-1]) if self.groups else 0
        self._cached_windows = lru_cache(CACHED_GROUPS)(self._build_windows)

    def spans(self, window: int) -> Spans:
        """Return the spans of a window."""
        group = int(np.searchsorted(self.ends, window, side="right"))
        windows = self._cached_windows(*self.groups[group])
        return windows[window - int(self.ends[group]) + len(windows)]

    def windows_of_document(self, document: Document) -> Ints:
        """Return the windows that have tokens of a document."""
        first = document.index // GROUP_DOCUMENTS * GROUP_DOCUMENTS
        group = self.groups.index((document.shard, first))
        windows = self._build_windows(document.shard, first)
        begin = int(self.ends[group]) - len(windows)
        inside = [any(document.start <= start < document.end for start, _ in window) for window in windows]
        return np.flatnonzero(inside) + begin

    def read(self, windows: Ints, score_prompts: bool) -> list[TokenWindow]:
        """Read these windows. Raises DataError as the corpus does."""
        return [self._read_window(self.spans(window), score_prompts) for window in windows.tolist()]

    def _read_window(self, spans: Spans, score_prompts: bool) -> TokenWindow:
        tokens = [self.corpus.read(np.array([start]), length)[0] for start, length in spans]
        segment_ids = np.repeat(np.arange(len(spans)), [length for _, length in spans])
        loss_mask = None
        if self.corpus.manifest.prompts and not score_prompts:
            loss_mask = np.concatenate(
                [self.corpus.compute_loss_mask(np.array([start]), length)[0] for start, length in spans]
            )
        return TokenWindow(np.concatenate(tokens), segment_ids, loss_mask)

    def _build_windows(self, shard: int, first: int) -> list[Spans]:
        """Build the windows of a group of documents. If a shard begins inside a document, the rest counts as a
        document."""
        corpus, stride = self.corpus, self.size.stride
        starts, end = (
            corpus.read_document_starts(shard, first, first + GROUP_DOCUMENTS + 1),
            corpus.shards[shard].tokens,
        )
        if len(starts) > GROUP_DOCUMENTS:  # the start of the next group
            starts, end = starts[:GROUP_DOCUMENTS], int(starts[GROUP_DOCUMENTS])
        if first == 0 and (not len(starts) or starts[0] > 0):
            starts = np.concatenate(([0], starts))
        tokens = np.diff(np.append(starts, end))
        shared = self.size.window - stride
        counts = np.maximum(-(-(tokens - shared) // stride), 0)
        index = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)  # within the document
        offset = index * stride
        lengths = np.minimum(np.repeat(tokens, counts) - offset, self.size.window)
        begin = int(corpus.shard_ends[shard]) - corpus.shards[shard].tokens
        spans = list(zip((begin + np.repeat(starts, counts) + offset).tolist(), lengths.tolist(), strict=True))
        if not self.packed:
            return [[span] for span in spans]
        return [[spans[n] for n in window] for window in pack_best_fit(lengths - shared, stride)]


def pack_best_fit(sizes: Ints, capacity: int) -> list[list[int]]:
    """Pack all sizes into bins of `capacity` and return their indices per bin (best-fit decreasing, Ding et al.
    2024)."""
    bins: list[list[int]] = []
    room: list[tuple[int, int]] = []  # (free capacity, bin), ascending
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        position = bisect_left(room, (size, -1))
        if position == len(room):
            bins.append([index])
            left, bin_index = capacity - size, len(bins) - 1
        else:
            left, bin_index = room.pop(position)
            bins[bin_index].append(index)
            left -= size
        if left:
            insort(room, (left, bin_index))
    return bins
