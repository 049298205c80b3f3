"""Fill in the middle (Bavarian et al. 2022): reorder some samples, then predict all tokens causally."""

from typing import Any

import numpy as np

from dist_llm.config.objective_sections import FIMSpec
from dist_llm.objectives.examples import Example, TokenWindow
from dist_llm.objectives.objective_vocabulary import Vocabulary


def make_fim_example(window: TokenWindow, rng: np.random.Generator, spec: FIMSpec, vocabulary: Vocabulary) -> Example:
    """PSM: <prefix> first <suffix> last <middle> middle. SPM: <prefix> <suffix> last <middle> first middle.

    Three special tokens replace the window's last three tokens.
    """
    tokens, documents = window.tokens_W.astype(np.int64), window.document_ids()
    if rng.random() < spec.fim_rate:
        length = len(tokens) - 3
        left, right = np.sort(rng.integers(0, length + 1, 2)).tolist()
        a, b, c = (vocabulary.special_id(name) for name in ("fim_prefix", "fim_middle", "fim_suffix"))
        indices = np.arange(length)
        first, mid, last = indices[:left], indices[left:right], indices[right:]
        if rng.random() < spec.fim_spm_rate:
            segments: list[Any] = [[a], [c], tokens[last], [b], tokens[first], tokens[mid]]
            order = np.concatenate(([0, 0], last, [0], first, mid)).astype(np.int64)
        else:
            segments = [[a], tokens[first], [c], tokens[last], [b], tokens[mid]]
            order = np.concatenate(([0], first, [0], last, [0], mid)).astype(np.int64)
        tokens, documents = np.concatenate(segments).astype(np.int64), documents[order]
    return Example(tokens[:-1], tokens[1:], documents[:-1])
