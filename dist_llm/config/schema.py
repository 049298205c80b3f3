"""Every key of a run's YAML: one frozen model per section, one line of description per key.

Types are strict (`steps: "20"` is an error). Rules within one key live here; rules that join
several keys, the corpus or the world size live in `check`. A 0 that stands for "derive it" is
filled in by `check.resolve`, so code past the command line only sees real sizes.
"""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

MAX_WIDTH, MAX_LAYERS, MAX_IDS = 1 << 24, 10_000, 1 << 31  # a model beyond these is a damaged config
Positive = Annotated[int, Field(ge=1, le=1 << 48)]
Count = Annotated[int, Field(ge=0, le=1 << 48)]
Width = Annotated[int, Field(ge=0, le=MAX_WIDTH)]
PositiveWidth = Annotated[int, Field(ge=1, le=MAX_WIDTH)]
Seed = Annotated[int, Field(ge=0, le=2**63 - 1)]  # what an int64 holds
Fraction = Annotated[float, Field(ge=0.0, lt=1.0)]
Rate = Annotated[float, Field(gt=0.0, lt=1.0)]
NonNegative = Annotated[float, Field(ge=0.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
Variable = Annotated[str, Field(pattern=r"^(NCCL|TORCH_NCCL|GLOO|UCX|FI)_[A-Z0-9_]+$")]
Policy = Literal["stop", "skip", "rewind", "warn"]

CACHE = "~/.cache/dist_llm"


def key(description: str, default: Any = ...) -> Any:
    """A key of a section; without `default` the user must set it."""
    return Field(default, description=description)


class Section(BaseModel):
    """Frozen, strict, and closed to unknown keys, inf and nan."""

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class RunConfig(Section):
    dir: str = key("directory of the run: config, metrics, logs, checkpoints; resumed when it holds a checkpoint")
    steps: Positive = key("optimizer steps to take in all, those before a resume included")
    seed: Seed = key("seed of initial values, sample order and dropout", 0)
    hang_seconds: NonNegative = key(
        "a run that stands still so long is ended, the rank that holds it up named; 10 times that in the first steps, "
        "and 10 times a usual step in later ones; 0: never",
        60.0,
    )

    network: dict[Variable, str | int] = key(
        "variables of NCCL, gloo and what is below them (NCCL_*, TORCH_NCCL_*, GLOO_*, UCX_*, FI_*), set on all ranks "
        "before they meet; one that the environment has with another value is refused",
        {},
    )


class ModelConfig(Section):
    architecture: Literal["decoder", "encoder", "encoder_decoder"] = key(
        "one stack that predicts what follows, one that sees all (BERT), or one that reads and one that writes (T5)",
        "decoder",
    )
    d_model: PositiveWidth = key("width of the residual stream")
    n_layers: Annotated[int, Field(ge=1, le=MAX_LAYERS)] = key(
        "number of blocks; of an encoder-decoder: in its decoder"
    )
    n_encoder_layers: Annotated[int, Field(ge=0, le=MAX_LAYERS)] = key(
        "encoder_decoder: blocks of the encoder; 0: n_layers", 0
    )
    n_heads: PositiveWidth = key("query heads per attention")
    n_kv_heads: Width = key("key-value heads (grouped-query attention); 0: n_heads", 0)
    head_dim: Width = key("size of one head; 0: d_model / n_heads", 0)
    d_ff: Width = key(
        "hidden size of the feed-forward; 0: 4 d_model, or 8/3 d_model rounded up to a multiple of 64 for swiglu",
        0,
    )
    vocab_size: Annotated[int, Field(ge=0, le=MAX_IDS)] = key(
        "token ids the model knows; 0: as many as the corpus's tokenizer", 0
    )
    vocab_multiple: PositiveWidth = key(
        "embedding rows are padded to a multiple of this; padding is never predicted", 64
    )
    max_seq_len: Annotated[int, Field(ge=0, le=MAX_IDS)] = key(
        "longest sequence (rows of learned positions); 0: data.seq_len", 0
    )
    positions: Literal["rope", "learned", "sinusoidal", "relative", "none"] = key(
        "how tokens know their place; relative: a learned bias per head and distance, shared by the layers (T5)",
        "rope",
    )
    rope_theta: PositiveFloat = key("base of the rotary wavelengths", 10_000.0)
    relative_buckets: PositiveWidth = key("relative: distances told apart, the far ones in logarithmic steps", 32)
    relative_distance: Positive = key("relative: distance from which all are one bucket", 128)
    norm: Literal["rmsnorm", "layernorm"] = key("normalisation layer", "rmsnorm")
    norm_eps: PositiveFloat = key("added to the variance inside the norms", 1e-5)
    norm_order: Literal["pre", "post"] = key("norm before each sublayer (pre) or after its residual sum (post)", "pre")
    norm_embedding: bool = key("a norm on the embeddings, before the first block (BERT, BART)", False)
    activation: Literal["swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu"] = key(
        "feed-forward non-linearity; swiglu and geglu multiply it with a second projection", "swiglu"
    )
    bias: bool = key("biases in linear layers and layer norms", False)
    qkv_bias: bool = key("biases of queries, keys and values, whatever `bias` says (Qwen2)", False)
    tie_embeddings: bool = key("the head shares the token embedding's weight", False)
    head: Literal["linear", "mlm"] = key(
        "mlm: a dense layer and a norm before the logits, a bias after (BERT)", "linear"
    )
    attention_scale: NonNegative = key("factor of queries times keys; 0: 1 / sqrt(head_dim); T5: 1", 0.0)
    qk_norm: bool = key("RMSNorm on each head's queries and keys, which bounds attention's logits", False)
    logit_cap: NonNegative = key("logits become cap * tanh(logits / cap); 0: they stay as they are", 0.0)
    dropout: Fraction = key("dropout on attention weights, residuals and embeddings", 0.0)
    stochastic_depth: Fraction = key(
        "chance that a sample skips the last block, falling linearly towards the first", 0.0
    )
    init: Literal["gpt2", "xavier", "he", "depth", "tfixup"] = key(
        "initial values: gpt2 scales residual outputs by the number of layers, depth each layer by its place; tfixup: "
        "for training without warm-up",
        "gpt2",
    )
    init_std: PositiveFloat = key("standard deviation of embeddings, and of all matrices under gpt2", 0.02)


class SourceConfig(Section):
    """One corpus of several."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")] = key("what metrics and weights call it")
    path: str = key("as data.path")
    weight: NonNegative = key("share of the samples; 0: by epochs", 0.0)
    epochs: PositiveFloat = key("where no source has a weight: passes over it, compared with the others'", 1.0)


class StageConfig(Section):
    """Other weights from some point on."""

    from_tokens: Positive = key("tokens after which these weights hold")
    weights: dict[str, NonNegative] = key("weight of each source, by name; 0: none of it")


class DataConfig(Section):
    path: str = key("directory that `dist-llm prepare` or `dist-llm adopt` made, or its URL; empty: see sources", "")
    sources: Annotated[tuple[SourceConfig, ...], Field(strict=False)] = key(
        "corpora in place of the one in path, each with a name, a path, and a weight or a number of epochs", ()
    )
    stages: Annotated[tuple[StageConfig, ...], Field(strict=False)] = key(
        "weights that change on the way, each with from_tokens and the weights from then on, by name", ()
    )
    cache: str = key("where remote shards are kept once fetched, one copy per content; nothing is ever removed", CACHE)
    seq_len: Positive = key("tokens per training sequence")
    global_batch: Positive = key("sequences per optimizer step, over all ranks")
    micro_batch: Count = key("sequences per forward pass of one rank; 0: all the rank has", 0)
    order: Literal["shuffle", "random"] = key(
        "each window once per epoch, or uniform offsets with replacement", "shuffle"
    )
    windows: Literal["stream", "document", "packed"] = key(
        "cut text as one stream; one document each, padded; or whole documents packed (and masked from each other)",
        "stream",
    )
    score_prompts: bool = key("score prompts too, of a corpus that was prepared with --prompt-field", False)
    document_mask: bool = key("tokens see their own document alone, in which positions count from 0", False)
    verify: Literal["size", "hash"] = key(
        "check shards at start by size, or read them all and check their hashes", "size"
    )
    prefetch: Count = key("steps whose batches are made ahead in a thread; 0: none", 2)
    skip: Annotated[tuple[Annotated[tuple[Count, Count], Field(strict=False)], ...], Field(strict=False)] = key(
        "ranges [from, to) of sample numbers to leave out, such as those of a loss spike", ()
    )
    on_change: Literal["refuse", "new_segment"] = key(
        "a resume with another corpus, seed, window or objective: refuse it, or go on with the new data from here",
        "refuse",
    )
    audit_every: Count = key(
        "steps after which ranks compare what they read; a sample read twice or left out ends the run; 0: never", 100
    )


class Denoiser(Section):
    """One way to make a training example of a window of text."""

    name: Literal["causal", "prefix", "masked", "span", "fim"] = key(
        "what is predicted: what follows, what follows a prefix, masked tokens, cut-out spans, a cut-out middle",
        "causal",
    )
    weight: PositiveFloat = key("share of the samples in a mixture", 1.0)
    mode: Literal["", "R", "S", "X"] = key("prefix and span: mode token put in front (UL2); empty: none", "")
    see_prefix: bool = key("prefix and span, in a decoder: the inputs see each other; false: causal throughout", True)
    mask_rate: Rate = key("masked: share of the tokens selected; of those 80% masked, 10% random, 10% kept", 0.15)
    whole_words: bool = key("masked: select words and not tokens", False)
    noise_density: Rate = key("span: share of the tokens cut out", 0.15)
    mean_span: Annotated[float, Field(ge=1.0)] = key("span: mean length of a span in tokens", 3.0)
    fim_rate: Annotated[float, Field(ge=0.0, le=1.0)] = key("fim: share of the samples with a cut-out middle", 0.5)
    fim_spm_rate: Annotated[float, Field(ge=0.0, le=1.0)] = key("fim: of those, share that has the suffix first", 0.5)


class ObjectiveConfig(Denoiser):
    mixture: Annotated[tuple[Denoiser, ...], Field(strict=False)] = key(  # a list, in YAML
        "objectives in place of the one above, each with the keys above and a weight", ()
    )

    @property
    def members(self) -> Sequence[Denoiser]:
        """The mixture, or the one objective that there is."""
        return self.mixture or (self,)


class LossConfig(Section):
    label_smoothing: Fraction = key("share of the target's probability spread over the vocabulary", 0.0)
    z_loss: NonNegative = key("weight of the squared log-partition, which keeps logits from drifting", 0.0)


class OptimConfig(Section):
    name: Literal["adamw", "muon", "sgd"] = key(
        "optimizer; muon: of the blocks' matrices, with AdamW for the rest", "adamw"
    )
    lr: PositiveFloat = key("peak learning rate", 3e-4)
    beta1: Fraction = key("AdamW's decay of the first moment", 0.9)
    beta2: Fraction = key("AdamW's decay of the second moment", 0.95)
    eps: PositiveFloat = key("AdamW's epsilon", 1e-8)
    moments: Literal["fp32", "bf16"] = key(
        "dtype in which AdamW's moments are kept; bf16 is rounded by chance, so right on average", "fp32"
    )
    muon_momentum: Fraction = key("Muon's momentum (Nesterov's)", 0.95)
    momentum: Fraction = key("SGD's momentum", 0.0)
    weight_decay: NonNegative = key("decoupled weight decay (in SGD: coupled)", 0.1)
    decay_embeddings: bool = key("decay embeddings too; norms and biases never are", False)
    clip: NonNegative = key("largest global gradient norm; 0: no clipping", 1.0)
    implementation: Literal["fused", "foreach"] = key("how torch runs AdamW's update", "fused")


class ScheduleConfig(Section):
    name: Literal["cosine", "linear", "inverse_sqrt", "wsd", "constant"] = key(
        "shape after warm-up; wsd: warm-up, stable, linear decay", "cosine"
    )
    warmup_steps: Count = key("steps of linear warm-up from 0 to optim.lr", 0)
    decay_steps: Count = key("cosine, linear and wsd: step at which the floor is reached; 0: run.steps", 0)
    decay_fraction: Fraction = key(
        "wsd: the last share of decay_steps in which the rate falls; 0: it drops at once, after decay_steps", 0.2
    )
    min_ratio: Annotated[float, Field(ge=0.0, le=1.0)] = key("floor of the rate as a share of optim.lr", 0.1)
    on_extend: Literal["keep", "replan"] = key(
        "a resume with another run.steps, where decay_steps is 0: keep the decay as it was planned (after it the rate "
        "stays at the floor), or replan it to end at the new run.steps (the rate jumps)",
        "keep",
    )


class ParallelConfig(Section):
    dp_replicate: Positive = key("data-parallel replicas, each a full copy of the (sharded) model", 1)
    dp_shard: Annotated[int, Field(ge=-1)] = key(
        "ranks over which FSDP2 shards each replica; -1: all that the other axes leave", -1
    )
    cp: Positive = key("context-parallel ranks: each holds a part of every sequence", 1)
    tp: Positive = key("tensor-parallel ranks: each holds some heads, hidden units and vocabulary rows", 1)
    pp: Positive = key("pipeline stages (ranks, each with some of the layers)", 1)
    reshard: Literal["default", "always", "never"] = key(
        "free gathered weights after forward; default: in all blocks but the last, never under pp", "default"
    )
    reduce_each_microbatch: bool = key(
        "reduce gradients after every microbatch: more traffic, but no whole gradient is held", False
    )
    cpu_offload: bool = key("keep sharded weights, gradients and moments in host memory", False)
    sequence_parallel: bool = key("under tp, split the sequence between the blocks' matrices too", True)
    async_tp: bool = key(
        "under tp with compile, on GPUs that read each other's memory: overlap collectives with products", False
    )
    pp_schedule: Literal["1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv"] = key(
        "order of the microbatches' forwards and backwards over the stages", "1f1b"
    )
    pp_split: Literal["cost", "count"] = key(
        "give stages equal work (embedding and head weighed in), or equally many blocks", "cost"
    )
    recompute: Literal["none", "full", "selective"] = key(
        "drop activations and compute them again in backward; selective keeps matrix products and attention", "none"
    )
    recompute_budget: Annotated[float, Field(ge=0.0, le=1.0)] = key(
        "with compile: share of activations each block may keep, the cheapest to recompute dropped first", 1.0
    )
    activations_gib: Annotated[float, Field(ge=0.0)] = key(
        "GiB that a rank's blocks may keep for backward, of all microbatches in flight: recompute is chosen for each "
        "block, as little as possible; 0: no budget",
        0.0,
    )


class DeepSpeedConfig(Section):
    stage: Literal[0, 1, 2, 3] = key(
        "what ZeRO shards: nothing, moments, gradients too, weights too (stage 3 is FSDP's way)", 2
    )
    offload_optimizer: Literal["none", "cpu"] = key("where moments are kept, and stepped", "none")
    offload_params: Literal["none", "cpu"] = key("stage 3: where weights wait for their turn", "none")
    config: str = key(
        "a DeepSpeed JSON file whose further settings hold; where it contradicts this config, it is refused", ""
    )


class AccelerateConfig(Section):
    plugin: Literal["ddp", "fsdp2", "deepspeed"] = key(
        "what accelerate prepares the model with; deepspeed: as the section deepspeed says", "ddp"
    )


class CheckpointConfig(Section):
    every: Count = key("steps between checkpoints; 0: only at the end", 500)
    dir: str = key("where they go, a path or a URL that fsspec opens (s3://...); empty: run.dir/checkpoints", "")
    keep: Positive = key("newest checkpoints kept", 2)
    keep_every: Count = key("keep those of each multiple of so many steps, too; 0: none", 0)
    keep_best: Count = key("keep so many with the lowest held-out loss, too", 0)
    probe: Literal["refuse", "warn"] = key(
        "weights that give a small fixed batch another loss than when they were saved, by more than rounding: refuse "
        "to start from them, or warn",
        "refuse",
    )
    background: bool = key("train on while a copy in host memory is written; false: wait, without that copy", True)


class GuardConfig(Section):
    """Bad steps: what they are, and what becomes of them."""

    not_finite: Policy = key(
        "a step with a loss or gradient that is not finite: stop the run; skip the update; rewind to the newest "
        "checkpoint and leave out the step's samples; or warn and go on. Noticed when metrics are written (log.every) "
        "and before each checkpoint; skip waits for the device in each step",
        "stop",
    )
    spike: Policy = key("a step with a loss far above those before it: the same choices", "warn")
    spike_z: PositiveFloat = key(
        "a spike lies so many standard deviations above the median of the newest losses (1.4826 times their median "
        "absolute deviation)",
        10.0,
    )
    window: Annotated[int, Field(ge=4)] = key("the newest losses that are compared with; none is judged before", 128)
    skip_steps: Count = key(
        "rewind: steps whose samples are left out, the bad one last; 0: none, for machines that err and not data", 1
    )
    budget: Count = key("bad steps that are skipped or rewound in a run; one more ends it", 10)
    corrupt: Literal["stop", "rewind"] = key(
        "ranks that should hold or compute the same, and do not: stop the run, or rewind to the newest checkpoint and "
        "leave no samples out",
        "stop",
    )
    digest_every: Count = key(
        "steps after which ranks compare digests of the weights that several hold, as they do before each checkpoint; "
        "0: never",
        100,
    )
    replay_every: Count = key(
        "engine: native, no dropout: steps after which each data rank computes its neighbour's batch, too, and both "
        "must agree; it costs two steps; 0: never",
        0,
    )


class EvalConfig(Section):
    every: Count = key("steps between evaluations on held-out text; 0: only at the end", 0)
    windows: Count = key("held-out windows used while training; 0: all", 0)
    sample_prompt: str = key("prompt of the sample shown in TensorBoard at each evaluation; empty: none", "")
    sample_tokens: Positive = key("tokens in that sample", 64)


class LogConfig(Section):
    every: Positive = key("steps between lines of progress; metrics of each step are written then, in one sync", 10)
    stragglers_seconds: NonNegative = key(
        "seconds of training after which it is told how long each rank works in a step, and which is slow; 0: never",
        120.0,
    )
    tensorboard: bool = key("write TensorBoard events to run.dir/tensorboard", True)
    peak_tflops: NonNegative = key(
        "dense TFLOP/s of one device, for MFU; 0: published for known GPUs, else measured by a matmul", 0.0
    )


class Config(Section):
    """A whole run."""

    run: RunConfig
    model: ModelConfig
    data: DataConfig
    objective: ObjectiveConfig = Field(default_factory=ObjectiveConfig, description="what is learned from a window")
    loss: LossConfig = Field(
        default_factory=LossConfig, description="the training loss; evaluation takes the plain cross-entropy"
    )
    optim: OptimConfig = Field(default_factory=OptimConfig, description="the optimizer")
    schedule: ScheduleConfig = Field(default_factory=ScheduleConfig, description="the learning rate over the steps")
    parallel: ParallelConfig = Field(default_factory=ParallelConfig, description="the layout")
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig, description="checkpoints")
    guard: GuardConfig = Field(default_factory=GuardConfig, description="what becomes of bad steps")
    eval: EvalConfig = Field(default_factory=EvalConfig, description="evaluation while training")
    log: LogConfig = Field(default_factory=LogConfig, description="what is shown")
    precision: Literal["fp32", "bf16", "fp16"] = key(
        "compute type (fp16 with a dynamic loss scale); weights, reduction and moments stay fp32", "fp32"
    )
    fp8: bool = key(
        "precision: bf16, engine: native: the blocks' matrix products in float8, each tensor with a scale of its own; "
        "needs GPUs of compute capability 8.9 or later, and is emulated on a CPU",
        False,
    )
    compile: bool = key("torch.compile each block", False)
    engine: Literal["native", "deepspeed", "accelerate"] = key("who runs the step", "native")
    deepspeed: DeepSpeedConfig = Field(default_factory=DeepSpeedConfig, description="DeepSpeed, as or in an engine")
    accelerate: AccelerateConfig = Field(default_factory=AccelerateConfig, description="engine: accelerate")

    init_from: str = key(
        "checkpoint or run whose weights a new run starts from; a model or objective that differs from the "
        "checkpoint's is refused unless init_allow names the key; empty: none",
        "",
    )
    init_allow: Annotated[tuple[str, ...], Field(strict=False)] = key(
        "init_from: keys that may differ from the checkpoint's, such as [model.vocab_size, objective]; each "
        "difference is logged, new parameters keep their initial values, and parameters without use are dropped",
        (),
    )
    init_optimizer: Literal["fresh", "keep"] = key(
        "init_from: start with new moments, or with the checkpoint's", "fresh"
    )

    @property
    def uses_deepspeed(self) -> bool:
        """Whether DeepSpeed runs the step, itself or through accelerate."""
        return self.engine == "deepspeed" or (self.engine == "accelerate" and self.accelerate.plugin == "deepspeed")
