"""Predict each next token from all before it."""

from typing import Any

import numpy as np
import numpy.typing as npt

from dist_llm.objectives.rows import Row, documents_of
from dist_llm.objectives.vocabulary import Vocabulary


def causal(window: npt.NDArray[Any], vocabulary: Vocabulary) -> Row:
    """A window of S + 1 tokens -> S inputs and the S tokens that follow them.

    A document's last target, the first token of the next, is scored too, as in one stream.
    """
    tokens = window.astype(np.int64)
    return Row(tokens[:-1], tokens[1:], documents_of(tokens[:-1], vocabulary.eot))
