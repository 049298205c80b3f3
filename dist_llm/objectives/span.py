"""Span corruption (Raffel et al. 2020, 3.1.4): find out what was cut out of a text, piece after piece."""

import numpy as np

from dist_llm.config.lengths import Lengths
from dist_llm.config.schema import Denoiser
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.rows import Ints, Row, Text
from dist_llm.objectives.vocabulary import Vocabulary


def span(
    text: Text,
    rng: np.random.Generator,
    denoiser: Denoiser,
    size: Lengths,
    vocabulary: Vocabulary,
    two_stacks: bool,
) -> Row:
    """[mode] text with a sentinel for each span, end -> each sentinel and its span, end.

    Two stacks: the first is read by the encoder, the second written by the decoder. One stack: one after the other.
    """
    tokens, documents = text.tokens_W.astype(np.int64), text.documents()
    pieces = segments(rng, len(tokens), size.noise, size.spans)
    mode = np.array([vocabulary.special(denoiser.mode)] if denoiser.mode else [], dtype=np.int64)
    kept, kept_documents = _replaced(tokens, documents, pieces, vocabulary, noise=True)
    cut, cut_documents = _replaced(tokens, documents, pieces, vocabulary, noise=False)
    kept = np.concatenate((mode, kept))
    kept_documents = np.concatenate((documents[:1].repeat(len(mode)), kept_documents))
    if two_stacks:
        inputs = np.concatenate(([vocabulary.special("start")], cut[:-1]))
        owners = np.concatenate((cut_documents[:1], cut_documents[:-1]))
        return Row(inputs, cut, owners, 0, kept, kept_documents)
    targets = np.concatenate((np.full(len(kept) - 1, IGNORE), cut))
    owners = np.concatenate((kept_documents, cut_documents[:-1]))
    seen = len(kept) if denoiser.see_prefix else 0
    return Row(np.concatenate((kept, cut[:-1])), targets, owners, seen)


def segments(rng: np.random.Generator, length: int, noise: int, spans: int) -> Ints:
    """For each token the number of its segment, from 0: text, span, text, span, ... `spans` of each, none empty.

    The spans hold `noise` tokens together, and every way to cut them is as likely.
    """
    text_lengths, span_lengths = _cut(rng, length - noise, spans), _cut(rng, noise, spans)
    return np.repeat(np.arange(2 * spans), np.stack((text_lengths, span_lengths), axis=1).ravel())


def _cut(rng: np.random.Generator, length: int, pieces: int) -> Ints:
    """Lengths of `pieces` pieces, none empty."""
    ends = np.sort(rng.choice(length - 1, pieces - 1, replace=False)) + 1
    return np.diff(np.concatenate(([0], ends, [length])))


def _replaced(tokens: Ints, documents: Ints, pieces: Ints, vocabulary: Vocabulary, noise: bool) -> tuple[Ints, Ints]:
    """The tokens with one sentinel for each span (or, without `noise`, for each text); an end, and documents.

    Sentinel k stands for span k in the one, and in front of it in the other.
    """
    gone = (pieces % 2 == 1) == noise
    first = np.concatenate(([True], pieces[1:] != pieces[:-1]))
    out = np.where(gone, vocabulary.sentinel(0) + pieces // 2, tokens)
    stays = ~gone | first
    ended = np.concatenate((out[stays], [vocabulary.eot]))
    return ended, np.concatenate((documents[stays], documents[-1:]))
