"""Causal language modelling: predict each token from all tokens before it."""

import numpy as np

from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.examples import Example, TokenWindow


def make_causal_example(window: TokenWindow) -> Example:
    """A window of S + 1 tokens -> S inputs and the S tokens that follow them.

    In a stream, the first token of a document is predicted from the previous document. Packed segments do not predict
    each other: the last token of a segment is no input, and its first token is no target.
    """
    tokens, documents = window.tokens_W.astype(np.int64), window.document_ids()
    inputs, targets = tokens[:-1], tokens[1:]
    if window.loss_mask_W is not None:
        targets = np.where(window.loss_mask_W[1:], targets, IGNORE)
    if window.segment_ids_W is None:
        return Example(inputs, targets, documents[:-1])
    inside = documents[1:] == documents[:-1]
    return Example(inputs[inside], targets[inside], documents[:-1][inside])
