"""Layouts, models and optimizers on which the law is tested."""

from dataclasses import dataclass, field, replace
from typing import Any

AXES = ("pp", "dp_replicate", "dp_shard", "cp", "tp")
LLAMA: dict[str, Any] = {}  # rope, rmsnorm, swiglu, GQA, untied: the defaults of law.MODEL
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
MODELS = {
    "llama": LLAMA,
    "tied": TIED,
    "gpt": GPT,
    "post": POST,
    "bert": BERT,
    "t5": T5,
    "bart": BART,
    "two": ENCODER_DECODER,
    "bounded": BOUNDED,
}
# The default objective of each architecture; the decoder's default is next tokens.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "encoder": {"name": "masked"},
    "encoder_decoder": {"name": "span"},
    "decoder": {},
}


@dataclass(frozen=True)
class Layout:
    """`parallel` keys on `ranks` ranks; `micro`: rows of a microbatch where the layout needs several microbatches."""

    ranks: int
    parallel: dict[str, Any]
    model: str = "llama"
    micro: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> int:
        """Return the number of mesh dimensions larger than 1."""
        return sum(self.parallel.get(axis, 1) > 1 for axis in AXES)

    def __str__(self) -> str:
        settings = [f"{name}={value}" for name, value in {**self.parallel, **self.extra}.items()]
        return f"{self.ranks} ranks, {' '.join(settings)}, {self.model}"

    @property
    def name(self) -> str:
        """Return a short name such as `pp2_tp2_schedule-zbv_tied`."""
        axes = [f"{axis}{size}" for axis in AXES if (size := self.parallel.get(axis, 1)) > 1]
        options = [f"{key.removeprefix('pp_')}-{value}" for key, value in self.parallel.items() if key not in AXES]
        objective = self.extra.get("objective", {})
        objectives = [objective["name"]] if "name" in objective else list(objective)
        masks = ["documents"] if "data" in self.extra else []
        micro = [f"micro{self.micro}"] if self.micro else []
        return "_".join((*axes, *options, *micro, *objectives, *masks, self.model))


def by_name(*layouts: Layout) -> dict[str, Layout]:
    """Return the layouts by their names, which must differ."""
    named = {layout.name: layout for layout in layouts}
    assert len(named) == len(layouts), "two layouts have the same name"
    return named


def _layout(ranks: int, model: str = "llama", micro: int = 0, **parallel: Any) -> Layout:
    return Layout(ranks, parallel, model, micro)


LAYOUTS = by_name(
    # two ranks: each axis alone, with each of its options
    _layout(2, dp_replicate=2),
    _layout(2, "tied", micro=4, dp_replicate=2),
    _layout(2, "gpt", dp_shard=2),
    _layout(2, micro=4, dp_shard=2, reshard="always"),
    _layout(2, "tied", micro=4, dp_shard=2, reshard="never"),
    _layout(2, micro=4, dp_shard=2, reduce_each_microbatch=True),
    _layout(2, dp_shard=2, cpu_offload=True),
    _layout(2, tp=2),
    _layout(2, "tied", micro=8, tp=2, sequence_parallel=False),
    _layout(2, "gpt", micro=3, tp=2),  # a rank holds one and a half sequences
    _layout(2, "gpt", tp=2, sequence_parallel=False),
    _layout(2, "post", tp=2),
    _layout(2, "tied", micro=8, cp=2),
    _layout(2, "gpt", cp=2),
    _layout(2, micro=6, pp=2),
    _layout(2, "tied", micro=6, pp=2, pp_split="count"),
    _layout(2, "gpt", micro=6, pp=2, pp_schedule="gpipe"),
    _layout(2, "tied", micro=6, pp=2, pp_schedule="interleaved_1f1b"),
    _layout(2, micro=6, pp=2, pp_schedule="interleaved_zero_bubble"),
    _layout(2, "tied", micro=6, pp=2, pp_schedule="zbv"),
    # three: nothing divides evenly
    _layout(3, "tied", dp_shard=3),
    _layout(3, micro=4, dp_replicate=3),
    # four: pairs of axes
    _layout(4, "tied", micro=2, dp_shard=4),
    _layout(4, dp_replicate=2, dp_shard=2),
    _layout(4, "tied", micro=4, dp_shard=2, tp=2, cpu_offload=True),
    _layout(4, "gpt", dp_shard=2, tp=2, sequence_parallel=False),
    _layout(4, dp_replicate=2, tp=2),
    _layout(4, "gpt", tp=4),
    _layout(4, "tied", cp=4),
    _layout(4, micro=8, cp=2, tp=2),
    _layout(4, "tied", cp=2, tp=2, sequence_parallel=False),
    _layout(4, micro=4, dp_shard=2, cp=2),
    _layout(4, "gpt", dp_replicate=2, cp=2),
    _layout(4, "gpt", micro=6, pp=4),
    _layout(4, "tied", micro=6, pp=2, tp=2),
    _layout(4, micro=6, pp=2, cp=2),
    _layout(4, "tied", micro=3, pp=2, dp_shard=2),
    _layout(4, "gpt", micro=3, pp=2, dp_replicate=2),
    _layout(4, "tied", micro=3, pp=2, dp_shard=2, pp_schedule="zbv"),
    _layout(4, micro=6, pp=2, tp=2, pp_schedule="interleaved_zero_bubble"),
    _layout(4, "tied", micro=6, pp=2, cp=2, pp_schedule="interleaved_1f1b"),
    # eight: triples, and pairs with a wide axis
    _layout(8, "tied", micro=2, dp_replicate=2, dp_shard=2, tp=2),
    _layout(8, dp_replicate=2, dp_shard=2, cp=2),
    _layout(8, "gpt", micro=4, dp_shard=2, cp=2, tp=2),
    _layout(8, "tied", dp_shard=2, cp=2, tp=2, sequence_parallel=False),
    _layout(8, dp_replicate=2, cp=2, tp=2),
    _layout(8, "tied", micro=3, pp=2, dp_shard=2, tp=2),
    _layout(8, "gpt", micro=3, pp=2, dp_replicate=2, tp=2),
    _layout(8, "tied", micro=6, pp=2, cp=2, tp=2),
    _layout(8, micro=6, pp=2, cp=2, tp=2, sequence_parallel=False),
    _layout(8, "tied", micro=3, pp=2, dp_shard=2, cp=2),
    _layout(8, micro=3, pp=2, dp_replicate=2, dp_shard=2),
    _layout(8, "tied", micro=3, pp=2, dp_shard=2, tp=2, pp_schedule="zbv"),
    _layout(8, micro=3, pp=2, dp_shard=2, tp=2, pp_schedule="interleaved_1f1b"),
    _layout(8, micro=3, pp=2, dp_shard=2, cp=2, pp_schedule="interleaved_zero_bubble"),
    _layout(8, "gpt", micro=2, dp_shard=4, tp=2),
    _layout(8, "tied", dp_shard=2, tp=4),
    _layout(8, micro=6, pp=4, tp=2),
)

# Other architectures and objectives.
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


def _with_extra(layout: Layout, **extra: Any) -> Layout:
    return replace(layout, extra=extra)


ARCHITECTURE_LAYOUTS = by_name(
    # encoders
    _layout(2, "bert", micro=4, dp_shard=2),
    _layout(2, "bert", dp_replicate=2),
    _layout(2, "bert", micro=3, tp=2),
    _layout(2, "bert", tp=2, sequence_parallel=False),
    _layout(2, "bert", cp=2),
    _layout(2, "bert", micro=6, pp=2),
    _layout(4, "bert", micro=4, dp_shard=2, tp=2),
    _with_extra(_layout(4, "bert", cp=2, tp=2), **DOCUMENTS),
    _layout(4, "bert", micro=3, pp=2, dp_shard=2),
    # encoder-decoders
    _layout(2, "t5", micro=4, dp_shard=2),
    _layout(2, "t5", micro=3, tp=2),
    _layout(2, "t5", tp=2, sequence_parallel=False),
    _layout(2, "bart", micro=4, dp_shard=2),
    _layout(2, "bart", tp=2),
    _with_extra(_layout(2, "bart", micro=6, pp=2), **PREFIX),
    _layout(2, "two", micro=6, pp=2, pp_schedule="gpipe"),
    _layout(2, "bart", micro=6, pp=2, pp_schedule="interleaved_1f1b"),
    _with_extra(_layout(2, "two", micro=4, dp_shard=2), **DOCUMENTS),
    _layout(4, "t5", micro=4, dp_shard=2, tp=2),
    _with_extra(_layout(4, "bart", dp_replicate=2, dp_shard=2), **PREFIX),
    _layout(4, "two", micro=6, pp=2, tp=2),
    _layout(4, "bart", micro=3, pp=2, dp_shard=2),
    # decoders with prefix, document and mixed masks
    _with_extra(_layout(2, micro=4, dp_shard=2), **PREFIX),
    _with_extra(_layout(2, cp=2), **PREFIX),
    _with_extra(_layout(2, "tied", cp=2), **DOCUMENTS),
    _with_extra(_layout(2, micro=6, pp=2), **UL2),
    _with_extra(_layout(2, "gpt", tp=2), **DOCUMENTS, **UL2),
    _with_extra(_layout(4, "tied", cp=2, tp=2), **DOCUMENTS, **PREFIX),
    # bounded logits and stochastic depth
    _layout(2, "bounded", micro=4, dp_shard=2),
    _layout(2, "bounded", micro=3, tp=2),
    _layout(2, "bounded", tp=2, sequence_parallel=False),
    _layout(2, "bounded", cp=2),
    _layout(2, "bounded", micro=6, pp=2),
)

# Twelve layouts for tests of compilation and recomputation.
COMPILED_LAYOUTS = by_name(
    _layout(2, micro=4, dp_shard=2),
    _layout(2, "tied", dp_replicate=2),
    _layout(2, "tied", tp=2),
    _layout(2, "gpt", tp=2, sequence_parallel=False),
    _layout(2, cp=2),
    _layout(2, "tied", micro=6, pp=2),
    _layout(2, micro=6, pp=2, pp_schedule="interleaved_1f1b"),
    _layout(4, "tied", micro=4, dp_shard=2, tp=2),
    _layout(4, "tied", dp_shard=2, cp=2),
    _layout(4, micro=6, pp=2, tp=2),
    _layout(8, "tied", micro=4, dp_shard=2, cp=2, tp=2),
    _layout(8, "tied", micro=3, pp=2, dp_shard=2, tp=2),
)

SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.0}
CLIPPED_SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.05}
# A large eps: a gradient may be pure rounding, and AdamW would turn its sign into a full step.
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip": 0.05, "eps": 1e-5}
MUON = ADAMW | {"name": "muon", "lr": 1e-2}
BF16_MOMENTS = ADAMW | {"moments": "bf16"}
