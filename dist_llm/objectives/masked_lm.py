"""Masked language modelling (Devlin et al. 2019, 3.1): predict masked tokens."""

import numpy as np

from dist_llm.config.objective_sections import MaskedSpec
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.examples import Example, Ints, TokenWindow
from dist_llm.objectives.objective_vocabulary import Vocabulary

MASKED, RANDOM = 0.8, 0.1  # of the selected tokens; the rest stay unchanged


def masked_example(window: TokenWindow, rng: np.random.Generator, spec: MaskedSpec, vocabulary: Vocabulary) -> Example:
    """A start token and the text with some tokens masked -> the masked tokens. Ends of documents are never selected."""
    tokens, documents = window.tokens_W.astype(np.int64), window.document_ids()
    selectable = tokens != vocabulary.eot
    if spec.whole_words:
        assert vocabulary.word_V2 is not None
        begins, ends = vocabulary.word_V2[tokens].T
        continues_word = np.concatenate(([False], begins[1:] & ends[:-1]))
        word_ids = np.cumsum(~continues_word)
        selected = (rng.random(word_ids[-1] + 1) < spec.mask_rate)[word_ids] & selectable
    else:
        selected = (rng.random(len(tokens)) < spec.mask_rate) & selectable
    how = rng.random(len(tokens))
    hidden = tokens.copy()
    hidden[selected & (how < MASKED)] = vocabulary.special("mask")
    replaced = selected & (how >= MASKED) & (how < MASKED + RANDOM)
    hidden[replaced] = _sample_tokens(rng, int(replaced.sum()), vocabulary)
    inputs = np.concatenate(([vocabulary.special("start")], hidden))
    targets = np.concatenate(([IGNORE], np.where(selected, tokens, IGNORE)))
    return Example(inputs, targets, np.concatenate((documents[:1], documents)))


def _sample_tokens(rng: np.random.Generator, count: int, vocabulary: Vocabulary) -> Ints:
    """Sample ids of the tokenizer uniformly, except the end of a document."""
    drawn = rng.integers(0, vocabulary.size - 1, count)
    return drawn + (drawn >= vocabulary.eot)
