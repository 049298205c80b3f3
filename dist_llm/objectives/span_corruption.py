"""Span corruption (Raffel et al. 2020, 3.1.4): remove random spans from a text and predict them.

A sentinel token takes the place of each removed span.
"""

import numpy as np

from dist_llm.config.objective_sections import SpanSpec
from dist_llm.config.sequence_lengths import SequenceLengths
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.examples import Example, Ints, TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary


def make_span_example(
    window: TokenWindow,
    rng: np.random.Generator,
    spec: SpanSpec,
    lengths: SequenceLengths,
    vocabulary: ObjectiveVocabulary,
    is_encoder_decoder: bool,
) -> Example:
    """Build two sequences from a window: the corrupted text and the removed spans.

    The corrupted text has a sentinel in the place of each span, after the mode token if any. The removed spans have
    their sentinel in front of each span. Both sequences end with the end-of-document token. In an encoder-decoder, the
    encoder reads the corrupted text and the decoder predicts the removed spans. A decoder reads the corrupted text
    followed by the removed spans.
    """
    tokens, documents = window.tokens_W.astype(np.int64), window.get_document_ids()
    segment_ids = sample_segment_ids(rng, len(tokens), lengths.num_noise_tokens, lengths.num_spans)
    mode = np.array([vocabulary.special_id(spec.mode)] if spec.mode else [], dtype=np.int64)
    corrupted, corrupted_documents = _replace_segments(tokens, documents, segment_ids, vocabulary, replace_spans=True)
    removed, removed_documents = _replace_segments(tokens, documents, segment_ids, vocabulary, replace_spans=False)
    corrupted = np.concatenate((mode, corrupted))
    corrupted_documents = np.concatenate((documents[:1].repeat(len(mode)), corrupted_documents))
    if is_encoder_decoder:
        inputs = np.concatenate(([vocabulary.special_id("start")], removed[:-1]))
        input_documents = np.concatenate((removed_documents[:1], removed_documents[:-1]))
        return Example(inputs, removed, input_documents, encoder_T=corrupted, encoder_documents_T=corrupted_documents)
    targets = np.concatenate((np.full(len(corrupted) - 1, IGNORE_INDEX), removed))
    input_documents = np.concatenate((corrupted_documents, removed_documents[:-1]))
    prefix_len = len(corrupted) if spec.see_prefix else 0
    return Example(np.concatenate((corrupted, removed[:-1])), targets, input_documents, prefix_len)


def sample_segment_ids(rng: np.random.Generator, num_tokens: int, num_noise_tokens: int, num_spans: int) -> Ints:
    """Divide a text into alternating segments: text, span, text, span, ... Return the segment of each token, from 0.

    There are `num_spans` spans and as many text segments, none empty. The spans have `num_noise_tokens` tokens in all.
    All divisions are equally likely.
    """
    text_lengths = _sample_lengths(rng, num_tokens - num_noise_tokens, num_spans)
    span_lengths = _sample_lengths(rng, num_noise_tokens, num_spans)
    return np.repeat(np.arange(2 * num_spans), np.stack((text_lengths, span_lengths), axis=1).ravel())


def _sample_lengths(rng: np.random.Generator, num_tokens: int, num_segments: int) -> Ints:
    """Divide `num_tokens` tokens into segments, none empty. Return the length of each segment."""
    ends = np.sort(rng.choice(num_tokens - 1, num_segments - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], ends, [num_tokens])))


def _replace_segments(
    tokens: Ints, documents: Ints, segment_ids: Ints, vocabulary: ObjectiveVocabulary, replace_spans: bool
) -> tuple[Ints, Ints]:
    """Replace each span, or else each text segment, by one sentinel, and append the end-of-document token.

    Return (tokens, document ids). With `replace_spans`, sentinel k takes the place of span k; otherwise it precedes
    span k.
    """
    is_replaced = (segment_ids % 2 == 1) == replace_spans
    is_segment_start = np.concatenate(([True], segment_ids[1:] != segment_ids[:-1]))
    tokens_or_sentinels = np.where(is_replaced, vocabulary.sentinel_id(0) + segment_ids // 2, tokens)
    is_kept = ~is_replaced | is_segment_start
    kept_tokens = np.concatenate((tokens_or_sentinels[is_kept], [vocabulary.eot]))
    return kept_tokens, np.concatenate((documents[is_kept], documents[-1:]))
