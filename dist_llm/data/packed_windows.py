"""Windows that do not cross documents: a window has one document, or several whole documents (packed sequences).

A document longer than a window is cut into several segments. If the objective predicts the next token, consecutive
segments overlap by one token, so that each token of a document except the first is a target once. Documents are packed
in groups of consecutive documents. Only the number of windows per group is stored; the windows of a group are computed
again when one of them is read.
"""

from bisect import bisect_left, insort
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.data.corpus import Corpus, DocumentLocation
from dist_llm.data.order import Ints
from dist_llm.objectives.examples import TokenWindow

GROUP_DOCUMENTS = 1024  # documents packed together: fewer documents need more padding, more make reads slower
NUM_CACHED_GROUPS = 64

Spans = list[
    tuple[int, int]
]  # (position of the first token in the corpus, number of tokens) of each segment of a window


class _DocumentGroup(NamedTuple):
    """Consecutive documents of a shard that are packed together."""

    shard: int  # index of the shard
    first_document: int  # index of the first document in the shard


class PackedWindows:
    """The windows of a corpus, in the order of the corpus. The constructor reads the offsets of all documents.

    With `is_packed`, a window may have several documents; otherwise it has one.
    """

    def __init__(self, corpus: Corpus, lengths: SequenceLengths, is_packed: bool) -> None:
        self.corpus, self.lengths, self.is_packed = corpus, lengths, is_packed
        self.groups = [
            _DocumentGroup(shard, first_document)
            for shard in range(len(corpus.shards))
            for first_document in range(0, max(corpus.shards[shard].documents, 1), GROUP_DOCUMENTS)
        ]
        # For each group, the number of windows up to its end.
        self.group_ends: Ints = np.cumsum([len(self._build_windows(*group)) for group in self.groups], dtype=np.int64)
        self.num_windows = int(self.group_ends[-1]) if self.groups else 0
        self._cached_windows = lru_cache(NUM_CACHED_GROUPS)(self._build_windows)

    def get_spans(self, window: int) -> Spans:
        """Return (first token, number of tokens) of each segment of a window."""
        group = int(np.searchsorted(self.group_ends, window, side="right"))
        windows = self._cached_windows(*self.groups[group])
        return windows[window - int(self.group_ends[group]) + len(windows)]

    def find_document_windows(self, document: DocumentLocation) -> Ints:
        """Return the indices of the windows that have tokens of a document."""
        first_document = document.index // GROUP_DOCUMENTS * GROUP_DOCUMENTS
        group = self.groups.index(_DocumentGroup(document.shard, first_document))
        windows = self._build_windows(document.shard, first_document)
        first_window = int(self.group_ends[group]) - len(windows)
        has_document = [any(document.start <= start < document.end for start, _ in spans) for spans in windows]
        return np.flatnonzero(has_document) + first_window

    def read(self, windows: Ints, prompt_loss_weight: float) -> list[TokenWindow]:
        """Read the windows with these indices. Raises DataError as `Corpus.read` does.

        The losses of prompt tokens get the weight `prompt_loss_weight`.
        """
        return [self._read_window(self.get_spans(window), prompt_loss_weight) for window in windows.tolist()]

    def _read_window(self, spans: Spans, prompt_loss_weight: float) -> TokenWindow:
        tokens = [self.corpus.read(np.array([start]), length)[0] for start, length in spans]
        segment_ids = np.repeat(np.arange(len(spans)), [length for _, length in spans])
        weights = None
        if self.corpus.manifest.prompts and prompt_loss_weight != 1:
            weights = np.concatenate(
                [
                    self.corpus.compute_loss_weights(np.array([start]), length, prompt_loss_weight)[0]
                    for start, length in spans
                ]
            )
        return TokenWindow(np.concatenate(tokens), segment_ids, weights)

    def _build_windows(self, shard: int, first_document: int) -> list[Spans]:
        """Build the windows of the group of documents that begins with document `first_document` of a shard.

        An adopted shard may begin inside a document. The tokens before its first document start count as a document.
        """
        corpus, window_tokens, stride = self.corpus, self.lengths.window_tokens, self.lengths.stride_tokens
        starts = corpus.read_document_starts(shard, first_document, first_document + GROUP_DOCUMENTS + 1)
        group_end = corpus.shards[shard].tokens
        if len(starts) > GROUP_DOCUMENTS:  # the last one is the start of the next group
            starts, group_end = starts[:GROUP_DOCUMENTS], int(starts[GROUP_DOCUMENTS])
        if first_document == 0 and (not len(starts) or starts[0] > 0):
            starts = np.concatenate(([0], starts))
        document_tokens = np.diff(np.append(starts, group_end))
        overlap = window_tokens - stride
        num_segments = np.maximum(-(-(document_tokens - overlap) // stride), 0)  # per document, rounded up
        first_segments = np.cumsum(num_segments) - num_segments
        segment_in_document = np.arange(num_segments.sum()) - np.repeat(first_segments, num_segments)
        offsets = segment_in_document * stride
        segment_tokens = np.minimum(np.repeat(document_tokens, num_segments) - offsets, window_tokens)
        shard_start = corpus.get_shard_start(shard)
        segment_starts = shard_start + np.repeat(starts, num_segments) + offsets
        spans = list(zip(segment_starts.tolist(), segment_tokens.tolist(), strict=True))
        if not self.is_packed:
            return [[span] for span in spans]
        return [[spans[segment] for segment in window] for window in pack_best_fit(segment_tokens - overlap, stride)]


def pack_best_fit(sizes: Ints, capacity: int) -> list[list[int]]:
    """Pack items of these sizes into bins of `capacity`. Return the indices of the items in each bin.

    The algorithm is best-fit decreasing (Ding et al. 2024).
    """
    bins: list[list[int]] = []
    free_space: list[tuple[int, int]] = []  # (free capacity, index of the bin), ascending
    for index in np.argsort(-sizes, kind="stable").tolist():
        size = int(sizes[index])
        position = bisect_left(free_space, (size, -1))
        if position == len(free_space):
            bins.append([index])
            free, bin_index = capacity - size, len(bins) - 1
        else:
            free, bin_index = free_space.pop(position)
            bins[bin_index].append(index)
            free -= size
        if free:
            insort(free_space, (free, bin_index))
    return bins
