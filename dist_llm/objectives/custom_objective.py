"""The base class of objectives of other packages, for decoders.

A package registers a class as an entry point of the group `dist_llm.objectives`; a config selects it with
`objective.name` (examples/custom_objective).
"""

from typing import Any, ClassVar

import numpy as np

from dist_llm.config.objective_sections import RegisteredObjectiveSpec
from dist_llm.config.registered_classes import load_registered_class
from dist_llm.config.section import NoOptions, Section
from dist_llm.objectives.examples import Example, TokenWindow
from dist_llm.objectives.objective_vocabulary import ObjectiveVocabulary


class CustomObjective:
    """An objective of a decoder with causal attention: it chooses the inputs, the targets and their loss weights.

    The loss of a step is the sum of weight * loss over all targets, divided by the sum of the weights, both over the
    global batch. So it does not depend on the layout.
    """

    Options: ClassVar[type[Section]] = NoOptions  # the further keys of the config section `objective`
    has_loss_weights: ClassVar[bool] = False  # whether examples have `loss_weights_S`

    def __init__(self, options: Any) -> None:
        self.options = options

    def make_example(self, window: TokenWindow, rng: np.random.Generator, vocabulary: ObjectiveVocabulary) -> Example:
        """Build an example of at most S inputs from a window of S + 1 tokens; shorter examples are padded.

        The example must depend only on the arguments, of which `rng` depends on the seed and the sample: then it is the
        same on all layouts and after a resume. `vocabulary` has no special tokens besides `eot`.
        """
        raise NotImplementedError


def build_custom_objective(spec: RegisteredObjectiveSpec) -> CustomObjective:
    """Build the objective that a config names. Raises ConfigError if no installed package registers it."""
    objective_class: type[CustomObjective] = load_registered_class("dist_llm.objectives", spec.name)
    return objective_class(objective_class.Options.model_validate(spec.options))
