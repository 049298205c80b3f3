"""The config section `model.parametrization`: how hyperparameters change with the width and the depth of the model."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from dist_llm.config.section import MAX_LAYERS, DerivedWidth, PositiveWidth, Section, key, select_by_name

NAME = "mup: hyperparameters of a narrow model fit a wide one (Yang et al. 2022); completep: also a deep one"


class MupConfig(Section):
    """The maximal update parametrization (Yang et al. 2022, arXiv 2203.03466)."""

    name: Literal["mup"] = key(NAME, "mup")
    base_d_model: PositiveWidth = key("d_model of the model whose hyperparameters are set in this config")
    base_head_dim: DerivedWidth = key("head_dim of that model; null: the same head_dim", None)


class CompletePConfig(Section):
    """CompleteP (Dey et al. 2025, arXiv 2505.01618): mup, and residual branches scaled by the number of layers."""

    name: Literal["completep"] = key(NAME, "completep")
    base_d_model: PositiveWidth = key("d_model of the model whose hyperparameters are set in this config")
    base_head_dim: DerivedWidth = key("head_dim of that model; null: the same head_dim", None)
    base_n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = key("n_layers of that model")
    depth_exponent: Annotated[float, Field(ge=0.5, le=1.0)] = key(
        "alpha: residual branches are multiplied by (n_layers / base_n_layers)^-alpha; 1: CompleteP", 1.0
    )


Parametrization = Annotated[
    Annotated[MupConfig, Tag("mup")] | Annotated[CompletePConfig, Tag("completep")], select_by_name("mup")
]
