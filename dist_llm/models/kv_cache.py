"""What the layers keep of earlier tokens in generation."""

from typing import Any

import torch
from torch import Tensor

# Shape suffixes: B batch, S queries, T keys, K key-value heads, E head_dim.


class KVCache:
    """Keys and values of each layer, for generation: of the tokens so far, and of the encoder output (the memory).

    A layer with a window keeps only the keys and values that the next query can attend to.

    Not a dataclass: FSDP's mixed-precision input casting copies dataclasses, so updates to the cache would be lost.
    """

    def __init__(self) -> None:
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self.memory: dict[int, tuple[Tensor, Tensor]] = {}
        self.states: dict[int, Any] = {}  # what other mixers keep of the tokens so far, by layer
        self.length = 0  # number of cached tokens, which the model counts

    def append(self, layer: int, k_BSKE: Tensor, v_BSKE: Tensor, window: int | None) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, [B, S, K, E].

        Return those that the new tokens may attend to, [B, T, K, E].
        """
        k_BTKE, v_BTKE = k_BSKE, v_BSKE
        if layer in self.layers:
            k_cached, v_cached = self.layers[layer]
            k_BTKE, v_BTKE = torch.cat((k_cached, k_BSKE), dim=1), torch.cat((v_cached, v_BSKE), dim=1)
        # A next query attends to itself and to the window - 1 tokens before it.
        num_kept = k_BTKE.shape[1] if window is None else min(window - 1, k_BTKE.shape[1])
        first = k_BTKE.shape[1] - num_kept
        self.layers[layer] = (k_BTKE[:, first:], v_BTKE[:, first:])
        return k_BTKE, v_BTKE
