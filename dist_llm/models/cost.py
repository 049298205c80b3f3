"""The cost of the layers of a model. FLOPs (MFU) and the pipeline split are computed from it."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Cost:
    """The cost of a layer or of one of its sublayers, of which only one has attention scores."""

    weights: int  # of matrix products that run once per token
    score_width: int = 0  # heads * head_dim: scores and their use take 2 * score_width multiply-adds per query and key
    window: int | None = None  # number of keys that a query attends to; None: all keys

    def __add__(self, other: "Cost") -> "Cost":
        window = self.window if self.score_width else other.window
        return Cost(self.weights + other.weights, self.score_width + other.score_width, window)

    def count_flops(self, num_keys: int) -> int:
        """Return the FLOPs of forward and backward for one token of a sequence of `num_keys` tokens.

        A causal mask does not halve them.
        """
        num_attended = num_keys if self.window is None else min(self.window, num_keys)
        return 6 * self.weights + 12 * self.score_width * num_attended
