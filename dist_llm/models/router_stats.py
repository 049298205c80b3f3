"""Statistics of the routers of a mixture of experts: the load of each expert, and the balance losses.

Shape suffixes: E experts.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from dist_llm.losses.cross_entropy import MAX_MICROBATCHES

NUM_LOSS_STATS = 3  # the entries of `RouterStats` after the counts


@dataclass(frozen=True)
class RouterStats:
    """Statistics of a layer. Of some sequences, the losses and the entropy are sums of means over each sequence.

    `pack` makes a vector of them, which one all-reduce sums over ranks.
    """

    counts_E: Tensor  # tokens that chose each expert
    balance: Tensor  # balance loss, without coefficient
    z: Tensor  # router z-loss, without coefficient
    entropy: Tensor  # entropy of the normalized scores, in nats

    def pack(self) -> Tensor:
        """Return all values as one vector [E + NUM_LOSS_STATS], without gradients."""
        return torch.cat((self.counts_E, torch.stack((self.balance, self.z, self.entropy)))).detach()

    def average(self, num_sequences: int) -> "RouterStats":
        """Return the means over sequences of the losses and the entropy."""
        return RouterStats(self.counts_E, *(term / num_sequences for term in (self.balance, self.z, self.entropy)))

    @staticmethod
    def unpack(packed: Tensor) -> "RouterStats":
        """Undo `pack`."""
        return RouterStats(packed[:-NUM_LOSS_STATS], *packed[-NUM_LOSS_STATS:])


class RouterLog:
    """Passes the weight of the balance losses to the layers, and collects the statistics of their routers.

    `loss_scale` is the weight of the balance losses of one sequence in the loss of a step, which the engine sets before
    the step. Each microbatch of a training step adds the packed `RouterStats` of each layer with experts.
    """

    def __init__(self) -> None:
        self.loss_scale: Tensor | None = None
        self._stats: dict[int, deque[Tensor]] = {}

    def add(self, layer: int, packed: Tensor) -> None:
        self._stats.setdefault(layer, deque(maxlen=MAX_MICROBATCHES)).append(packed)

    def pop_latest(self, num_microbatches: int) -> dict[int, Tensor]:
        """Return the sums of the packed statistics of the latest microbatches, by layer, and clear all statistics.

        Older statistics come from a trial forward.
        """
        latest = {layer: torch.stack(list(stats)[-num_microbatches:]).sum(0) for layer, stats in self._stats.items()}
        self._stats.clear()
        return latest
