"""Codecs that only some families of Hugging Face decoders need."""

import math
from collections.abc import Callable
from typing import Any, ClassVar

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import resolve_attention_scale
from dist_llm.convert.hf_codecs import (
    ANY_VALUE,
    FreeKeys,
    LayerTypesField,
    build_kinds,
)
from dist_llm.convert.hf_config_fields import ConfigFields


class QueryPreAttnScalar:
    """`query_pre_attn_scalar`: attention scores are divided by the square root of this field (Gemma)."""

    free_keys: ClassVar[FreeKeys] = {"attention_scale": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        return {"attention_scale": fields["query_pre_attn_scalar"] ** -0.5}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scalar = resolve_attention_scale(model) ** -2
        return {"query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar}


class AttentionMultiplier:
    """`attention_multiplier`: attention scores are multiplied by this field (Granite)."""

    free_keys: ClassVar[FreeKeys] = {"attention_scale": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        return {"attention_scale": float(fields.get("attention_multiplier", 1.0))}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"attention_multiplier": resolve_attention_scale(model)}


def invert_scale(scale: float) -> float:
    """Return 1 / scale, without the rounding errors that two inversions would add."""
    return float(f"{1 / scale:.12g}")


class AttentionBias:
    """`attention_bias` adds biases to all four projections of attention."""

    free_keys: ClassVar[FreeKeys] = {"qkv_bias": ANY_VALUE, "out_bias": ANY_VALUE}

    def __init__(self, default: bool = False) -> None:
        self.default = default

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        bias = bool(fields.get("attention_bias", self.default))
        return {"qkv_bias": bias, "out_bias": bias}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"attention_bias": model.qkv_bias or model.bias}


def read_qwen_types(fields: ConfigFields) -> list[str]:
    """Without layer_types: the layers from max_window_layers on have windows, if use_sliding_window is set."""
    num_layers, first = fields["num_hidden_layers"], fields.get("max_window_layers", 28)
    has_windows = fields.get("use_sliding_window", False)
    return ["sliding_attention" if has_windows and layer >= first else "full_attention" for layer in range(num_layers)]


class QwenLayerWindows:
    """The windows of Qwen, which need use_sliding_window."""

    types = LayerTypesField(read_qwen_types)
    free_keys = types.free_keys

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        keys = self.types.read(fields)
        return keys if fields.get("use_sliding_window", False) else {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        fields = self.types.write(model)
        has_windows = fields["sliding_window"] is not None
        first = fields["layer_types"].index("sliding_attention") if has_windows else model.n_layers
        return {**fields, "use_sliding_window": has_windows, "max_window_layers": first}


def full_attention_every(period: int) -> Callable[[ConfigFields], list[str]]:
    """Return a function that returns the type of each layer: every `period`-th layer has full attention.

    The field sliding_window_pattern of a config.json replaces `period`.
    """

    def read_types(fields: ConfigFields) -> list[str]:
        patterns = [fields.get(f"{prefix}sliding_window_pattern") for prefix in ("", "_")]
        actual_period = next(filter(None, patterns), period)
        numbers = range(1, fields["num_hidden_layers"] + 1)
        return ["full_attention" if number % actual_period == 0 else "sliding_attention" for number in numbers]

    return read_types


def _read_rotation_flags(fields: ConfigFields) -> list[int]:
    """Return 1 for each layer with rotation and 0 for each without."""
    num_layers, interval = fields["num_hidden_layers"], fields.get("no_rope_layer_interval", 4)
    return list(fields.get("no_rope_layers") or [int((layer + 1) % interval != 0) for layer in range(num_layers)])


def read_smollm3_types(fields: ConfigFields) -> list[str]:
    """Without layer_types: layers without rotation have windows, if use_sliding_window and sliding_window are set."""
    has_windows = fields.get("use_sliding_window", False) and fields.get("sliding_window")
    return [
        "full_attention" if rotates or not has_windows else "sliding_attention"
        for rotates in _read_rotation_flags(fields)
    ]


class SmolLM3Layers:
    """Layers without rotation (no_rope_layers: 0), and windows."""

    types = LayerTypesField(read_smollm3_types)
    free_keys: ClassVar[FreeKeys] = {**types.free_keys, "kinds.positions": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        types, type_overrides = self.types.read_types_and_overrides(fields)
        names, overrides = [], {}
        for layer_type, rotates in zip(types, _read_rotation_flags(fields), strict=True):
            name = layer_type if rotates else layer_type.replace("_attention", "_unrotated_attention")
            names.append(name)
            overrides[name] = type_overrides[layer_type] | ({} if rotates else {"positions": "none"})
        return build_kinds(names, overrides)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        fields = self.types.write(model)
        layers = [model.layer_config(layer) for layer in range(model.n_layers)]
        return {
            **fields,
            "no_rope_layers": [int(layer.positions == "rope") for layer in layers],
            "no_rope_layer_interval": 4,
            "use_sliding_window": fields["sliding_window"] is not None,
        }


class ParallelResidual:
    """`use_parallel_residual`: the value of our key parallel_residual if it is true."""

    def __init__(self, value: str, default: bool) -> None:
        self.value, self.default = value, default
        self.free_keys: FreeKeys = {"parallel_residual": ("off", value)}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        return {"parallel_residual": self.value if fields.get("use_parallel_residual", self.default) else "off"}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"use_parallel_residual": model.parallel_residual != "off"}


class BloomSizes:
    """The sizes of BLOOM. Its positions have no limit; ours record seq_length, the length of the training."""

    free_keys: ClassVar[FreeKeys] = {
        **dict.fromkeys(("d_model", "n_layers", "n_heads", "max_seq_len"), ANY_VALUE),
        "d_ff": ANY_VALUE,
    }

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        d_model, n_heads = fields["hidden_size"], fields.get("n_head") or fields["num_attention_heads"]
        fields.get("num_attention_heads")
        fields.get("slow_but_exact")  # another order of the same sums
        return {
            "d_model": d_model,
            "n_layers": fields.get("n_layer") or fields["num_hidden_layers"],
            "n_heads": n_heads,
            "n_kv_heads": n_heads,
            "head_dim": d_model // n_heads,
            "d_ff": 4 * d_model,
            "max_seq_len": fields.get("seq_length", 2048),
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "hidden_size": model.d_model,
            "n_layer": model.n_layers,
            "n_head": model.n_heads,
            "seq_length": model.max_seq_len,
        }


class FalconLayout:
    """The options of Falcon: key-value heads, norms and biases. The variants with ALiBi are not supported."""

    free_keys: ClassVar[FreeKeys] = {
        "n_kv_heads": ANY_VALUE,
        "parallel_residual": ("one_norm", "two_norms"),
        **dict.fromkeys(("qkv_bias", "out_bias", "feedforward_bias"), ANY_VALUE),
    }

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        fields.require(alibi=False, parallel_attn=True)
        is_new, n_heads = fields.get("new_decoder_architecture", False), fields["num_attention_heads"]
        if not is_new:
            fields.require(multi_query=True)
        fields.get("multi_query")
        fields.get("num_kv_heads")  # only used in the new architecture
        num_norms = fields.get("num_ln_in_parallel_attn") or (2 if is_new else 1)
        bias = bool(fields.get("bias", False))
        return {
            "n_kv_heads": (fields.get("num_kv_heads") or n_heads) if is_new else 1,
            "parallel_residual": "two_norms" if is_new and num_norms == 2 else "one_norm",
            **dict.fromkeys(("qkv_bias", "out_bias", "feedforward_bias"), bias),
        }

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {
            "alibi": False,
            "parallel_attn": True,
            "new_decoder_architecture": True,
            "multi_query": False,
            "num_kv_heads": model.n_kv_heads,
            "num_ln_in_parallel_attn": 2 if model.parallel_residual == "two_norms" else 1,
            "bias": model.out_bias or model.bias,
        }
