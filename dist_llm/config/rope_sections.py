"""The config section `model.rope_scaling`: rotary frequencies for contexts longer than those of the first training."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from dist_llm.config.section import PositiveFloat, PositiveInt, Section, key, select_by_name

SCALING = "how the rotary frequencies are changed for long contexts"
FACTOR = "the frequencies are divided by this factor"
ORIGINAL_LENGTH = "context length of the first training, in tokens"
LENGTH = (
    "context length for which the frequencies are computed, whatever the length of a sequence; null: model.max_seq_len"
)
Factors = Annotated[tuple[PositiveFloat, ...], Field(strict=False)]  # a list in YAML


class LinearScaling(Section):
    """Position interpolation (Chen et al. 2023)."""

    name: Literal["linear"] = key(SCALING, "linear")
    factor: PositiveFloat = key(FACTOR)


class DynamicScaling(Section):
    """A larger base for longer sequences (NTK-aware scaling, bloc97 and emozilla 2023)."""

    name: Literal["dynamic"] = key(SCALING, "dynamic")
    factor: PositiveFloat = key(FACTOR)
    original_max_seq_len: PositiveInt = key(ORIGINAL_LENGTH)
    length: PositiveInt | None = key(LENGTH, None)


class Llama3Scaling(Section):
    """Lower only the low frequencies (Llama 3.1)."""

    name: Literal["llama3"] = key(SCALING, "llama3")
    factor: PositiveFloat = key(FACTOR)
    original_max_seq_len: PositiveInt = key(ORIGINAL_LENGTH)
    low_freq_factor: PositiveFloat = key(
        "frequencies with fewer turns in the original context are divided by factor", 1.0
    )
    high_freq_factor: PositiveFloat = key("frequencies with more turns in the original context do not change", 4.0)


class YarnScaling(Section):
    """Lower only the low frequencies, and scale the attention scores (Peng et al. 2023, arXiv 2309.00071)."""

    name: Literal["yarn"] = key(SCALING, "yarn")
    factor: PositiveFloat = key(FACTOR)
    original_max_seq_len: PositiveInt = key(ORIGINAL_LENGTH)
    beta_fast: PositiveFloat = key("frequencies with more turns in the original context do not change", 32.0)
    beta_slow: PositiveFloat = key("frequencies with fewer turns in the original context are divided by factor", 1.0)
    truncate: bool = key("round the limits of the changed frequencies to integers (gpt-oss does not)", True)
    attention_factor: PositiveFloat | None = key(
        "factor of the rotated queries and keys; null: 0.1 ln(factor) + 1", None
    )


class LongropeScaling(Section):
    """A factor for each frequency (Ding et al. 2024, arXiv 2402.13753; Phi-3)."""

    name: Literal["longrope"] = key(SCALING, "longrope")
    short_factors: Factors = key("divisor of each frequency, for a length up to original_max_seq_len")
    long_factors: Factors = key("divisor of each frequency, for a greater length")
    original_max_seq_len: PositiveInt = key(ORIGINAL_LENGTH)
    length: PositiveInt | None = key(LENGTH, None)
    attention_factor: PositiveFloat | None = key(
        "factor of the rotated queries and keys; null: sqrt(1 + ln(s) / ln(original_max_seq_len)) with s = "
        "model.max_seq_len / original_max_seq_len",
        None,
    )


RopeScaling = Annotated[
    Annotated[LinearScaling, Tag("linear")]
    | Annotated[DynamicScaling, Tag("dynamic")]
    | Annotated[Llama3Scaling, Tag("llama3")]
    | Annotated[YarnScaling, Tag("yarn")]
    | Annotated[LongropeScaling, Tag("longrope")],
    select_by_name("linear"),
]
