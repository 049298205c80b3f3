"""The config sections `optim` and `schedule`: one class for each optimizer and each learning-rate schedule."""

from typing import Annotated, Literal

from pydantic import Field, Tag

from dist_llm.config.section import (
    DerivedPositiveInt,
    Fraction,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    Section,
    key,
    select_by_name,
)

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]

OPTIMIZER = "optimizer; muon: Muon for the matrices of the blocks, AdamW for the rest"
SCHEDULE = "learning-rate schedule after warmup; wsd: warmup, stable, linear decay"


class ParamGroup(Section):
    """Settings of the parameters whose names match a pattern."""

    pattern: str = key(
        "glob pattern of parameter names, such as blocks.*.attention.*; a parameter belongs to the first group that "
        "matches its name"
    )
    lr_mult: PositiveFloat = key("factor of the learning rate", 1.0)
    weight_decay_mult: NonNegativeFloat = key("factor of the weight decay; norms and biases never decay", 1.0)
    freeze: bool = key("do not train the parameters: no gradients, no optimizer state, no weight decay", False)


class OptimKeys(Section):
    """The keys of all optimizers."""

    name: str = key(OPTIMIZER)
    lr: PositiveFloat = key("peak learning rate", 3e-4)
    weight_decay: NonNegativeFloat = key("decoupled weight decay (sgd: coupled)", 0.1)
    decay_embeddings: bool = key("also apply weight decay to embeddings; norms and biases never decay", False)
    clip: Limit = key("maximum global gradient norm", 1.0)
    groups: Annotated[tuple[ParamGroup, ...], Field(strict=False)] = key(
        "parameter groups with their own learning rate or weight decay, or that are not trained", ()
    )


class AdamWKeys(OptimKeys):
    """The keys of AdamW. Under Muon, AdamW updates the parameters that are not matrices of the blocks."""

    beta1: Fraction = key("decay of the first moment", 0.9)
    beta2: Fraction = key("decay of the second moment", 0.95)
    eps: PositiveFloat = key("epsilon", 1e-8)
    moments: Literal["fp32", "bf16"] = key("dtype of the stored moments; bf16 uses stochastic rounding", "fp32")
    implementation: Literal["fused", "foreach"] = key("implementation of torch's AdamW update", "fused")


class AdamWConfig(AdamWKeys):
    """AdamW for all parameters."""

    name: Literal["adamw"] = key(OPTIMIZER, "adamw")


class MuonConfig(AdamWKeys):
    """Muon for the matrices of the blocks, AdamW for the rest."""

    name: Literal["muon"] = key(OPTIMIZER, "muon")
    muon_momentum: Fraction = key("Nesterov momentum", 0.95)


class SGDConfig(OptimKeys):
    """Stochastic gradient descent for all parameters."""

    name: Literal["sgd"] = key(OPTIMIZER, "sgd")
    momentum: Fraction = key("momentum", 0.0)


OptimConfig = Annotated[
    Annotated[AdamWConfig, Tag("adamw")] | Annotated[MuonConfig, Tag("muon")] | Annotated[SGDConfig, Tag("sgd")],
    select_by_name("adamw"),
]


class ScheduleKeys(Section):
    """The keys of all schedules."""

    name: str = key(SCHEDULE)
    warmup_steps: NonNegativeInt = key("steps of linear warmup from 0 to optim.lr", 0)


class DecayKeys(ScheduleKeys):
    """The keys of schedules that reach their minimum at a given step."""

    decay_steps: DerivedPositiveInt = key("step at which the decay reaches min_ratio; null: run.steps", None)
    min_ratio: Ratio = key("final learning rate as a share of optim.lr", 0.1)
    on_extend: Literal["keep", "replan"] = key(
        "resume with another run.steps while decay_steps is null: keep the planned decay (the rate then stays at its "
        "minimum), or replan the decay to end at the new run.steps (the rate jumps)",
        "keep",
    )


class CosineConfig(DecayKeys):
    """Cosine decay."""

    name: Literal["cosine"] = key(SCHEDULE, "cosine")


class LinearConfig(DecayKeys):
    """Linear decay."""

    name: Literal["linear"] = key(SCHEDULE, "linear")


class WSDConfig(DecayKeys):
    """Warmup, a stable rate, and a linear decay at the end."""

    name: Literal["wsd"] = key(SCHEDULE, "wsd")
    decay_fraction: Fraction = key(
        "share of decay_steps, at their end, in which the rate decays; 0: the rate drops at once after decay_steps",
        0.2,
    )


class InverseSqrtConfig(ScheduleKeys):
    """Decay with the inverse square root of the step."""

    name: Literal["inverse_sqrt"] = key(SCHEDULE, "inverse_sqrt")
    min_ratio: Ratio = key("final learning rate as a share of optim.lr", 0.1)


class ConstantConfig(ScheduleKeys):
    """A constant rate."""

    name: Literal["constant"] = key(SCHEDULE, "constant")


ScheduleConfig = Annotated[
    Annotated[CosineConfig, Tag("cosine")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[WSDConfig, Tag("wsd")]
    | Annotated[InverseSqrtConfig, Tag("inverse_sqrt")]
    | Annotated[ConstantConfig, Tag("constant")],
    select_by_name("cosine"),
]
