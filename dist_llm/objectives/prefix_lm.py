"""Prefix language modelling (Liu et al. 2018; Raffel et al. 2020, 3.2): predict the tokens after a random prefix.

The tokens of the prefix may attend to each other in both directions.
"""

import numpy as np

from dist_llm.config.objective_sections import PrefixSpec
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.examples import Example, TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary


def make_prefix_example(
    window: TokenWindow,
    rng: np.random.Generator,
    spec: PrefixSpec,
    vocabulary: ObjectiveVocabulary,
    is_encoder_decoder: bool,
) -> Example:
    """Split the window at a uniformly random position. The first part is the prefix, after the mode token if any.

    In an encoder-decoder, the encoder reads the prefix and the decoder predicts the rest.
    """
    tokens, document_ids = window.tokens_W.astype(np.int64), window.get_document_ids()
    cut = int(rng.integers(1, len(tokens)))
    mode = [vocabulary.special_id(spec.mode)] if spec.mode else []
    prefix = np.concatenate((mode, tokens[:cut])).astype(np.int64)
    prefix_documents = np.concatenate((document_ids[:1].repeat(len(mode)), document_ids[:cut]))
    if is_encoder_decoder:
        inputs = np.concatenate(([vocabulary.special_id("start")], tokens[cut:-1]))
        input_documents = np.concatenate((document_ids[cut : cut + 1], document_ids[cut:-1]))
        return Example(inputs, tokens[cut:], input_documents, encoder_T=prefix, encoder_documents_T=prefix_documents)
    inputs = np.concatenate((prefix, tokens[cut:-1]))
    targets = np.concatenate((np.full(len(prefix) - 1, IGNORE_INDEX), tokens[cut:]))
    prefix_len = len(prefix) if spec.see_prefix else 0
    return Example(inputs, targets, np.concatenate((prefix_documents, document_ids[cut:-1])), prefix_len)
