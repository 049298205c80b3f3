"""Prefix language modelling: predict the tokens after a random prefix, which is attended bidirectionally (Liu et al.
2018; Raffel et al. 2020, 3.2)."""

import numpy as np

from dist_llm.config.objective_sections import PrefixSpec
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.examples import Example, TokenWindow
from dist_llm.objectives.objective_vocabulary import Vocabulary


def make_prefix_example(
    window: TokenWindow, rng: np.random.Generator, spec: PrefixSpec, vocabulary: Vocabulary, is_encoder_decoder: bool
) -> Example:
    """Split the window at a uniformly random position: [mode] first part -> second part."""
    tokens, documents = window.tokens_W.astype(np.int64), window.document_ids()
    cut = int(rng.integers(1, len(tokens)))
    mode = [vocabulary.special_id(spec.mode)] if spec.mode else []
    first = np.concatenate((mode, tokens[:cut])).astype(np.int64)
    first_documents = np.concatenate((documents[:1].repeat(len(mode)), documents[:cut]))
    if is_encoder_decoder:
        inputs = np.concatenate(([vocabulary.special_id("start")], tokens[cut:-1]))
        input_documents = np.concatenate((documents[cut : cut + 1], documents[cut:-1]))
        return Example(inputs, tokens[cut:], input_documents, 0, first, first_documents)
    inputs = np.concatenate((first, tokens[cut:-1]))
    targets = np.concatenate((np.full(len(first) - 1, IGNORE), tokens[cut:]))
    prefix_len = len(first) if spec.see_prefix else 0
    return Example(inputs, targets, np.concatenate((first_documents, documents[cut:-1])), prefix_len)
