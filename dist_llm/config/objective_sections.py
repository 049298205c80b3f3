"""The config section `objective`: one class for each training objective, and mixtures of objectives."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal, cast

from pydantic import ConfigDict, Field, Tag

from dist_llm.config.section import MIXTURE, PositiveFloat, Rate, Section, key, select_by_name

OBJECTIVE = (
    "predict next tokens, tokens after a prefix, masked tokens, removed spans, or a removed middle (FIM); or the NAME "
    "of an objective that an installed package registers (examples/custom_objective)"
)
MODE = "mode token that is put first (UL2); empty: none"
SEE_PREFIX = "in a decoder: bidirectional attention within the prefix; false: causal"

Mode = Literal["", "R", "S", "X"]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]


class ObjectiveKeys(Section):
    """The keys of all objectives."""

    name: str = key(OBJECTIVE)
    weight: PositiveFloat = key("share of the samples in a mixture", 1.0)

    @property
    def components(self) -> "Sequence[ObjectiveSpec]":
        """The objectives of the mixture: this one."""
        return (cast("ObjectiveSpec", self),)


class CausalSpec(ObjectiveKeys):
    """Predict the next tokens."""

    name: Literal["causal"] = key(OBJECTIVE, "causal")


class PrefixSpec(ObjectiveKeys):
    """Predict the tokens after a prefix."""

    name: Literal["prefix"] = key(OBJECTIVE, "prefix")
    mode: Mode = key(MODE, "")
    see_prefix: bool = key(SEE_PREFIX, True)


class MaskedSpec(ObjectiveKeys):
    """Predict masked tokens."""

    name: Literal["masked"] = key(OBJECTIVE, "masked")
    mask_rate: Rate = key("share of the tokens selected; 80% of them are masked, 10% random, 10% unchanged", 0.15)
    whole_words: bool = key("select whole words instead of tokens", False)


class SpanSpec(ObjectiveKeys):
    """Predict removed spans."""

    name: Literal["span"] = key(OBJECTIVE, "span")
    mode: Mode = key(MODE, "")
    see_prefix: bool = key(SEE_PREFIX, True)
    noise_density: Rate = key("share of the tokens that is removed", 0.15)
    mean_span: Annotated[float, Field(ge=1.0)] = key("mean length of a removed span in tokens", 3.0)


class FIMSpec(ObjectiveKeys):
    """Predict a removed middle."""

    name: Literal["fim"] = key(OBJECTIVE, "fim")
    fim_rate: Probability = key("share of the samples with a removed middle", 0.5)
    fim_spm_rate: Probability = key(
        "share of the samples with a removed middle that are in the order suffix, prefix, middle", 0.5
    )


class RegisteredObjectiveSpec(ObjectiveKeys):
    """An objective that an installed package registers. It has the further keys `Options` of its class."""

    model_config = ConfigDict(extra="allow")

    name: str = key("name under which the package registers the objective")

    @property
    def options(self) -> dict[str, Any]:
        """The further keys, before they are parsed."""
        return self.model_extra or {}


BUILT_IN_OBJECTIVES = ("causal", "prefix", "masked", "span", "fim")
_Objectives = (
    Annotated[CausalSpec, Tag("causal")]
    | Annotated[PrefixSpec, Tag("prefix")]
    | Annotated[MaskedSpec, Tag("masked")]
    | Annotated[SpanSpec, Tag("span")]
    | Annotated[FIMSpec, Tag("fim")]
    | Annotated[RegisteredObjectiveSpec, Tag("NAME")]
)
ObjectiveSpec = Annotated[_Objectives, select_by_name("causal", known_names=BUILT_IN_OBJECTIVES, other_tag="NAME")]


class MixtureConfig(Section):
    """Several objectives, each with a share of the samples."""

    mixture: Annotated[tuple[ObjectiveSpec, ...], Field(strict=False)] = key(  # a list in YAML
        "list of objectives instead of one; each entry has the keys of this section and a weight"
    )

    @property
    def components(self) -> Sequence[ObjectiveSpec]:
        """The objectives of the mixture."""
        return self.mixture


ObjectiveConfig = Annotated[
    _Objectives | Annotated[MixtureConfig, Tag(MIXTURE)],
    select_by_name("causal", known_names=(*BUILT_IN_OBJECTIVES, MIXTURE), other_tag="NAME"),
]


def get_mode_token(spec: ObjectiveSpec) -> str:
    """Return the mode token of an objective. An empty string means none."""
    return spec.mode if isinstance(spec, PrefixSpec | SpanSpec) else ""
