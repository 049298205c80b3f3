"""List the supported families of Hugging Face models, with what a model of each family must and can have."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_codecs import FreeKeys
from dist_llm.convert.hf_config import CLASSES, FREE_KEYS, SHARED_KEYS
from dist_llm.convert.hf_families import DECODER_FAMILIES

SIZE_KEYS = {
    *("d_model", "n_layers", "n_encoder_layers", "n_heads", "n_kv_heads", "head_dim", "d_ff", "max_seq_len"),
    "norm_eps",
}
# Keys that `describe_settings` leaves out, because nearly all families have the same choice.
COMMON_KEYS = SIZE_KEYS | {
    *("activation", "rope_theta", "rope_scaling", "kinds.rope_scaling", "relative_buckets", "relative_distance"),
    "tie_embeddings",
    *(f"feedforward.{key}" for key in ("n_experts", "top_k", "d_expert", "normalize_weights", "top_groups")),
}
# (key, shared value) or key -> what a model with it has.
SETTINGS: dict[tuple[str, Any] | str, str] = {
    ("architecture", "encoder"): "encoder",
    ("architecture", "encoder_decoder"): "encoder-decoder",
    ("positions", "learned"): "learned positions",
    ("positions", "relative"): "relative positions",
    ("positions", "alibi"): "ALiBi",
    "rotary_fraction": "partial rotation",
    "window": "windows",
    "kinds.window": "windows by layer",
    "kinds.rope_theta": "frequencies by layer",
    "kinds.positions": "layers without rotation",
    ("norm", "layernorm"): "LayerNorm",
    ("norm_weight", "plus_one"): "norms with 1 + weight",
    ("norm_weight", "none"): "norms without weights",
    ("norm_bias", True): "biases of norms",
    ("norm_order", "post"): "norms after residual sums",
    ("norm_order", "sandwich"): "norms before and after sublayers",
    ("norm_order", "reordered"): "norms after sublayers",
    ("norm_embedding", True): "norm of the embeddings",
    ("qk_norm", True): "norms of queries and keys by head",
    ("qk_norm", "all"): "norms of queries and keys over all heads",
    ("parallel_residual", "one_norm"): "parallel sublayers",
    "parallel_residual": "parallel sublayers",
    ("bias", True): "biases",
    ("qkv_bias", True): "biases of queries, keys and values",
    **dict.fromkeys(("bias", "qkv_bias", "out_bias", "feedforward_bias"), "optional biases"),
    ("head_bias", True): "bias of the logits",
    ("head", "mlm"): "masked-LM head",
    ("attention_scale", 1.0): "unscaled scores",
    "attention_scale": "scaled scores",
    "attention_cap": "capped scores",
    "logit_cap": "capped logits",
    "embedding_scale": "scaled embeddings",
    "residual_scale": "scaled residuals",
    "logit_scale": "scaled logits",
    ("feedforward.name", "moe"): "experts",
    ("feedforward.score", "sigmoid"): "sigmoid scores of experts",
    ("feedforward.selection_bias", True): "biases for the choice of experts",
    "feedforward.n_groups": "groups of experts",
    "feedforward.n_shared_experts": "shared experts",
    "feedforward.weight_scale": "scaled outputs of experts",
    ("feedforward.router_bias", True): "biases of routers",
    "kinds.feedforward": "dense layers",
    ("attention_sinks", True): "attention sinks",
    ("feedforward_bias", True): "biases of experts",
    "qk_norm": "optional norms of queries and keys by head",
}


@dataclass(frozen=True)
class FamilySummary:
    """A family. A key of `model` that is neither shared nor free has its default value."""

    model_type: str
    hf_class: str
    shared_keys: Mapping[str, Any]  # the value that a key has in all models of the family
    free_keys: FreeKeys


def list_families() -> list[FamilySummary]:
    """Return the families in the order in which an export tries them."""
    families = []
    for name, hf_class in CLASSES.items():
        family = DECODER_FAMILIES.get(name)
        shared_keys = dict(SHARED_KEYS[name] if family is None else family.shared_keys)
        free_keys = FREE_KEYS[name] if family is None else family.free_keys
        # A size without a field of its own is derived, and an epsilon without a field is the default.
        fixed = {"n_kv_heads": None, "head_dim": None, "norm_eps": ModelConfig.model_fields["norm_eps"].default}
        shared_keys |= {key: value for key, value in fixed.items() if key not in free_keys}
        free_keys = {key: values for key, values in free_keys.items() if key not in shared_keys}
        families.append(FamilySummary(name, hf_class, shared_keys, free_keys))
    return families


def describe_settings(family: FamilySummary) -> str:
    """Describe what a model of the family has or can have, beside what all families have."""
    names = [
        SETTINGS[(key, value) if (key, value) in SETTINGS else key]
        for key, value in family.shared_keys.items()
        if key not in COMMON_KEYS and (key, value) != ("feedforward.score", "softmax")
    ]
    names += [SETTINGS[key] for key in family.free_keys if key not in COMMON_KEYS]
    return ", ".join(dict.fromkeys(names))
