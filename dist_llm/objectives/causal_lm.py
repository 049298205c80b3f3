"""Causal language modelling: predict each token from all tokens before it."""

import numpy as np

from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.examples import Example, TokenWindow


def make_causal_example(window: TokenWindow) -> Example:
    """Build S inputs, and the S tokens that follow them as targets, from a window of S + 1 tokens.

    In a window of consecutive text, the first token of a document is predicted from the previous document. Packed
    segments do not predict each other: the last token of a segment is no input, and its first token is no target.
    """
    tokens, document_ids = window.tokens_W.astype(np.int64), window.get_document_ids()
    inputs, targets = tokens[:-1], tokens[1:]
    weights = np.ones(len(targets)) if window.loss_weights_W is None else window.loss_weights_W[1:]
    targets = np.where(weights > 0, targets, IGNORE_INDEX)
    is_kept = slice(None) if window.segment_ids_W is None else document_ids[1:] == document_ids[:-1]
    return Example(inputs[is_kept], targets[is_kept], document_ids[:-1][is_kept], loss_weights_S=weights[is_kept])
