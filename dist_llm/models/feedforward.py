"""The position-wise feed-forward layers: their base class, and the dense layer."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.derive import is_gated
from dist_llm.config.feedforward_sections import RegisteredConfig
from dist_llm.config.model_section import ModelConfig
from dist_llm.models.cost import Cost
from dist_llm.models.init import block_matrix_init
from dist_llm.models.sublayer import Sublayer
from dist_llm.param_spec import ParamSpec, linear_specs

CLAMP_LIMIT, SIGMOID_SLOPE = 7.0, 1.702  # of gpt-oss


def clamped_silu(x: Tensor) -> Tensor:
    """Apply a steeper SiLU to values that are limited from above."""
    x = x.clamp(max=CLAMP_LIMIT)
    return x * F.sigmoid(SIGMOID_SLOPE * x)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "swiglu": F.silu,
    "swiglu_clamped": clamped_silu,
    "geglu": F.gelu,
    "geglu_tanh": partial(F.gelu, approximate="tanh"),
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "relu": F.relu,
    "relu_squared": lambda x: F.relu(x).square(),  # So et al. 2021 (Primer)
}


def apply_gate(activation: str, gate: Tensor, up: Tensor) -> Tensor:
    """Multiply the activated gate and the up projection."""
    if activation == "swiglu_clamped":
        up = up.clamp(-CLAMP_LIMIT, CLAMP_LIMIT) + 1
    return ACTIVATIONS[activation](gate) * up


class FeedForward(Sublayer):
    """The base class of feed-forward layers, which compute each token on its own.

    Another package can register its own as an entry point of the group `dist_llm.feedforwards`; a config selects it
    with `model.feedforward.name` (examples/custom_feedforward).
    """

    supports_context_parallel = True

    @property
    def options(self) -> Any:
        """The parsed keys of model.feedforward, besides its name."""
        assert isinstance(self.config.feedforward, RegisteredConfig)
        return self.parse_options(self.config.feedforward.options)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        raise NotImplementedError


class DenseFeedForward(FeedForward):
    """down(f(up(x))), or down(f(gate(x)) * up(x)) for gated activations (Shazeer 2020).

    swiglu_clamped also limits up(x), and adds 1 to it.
    """

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.activation = ACTIVATIONS[config.activation]
        bias = config.bias or config.feedforward_bias
        self.gate = nn.Linear(config.d_model, config.d_ff, bias=bias) if is_gated(config) else None
        self.up = nn.Linear(config.d_model, config.d_ff, bias=bias)
        self.down = nn.Linear(config.d_ff, config.d_model, bias=bias)

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the two or three matrix products."""
        return Cost(config.d_model * config.d_ff * (3 if is_gated(config) else 2))

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters: the hidden units are sharded."""
        input_init = block_matrix_init(self.config, self.layer, self.up, role="input")
        down_init = block_matrix_init(self.config, self.layer, self.down, role="residual_output")
        return {
            **linear_specs("gate", self.gate, ("ffn", "embed"), input_init),
            **linear_specs("up", self.up, ("ffn", "embed"), input_init),
            **linear_specs("down", self.down, ("embed", "ffn"), down_init),
        }

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        if self.gate is None:
            return self.down(self.activation(self.up(x_BSD)))
        return self.down(apply_gate(self.config.activation, self.gate(x_BSD), self.up(x_BSD)))
