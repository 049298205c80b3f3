"""Masked language modelling (Devlin et al. 2019, 3.1): predict the masked tokens of a text."""

import numpy as np

from dist_llm.config.objective_sections import MaskedSpec
from dist_llm.losses.cross_entropy import IGNORE_INDEX
from dist_llm.objectives.examples import Example, Ints, TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary

# Fractions of the selected tokens that become the mask token, and a random token. The remaining 0.1 stay unchanged.
MASK_FRACTION, RANDOM_FRACTION = 0.8, 0.1


def make_masked_example(
    window: TokenWindow, rng: np.random.Generator, spec: MaskedSpec, vocabulary: ObjectiveVocabulary
) -> Example:
    """Select random tokens and corrupt them. The targets are the original tokens at the selected positions.

    The inputs begin with a start token. End-of-document tokens are never selected.
    """
    tokens, document_ids = window.tokens_W.astype(np.int64), window.get_document_ids()
    selectable = tokens != vocabulary.eot
    if spec.whole_words:
        assert vocabulary.word_edges_V2 is not None
        begins_inside_word, ends_inside_word = vocabulary.word_edges_V2[tokens].T
        continues_word = np.concatenate(([False], begins_inside_word[1:] & ends_inside_word[:-1]))
        word_ids = np.cumsum(~continues_word)
        selected = (rng.random(word_ids[-1] + 1) < spec.mask_rate)[word_ids] & selectable
    else:
        selected = (rng.random(len(tokens)) < spec.mask_rate) & selectable
    action_draw = rng.random(len(tokens))
    corrupted_tokens = tokens.copy()
    corrupted_tokens[selected & (action_draw < MASK_FRACTION)] = vocabulary.special_id("mask")
    randomized = selected & (action_draw >= MASK_FRACTION) & (action_draw < MASK_FRACTION + RANDOM_FRACTION)
    corrupted_tokens[randomized] = _sample_tokens(rng, int(randomized.sum()), vocabulary)
    inputs = np.concatenate(([vocabulary.special_id("start")], corrupted_tokens))
    targets = np.concatenate(([IGNORE_INDEX], np.where(selected, tokens, IGNORE_INDEX)))
    # The start token belongs to the document of the first token.
    return Example(inputs, targets, np.concatenate((document_ids[:1], document_ids)))


def _sample_tokens(rng: np.random.Generator, num_tokens: int, vocabulary: ObjectiveVocabulary) -> Ints:
    """Sample ids of the tokenizer uniformly, except the end-of-document token."""
    sampled = rng.integers(0, vocabulary.num_tokenizer_ids - 1, num_tokens)
    return sampled + (sampled >= vocabulary.eot)  # shift the ids from `eot` on by one, so that `eot` is never sampled
