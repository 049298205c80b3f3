"""Predict what follows a prefix of random length, which is seen whole (Liu et al. 2018; Raffel et al. 2020, 3.2)."""

import numpy as np

from dist_llm.config.schema import Denoiser
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.rows import Row, Text
from dist_llm.objectives.vocabulary import Vocabulary


def prefix(text: Text, rng: np.random.Generator, denoiser: Denoiser, vocabulary: Vocabulary, two_stacks: bool) -> Row:
    """Cut the window in two, each place as likely: [mode] first part -> second part."""
    tokens, documents = text.tokens_W.astype(np.int64), text.documents()
    cut = int(rng.integers(1, len(tokens)))
    mode = [vocabulary.special(denoiser.mode)] if denoiser.mode else []
    first = np.concatenate((mode, tokens[:cut])).astype(np.int64)
    first_documents = np.concatenate((documents[:1].repeat(len(mode)), documents[:cut]))
    if two_stacks:
        inputs = np.concatenate(([vocabulary.special("start")], tokens[cut:-1]))
        owners = np.concatenate((documents[cut : cut + 1], documents[cut:-1]))
        return Row(inputs, tokens[cut:], owners, 0, first, first_documents)
    inputs = np.concatenate((first, tokens[cut:-1]))
    targets = np.concatenate((np.full(len(first) - 1, IGNORE), tokens[cut:]))
    seen = len(first) if denoiser.see_prefix else 0
    return Row(inputs, targets, np.concatenate((first_documents, documents[cut:-1])), seen)
