"""Span corruption (Raffel et al. 2020, 3.1.4): predict the spans that were removed from a text."""

import numpy as np

from dist_llm.config.lengths import Lengths
from dist_llm.config.objective_sections import SpanSpec
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.examples import Example, Ints, TokenWindow
from dist_llm.objectives.objective_vocabulary import Vocabulary


def make_span_example(
    window: TokenWindow,
    rng: np.random.Generator,
    spec: SpanSpec,
    size: Lengths,
    vocabulary: Vocabulary,
    is_encoder_decoder: bool,
) -> Example:
    """[mode] text with a sentinel for each span, end -> each sentinel and its span, end.

    In an encoder-decoder the encoder gets the first and the decoder predicts the second. In a decoder they are
    concatenated.
    """
    tokens, documents = window.tokens_W.astype(np.int64), window.document_ids()
    segment_ids = sample_segment_ids(rng, len(tokens), size.noise, size.spans)
    mode = np.array([vocabulary.special_id(spec.mode)] if spec.mode else [], dtype=np.int64)
    corrupted, corrupted_documents = _replace_segments(tokens, documents, segment_ids, vocabulary, noise=True)
    removed, removed_documents = _replace_segments(tokens, documents, segment_ids, vocabulary, noise=False)
    corrupted = np.concatenate((mode, corrupted))
    corrupted_documents = np.concatenate((documents[:1].repeat(len(mode)), corrupted_documents))
    if is_encoder_decoder:
        inputs = np.concatenate(([vocabulary.special_id("start")], removed[:-1]))
        input_documents = np.concatenate((removed_documents[:1], removed_documents[:-1]))
        return Example(inputs, removed, input_documents, 0, corrupted, corrupted_documents)
    targets = np.concatenate((np.full(len(corrupted) - 1, IGNORE), removed))
    input_documents = np.concatenate((corrupted_documents, removed_documents[:-1]))
    prefix_len = len(corrupted) if spec.see_prefix else 0
    return Example(np.concatenate((corrupted, removed[:-1])), targets, input_documents, prefix_len)


def sample_segment_ids(rng: np.random.Generator, length: int, noise: int, spans: int) -> Ints:
    """Return the segment of each token, [length], from 0: text, span, text, span, ...; `spans` of each, none empty.

    The spans hold `noise` tokens in all. Every division is equally likely.
    """
    text_lengths, span_lengths = _sample_lengths(rng, length - noise, spans), _sample_lengths(rng, noise, spans)
    return np.repeat(np.arange(2 * spans), np.stack((text_lengths, span_lengths), axis=1).ravel())


def _sample_lengths(rng: np.random.Generator, length: int, segment_ids: int) -> Ints:
    """Sample the lengths of `segment_ids` segments, none empty."""
    ends = np.sort(rng.choice(length - 1, segment_ids - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], ends, [length])))


def _replace_segments(
    tokens: Ints, documents: Ints, segment_ids: Ints, vocabulary: Vocabulary, noise: bool
) -> tuple[Ints, Ints]:
    """Replace each span (or, without `noise`, each text) by one sentinel; append an end. Return tokens and documents.

    Sentinel k replaces span k with `noise`, and precedes span k without.
    """
    is_replaced = (segment_ids % 2 == 1) == noise
    first = np.concatenate(([True], segment_ids[1:] != segment_ids[:-1]))
    out = np.where(is_replaced, vocabulary.sentinel(0) + segment_ids // 2, tokens)
    is_kept = ~is_replaced | first
    ended = np.concatenate((out[is_kept], [vocabulary.eot]))
    return ended, np.concatenate((documents[is_kept], documents[-1:]))
