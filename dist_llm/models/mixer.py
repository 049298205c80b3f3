"""The base class of mixers: the sublayers of a block that exchange information between tokens.

Attention is one. Another package can register its own as an entry point of the group `dist_llm.mixers`; a config
selects it with `model.mixer` (examples/custom_mixer).
"""

from typing import Any, ClassVar

from torch import Tensor, nn

from dist_llm.config.mixer_names import load_mixer
from dist_llm.config.model_section import ATTENTION, ModelConfig, UnresolvedModelConfig
from dist_llm.config.section import Section
from dist_llm.models.cost import Cost
from dist_llm.models.layer_context import LayerContext
from dist_llm.param_spec import ParamSpec


class NoOptions(Section):
    """The options of a mixer that has none."""


class Mixer(nn.Module):
    """A sublayer that exchanges information between tokens.

    Under tensor parallelism, a rank has a part of each parameter whose dimensions `param_specs` names as sharded, such
    as "ffn", and calls `forward` with all tokens. nn.Linear layers are sharded by their `dims`: one whose outputs are
    sharded keeps them local, one whose inputs are sharded sums its outputs over ranks. Other parameters are read with
    `dist_llm.sharded.to_local`.
    """

    Options: ClassVar[type[Section]] = NoOptions  # the keys of model.mixer_options
    supports_context_parallel: ClassVar[bool] = False

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer

    @property
    def options(self) -> Any:
        """The parsed model.mixer_options."""
        return self.Options.model_validate(self.config.mixer_options)

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        """[B, S, D] -> [B, S, D].

        `context.mask.documents_BT` are the document ids of the tokens; None: one document. With a cache, the tokens
        follow the cached ones: the mixer keeps what it needs of them in `context.cache.states[self.layer]`.
        """
        raise NotImplementedError

    def param_specs(self) -> dict[str, ParamSpec]:
        """Describe the parameters."""
        raise NotImplementedError

    @staticmethod
    def cost(config: ModelConfig) -> Cost:
        """Return the cost of the mixer."""
        raise NotImplementedError

    @staticmethod
    def sharded_sizes(config: UnresolvedModelConfig) -> dict[str, int]:
        """Return {description: size} of the dimensions that tensor parallelism divides."""
        return {}


def get_mixer_class(name: str) -> type[Mixer]:
    """Return the class of a mixer. Raises ConfigError if no installed package registers it."""
    if name == ATTENTION:
        from dist_llm.models.attention import Attention  # attention.py imports this module

        return Attention
    mixer: type[Mixer] = load_mixer(name)
    return mixer
