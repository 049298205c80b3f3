"""The layouts, models and optimizers with which the law tests compare a parallel run with one process.

MODELS has the `model` sections, LAYOUTS the parallel layouts by name, and CLIPPED_SGD, ADAMW, MUON, ... are `optim`
sections. law.py combines them:

    layout = Layout(ranks=4, parallel={"dp_shard": 2, "tp": 2}, model="gpt")
    assert_matches_one_process(layout, optim=ADAMW, steps=2)
"""

from dataclasses import dataclass, field, replace
from typing import Any

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
# The models, as differences from MODEL of law.py. MODEL is a Llama: RoPE, RMSNorm, SwiGLU, grouped-query attention,
# untied embeddings.
LLAMA: dict[str, Any] = {}
TIED: dict[str, Any] = {"tie_embeddings": True}
GPT: dict[str, Any] = {
    "positions": "learned",
    "norm": "layernorm",
    "bias": True,
    "activation": "gelu",
    "n_kv_heads": 8,
    "tie_embeddings": True,
}
POST: dict[str, Any] = {"positions": "sinusoidal", "norm_order": "post", "bias": True}
# BERT: bidirectional attention, a norm after the embeddings, post-norm, a dense layer and a bias before the logits.
BERT: dict[str, Any] = {
    "architecture": "encoder",
    "positions": "learned",
    "norm": "layernorm",
    "norm_order": "post",
    "norm_embedding": True,
    "bias": True,
    "activation": "gelu",
    "n_kv_heads": 8,
    "tie_embeddings": True,
    "head": "mlm",
}
# T5 v1.1: relative positions, gated GELU, unscaled attention scores, an untied head.
T5: dict[str, Any] = {
    "architecture": "encoder_decoder",
    "n_layers": 2,
    "positions": "relative",
    "relative_buckets": 8,
    "relative_distance": 16,
    "activation": "geglu_tanh",
    "attention_scale": 1.0,
    "n_kv_heads": 8,
}
# BART: learned positions in each stack, post-norm, all embeddings tied.
BART: dict[str, Any] = {
    **{key: value for key, value in BERT.items() if key != "head"},
    "architecture": "encoder_decoder",
    "n_layers": 2,
}
ENCODER_DECODER: dict[str, Any] = {"architecture": "encoder_decoder", "n_layers": 2, "n_encoder_layers": 3}
# QK norm, a logit cap and stochastic depth in one model.
BOUNDED: dict[str, Any] = {
    "qk_norm": True,
    "logit_cap": 5.0,
    "stochastic_depth": 0.3,
    "n_kv_heads": 4,
    "qkv_bias": True,
}
# Like Gemma 2 and 3: windows in two of three layers, norms with 1 + weight before and after each sublayer, capped
# scores and logits, scaled embeddings. The last repetition of the kinds is cut.
GEMMA: dict[str, Any] = {
    "norm_weight": "plus_one",
    "norm_order": "sandwich",
    "activation": "geglu_tanh",
    "embedding_scale": 5.5,
    "attention_cap": 1.0,
    "logit_cap": 5.0,
    "tie_embeddings": True,
    "layers": ["local", "local", "global"],
    "kinds": {
        "local": {"window": 5, "rope_theta": 500.0},
        "global": {"qk_norm": True, "n_kv_heads": 8, "head_dim": 8, "attention_scale": 0.5},
    },
}
# Like OLMo 2 and 3 and SmolLM3: norms after the sublayers, norms over all heads, windows, scaled and missing rotation.
OLMO: dict[str, Any] = {
    "norm_order": "reordered",
    "qk_norm": "all",
    "residual_scale": 0.7,
    "logit_scale": 0.5,
    "layers": ["near", "far", "unrotated"],
    "kinds": {
        "near": {"window": 7},
        "far": {"rope_scaling": {"name": "yarn", "factor": 4.0, "original_max_seq_len": 8}},
        "unrotated": {"positions": "none", "activation": "gelu", "d_ff": 80},
    },
}
# Like Phi: attention and feed-forward after the same norm, half of each head rotates, all biases set one by one.
PHI: dict[str, Any] = {
    "parallel_residual": "one_norm",
    "rotary_fraction": 0.5,
    "norm": "layernorm",
    "norm_bias": True,
    "qkv_bias": True,
    "out_bias": True,
    "feedforward_bias": True,
    "head_bias": True,
    "activation": "relu_squared",
}
# Like GPT-NeoX and OLMo 1: parallel sublayers with norms of their own, which have no weights.
NEOX: dict[str, Any] = {"parallel_residual": "two_norms", "norm": "layernorm", "norm_weight": "none"}
# Like BLOOM: a bias that grows with the distance, and a norm after the embeddings.
BLOOM: dict[str, Any] = {"positions": "alibi", "norm_embedding": True, "norm": "layernorm", "bias": True}
# Like Mixtral: softmax over 8 experts of which a token uses 2, balanced per sequence.
MOE: dict[str, Any] = {
    "d_ff": None,
    "feedforward": {
        **{"name": "moe", "n_experts": 8, "top_k": 2, "d_expert": 24},
        **{"balance_loss": 0.1, "router_z_loss": 0.01},
    },
    "init_std": 0.1,
}
SIX_EXPERTS: dict[str, Any] = {**MOE, "feedforward": {**MOE["feedforward"], "n_experts": 6}}  # for ep 3
# Like DeepSeek-V3: sigmoid scores, groups of experts, a shared expert, a selection bias, a dense first layer; with the
# biases and the activation of gpt-oss.
DEEPSEEK: dict[str, Any] = {
    "activation": "swiglu_clamped",
    "feedforward": {
        **{"name": "moe", "n_experts": 8, "top_k": 3, "d_expert": 16, "n_shared_experts": 1, "score": "sigmoid"},
        **{"weight_scale": 2.5, "n_groups": 4, "top_groups": 2, "balance_loss": 0.05, "router_bias": True},
        **{"balance_over": "previous_step", "selection_bias": True, "selection_bias_rate": 0.01},
    },
    "feedforward_bias": True,
    "layers": ["dense", "moe", "moe"],
    "kinds": {"dense": {"feedforward": {"name": "dense"}}, "moe": {}},
    "init_std": 0.1,
    "tie_embeddings": True,
}
# Like gpt-oss and Qwen3-Next: attention sinks in layers with and without a window, gates of both forms, all biases of
# attention.
SINKS_AND_GATES: dict[str, Any] = {
    "attention_sinks": True,
    "qkv_bias": True,
    "out_bias": True,
    "layers": ["local", "elementwise", "per_head"],
    "kinds": {
        "local": {"window": 5},
        "elementwise": {"output_gate": "elementwise"},
        "per_head": {"output_gate": "per_head"},
    },
}
# Windows that are, under cp 2 and cp 4, shorter than a chunk, as long as a chunk or as the part of a rank, and longer
# than both. A part has two chunks of 8 tokens under cp 2, and two of 4 tokens under cp 4.
WINDOWS: dict[str, Any] = {
    "layers": ["short", "chunk", "part", "long"],
    "kinds": {
        "short": {"window": 3},
        "chunk": {"window": 8, "attention_sinks": True},
        "part": {"window": 16},
        "long": {"window": 21, "attention_sinks": True},
    },
    "init_std": 0.1,
}
# A model that is wider and deeper than its base model. The exponent 0.5 scales learning rates too.
COMPLETEP: dict[str, Any] = {
    "bias": True,
    "parametrization": {
        **{"name": "completep", "base_d_model": 8, "base_head_dim": 2},
        **{"base_n_layers": 2, "depth_exponent": 0.5},
    },
}
MODELS = {
    "llama": LLAMA,
    "tied": TIED,
    "gpt": GPT,
    "post_norm": POST,
    "bert": BERT,
    "t5": T5,
    "bart": BART,
    "encoder_decoder": ENCODER_DECODER,
    "bounded": BOUNDED,
    "gemma": GEMMA,
    "olmo": OLMO,
    "phi": PHI,
    "neox": NEOX,
    "bloom": BLOOM,
    "moe": MOE,
    "six_experts": SIX_EXPERTS,
    "deepseek": DEEPSEEK,
    "sinks_and_gates": SINKS_AND_GATES,
    "windows": WINDOWS,
    "completep": COMPLETEP,
}
# The objective of each architecture in the tests. A decoder predicts the next token.
OBJECTIVE_OF_ARCHITECTURE: dict[str, dict[str, Any]] = {
    "encoder": {"name": "masked"},
    "encoder_decoder": {"name": "span"},
    "decoder": {},
}


@dataclass(frozen=True, kw_only=True)
class Layout:
    """A parallel layout, the model that it trains, and further config sections.

    `parallel` has the keys of the config section. `model` is a key of MODELS. `micro_batch` is the number of sequences
    in a microbatch, or 0 for all sequences of a data-parallel rank. `sections` has further config sections.
    """

    ranks: int
    parallel: dict[str, Any] = field(default_factory=dict)
    model: str = "llama"
    micro_batch: int = 0
    sections: dict[str, Any] = field(default_factory=dict)

    @property
    def num_parallel_axes(self) -> int:
        """The number of mesh axes larger than 1."""
        return sum(self.parallel.get(axis, 1) > 1 for axis in AXES)

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in {**self.parallel, **self.sections}.items()]
        return f"{self.ranks} ranks, {' '.join(settings)}, {self.model}"

    @property
    def name(self) -> str:
        """A short name such as `pp2_tp2_schedule-zbv_tied`."""
        axes = [f"{axis}{size}" for axis in AXES if (size := self.parallel.get(axis, 1)) > 1]
        options = [f"{key.removeprefix('pp_')}-{value}" for key, value in self.parallel.items() if key not in AXES]
        objective = self.sections.get("objective", {})
        objectives = [objective["name"]] if "name" in objective else list(objective)
        data_options = [
            name
            for name, key in (("documents", "document_mask"), ("prompt_weights", "prompt_loss_weight"))
            if key in self.sections.get("data", {})
        ]
        microbatches = [f"micro{self.micro_batch}"] if self.micro_batch else []
        return "_".join((*axes, *options, *microbatches, *objectives, *data_options, self.model))


def index_by_name(*layouts: Layout) -> dict[str, Layout]:
    """Return the layouts by their names, which must differ."""
    named = {layout.name: layout for layout in layouts}
    assert len(named) == len(layouts), "two layouts have the same name"
    return named


def _layout(*, ranks: int, model: str = "llama", micro_batch: int = 0, **parallel: Any) -> Layout:
    """Return a layout whose section `parallel` has the keys `parallel`."""
    return Layout(ranks=ranks, parallel=parallel, model=model, micro_batch=micro_batch)


LAYOUTS = index_by_name(
    # Two ranks: one mesh axis, with each of its options
    _layout(ranks=2, dp_replicate=2),
    _layout(ranks=2, model="tied", micro_batch=4, dp_replicate=2),
    _layout(ranks=2, model="gpt", dp_shard=2),
    _layout(ranks=2, micro_batch=4, dp_shard=2, reshard="always"),
    _layout(ranks=2, model="tied", micro_batch=4, dp_shard=2, reshard="never"),
    _layout(ranks=2, micro_batch=4, dp_shard=2, reduce_each_microbatch=True),
    _layout(ranks=2, dp_shard=2, cpu_offload=True),
    _layout(ranks=2, tp=2),
    _layout(ranks=2, model="tied", micro_batch=8, tp=2, sequence_parallel=False),
    _layout(ranks=2, model="gpt", micro_batch=3, tp=2),  # the token slice of a rank contains one and a half sequences
    _layout(ranks=2, model="gpt", tp=2, sequence_parallel=False),
    _layout(ranks=2, model="post_norm", tp=2),
    _layout(ranks=2, model="tied", micro_batch=8, cp=2),
    _layout(ranks=2, model="gpt", cp=2),
    _layout(ranks=2, micro_batch=6, pp=2),
    _layout(ranks=2, model="tied", micro_batch=6, pp=2, pp_split="count"),
    _layout(ranks=2, model="gpt", micro_batch=6, pp=2, pp_schedule="gpipe"),
    _layout(ranks=2, model="tied", micro_batch=6, pp=2, pp_schedule="interleaved_1f1b"),
    _layout(ranks=2, micro_batch=6, pp=2, pp_schedule="interleaved_zero_bubble"),
    _layout(ranks=2, model="tied", micro_batch=6, pp=2, pp_schedule="zbv"),
    # Three ranks: no dimension of the model is divisible by 3
    _layout(ranks=3, model="tied", dp_shard=3),
    _layout(ranks=3, micro_batch=4, dp_replicate=3),
    # Four ranks: pairs of mesh axes
    _layout(ranks=4, model="tied", micro_batch=2, dp_shard=4),
    _layout(ranks=4, dp_replicate=2, dp_shard=2),
    _layout(ranks=4, model="tied", micro_batch=4, dp_shard=2, tp=2, cpu_offload=True),
    _layout(ranks=4, model="gpt", dp_shard=2, tp=2, sequence_parallel=False),
    _layout(ranks=4, dp_replicate=2, tp=2),
    _layout(ranks=4, model="gpt", tp=4),
    _layout(ranks=4, model="tied", cp=4),
    _layout(ranks=4, micro_batch=8, cp=2, tp=2),
    _layout(ranks=4, model="tied", cp=2, tp=2, sequence_parallel=False),
    _layout(ranks=4, micro_batch=4, dp_shard=2, cp=2),
    _layout(ranks=4, model="gpt", dp_replicate=2, cp=2),
    _layout(ranks=4, model="gpt", micro_batch=6, pp=4),
    _layout(ranks=4, model="tied", micro_batch=6, pp=2, tp=2),
    _layout(ranks=4, micro_batch=6, pp=2, cp=2),
    _layout(ranks=4, model="tied", micro_batch=3, pp=2, dp_shard=2),
    _layout(ranks=4, model="gpt", micro_batch=3, pp=2, dp_replicate=2),
    _layout(ranks=4, model="tied", micro_batch=3, pp=2, dp_shard=2, pp_schedule="zbv"),
    _layout(ranks=4, micro_batch=6, pp=2, tp=2, pp_schedule="interleaved_zero_bubble"),
    _layout(ranks=4, model="tied", micro_batch=6, pp=2, cp=2, pp_schedule="interleaved_1f1b"),
    # Eight ranks: three mesh axes, or two of which one is 4
    _layout(ranks=8, model="tied", micro_batch=2, dp_replicate=2, dp_shard=2, tp=2),
    _layout(ranks=8, dp_replicate=2, dp_shard=2, cp=2),
    _layout(ranks=8, model="gpt", micro_batch=4, dp_shard=2, cp=2, tp=2),
    _layout(ranks=8, model="tied", dp_shard=2, cp=2, tp=2, sequence_parallel=False),
    _layout(ranks=8, dp_replicate=2, cp=2, tp=2),
    _layout(ranks=8, model="tied", micro_batch=3, pp=2, dp_shard=2, tp=2),
    _layout(ranks=8, model="gpt", micro_batch=3, pp=2, dp_replicate=2, tp=2),
    _layout(ranks=8, model="tied", micro_batch=6, pp=2, cp=2, tp=2),
    _layout(ranks=8, micro_batch=6, pp=2, cp=2, tp=2, sequence_parallel=False),
    _layout(ranks=8, model="tied", micro_batch=3, pp=2, dp_shard=2, cp=2),
    _layout(ranks=8, micro_batch=3, pp=2, dp_replicate=2, dp_shard=2),
    _layout(ranks=8, model="tied", micro_batch=3, pp=2, dp_shard=2, tp=2, pp_schedule="zbv"),
    _layout(ranks=8, micro_batch=3, pp=2, dp_shard=2, tp=2, pp_schedule="interleaved_1f1b"),
    _layout(ranks=8, micro_batch=3, pp=2, dp_shard=2, cp=2, pp_schedule="interleaved_zero_bubble"),
    _layout(ranks=8, model="gpt", micro_batch=2, dp_shard=4, tp=2),
    _layout(ranks=8, model="tied", dp_shard=2, tp=4),
    _layout(ranks=8, micro_batch=6, pp=4, tp=2),
)

# Config sections of objectives other than causal, and of a document mask.
PREFIX = {"objective": {"name": "prefix"}}
UL2 = {
    "objective": {
        "mixture": [
            {"name": "span", "mode": "R"},
            {"name": "span", "mode": "X", "noise_density": 0.5, "mean_span": 8.0},
            {"name": "prefix", "mode": "S", "weight": 2.0},
        ]
    },
}
DOCUMENTS = {"data": {"document_mask": True}}
# A power of two, so that the sum of the weights is the same in any order.
PROMPT_WEIGHTS = {"data": {"prompt_loss_weight": 0.25}}


def _with_sections(layout: Layout, **sections: Any) -> Layout:
    """Return the layout with these further config sections."""
    return replace(layout, sections=sections)


def _layouts_of_layer_model(model: str) -> list[Layout]:
    """Return each axis, each schedule and three axes together, for a model with other layers than those of Llama."""
    schedules = ("1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
    return [
        _layout(ranks=2, model=model, micro_batch=4, dp_shard=2),
        _layout(ranks=4, model=model, micro_batch=3, dp_replicate=2, dp_shard=2),
        _layout(ranks=2, model=model, micro_batch=3, tp=2),
        _layout(ranks=2, model=model, tp=2, sequence_parallel=False),
        _with_sections(_layout(ranks=2, model=model, tp=2), **DOCUMENTS),
        _with_sections(_layout(ranks=2, model=model, cp=2), **DOCUMENTS),
        _with_sections(_layout(ranks=2, model=model, cp=2), **PREFIX),
        *(_layout(ranks=2, model=model, micro_batch=6, pp=2, pp_schedule=schedule) for schedule in schedules),
        _with_sections(_layout(ranks=8, model=model, micro_batch=4, dp_shard=2, cp=2, tp=2), **DOCUMENTS),
        _with_sections(_layout(ranks=8, model=model, micro_batch=6, pp=2, cp=2, tp=2), **DOCUMENTS),
        _layout(ranks=8, model=model, micro_batch=3, pp=2, dp_shard=2, tp=2, pp_schedule="zbv"),
    ]


def _layouts_with_experts(model: str) -> list[Layout]:
    """Return expert-parallel degrees on each axis, with each schedule, and with three axes together."""
    schedules = ("1f1b", "gpipe", "interleaved_1f1b", "interleaved_zero_bubble", "zbv")
    return [
        _layout(ranks=2, model=model, dp_replicate=2),
        _layout(ranks=2, model=model, micro_batch=4, dp_shard=2),
        _layout(ranks=2, model=model, micro_batch=4, dp_shard=2, ep=2),
        _layout(ranks=3, model=model, dp_shard=3),
        _layout(ranks=2, model=model, tp=2),
        _layout(ranks=2, model=model, tp=2, sequence_parallel=False),
        _layout(ranks=2, model=model, micro_batch=3, tp=2, ep=2),
        _layout(ranks=2, model=model, tp=2, ep=2, sequence_parallel=False),
        _with_sections(_layout(ranks=2, model=model, cp=2), **DOCUMENTS),
        _with_sections(_layout(ranks=2, model=model, cp=2, ep=2), **PREFIX),
        *(_layout(ranks=2, model=model, micro_batch=6, pp=2, pp_schedule=schedule) for schedule in schedules),
        _layout(ranks=4, model=model, micro_batch=3, dp_replicate=2, dp_shard=2, ep=2),
        _layout(ranks=4, model=model, micro_batch=3, dp_shard=4, ep=2, reshard="always"),
        _layout(ranks=4, model=model, dp_shard=4, ep=4, reshard="never"),
        _layout(ranks=4, model=model, dp_shard=4, ep=2, reduce_each_microbatch=True),
        _layout(ranks=2, model=model, micro_batch=4, dp_shard=2, ep=2, ep_dispatch="padded"),
        _layout(ranks=4, model=model, micro_batch=3, dp_shard=2, tp=2, ep=4, ep_dispatch="padded"),
        _layout(ranks=4, model=model, dp_shard=2, tp=2, ep=4, cpu_offload=True),
        *(
            _layout(ranks=4, model=model, micro_batch=3, pp=2, dp_shard=2, ep=2, pp_schedule=schedule)
            for schedule in schedules
        ),
        _layout(ranks=8, model=model, micro_batch=3, dp_shard=8, ep=8),
        _layout(ranks=8, model=model, micro_batch=2, dp_shard=2, cp=2, tp=2, ep=8),
        _layout(ranks=8, model=model, micro_batch=2, dp_replicate=2, dp_shard=2, tp=2, ep=4, sequence_parallel=False),
        _layout(ranks=8, model=model, micro_batch=3, pp=2, dp_shard=2, tp=2, ep=2, pp_schedule="interleaved_1f1b"),
        _layout(ranks=8, model=model, micro_batch=3, pp=2, dp_shard=2, cp=2, ep=4, pp_schedule="zbv"),
    ]


ARCHITECTURE_LAYOUTS = index_by_name(
    # encoders
    _layout(ranks=2, model="bert", micro_batch=4, dp_shard=2),
    _layout(ranks=2, model="bert", dp_replicate=2),
    _layout(ranks=2, model="bert", micro_batch=3, tp=2),
    _layout(ranks=2, model="bert", tp=2, sequence_parallel=False),
    _layout(ranks=2, model="bert", cp=2),
    _layout(ranks=2, model="bert", micro_batch=6, pp=2),
    _layout(ranks=4, model="bert", micro_batch=4, dp_shard=2, tp=2),
    _with_sections(_layout(ranks=4, model="bert", cp=2, tp=2), **DOCUMENTS),
    _layout(ranks=4, model="bert", micro_batch=3, pp=2, dp_shard=2),
    # encoder-decoders
    _layout(ranks=2, model="t5", micro_batch=4, dp_shard=2),
    _layout(ranks=2, model="t5", micro_batch=3, tp=2),
    _layout(ranks=2, model="t5", tp=2, sequence_parallel=False),
    _layout(ranks=2, model="bart", micro_batch=4, dp_shard=2),
    _layout(ranks=2, model="bart", tp=2),
    _with_sections(_layout(ranks=2, model="bart", micro_batch=6, pp=2), **PREFIX),
    _layout(ranks=2, model="encoder_decoder", micro_batch=6, pp=2, pp_schedule="gpipe"),
    _layout(ranks=2, model="bart", micro_batch=6, pp=2, pp_schedule="interleaved_1f1b"),
    _with_sections(_layout(ranks=2, model="encoder_decoder", micro_batch=4, dp_shard=2), **DOCUMENTS),
    _layout(ranks=4, model="t5", micro_batch=4, dp_shard=2, tp=2),
    _with_sections(_layout(ranks=4, model="bart", dp_replicate=2, dp_shard=2), **PREFIX),
    _layout(ranks=4, model="encoder_decoder", micro_batch=6, pp=2, tp=2),
    _layout(ranks=4, model="bart", micro_batch=3, pp=2, dp_shard=2),
    # decoders with prefix, document and mixed masks
    _with_sections(_layout(ranks=2, micro_batch=4, dp_shard=2), **PREFIX),
    _with_sections(_layout(ranks=2, cp=2), **PREFIX),
    _with_sections(_layout(ranks=2, model="tied", cp=2), **DOCUMENTS),
    _with_sections(_layout(ranks=2, micro_batch=6, pp=2), **UL2),
    _with_sections(_layout(ranks=2, model="gpt", tp=2), **DOCUMENTS, **UL2),
    _with_sections(_layout(ranks=4, model="tied", cp=2, tp=2), **DOCUMENTS, **PREFIX),
    # layers of several kinds, other norm placements, parallel sublayers
    *(
        layout
        for model in ("gemma", "olmo", "phi", "neox", "bloom", "sinks_and_gates")
        for layout in _layouts_of_layer_model(model)
    ),
    # mixtures of experts, with the experts of a layer on one rank or spread over ranks
    *(layout for model in ("moe", "deepseek") for layout in _layouts_with_experts(model)),
    _layout(ranks=3, model="six_experts", micro_batch=4, dp_shard=3, ep=3),
    # bounded logits and stochastic depth
    _layout(ranks=2, model="bounded", micro_batch=4, dp_shard=2),
    _layout(ranks=2, model="bounded", micro_batch=3, tp=2),
    _layout(ranks=2, model="bounded", tp=2, sequence_parallel=False),
    _layout(ranks=2, model="bounded", cp=2),
    _layout(ranks=2, model="bounded", micro_batch=6, pp=2),
)

# Layouts for tests that are too slow for all of LAYOUTS, such as tests of compilation and recomputation.
COMPILED_LAYOUTS = index_by_name(
    _layout(ranks=2, micro_batch=4, dp_shard=2),
    _layout(ranks=2, model="tied", dp_replicate=2),
    _layout(ranks=2, model="tied", tp=2),
    _layout(ranks=2, model="gpt", tp=2, sequence_parallel=False),
    _layout(ranks=2, cp=2),
    _layout(ranks=2, model="tied", micro_batch=6, pp=2),
    _layout(ranks=2, micro_batch=6, pp=2, pp_schedule="interleaved_1f1b"),
    _layout(ranks=4, model="tied", micro_batch=4, dp_shard=2, tp=2),
    _layout(ranks=4, model="tied", dp_shard=2, cp=2),
    _layout(ranks=4, micro_batch=6, pp=2, tp=2),
    _layout(ranks=8, model="tied", micro_batch=4, dp_shard=2, cp=2, tp=2),
    _layout(ranks=8, model="tied", micro_batch=3, pp=2, dp_shard=2, tp=2),
)

SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.0}
CLIPPED_SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.05}
# The large eps keeps AdamW from turning a gradient that is only rounding errors into a full step.
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip": 0.05, "eps": 1e-5}
MUON = ADAMW | {"name": "muon", "lr": 1e-2}
BF16_MOMENTS = ADAMW | {"moments": "bf16"}
