"""The layouts that the law is held on, and the settings it crosses them with."""

from dataclasses import dataclass, field
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
MODELS = {"llama": LLAMA, "tied": TIED, "gpt": GPT, "post": POST}


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
    _at(2, "gpt", micro=8, tp=2),
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
    _at(4, "tied", micro=4, dp_shard=2, tp=2),
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
