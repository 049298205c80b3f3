"""The layouts that the law is held on, and the settings it crosses them with."""

from dataclasses import dataclass, field, replace
from typing import Any

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
# BERT: sees all, a norm on its embeddings, post-norm, a dense layer and a bias before the logits.
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
# T5 v1.1: relative positions, gated GELU, unscaled scores, an untied head.
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
# BART: learned positions of each stack, post-norm, everything tied.
BART: dict[str, Any] = {
    **{key: value for key, value in BERT.items() if key != "head"},
    "architecture": "encoder_decoder",
    "n_layers": 2,
}
TWO_STACKS: dict[str, Any] = {"architecture": "encoder_decoder", "n_layers": 2, "n_encoder_layers": 3}
# What keeps logits and depth in bounds, in one model.
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
    "two": TWO_STACKS,
    "bounded": BOUNDED,
}
# What each architecture learns from; a decoder: next tokens, or what a test says.
OBJECTIVES: dict[str, dict[str, Any]] = {
    "encoder": {"name": "masked"},
    "encoder_decoder": {"name": "span"},
    "decoder": {},
}


@dataclass(frozen=True)
class Layout:
    """`parallel` keys on `ranks` ranks; `micro`: rows of a microbatch where the layout needs several."""

    ranks: int
    parallel: dict[str, Any]
    model: str = "llama"
    micro: int = 0
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def axes(self) -> int:
        return sum(self.parallel.get(axis, 1) > 1 for axis in ("pp", "dp_replicate", "dp_shard", "cp", "tp"))

    def __str__(self) -> str:
        words = [f"{name}={value}" for name, value in {**self.parallel, **self.extra}.items()]
        return f"{self.ranks} ranks, {' '.join(words)}, {self.model}"


def _at(ranks: int, model: str = "llama", micro: int = 0, **parallel: Any) -> Layout:
    return Layout(ranks, parallel, model, micro)


LAYOUTS = [
    # two ranks: each axis alone, and each of its options
    _at(2, dp_replicate=2),
    _at(2, "tied", micro=4, dp_replicate=2),
    _at(2, "gpt", dp_shard=2),
    _at(2, micro=4, dp_shard=2, reshard="always"),
    _at(2, "tied", micro=4, dp_shard=2, reshard="never"),
    _at(2, micro=4, dp_shard=2, reduce_each_microbatch=True),
    _at(2, dp_shard=2, cpu_offload=True),
    _at(2, tp=2),
    _at(2, "tied", micro=8, tp=2, sequence_parallel=False),
    _at(2, "gpt", micro=3, tp=2),  # a rank's share of the tokens: a sequence and a half
    _at(2, "gpt", tp=2, sequence_parallel=False),
    _at(2, "post", tp=2),
    _at(2, "tied", micro=8, cp=2),
    _at(2, "gpt", cp=2),
    _at(2, micro=6, pp=2),
    _at(2, "tied", micro=6, pp=2, pp_split="count"),
    _at(2, "gpt", micro=6, pp=2, pp_schedule="gpipe"),
    _at(2, "tied", micro=6, pp=2, pp_schedule="interleaved_1f1b"),
    _at(2, micro=6, pp=2, pp_schedule="interleaved_zero_bubble"),
    _at(2, "tied", micro=6, pp=2, pp_schedule="zbv"),
    # three: nothing divides evenly
    _at(3, "tied", dp_shard=3),
    _at(3, micro=4, dp_replicate=3),
    # four: pairs of axes
    _at(4, "tied", micro=2, dp_shard=4),
    _at(4, dp_replicate=2, dp_shard=2),
    _at(4, "tied", micro=4, dp_shard=2, tp=2, cpu_offload=True),
    _at(4, "gpt", dp_shard=2, tp=2, sequence_parallel=False),
    _at(4, dp_replicate=2, tp=2),
    _at(4, "gpt", tp=4),
    _at(4, "tied", cp=4),
    _at(4, micro=8, cp=2, tp=2),
    _at(4, "tied", cp=2, tp=2, sequence_parallel=False),
    _at(4, micro=4, dp_shard=2, cp=2),
    _at(4, "gpt", dp_replicate=2, cp=2),
    _at(4, "gpt", micro=6, pp=4),
    _at(4, "tied", micro=6, pp=2, tp=2),
    _at(4, micro=6, pp=2, cp=2),
    _at(4, "tied", micro=3, pp=2, dp_shard=2),
    _at(4, "gpt", micro=3, pp=2, dp_replicate=2),
    _at(4, "tied", micro=3, pp=2, dp_shard=2, pp_schedule="zbv"),
    _at(4, micro=6, pp=2, tp=2, pp_schedule="interleaved_zero_bubble"),
    _at(4, "tied", micro=6, pp=2, cp=2, pp_schedule="interleaved_1f1b"),
    # eight: triples, and pairs with a wide axis
    _at(8, "tied", micro=2, dp_replicate=2, dp_shard=2, tp=2),
    _at(8, dp_replicate=2, dp_shard=2, cp=2),
    _at(8, "gpt", micro=4, dp_shard=2, cp=2, tp=2),
    _at(8, "tied", dp_shard=2, cp=2, tp=2, sequence_parallel=False),
    _at(8, dp_replicate=2, cp=2, tp=2),
    _at(8, "tied", micro=3, pp=2, dp_shard=2, tp=2),
    _at(8, "gpt", micro=3, pp=2, dp_replicate=2, tp=2),
    _at(8, "tied", micro=6, pp=2, cp=2, tp=2),
    _at(8, micro=6, pp=2, cp=2, tp=2, sequence_parallel=False),
    _at(8, "tied", micro=3, pp=2, dp_shard=2, cp=2),
    _at(8, micro=3, pp=2, dp_replicate=2, dp_shard=2),
    _at(8, "tied", micro=3, pp=2, dp_shard=2, tp=2, pp_schedule="zbv"),
    _at(8, micro=3, pp=2, dp_shard=2, tp=2, pp_schedule="interleaved_1f1b"),
    _at(8, micro=3, pp=2, dp_shard=2, cp=2, pp_schedule="interleaved_zero_bubble"),
    _at(8, "gpt", micro=2, dp_shard=4, tp=2),
    _at(8, "tied", dp_shard=2, tp=4),
    _at(8, micro=6, pp=4, tp=2),
]

# Other architectures and objectives: `objective` and `documents` are keys of `extra`.
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


def _also(layout: Layout, **extra: Any) -> Layout:
    return replace(layout, extra=extra)


FAMILIES = [
    # encoders
    _at(2, "bert", micro=4, dp_shard=2),
    _at(2, "bert", dp_replicate=2),
    _at(2, "bert", micro=3, tp=2),
    _at(2, "bert", tp=2, sequence_parallel=False),
    _at(2, "bert", cp=2),
    _at(2, "bert", micro=6, pp=2),
    _at(4, "bert", micro=4, dp_shard=2, tp=2),
    _also(_at(4, "bert", cp=2, tp=2), **DOCUMENTS),
    _at(4, "bert", micro=3, pp=2, dp_shard=2),
    # encoder-decoders
    _at(2, "t5", micro=4, dp_shard=2),
    _at(2, "t5", micro=3, tp=2),
    _at(2, "t5", tp=2, sequence_parallel=False),
    _at(2, "bart", micro=4, dp_shard=2),
    _at(2, "bart", tp=2),
    _also(_at(2, "bart", micro=6, pp=2), **PREFIX),
    _at(2, "two", micro=6, pp=2, pp_schedule="gpipe"),
    _at(2, "bart", micro=6, pp=2, pp_schedule="interleaved_1f1b"),
    _also(_at(2, "two", micro=4, dp_shard=2), **DOCUMENTS),
    _at(4, "t5", micro=4, dp_shard=2, tp=2),
    _also(_at(4, "bart", dp_replicate=2, dp_shard=2), **PREFIX),
    _at(4, "two", micro=6, pp=2, tp=2),
    _at(4, "bart", micro=3, pp=2, dp_shard=2),
    # decoders that see more, or less
    _also(_at(2, micro=4, dp_shard=2), **PREFIX),
    _also(_at(2, cp=2), **PREFIX),
    _also(_at(2, "tied", cp=2), **DOCUMENTS),
    _also(_at(2, micro=6, pp=2), **UL2),
    _also(_at(2, "gpt", tp=2), **DOCUMENTS, **UL2),
    _also(_at(4, "tied", cp=2, tp=2), **DOCUMENTS, **PREFIX),
    # bounded logits, and depth that samples skip
    _at(2, "bounded", micro=4, dp_shard=2),
    _at(2, "bounded", micro=3, tp=2),
    _at(2, "bounded", tp=2, sequence_parallel=False),
    _at(2, "bounded", cp=2),
    _at(2, "bounded", micro=6, pp=2),
]

# The dozen on which compilation and recomputation are crossed with the layout.
CHOSEN = [
    _at(2, micro=4, dp_shard=2),
    _at(2, "tied", dp_replicate=2),
    _at(2, "tied", tp=2),
    _at(2, "gpt", tp=2, sequence_parallel=False),
    _at(2, cp=2),
    _at(2, "tied", micro=6, pp=2),
    _at(2, micro=6, pp=2, pp_schedule="interleaved_1f1b"),
    _at(4, "tied", micro=4, dp_shard=2, tp=2),
    _at(4, "tied", dp_shard=2, cp=2),
    _at(4, micro=6, pp=2, tp=2),
    _at(8, "tied", micro=4, dp_shard=2, cp=2, tp=2),
    _at(8, "tied", micro=3, pp=2, dp_shard=2, tp=2),
]

SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.0}
CLIPPED_SGD = {"name": "sgd", "lr": 1.0, "weight_decay": 0.0, "clip": 0.05}
# A large eps: where a gradient is rounding, AdamW would turn its sign into a whole step.
ADAMW = {"name": "adamw", "lr": 1e-3, "weight_decay": 0.1, "clip": 0.05, "eps": 1e-5}
MUON = ADAMW | {"name": "muon", "lr": 1e-2}
BF16_MOMENTS = ADAMW | {"moments": "bf16"}
