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

    If the spans `c d` and `f` are removed from the text `a b c d e f`, the sequences are

        corrupted text: a b <sentinel 0> e <sentinel 1> <|endoftext|>
        removed spans:  <sentinel 0> c d <sentinel 1> f <|endoftext|>

    With `spec.mode` (R, S or X of UL2), the corrupted text begins with the mode token. In an encoder-decoder, the
    encoder reads the corrupted text, and the decoder predicts the removed spans. A decoder reads the corrupted text
    followed by the removed spans.
    """
    tokens, documents = window.tokens_W.astype(np.int64), window.get_document_ids()
    piece_ids = sample_piece_ids(rng, len(tokens), lengths.num_noise_tokens, lengths.num_spans)
    mode = np.array([vocabulary.special_id(spec.mode)] if spec.mode else [], dtype=np.int64)
    corrupted, corrupted_documents = _replace_pieces(tokens, documents, piece_ids, vocabulary, replace_spans=True)
    removed, removed_documents = _replace_pieces(tokens, documents, piece_ids, vocabulary, replace_spans=False)
    corrupted = np.concatenate((mode, corrupted))
    corrupted_documents = np.concatenate((documents[:1].repeat(len(mode)), corrupted_documents))
    if is_encoder_decoder:
        inputs = np.concatenate(([vocabulary.special_id("start")], removed[:-1]))
        input_documents = np.concatenate((removed_documents[:1], removed_documents[:-1]))
        return Example(inputs, removed, input_documents, encoder_T=corrupted, encoder_documents_T=corrupted_documents)
    # The last token of the corrupted text predicts the first sentinel; the tokens before it have no loss.
    targets = np.concatenate((np.full(len(corrupted) - 1, IGNORE_INDEX), removed))
    input_documents = np.concatenate((corrupted_documents, removed_documents[:-1]))
    prefix_len = len(corrupted) if spec.see_prefix else 0
    return Example(np.concatenate((corrupted, removed[:-1])), targets, input_documents, prefix_len)


def sample_piece_ids(rng: np.random.Generator, num_tokens: int, num_noise_tokens: int, num_spans: int) -> Ints:
    """Divide a window into alternating pieces: text, span, text, span, ... Return the piece of each token, from 0.

    There are `num_spans` spans and as many pieces of text, none empty. The spans have `num_noise_tokens` tokens in all.
    All divisions are equally likely.
    """
    text_lengths = _sample_lengths(rng, num_tokens - num_noise_tokens, num_spans)
    span_lengths = _sample_lengths(rng, num_noise_tokens, num_spans)
    return np.repeat(np.arange(2 * num_spans), np.stack((text_lengths, span_lengths), axis=1).ravel())


def _sample_lengths(rng: np.random.Generator, num_tokens: int, num_pieces: int) -> Ints:
    """Divide `num_tokens` tokens into pieces, none empty. Return the length of each piece."""
    ends = np.sort(rng.choice(num_tokens - 1, num_pieces - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], ends, [num_tokens])))


def _replace_pieces(
    tokens: Ints, documents: Ints, piece_ids: Ints, vocabulary: ObjectiveVocabulary, replace_spans: bool
) -> tuple[Ints, Ints]:
    """Replace each span, or else each piece of text, by one sentinel, and append the end-of-document token.

    Return (tokens, document ids). Sentinel k replaces span k with `replace_spans`; otherwise it replaces the piece of
    text before span k.
    """
    is_span = piece_ids % 2 == 1
    is_replaced = is_span if replace_spans else ~is_span
    is_piece_start = np.concatenate(([True], piece_ids[1:] != piece_ids[:-1]))
    # The ids of the sentinels are consecutive.
    tokens_or_sentinels = np.where(is_replaced, vocabulary.sentinel_id(0) + piece_ids // 2, tokens)
    is_kept = ~is_replaced | is_piece_start  # of a replaced piece, the first token becomes the sentinel
    kept_tokens = np.concatenate((tokens_or_sentinels[is_kept], [vocabulary.eot]))
    return kept_tokens, np.concatenate((documents[is_kept], documents[-1:]))
