"""Predict each next token from all before it."""

import numpy as np

from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.rows import Row, Text


def causal(text: Text) -> Row:
    """A window of S + 1 tokens -> S inputs and the S tokens that follow them.

    In a stream a document's last target, the first token of the next, is scored too. Pieces do not predict each
    other: each is an input without its last token, and a target without its first.
    """
    tokens, documents = text.tokens_W.astype(np.int64), text.documents()
    inputs, targets = tokens[:-1], tokens[1:]
    if text.scored_W is not None:
        targets = np.where(text.scored_W[1:], targets, IGNORE)
    if text.pieces_W is None:
        return Row(inputs, targets, documents[:-1])
    inside = documents[1:] == documents[:-1]
    return Row(inputs[inside], targets[inside], documents[:-1][inside])
