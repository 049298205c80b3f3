"""The base class of the sublayers that another package can register: mixers and feed-forward layers.

The engine, the optimizers, the layouts and the checkpoints learn all that they need of a sublayer from these methods.
"""

from typing import Any, ClassVar

from torch import nn

from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.section import NoOptions, Section
from dist_llm.models.cost import Cost
from dist_llm.param_spec import ParamSpec


class Sublayer(nn.Module):
    """A mixer or a feed-forward layer of a block.

    Under tensor parallelism, a rank has a part of each parameter whose dimensions `param_specs` names as sharded, such
    as "ffn", and calls `forward` with all tokens. nn.Linear layers are sharded by their `dims`: one whose outputs are
    sharded keeps them local, one whose inputs are sharded sums its outputs over ranks. Other parameters are read with
    `dist_llm.sharded.to_local`.
    """

    Options: ClassVar[type[Section]] = NoOptions  # the keys that a registered class reads from the config
    supports_context_parallel: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters."""
        raise NotImplementedError

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the sublayer."""
        raise NotImplementedError

    @staticmethod
    def sharded_sizes(config: UnresolvedModelConfig) -> dict[str, int]:
        """Return {description: size} of the dimensions that tensor parallelism divides."""
        return {}

    @classmethod
    def parse_options(cls, options: Any) -> Any:
        """Return the section `Options` with the values of `options`."""
        return cls.Options.model_validate(options)
