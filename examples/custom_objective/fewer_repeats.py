"""An objective of another package: next-token prediction in which repeated tokens weigh less.

A token that occurs among the last `distance` tokens is easy to predict by copying. Its loss gets the weight
`repeat_weight`, all others the weight 1.
"""

from typing import ClassVar

import numpy as np

from dist_llm.config.section import PositiveInt, Section, Share, key
from dist_llm.objectives.custom_objective import CustomObjective
from dist_llm.objectives.examples import Example, TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary


class FewerRepeats(CustomObjective):
    """Predict the next token; the losses of repeated tokens have a smaller weight."""

    class Options(Section):
        """The further keys of the config section `objective`."""

        distance: PositiveInt = key("number of earlier tokens among which a token counts as repeated", 8)
        repeat_weight: Share = key("weight of the loss of a repeated token", 0.25)

    has_loss_weights: ClassVar[bool] = True

    def make_example(self, window: TokenWindow, rng: np.random.Generator, vocabulary: ObjectiveVocabulary) -> Example:
        """Build S inputs, and the S tokens that follow them as targets."""
        tokens_W = window.tokens_W.astype(np.int64)
        is_repeated_W = np.zeros(len(tokens_W), bool)
        for distance in range(1, min(self.options.distance, len(tokens_W) - 1) + 1):
            is_repeated_W[distance:] |= tokens_W[distance:] == tokens_W[:-distance]
        weights_S = np.where(is_repeated_W[1:], self.options.repeat_weight, 1.0)
        documents_S = window.get_document_ids()[:-1]
        return Example(tokens_W[:-1], tokens_W[1:], documents_S, loss_weights_S=weights_S)
