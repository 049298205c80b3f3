"""Fill in the middle (Bavarian et al. 2022): some samples are written in another order, all is predicted causally."""

from typing import Any

import numpy as np

from dist_llm.config.schema import Denoiser
from dist_llm.objectives.rows import Row, Text
from dist_llm.objectives.vocabulary import Vocabulary


def fim(text: Text, rng: np.random.Generator, denoiser: Denoiser, vocabulary: Vocabulary) -> Row:
    """PSM: <prefix> first <suffix> last <middle> middle. SPM: <prefix> <suffix> last <middle> first middle.

    Three ids take the place of the window's last three tokens.
    """
    tokens, documents = text.tokens_W.astype(np.int64), text.documents()
    if rng.random() < denoiser.fim_rate:
        length = len(tokens) - 3
        left, right = np.sort(rng.integers(0, length + 1, 2)).tolist()
        a, b, c = (vocabulary.special(name) for name in ("fim_prefix", "fim_middle", "fim_suffix"))
        places = np.arange(length)
        first, mid, last = places[:left], places[left:right], places[right:]
        if rng.random() < denoiser.fim_spm_rate:
            parts: list[Any] = [[a], [c], tokens[last], [b], tokens[first], tokens[mid]]
            order = np.concatenate(([0, 0], last, [0], first, mid)).astype(np.int64)
        else:
            parts = [[a], tokens[first], [c], tokens[last], [b], tokens[mid]]
            order = np.concatenate(([0], first, [0], last, [0], mid)).astype(np.int64)
        tokens, documents = np.concatenate(parts).astype(np.int64), documents[order]
    return Row(tokens[:-1], tokens[1:], documents[:-1])
