"""The base class of mixers: the sublayers of a block that exchange information between tokens.

Attention is one. Another package can register its own as an entry point of the group `dist_llm.mixers`; a config
selects it with `model.mixer` (examples/custom_mixer).
"""

from typing import Any

from torch import Tensor

from dist_llm.config.model_section import ATTENTION
from dist_llm.config.registered_classes import load_registered_class
from dist_llm.models.layer_context import LayerContext
from dist_llm.models.sublayer import Sublayer


class Mixer(Sublayer):
    """A sublayer that exchanges information between tokens."""

    @property
    def options(self) -> Any:
        """The parsed model.mixer_options."""
        return self.parse_options(self.config.mixer_options)

    def forward(self, x_BSD: Tensor, context: LayerContext) -> Tensor:
        """[B, S, D] -> [B, S, D].

        `context.mask.documents_BT` are the document ids of the tokens; None: one document. With a cache, the tokens
        follow the cached ones: the mixer keeps what it needs of them in `context.cache.states[self.layer]`.
        """
        raise NotImplementedError


def get_mixer_class(name: str) -> type[Mixer]:
    """Return the class of a mixer. Raises ConfigError if no installed package registers it."""
    if name == ATTENTION:
        from dist_llm.models.attention import Attention  # attention.py imports this module

        return Attention
    mixer: type[Mixer] = load_registered_class("dist_llm.mixers", name)
    return mixer
