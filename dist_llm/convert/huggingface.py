"""Hugging Face's config.json -> our `model` section, for the families in `keys`."""

from collections.abc import Mapping
from typing import Any

from dist_llm.config.schema import ModelConfig
from dist_llm.errors import CheckpointError

ACTIVATIONS = {"gelu": "gelu", "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "relu": "relu"}


def model_config(theirs: Mapping[str, Any]) -> ModelConfig:
    """The resolved model that a Hugging Face config describes.

    Raises CheckpointError for a family that we have no table for, or a setting that we do not have.
    """
    family = str(theirs.get("model_type"))
    if family not in READERS:
        raise CheckpointError(f"config.json: model_type {family} is not supported; choose from {', '.join(READERS)}")
    return ModelConfig(**READERS[family](theirs), vocab_size=theirs["vocab_size"], vocab_multiple=1)


def _gpt2(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_sizes(c["n_embd"], c["n_layer"], c["n_head"], c.get("n_inner") or 4 * c["n_embd"]),
        **LAYER_NORMED,
        "max_seq_len": c["n_positions"],
        "norm_eps": c["layer_norm_epsilon"],
        "activation": _activation(c["activation_function"]),
        "tie_embeddings": c.get("tie_word_embeddings", True),
    }


def _llama(c: Mapping[str, Any]) -> dict[str, Any]:
    rope = c.get("rope_parameters") or {}
    if (kind := rope.get("rope_type", "default")) != "default":
        raise CheckpointError(f"config.json: rope_type {kind} is not supported, only default")
    sizes = _sizes(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"])
    return {
        **sizes,
        "n_kv_heads": c["num_key_value_heads"],
        "head_dim": c.get("head_dim") or sizes["head_dim"],
        "max_seq_len": c["max_position_embeddings"],
        "rope_theta": float(rope.get("rope_theta", c.get("rope_theta", 10_000.0))),
        "norm_eps": c["rms_norm_eps"],
        "tie_embeddings": c.get("tie_word_embeddings", False),
        "qk_norm": c["model_type"] == "qwen3",
    }


def _bert(c: Mapping[str, Any]) -> dict[str, Any]:
    return {
        **_sizes(c["hidden_size"], c["num_hidden_layers"], c["num_attention_heads"], c["intermediate_size"]),
        **LAYER_NORMED,
        "architecture": "encoder",
        "norm_order": "post",
        "norm_embedding": True,
        "head": "mlm",
        "max_seq_len": c["max_position_embeddings"],
        "norm_eps": c["layer_norm_eps"],
        "activation": _activation(c["hidden_act"]),
        "tie_embeddings": True,
    }


def _t5(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("feed_forward_proj") != "gated-gelu":
        raise CheckpointError("config.json: of T5 only v1.1 is supported (feed_forward_proj gated-gelu)")
    return {
        **_sizes(c["d_model"], c["num_decoder_layers"], c["num_heads"], c["d_ff"]),
        "architecture": "encoder_decoder",
        "n_encoder_layers": c["num_layers"],
        "head_dim": c["d_kv"],
        "max_seq_len": c.get("n_positions", 512),
        "positions": "relative",
        "relative_buckets": c["relative_attention_num_buckets"],
        "relative_distance": c["relative_attention_max_distance"],
        "attention_scale": 1.0,
        "norm_eps": c["layer_norm_epsilon"],
        "activation": "geglu_tanh",
        "tie_embeddings": False,
    }


def _bart(c: Mapping[str, Any]) -> dict[str, Any]:
    if c.get("scale_embedding"):
        raise CheckpointError("config.json: scale_embedding is not supported")
    return {
        **_sizes(c["d_model"], c["decoder_layers"], c["decoder_attention_heads"], c["decoder_ffn_dim"]),
        **LAYER_NORMED,
        "architecture": "encoder_decoder",
        "n_encoder_layers": c["encoder_layers"],
        "norm_order": "post",
        "norm_embedding": True,
        "max_seq_len": c["max_position_embeddings"],
        "activation": _activation(c["activation_function"]),
        "tie_embeddings": True,
    }


LAYER_NORMED = {"positions": "learned", "norm": "layernorm", "bias": True}
READERS = {"gpt2": _gpt2, "llama": _llama, "mistral": _llama, "qwen3": _llama, "bert": _bert, "t5": _t5, "bart": _bart}


def _sizes(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> dict[str, Any]:
    return {
        "d_model": d_model,
        "n_layers": n_layers,
        "n_heads": n_heads,
        "n_kv_heads": n_heads,
        "head_dim": d_model // n_heads,
        "d_ff": d_ff,
    }


def _activation(name: str) -> str:
    if name not in ACTIVATIONS:
        raise CheckpointError(f"config.json: activation {name} is not supported; choose from {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]
