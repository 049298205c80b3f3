"""Fill in the middle (Bavarian et al. 2022): reorder some samples, then predict all tokens causally."""

from typing import Any

import numpy as np

from dist_llm.config.objective_sections import FIMSpec
from dist_llm.objectives.examples import Example, TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary


def make_fim_example(
    window: TokenWindow, rng: np.random.Generator, spec: FIMSpec, vocabulary: ObjectiveVocabulary
) -> Example:
    """Split a text into prefix, middle and suffix at random positions, and reorder it with probability `fim_rate`.

    PSM order: <fim_prefix> prefix <fim_suffix> suffix <fim_middle> middle.
    SPM order: <fim_prefix> <fim_suffix> suffix <fim_middle> prefix middle.
    The three special tokens take the place of the last three tokens of the window.
    """
    tokens, document_ids = window.tokens_W.astype(np.int64), window.get_document_ids()
    if rng.random() < spec.fim_rate:
        text_len = len(tokens) - 3
        middle_start, middle_end = np.sort(rng.integers(0, text_len + 1, 2)).tolist()
        prefix_id, middle_id, suffix_id = (
            vocabulary.special_id(name) for name in ("fim_prefix", "fim_middle", "fim_suffix")
        )
        indices = np.arange(text_len)
        prefix, middle, suffix = indices[:middle_start], indices[middle_start:middle_end], indices[middle_end:]
        # `source_indices` has the index in the window whose document id each token gets; 0 for the special tokens.
        if rng.random() < spec.fim_spm_rate:
            segments: list[Any] = [
                [prefix_id],
                [suffix_id],
                tokens[suffix],
                [middle_id],
                tokens[prefix],
                tokens[middle],
            ]
            source_indices = np.concatenate(([0, 0], suffix, [0], prefix, middle)).astype(np.int64)
        else:
            segments = [[prefix_id], tokens[prefix], [suffix_id], tokens[suffix], [middle_id], tokens[middle]]
            source_indices = np.concatenate(([0], prefix, [0], suffix, [0], middle)).astype(np.int64)
        tokens, document_ids = np.concatenate(segments).astype(np.int64), document_ids[source_indices]
    return Example(tokens[:-1], tokens[1:], document_ids[:-1])
