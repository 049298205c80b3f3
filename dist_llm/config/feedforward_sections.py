"""The config section `model.feedforward`: the kind of the feed-forward layer."""

from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, Tag

from dist_llm.config.section import (
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    PositiveWidth,
    Section,
    key,
    select_by_name,
)

KIND = "kind of the feed-forward layer"
MAX_EXPERTS = 1 << 14
# Grouped matrix products need rows of a multiple of 16 bytes, which are 8 elements in half precision.
GROUPED_WIDTH_MULTIPLE = 8
Experts = Annotated[int, Field(ge=2, le=MAX_EXPERTS)]


class DenseConfig(Section):
    """One feed-forward layer of d_ff hidden units."""

    name: Literal["dense"] = key(KIND, "dense")


class MoEConfig(Section):
    """A mixture of experts: a router chooses `top_k` of `n_experts` feed-forward layers for each token."""

    name: Literal["moe"] = key(KIND, "moe")
    n_experts: Experts = key("number of experts of a layer")
    top_k: PositiveInt = key("number of experts that the router chooses for each token")
    d_expert: PositiveWidth = key("hidden size of one expert")
    n_shared_experts: NonNegativeInt = key(
        "number of experts that all tokens use, besides the chosen ones (DeepSeekMoE)", 0
    )
    score: Literal["softmax", "sigmoid"] = key("function that turns router logits into scores", "softmax")
    normalize_weights: bool = key(
        "divide the scores of the chosen experts by their sum; with softmax this equals a softmax over the chosen "
        "logits (Mixtral)",
        True,
    )
    weight_scale: PositiveFloat = key("factor of the weights of the chosen experts (DeepSeek-V3: 2.5)", 1.0)
    router_bias: bool = key("bias of the router logits (gpt-oss)", False)
    n_groups: PositiveInt = key("number of groups of experts; above 1, a token chooses experts in top_groups groups", 1)
    top_groups: PositiveInt = key("number of groups that a token may choose from (DeepSeek-V3: 4 of 8)", 1)
    balance_loss: NonNegativeFloat = key("coefficient of the loss that balances the load of the experts", 0.0)
    balance_over: Literal["sequence", "previous_step"] = key(
        "balance_loss: the tokens whose choices define the load: those of the same sequence (DeepSeek-V3), or those "
        "of the whole previous step",
        "sequence",
    )
    router_z_loss: NonNegativeFloat = key("coefficient of log(Z)^2 of the router logits (ST-MoE)", 0.0)
    selection_bias: bool = key(
        "add a bias per expert to the scores for the choice, not for the weights; each step changes it by "
        "selection_bias_rate towards a balanced load (DeepSeek-V3)",
        False,
    )
    selection_bias_rate: NonNegativeFloat = key("change of the selection bias per optimizer step", 0.001)


class RegisteredConfig(Section):
    """A feed-forward layer that an installed package registers. It has the further keys `Options` of its class."""

    model_config = ConfigDict(extra="allow")

    name: str = key("name under which the package registers the layer")

    @property
    def options(self) -> dict[str, Any]:
        """The further keys, before they are parsed."""
        return self.model_extra or {}


BUILT_IN_FEEDFORWARDS = ("dense", "moe")
FeedForwardConfig = Annotated[
    Annotated[DenseConfig, Tag("dense")] | Annotated[MoEConfig, Tag("moe")] | Annotated[RegisteredConfig, Tag("NAME")],
    select_by_name("dense", known_names=BUILT_IN_FEEDFORWARDS, other_tag="NAME"),
]
