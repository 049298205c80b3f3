"""Define all keys of a config: one frozen pydantic model per section, one description per key.

Types are strict (`steps: "20"` is an error). This file has the rules of a single key. `check.py` has the rules that
involve several keys, the corpus or the world size.

A user writes an `UnresolvedConfig`, in which null means that the value is derived from other keys.
`derive.resolve_config` turns an `UnresolvedConfig` into a `Config`, which has all sizes. Engines and models accept only
a `Config`.
"""

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.data_sections import DataConfig, UnresolvedDataConfig
from dist_llm.config.model_section import ModelConfig, UnresolvedModelConfig
from dist_llm.config.objective_sections import CausalSpec, ObjectiveConfig
from dist_llm.config.optim_sections import AdamWConfig, CosineConfig, OptimConfig, ScheduleConfig
from dist_llm.config.parallel_section import ParallelConfig, UnresolvedParallelConfig
from dist_llm.config.section import (
    DerivedFloat,
    DerivedPositiveInt,
    Fraction,
    Limit,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
    Seed,
    StepInterval,
    key,
)

Variable = Annotated[str, Field(pattern=r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$")]
Policy = Literal["stop", "skip", "rewind", "warn"]


class KnownNames:
    """Marks a string key whose values other packages may extend. The help lists the names that dist_llm knows."""

    def __init__(self, *names: str) -> None:
        self.names = names


class RunConfig(Section):
    dir: str = key("run directory, with config, metrics, logs and checkpoints; a run resumes if it has a checkpoint")
    steps: PositiveInt = key("total number of optimizer steps, including those before a resume")
    seed: Seed = key("seed of initial weights, sample order and dropout", 0)
    hang_seconds: Limit = key(
        "watchdog timeout in seconds: if no step completes in this time, abort and report the stalled rank; 10 "
        "times as long in the first steps, and at least 10 times a typical step later",
        60.0,
    )
    network: dict[Variable, str | int] = key(
        "variables of NCCL, gloo and the libraries below them (NCCL_*, TORCH_NCCL_*, GLOO_*, UCX_*, FI_*), set on "
        "all ranks before rendezvous; a variable that the environment sets to another value is an error",
        {},
    )


class LossConfig(Section):
    label_smoothing: Fraction = key("share of the target probability that is spread over the vocabulary", 0.0)
    z_loss: NonNegativeFloat = key(
        "weight of the squared log-partition function, which keeps logits from drifting", 0.0
    )


class DeepSpeedConfig(Section):
    stage: Literal[0, 1, 2, 3] = key(
        "ZeRO stage; 0: shard nothing; 1: optimizer state; 2: also gradients; 3: also weights", 2
    )
    offload_optimizer: Literal["none", "cpu"] = key("device of the optimizer state and its step", "none")
    offload_params: Literal["none", "cpu"] = key("stage 3: device of weights that are not in use", "none")
    config: str = key("DeepSpeed JSON file with further settings; an error if it contradicts this config", "")


class AccelerateConfig(Section):
    plugin: Literal["ddp", "fsdp2", "deepspeed"] = key(
        "how accelerate prepares the model; deepspeed: with the settings of section deepspeed", "ddp"
    )


class CheckpointConfig(Section):
    every: StepInterval = key("steps between checkpoints; off: only at the end", 500)
    dir: str = key("checkpoint directory, a path or a URL for fsspec (s3://...); empty: run.dir/checkpoints", "")
    keep: PositiveInt = key("number of newest checkpoints to keep", 2)
    keep_every: StepInterval = key("also keep every checkpoint whose step is a multiple of this number", None)
    keep_best: NonNegativeInt = key("also keep this many checkpoints with the lowest held-out loss", 0)
    probe: Literal["refuse", "warn"] = key(
        "if the loss of a small fixed batch differs between save and load by more than rounding: refuse to start, or "
        "warn",
        "refuse",
    )
    background: bool = key(
        "write checkpoints in the background from a copy in host memory; false: make no copy, and training waits", True
    )


class GuardConfig(Section):
    """Detection and handling of bad steps: a loss or gradient that is not finite, or a loss spike."""

    not_finite: Policy = key(
        "if a loss or gradient is not finite: stop the run; skip the update; rewind to the newest checkpoint and "
        "leave out the samples of the step; or warn and continue. Checked when metrics are written (log.every) and "
        "before each checkpoint; skip synchronizes with the device in each step",
        "stop",
    )
    spike: Policy = key("if a loss is far above the recent losses: the same choices as not_finite", "warn")
    spike_z: PositiveFloat = key(
        "a spike is this many standard deviations above the median of recent losses (1.4826 times their median "
        "absolute deviation)",
        10.0,
    )
    window: Annotated[int, Field(ge=4)] = key(
        "number of recent losses to compare with; spikes are not detected before so many steps", 128
    )
    skip_steps: NonNegativeInt = key(
        "rewind: number of steps whose samples are left out, the bad step last; 0: none, if the hardware is the cause",
        1,
    )
    budget: NonNegativeInt = key(
        "number of bad steps that may be skipped or rewound in a run; one more ends the run", 10
    )
    corrupt: Literal["stop", "rewind"] = key(
        "if ranks that must have equal values differ: stop the run, or rewind to the newest checkpoint and repeat the "
        "same samples",
        "stop",
    )
    digest_every: StepInterval = key(
        "steps between comparisons of digests of replicated weights; each checkpoint is also preceded by one",
        100,
    )
    replay_every: StepInterval = key(
        "engine: native, no dropout: steps between checks in which each data rank also computes the batch of its "
        "neighbor, and the results must agree; a check costs two steps",
        None,
    )


class EvalConfig(Section):
    every: StepInterval = key("steps between evaluations on held-out text; off: only at the end", None)
    windows: DerivedPositiveInt = key("number of held-out windows per evaluation; null: all", None)
    sample_prompt: str = key("prompt of the generated sample in TensorBoard at each evaluation; empty: none", "")
    sample_tokens: PositiveInt = key("number of tokens of the generated sample", 64)


class LogConfig(Section):
    every: PositiveInt = key(
        "steps between progress lines; the metrics of all steps since the last line are written at the same time, with "
        "one device synchronization",
        10,
    )
    stragglers_seconds: Limit = key(
        "seconds of training between straggler reports: how long each rank is busy in a step, and which rank is slow",
        120.0,
    )
    tensorboard: bool = key("write TensorBoard events to run.dir/tensorboard", True)
    peak_tflops: DerivedFloat = key(
        "dense TFLOP/s of one device, for MFU; null: the published figure of known GPUs, else a measured matmul rate",
        None,
    )


class UnresolvedConfig(Section):
    """A config as a user writes it. null means that the value is derived from other keys."""

    run: RunConfig = Field(description="length, directory and seed of the run")
    model: UnresolvedModelConfig = Field(description="architecture")
    data: UnresolvedDataConfig = Field(description="corpora, windows and batches")
    objective: ObjectiveConfig = Field(default_factory=CausalSpec, description="training objective")
    loss: LossConfig = Field(
        default_factory=LossConfig, description="training loss; evaluation uses the plain cross-entropy"
    )
    optim: OptimConfig = Field(default_factory=AdamWConfig, description="optimizer")
    schedule: ScheduleConfig = Field(default_factory=CosineConfig, description="learning-rate schedule")
    parallel: UnresolvedParallelConfig = Field(default_factory=UnresolvedParallelConfig, description="parallel layout")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="handling of bad steps")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluation during training")
    log: LogConfig = Field(default_factory=LogConfig, description="logging")
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "compute dtype (fp16: with a dynamic loss scale); weights, gradient reduction and optimizer state stay fp32",
        "fp32",
    )
    fp8: bool = key(
        "compute the matrix products of the blocks in float8, with a scale per tensor; needs precision bf16, engine "
        "native, and GPUs of compute capability 8.9 or later; emulated on a CPU",
        False,
    )
    compile: bool = key("torch.compile each block", False)
    engine: Annotated[str, KnownNames("native", "deepspeed", "accelerate")] = key(
        "training engine; an installed package can register further engines", "native"
    )
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig,
        description="settings of engine deepspeed, and of engine accelerate with its deepspeed plugin",
    )
    accelerate: AccelerateConfig = Field(default_factory=AccelerateConfig, description="settings of engine accelerate")

    init_from: str = key(
        "checkpoint or run with the initial weights of a new run; its model and objective must agree with this config, "
        "except for the keys in init_allow; empty: none",
        "",
    )
    init_allow: Annotated[tuple[str, ...], Field(strict=False)] = key(
        "init_from: keys that may differ from the checkpoint, such as [model.vocab_size, objective]; each difference "
        "is logged, new parameters keep their initial values, experts are copies of a dense "
        "feed-forward layer, and unused parameters are dropped",
        (),
    )
    init_optimizer: Literal["fresh", "keep"] = key(
        "init_from: start with new optimizer state, or keep the optimizer state of the checkpoint", "fresh"
    )

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step, itself or through accelerate."""
        return self.engine == "deepspeed" or (self.engine == "accelerate" and self.accelerate.plugin == "deepspeed")


class Config(UnresolvedConfig):
    """The resolved config of a run: all sizes are set.

    On a resume, `training/learning_rate_plan.py:plan_learning_rate` updates `schedule.decay_steps`.
    """

    model: ModelConfig
    data: DataConfig
    parallel: ParallelConfig = Field(default_factory=ParallelConfig)
