"""All keys of a run's YAML: one frozen model per section, one description per key.

Types are strict (`steps: "20"` is an error). Rules of a single key are here; rules that involve several keys, the
corpus or the world size are in `check`. `derive.resolve` replaces each 0 that means "derive", so that the engines see
resolved sizes only.
"""

from typing import Annotated, Literal

from pydantic import Field

from dist_llm.config.objective_sections import CausalSpec, ObjectiveConfig
from dist_llm.config.optim_sections import AdamWConfig, CosineConfig, OptimConfig, ScheduleConfig
from dist_llm.config.section import (
    MAX_IDS,
    MAX_LAYERS,
    Count,
    Fraction,
    NonNegative,
    Positive,
    PositiveFloat,
    PositiveWidth,
    Section,
    Seed,
    Width,
    key,
)

Variable = Annotated[str, Field(pattern=r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$")]
Policy = Literal["stop", "skip", "rewind", "warn"]

CACHE = "~/.cache/dist_llm"


class KnownNames:
    """Marks a string key whose values other packages may extend; the help lists the names that this one knows."""

    def __init__(self, *names: str) -> None:
        self.names = names


class RunConfig(Section):
    dir: str = key("run directory, with config, metrics, logs and checkpoints; a run resumes if it has a checkpoint")
    steps: Positive = key("total number of optimizer steps, including those before a resume")
    seed: Seed = key("seed of initial weights, sample order and dropout", 0)
    hang_seconds: NonNegative = key(
        "watchdog timeout in seconds: if no step completes in this time, abort and report the stalled rank; 10 "
        "times as long in the first steps, and at least 10 times a typical step later; 0: never",
        60.0,
    )

    network: dict[Variable, str | int] = key(
        "variables of NCCL, gloo and the libraries below them (NCCL_*, TORCH_NCCL_*, GLOO_*, UCX_*, FI_*), set on "
        "all ranks before rendezvous; a variable that the environment sets to another value is an error",
        {},
    )


class ModelConfig(Section):
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = key(
        "decoder-only, encoder-only (BERT) or encoder-decoder (T5)",
        "decoder",
    )
    d_model: PositiveWidth = key("width of the residual stream")
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = key(
        "number of blocks; encoder_decoder: blocks of the decoder"
    )
    n_encoder_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] = key(
        "encoder_decoder: blocks of the encoder; 0: n_layers", 0
    )
    n_heads: PositiveWidth = key("number of query heads")
    n_kv_heads: Width = key("number of key-value heads (grouped-query attention); 0: n_heads", 0)
    head_dim: Width = key("size of a head; 0: d_model / n_heads", 0)
    d_ff: Width = key(
        "hidden size of the feed-forward layer; 0: 4 d_model, or for gated activations 8/3 d_model rounded up to "
        "a multiple of 64",
        0,
    )
    vocab_size: Annotated[int, Field(ge=0, le=MAX_IDS)] = key(
        "vocabulary size; 0: that of the corpus's tokenizer plus the objective's special tokens", 0
    )
    vocab_multiple: PositiveWidth = key(
        "pad the embedding to a multiple of this many rows; padding is never predicted", 64
    )
    max_seq_len: Annotated[int, Field(ge=0, le=MAX_IDS)] = key(
        "maximum sequence length (rows of learned positions); 0: data.seq_len", 0
    )
    positions: Literal["rope", "learned", "sinusoidal", "relative", "none"] = key(
        "positional encoding; relative: a learned bias per head and distance, shared by all layers (T5)",
        "rope",
    )
    rope_theta: PositiveFloat = key("rope: base of the rotary frequencies", 10_000.0)
    relative_buckets: PositiveWidth = key("relative: number of distance buckets, logarithmic for large distances", 32)
    relative_distance: Positive = key("relative: distance from which all positions share the last bucket", 128)
    norm: Literal["rmsnorm", "layernorm"] = key("normalization layer", "rmsnorm")
    norm_eps: PositiveFloat = key("epsilon of the normalization layers", 1e-5)
    norm_order: Literal["pre", "post"] = key(
        "pre: normalize the input of each sublayer; post: normalize after the residual sum", "pre"
    )
    norm_embedding: bool = key("normalize the embeddings before the first block (BERT, BART)", False)
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = key(
        "feed-forward activation; swiglu and geglu gate a second projection", "swiglu"
    )
    bias: bool = key("biases in linear layers and layer norms", False)
    qkv_bias: bool = key("biases of queries, keys and values, independent of `bias` (Qwen2)", False)
    tie_embeddings: bool = key("share the token embedding's weight with the head", False)
    head: Literal["linear", "mlm"] = key(
        "mlm: a dense layer and a norm before the logits, and a bias after them (BERT)", "linear"
    )
    attention_scale: NonNegative = key("factor of the attention scores; 0: 1 / sqrt(head_dim); T5 uses 1", 0.0)
    qk_norm: bool = key("RMSNorm of each head's queries and keys, which bounds the attention scores", False)
    logit_cap: NonNegative = key("softcap: logits become cap * tanh(logits / cap); 0: none", 0.0)
    dropout: Fraction = key("dropout of attention weights, residual branches and embeddings", 0.0)
    stochastic_depth: Fraction = key(
        "probability that a sample skips the last block; decreases linearly to 0 at the first", 0.0
    )
    init: Literal["gpt2", "xavier", "he", "depth", "tfixup"] = key(
        "initialization: gpt2 scales residual output layers by the number of layers, depth each layer by its "
        "index; tfixup trains without warmup",
        "gpt2",
    )
    init_std: PositiveFloat = key("standard deviation of embeddings, and under gpt2 of all matrices", 0.02)


class SourceConfig(Section):
    """One of several corpora."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = key("name in metrics and weights")
    path: str = key("see data.path")
    weight: NonNegative = key("share of the samples; 0: use epochs", 0.0)
    epochs: PositiveFloat = key(
        "if no source has a weight: passes over this source, relative to those of the others", 1.0
    )


class StageConfig(Section):
    """Source weights from a number of tokens on."""

    from_tokens: Positive = key("number of tokens after which these weights apply")
    weights: dict[str, NonNegative] = key("weight of each source, by name; 0: no samples of it")


class DataConfig(Section):
    path: str = key(
        "corpus directory made by `dist-llm prepare` or `dist-llm adopt`, or its URL; empty: use sources", ""
    )
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = key(
        "several corpora instead of path, each with a name, a path, and a weight or a number of epochs", ()
    )
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = key(
        "source weights that change during the run: from_tokens and weights by source name", ()
    )
    cache: str = key("directory for downloaded shards, one copy per content; nothing is ever removed", CACHE)
    seq_len: Positive = key("tokens per training sequence")
    global_batch: Positive = key("sequences per optimizer step, over all ranks")
    micro_batch: Count = key("sequences per forward pass of one rank; 0: all sequences of the rank at once", 0)
    order: Literal["shuffle", "random"] = key(
        "shuffle: each window once per epoch; random: uniform offsets with replacement", "shuffle"
    )
    windows: Literal["stream", "document", "packed"] = key(
        "stream: cut the token stream; document: one padded document each; packed: pack whole documents, masked "
        "from each other",
        "stream",
    )
    score_prompts: bool = key(
        "compute the loss on prompts too, of a corpus that was prepared with --prompt-field", False
    )
    document_mask: bool = key("restrict attention to the own document, whose positions start at 0", False)
    verify: Literal["size", "hash"] = key(
        "check the shards at the start by size, or read them completely and check their hashes", "size"
    )
    prefetch: Count = key("number of steps whose batches a thread prepares in advance; 0: none", 2)
    skip: Annotated[tuple[Annotated[tuple[Count, Count], Field(strict=False)], ...], Field(strict=False)] = key(
        "ranges [from, to) of sample numbers to leave out, such as those of a loss spike", ()
    )
    on_change: Literal["refuse", "new_segment"] = key(
        "resume with another corpus, seed, window or objective: refuse, or continue with the new data from here",
        "refuse",
    )
    audit_every: Count = key(
        "steps between checks that the ranks read the planned samples; a sample read twice or not at all ends the "
        "run; 0: never",
        100,
    )


class LossConfig(Section):
    label_smoothing: Fraction = key("share of the target's probability that is spread over the vocabulary", 0.0)
    z_loss: NonNegative = key("weight of the squared log-partition function, which keeps logits from drifting", 0.0)


class ParallelConfig(Section):
    dp_replicate: Positive = key("data-parallel replicas, each with a full copy of the (sharded) model", 1)
    dp_shard: Annotated[int, Field(ge=-1)] = key(
        "FSDP2 sharding degree within a replica; -1: all ranks that the other axes leave", -1
    )
    cp: Positive = key("context-parallel degree: each rank has a part of every sequence", 1)
    tp: Positive = key("tensor-parallel degree: each rank has some heads, hidden units and vocabulary rows", 1)
    pp: Positive = key("pipeline-parallel degree: each rank has some of the layers", 1)
    reshard: Literal["default", "always", "never"] = key(
        "free gathered weights after forward; default: in all blocks but the last, and never under pp", "default"
    )
    reduce_each_microbatch: bool = key(
        "reduce-scatter gradients after every microbatch: more traffic, but no full gradients in memory", False
    )
    cpu_offload: bool = key("keep sharded weights, gradients and optimizer state in host memory", False)
    sequence_parallel: bool = key(
        "under tp, shard the sequence outside the matrix products (sequence parallelism)", True
    )
    async_tp: bool = key(
        "under tp with compile, on GPUs with peer-to-peer access: overlap collectives with matrix products", False
    )
    pp_schedule: Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = key(
        "pipeline schedule", "1f1b"
    )
    pp_split: Literal["cost", "count"] = key(
        "split the layers into stages of equal cost (with embedding and head), or of equal count", "cost"
    )
    recompute: Literal["none", "full", "selective"] = key(
        "activation checkpointing: drop activations and recompute them in backward; selective keeps matrix "
        "products and attention",
        "none",
    )
    recompute_budget: Annotated[float, Field(ge=0.0, le=1.0)] = key(
        "with compile: share of the activations that a block may keep; those cheapest to recompute are dropped first",
        1.0,
    )
    activations_gib: Annotated[float, Field(ge=0.0)] = key(
        "activation memory in GiB for the blocks of a rank, over all microbatches in flight; each block "
        "recomputes as little as fits; 0: no budget",
        0.0,
    )


class DeepSpeedConfig(Section):
    stage: Literal[0, 1, 2, 3] = key("ZeRO stage: shard nothing, optimizer state, also gradients, also weights", 2)
    offload_optimizer: Literal["none", "cpu"] = key("device of the optimizer state and its step", "none")
    offload_params: Literal["none", "cpu"] = key("stage 3: device of weights that are not in use", "none")
    config: str = key("DeepSpeed JSON file with further settings; an error if it contradicts this config", "")


class AccelerateConfig(Section):
    plugin: Literal["ddp", "fsdp2", "deepspeed"] = key(
        "how accelerate prepares the model; deepspeed: with the settings of section deepspeed", "ddp"
    )


class CheckpointConfig(Section):
    every: Count = key("steps between checkpoints; 0: only at the end", 500)
    dir: str = key("checkpoint directory, a path or a URL for fsspec (s3://...); empty: run.dir/checkpoints", "")
    keep: Positive = key("number of newest checkpoints to keep", 2)
    keep_every: Count = key("also keep every checkpoint whose step is a multiple of N; 0: none", 0)
    keep_best: Count = key("also keep this many checkpoints with the lowest held-out loss", 0)
    probe: Literal["refuse", "warn"] = key(
        "when loaded weights give a small fixed batch another loss than at the save, by more than rounding: "
        "refuse to start, or warn",
        "refuse",
    )
    background: bool = key(
        "write checkpoints in the background from a copy in host memory; false: training waits, without that copy", True
    )


class GuardConfig(Section):
    """Detection and handling of bad steps."""

    not_finite: Policy = key(
        "a loss or gradient that is not finite: stop the run; skip the update; rewind to the newest checkpoint "
        "and leave out the step's samples; or warn and continue. Checked when metrics are written (log.every) and "
        "before each checkpoint; skip synchronizes with the device in each step",
        "stop",
    )
    spike: Policy = key("a loss far above the recent ones: the same choices", "warn")
    spike_z: PositiveFloat = key(
        "a spike is this many standard deviations above the median of recent losses (1.4826 times their median "
        "absolute deviation)",
        10.0,
    )
    window: Annotated[int, Field(ge=4)] = key("number of recent losses to compare with; no step is checked before", 128)
    skip_steps: Count = key(
        "rewind: number of steps whose samples are left out, the bad step last; 0: none, if hardware and not data "
        "is at fault",
        1,
    )
    budget: Count = key("number of bad steps that may be skipped or rewound in a run; one more ends it", 10)
    corrupt: Literal["stop", "rewind"] = key(
        "ranks that should have or compute the same values, but do not: stop the run, or rewind to the newest "
        "checkpoint and repeat the same samples",
        "stop",
    )
    digest_every: Count = key(
        "steps between comparisons of digests of replicated weights, which also precede each checkpoint; 0: never",
        100,
    )
    replay_every: Count = key(
        "engine: native, no dropout: steps between checks in which each data rank also computes its neighbour's "
        "batch, and both must agree; costs two steps; 0: never",
        0,
    )


class EvalConfig(Section):
    every: Count = key("steps between evaluations on held-out text; 0: only at the end", 0)
    windows: Count = key("number of held-out windows per evaluation; 0: all", 0)
    sample_prompt: str = key("prompt of the generated sample in TensorBoard at each evaluation; empty: none", "")
    sample_tokens: Positive = key("number of tokens of that sample", 64)


class LogConfig(Section):
    every: Positive = key(
        "steps between progress lines; the metrics of all steps are written then, with one device synchronization", 10
    )
    stragglers_seconds: NonNegative = key(
        "seconds of training between straggler reports: how long each rank is busy in a step, and which rank is "
        "slow; 0: never",
        120.0,
    )
    tensorboard: bool = key("write TensorBoard events to run.dir/tensorboard", True)
    peak_tflops: NonNegative = key(
        "dense TFLOP/s of one device, for MFU; 0: the published figure of known GPUs, else a measured matmul rate", 0.0
    )


class Config(Section):
    """The config of a run."""

    run: RunConfig = Field(description="length, directory and seed of the run")
    model: ModelConfig = Field(description="architecture")
    data: DataConfig = Field(description="corpora, windows and batches")
    objective: ObjectiveConfig = Field(default_factory=CausalSpec, description="training objective")
    loss: LossConfig = Field(
        default_factory=LossConfig, description="training loss; evaluation uses the plain cross-entropy"
    )
    optim: OptimConfig = Field(default_factory=AdamWConfig, description="optimizer")
    schedule: ScheduleConfig = Field(default_factory=CosineConfig, description="learning-rate schedule")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="parallel layout")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="handling of bad steps")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluation during training")
    log: LogConfig = Field(default_factory=LogConfig, description="logging")
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "compute dtype (fp16 with a dynamic loss scale); weights, gradient reduction and optimizer state stay fp32",
        "fp32",
    )
    fp8: bool = key(
        "precision: bf16, engine: native: matrix products of the blocks in float8 with a scale per tensor; needs "
        "GPUs of compute capability 8.9 or later, emulated on a CPU",
        False,
    )
    compile: bool = key("torch.compile each block", False)
    engine: Annotated[str, KnownNames("native", "deepspeed", "accelerate")] = key(
        "training engine; also the name of one that an installed package registers", "native"
    )
    deepspeed: DeepSpeedConfig = Field(
        default_factory=DeepSpeedConfig, description="engine deepspeed, and accelerate with its deepspeed plugin"
    )
    accelerate: AccelerateConfig = Field(default_factory=AccelerateConfig, description="engine accelerate")

    init_from: str = key(
        "checkpoint or run with the initial weights of a new run; a model or objective that differs from the "
        "checkpoint's is an error unless init_allow has its key; empty: none",
        "",
    )
    init_allow: Annotated[tuple[str, ...], Field(strict=False)] = key(
        "init_from: keys that may differ from the checkpoint's, such as [model.vocab_size, objective]; each "
        "difference is logged, new parameters keep their initial values, and unused parameters are dropped",
        (),
    )
    init_optimizer: Literal["fresh", "keep"] = key(
        "init_from: start with new optimizer state, or with the checkpoint's", "fresh"
    )

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step, itself or through accelerate."""
        return self.engine == "deepspeed" or (self.engine == "accelerate" and self.accelerate.plugin == "deepspeed")
