"""The cost of the layers of a model. FLOPs (MFU) and the pipeline split are computed from it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of a layer or of one of its sublayers."""

    weights: int  # of matrix products that run once per token
    score_width: int = 0  # heads * head_dim: scores and their use take 2 * score_width multiply-adds per query and key

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.weights + other.weights, self.score_width + other.score_width)
