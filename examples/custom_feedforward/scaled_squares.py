"""A feed-forward layer of another package: squared ReLU, with a learned scale of each hidden unit.

    y = W_down (scale * relu(W_up x)^2)

Tensor parallelism divides the hidden units, because `param_specs` names them "ffn", a dimension that is sharded.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.feedforward_sections import RegisteredConfig
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.section import PositiveWidth, Section, key
from dist_llm.models.cost import Cost
from dist_llm.models.feedforward import FeedForward
from dist_llm.models.init import block_matrix_init
from dist_llm.param_spec import ONES, ParamSpec, linear_specs
from dist_llm.sharded import to_local

# Shape suffixes: B batch, S tokens, D d_model, F hidden units of this rank.


class ScaledSquares(FeedForward):
    """A feed-forward layer with `hidden` units."""

    class Options(Section):
        """The keys of model.feedforward, besides its name."""

        hidden: PositiveWidth = key("number of hidden units")

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        hidden = self.options.hidden
        self.up = nn.Linear(config.d_model, hidden, bias=False)
        self.scale = nn.Parameter(torch.empty(hidden))
        self.down = nn.Linear(hidden, config.d_model, bias=False)

    def forward(self, x_BSD: Tensor) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        hidden_BSF = F.relu(self.up(x_BSD)).square()
        return self.down(to_local(self.scale) * hidden_BSF)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters. The scales are vectors: no weight decay, and no Muon."""
        up_init = block_matrix_init(self.config, self.layer, self.up, role="input")
        down_init = block_matrix_init(self.config, self.layer, self.down, role="residual_output")
        return {
            **linear_specs("up", self.up, ("ffn", "embed"), up_init),
            "scale": ParamSpec(("ffn",), ONES, decay=False),
            **linear_specs("down", self.down, ("embed", "ffn"), down_init),
        }

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the two products."""
        return Cost(2 * config.d_model * _options(config).hidden)

    @staticmethod
    def sharded_sizes(config: UnresolvedModelConfig) -> dict[str, int]:
        """Return the number of hidden units."""
        return {"hidden units": _options(config).hidden}


def _options(config: UnresolvedModelConfig) -> ScaledSquares.Options:
    assert isinstance(config.feedforward, RegisteredConfig)
    return ScaledSquares.Options.model_validate(config.feedforward.options)
