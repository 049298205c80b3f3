"""A mixer of another package: a gated short convolution over the last tokens, without attention.

    y_t = W_out (silu(W_gate x_t) * sum_j taps_j * (W_value x_{t-j})),   j = 0, ..., width - 1

It costs as much per token for each sequence length. Tensor parallelism divides its channels, because `param_specs`
names them "ffn", a dimension that is sharded. Tokens of an earlier document do not enter the sum.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.section import PositiveInt, Section, key
from dist_llm.models.cost import Cost
from dist_llm.models.init import block_matrix_init
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.mixer import Mixer
from dist_llm.param_spec import InitRule, ParamSpec, linear_specs
from dist_llm.sharded import to_local

# Shape suffixes: B batch, S tokens, D d_model, C channels of this rank, W width.


class GatedConvolution(Mixer):
    """A causal convolution of `width` tokens per channel, multiplied by a gate."""

    class Options(Section):
        """The keys of model.mixer_options."""

        width: PositiveInt = key("number of tokens that the convolution sees, the current one included", 4)

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__(config, layer)
        size = config.d_model
        self.gate = nn.Linear(size, size, bias=False)
        self.value = nn.Linear(size, size, bias=False)
        self.taps = nn.Parameter(torch.empty(size, self.options.width))
        self.out = nn.Linear(size, size, bias=False)

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        """[B, S, D] -> [B, S, D]."""
        mask, cache = context.mask, context.cache
        values_BSC, taps_CW = self.value(x_BSD), to_local(self.taps)
        num_earlier = taps_CW.shape[1] - 1
        earlier = values_BSC.new_zeros(len(values_BSC), num_earlier, values_BSC.shape[2])
        if cache is not None:
            earlier = cache.states.get(self.layer, earlier)
        padded = torch.cat((earlier, values_BSC), dim=1)
        if cache is not None:
            cache.states[self.layer] = padded[:, padded.shape[1] - num_earlier :]
        S = values_BSC.shape[1]
        sum_BSC = torch.zeros_like(values_BSC)
        for distance in range(num_earlier + 1):
            start = num_earlier - distance
            shifted_BSC = padded[:, start : start + S]
            if distance and mask.documents_BT is not None:
                documents_BS = F.pad(mask.documents_BT, (distance, 0), value=-1)[:, :S]
                shifted_BSC = shifted_BSC * (documents_BS == mask.documents_BT)[..., None]
            sum_BSC = sum_BSC + taps_CW[:, distance] * shifted_BSC
        return self.out(F.silu(self.gate(x_BSD)) * sum_BSC)

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters. The taps are few and small: no weight decay, and no Muon."""
        input_init = block_matrix_init(self.config, self.layer, self.gate, role="input")
        out_init = block_matrix_init(self.config, self.layer, self.out, role="residual_output")
        return {
            **linear_specs("gate", self.gate, ("ffn", "embed"), input_init),
            **linear_specs("value", self.value, ("ffn", "embed"), input_init),
            "taps": ParamSpec(("ffn", "tap"), InitRule("uniform", self.options.width**-0.5), decay=False),
            **linear_specs("out", self.out, ("embed", "ffn"), out_init),
        }

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the three products. The convolution itself is negligible."""
        return Cost(3 * config.d_model**2)

    @staticmethod
    def sharded_sizes(config: UnresolvedModelConfig) -> dict[str, int]:
        """Return the number of channels."""
        return {"channels": config.d_model}
