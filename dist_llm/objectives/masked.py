"""Masked language modelling (Devlin et al. 2019, 3.1): find out tokens that were hidden."""

import numpy as np

from dist_llm.config.schema import Denoiser
from dist_llm.losses.cross_entropy import IGNORE
from dist_llm.objectives.rows import Ints, Row, Text
from dist_llm.objectives.vocabulary import Vocabulary

MASKED, RANDOM = 0.8, 0.1  # of the selected tokens; the rest stay as they are


def masked(text: Text, rng: np.random.Generator, denoiser: Denoiser, vocabulary: Vocabulary) -> Row:
    """A start token, then the text with some tokens hidden -> the hidden ones. Ends of documents never are."""
    tokens, documents = text.tokens_W.astype(np.int64), text.documents()
    words_only = tokens != vocabulary.eot
    if denoiser.whole_words:
        assert vocabulary.word_V2 is not None
        begins, ends = vocabulary.word_V2[tokens].T
        goes_on = np.concatenate(([False], begins[1:] & ends[:-1]))
        words = np.cumsum(~goes_on)
        selected = (rng.random(words[-1] + 1) < denoiser.mask_rate)[words] & words_only
    else:
        selected = (rng.random(len(tokens)) < denoiser.mask_rate) & words_only
    how = rng.random(len(tokens))
    hidden = tokens.copy()
    hidden[selected & (how < MASKED)] = vocabulary.special("mask")
    replaced = selected & (how >= MASKED) & (how < MASKED + RANDOM)
    hidden[replaced] = _any_text(rng, int(replaced.sum()), vocabulary)
    inputs = np.concatenate(([vocabulary.special("start")], hidden))
    targets = np.concatenate(([IGNORE], np.where(selected, tokens, IGNORE)))
    return Row(inputs, targets, np.concatenate((documents[:1], documents)))


def _any_text(rng: np.random.Generator, count: int, vocabulary: Vocabulary) -> Ints:
    """Ids of the tokenizer, each as likely, but for the one that ends a document."""
    drawn = rng.integers(0, vocabulary.size - 1, count)
    return drawn + (drawn >= vocabulary.eot)
