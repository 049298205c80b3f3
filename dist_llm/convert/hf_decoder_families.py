"""The families of Hugging Face decoders without experts, one table for each."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from dist_llm.config.derive import count_rotated_dims
from dist_llm.config.model_section import ModelConfig
from dist_llm.config.parametrization import resolve_attention_scale
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.convert.hf_family import (
    ANY_VALUE,
    UNGATED,
    Activation,
    Constant,
    Derived,
    Family,
    FreeKeys,
    LayerTypes,
    ModuleName,
    Part,
    Rope,
    Sizes,
    Value,
    build_kinds,
)
from dist_llm.convert.hf_rope import RopeFormat

# Rows of fused and of otherwise ordered tensors.


def _attention_rows(model: ModelConfig) -> dict[str, int]:
    """Return the number of rows of queries, keys and values."""
    num_keys = model.n_kv_heads * model.head_dim
    return {"q": model.n_heads * model.head_dim, "k": num_keys, "v": num_keys}


def _stacked(name: str) -> Callable[[ModelConfig], Sequence[int]]:
    """Queries, then keys, then values (Phi-3)."""

    def rows(model: ModelConfig) -> Sequence[int]:
        sizes = _attention_rows(model)
        names = list(sizes)
        start = sum(sizes[before] for before in names[: names.index(name)])
        return range(start, start + sizes[name])

    return rows


def _gate_up(index: int) -> Callable[[ModelConfig], Sequence[int]]:
    """The gate, then the up projection."""
    return lambda model: range(index * model.d_ff, (index + 1) * model.d_ff)


def _by_group(name: str) -> Callable[[ModelConfig], Sequence[int]]:
    """For each key-value head: its query heads, its key, its value (Falcon; GPT-NeoX with one query head each)."""

    def rows(model: ModelConfig) -> Sequence[int]:
        queries = model.n_heads // model.n_kv_heads
        heads = {"q": range(queries), "k": [queries], "v": [queries + 1]}[name]
        return [
            (group * (queries + 2) + head) * model.head_dim + element
            for group in range(model.n_kv_heads)
            for head in heads
            for element in range(model.head_dim)
        ]

    return rows


def _paired(name: str) -> Callable[[ModelConfig], Sequence[int]]:
    """Rotated dimensions in the pairs (2i, 2i + 1) instead of (i, i + F) (Cohere, GLM)."""

    def rows(model: ModelConfig) -> Sequence[int]:
        num_rotated = count_rotated_dims(model)
        order = [*range(0, num_rotated, 2), *range(1, num_rotated, 2), *range(num_rotated, model.head_dim)]
        num_heads = _attention_rows(model)[name] // model.head_dim
        return [head * model.head_dim + element for head in range(num_heads) for element in order]

    return rows


# Names of modules.
OTHER_NAMES: dict[str, ModuleName] = {
    "embed.tokens": "model.embed_tokens",
    "head.norm": "model.norm",
    "head.out": "lm_head",
}
ATTENTION_NAMES: dict[str, ModuleName] = {
    "attention.q": "self_attn.q_proj",
    "attention.k": "self_attn.k_proj",
    "attention.v": "self_attn.v_proj",
    "attention.out": "self_attn.o_proj",
    "attention.norm_q": "self_attn.q_norm",
    "attention.norm_k": "self_attn.k_norm",
}
FEEDFORWARD_NAMES: dict[str, ModuleName] = {
    "feedforward.gate": "mlp.gate_proj",
    "feedforward.up": "mlp.up_proj",
    "feedforward.down": "mlp.down_proj",
}
FUSED_GATE_UP: dict[str, ModuleName] = {
    "feedforward.gate": Part("mlp.gate_up_proj", _gate_up(0)),
    "feedforward.up": Part("mlp.gate_up_proj", _gate_up(1)),
    "feedforward.down": "mlp.down_proj",
}
PAIRED_ATTENTION_NAMES = ATTENTION_NAMES | {
    "attention.q": Part("self_attn.q_proj", _paired("q")),
    "attention.k": Part("self_attn.k_proj", _paired("k")),
}
PRE_NORMS: dict[str, ModuleName] = {
    "norm_attention": "input_layernorm",
    "norm_feedforward": "post_attention_layernorm",
}
SANDWICH_NORMS: dict[str, ModuleName] = {
    "norm_attention": "input_layernorm",
    "norm_attention_out": "post_attention_layernorm",
    "norm_feedforward": "pre_feedforward_layernorm",
    "norm_feedforward_out": "post_feedforward_layernorm",
}
REORDERED_NORMS: dict[str, ModuleName] = {
    "norm_attention": "post_attention_layernorm",
    "norm_feedforward": "post_feedforward_layernorm",
}
RMS_EPS = Value("rms_norm_eps", "norm_eps", 1e-6)
RMS_EPS_1E5, RMS_EPS_GLM = replace(RMS_EPS, default=1e-5), replace(RMS_EPS, default=1.5625e-07)
LAYER_NORM_EPS = Value("layer_norm_eps", "norm_eps", 1e-5)
NO_BIAS = Constant("attention_bias", False)
LLAMA_SIZES, LLAMA_ACTIVATION, LLAMA_ROPE = Sizes(), Activation(), Rope()
HALF_ROTATED = Rope(RopeFormat(fraction=0.5))


def make_family(
    hf_class: str,
    *codecs: Any,
    names: Mapping[str, ModuleName] = {},
    sizes: Any = LLAMA_SIZES,
    activation: Any = LLAMA_ACTIVATION,
    rope: Any = LLAMA_ROPE,
    other_names: Mapping[str, ModuleName] = OTHER_NAMES,
    prefix: str = "model.layers.{}.",
    tied: bool = False,
    **keys: Any,
) -> Family:
    """Describe a family by its differences from Llama."""
    return Family(
        hf_class,
        keys,
        [sizes, activation, rope, *codecs],
        prefix,
        {**PRE_NORMS, **ATTENTION_NAMES, **FEEDFORWARD_NAMES, **names},
        other_names,
        tied,
    )


class _QueryScale:
    """`query_pre_attn_scalar`: the scores are divided by its square root."""

    free_keys: ClassVar[FreeKeys] = {"attention_scale": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        return {"attention_scale": fields["query_pre_attn_scalar"] ** -0.5}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        scalar = resolve_attention_scale(model) ** -2
        return {"query_pre_attn_scalar": round(scalar) if math.isclose(scalar, round(scalar)) else scalar}


class AttentionMultiplier:
    """`attention_multiplier`: factor of the scores."""

    free_keys: ClassVar[FreeKeys] = {"attention_scale": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        return {"attention_scale": float(fields.get("attention_multiplier", 1.0))}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"attention_multiplier": resolve_attention_scale(model)}


def _invert(scale: float) -> float:
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


def _qwen_types(fields: ConfigFields) -> list[str]:
    """Without layer_types: the layers from max_window_layers on have windows, if use_sliding_window is set."""
    num_layers, first = fields["num_hidden_layers"], fields.get("max_window_layers", 28)
    has_windows = fields.get("use_sliding_window", False)
    return ["sliding_attention" if has_windows and i >= first else "full_attention" for i in range(num_layers)]


class _QwenWindows:
    """The windows of Qwen, which need use_sliding_window."""

    types = LayerTypes(_qwen_types)
    free_keys = types.free_keys

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        keys = self.types.read(fields)
        return keys if fields.get("use_sliding_window", False) else {}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        fields = self.types.write(model)
        has_windows = fields["sliding_window"] is not None
        first = fields["layer_types"].index("sliding_attention") if has_windows else model.n_layers
        return {**fields, "use_sliding_window": has_windows, "max_window_layers": first}


def full_each(period: int) -> Callable[[ConfigFields], list[str]]:
    """Each layer whose number is a multiple of `period`, counted from 1, attends to all tokens."""

    def read_types(fields: ConfigFields) -> list[str]:
        patterns = [fields.get(f"{prefix}sliding_window_pattern") for prefix in ("", "_")]
        actual = next(filter(None, patterns), period)
        numbers = range(1, fields["num_hidden_layers"] + 1)
        return ["full_attention" if number % actual == 0 else "sliding_attention" for number in numbers]

    return read_types


def _read_rotates(fields: ConfigFields) -> list[int]:
    """Return 1 for each layer with rotation and 0 for each without."""
    num_layers, interval = fields["num_hidden_layers"], fields.get("no_rope_layer_interval", 4)
    return list(fields.get("no_rope_layers") or [int((i + 1) % interval != 0) for i in range(num_layers)])


def _smollm3_types(fields: ConfigFields) -> list[str]:
    """Without layer_types: layers without rotation have windows, if use_sliding_window and sliding_window are set."""
    has_windows = fields.get("use_sliding_window", False) and fields.get("sliding_window")
    return [
        "full_attention" if rotates or not has_windows else "sliding_attention" for rotates in _read_rotates(fields)
    ]


class _SmolLM3Layers:
    """Layers without rotation (no_rope_layers: 0), and windows."""

    types = LayerTypes(_smollm3_types)
    free_keys: ClassVar[FreeKeys] = {**types.free_keys, "kinds.positions": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        types, type_overrides = self.types.read_types_and_overrides(fields)
        names, overrides = [], {}
        for layer_type, rotates in zip(types, _read_rotates(fields), strict=True):
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


class _ParallelResidual:
    """`use_parallel_residual`: the value of our key parallel_residual if it is true."""

    def __init__(self, value: str, default: bool) -> None:
        self.value, self.default = value, default
        self.free_keys: FreeKeys = {"parallel_residual": ("off", value)}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        return {"parallel_residual": self.value if fields.get("use_parallel_residual", self.default) else "off"}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"use_parallel_residual": model.parallel_residual != "off"}


class _BloomSizes:
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


class _FalconLayout:
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


LAYER_NORM: dict[str, Any] = {"norm": "layernorm", "norm_bias": True}
GEMMA: dict[str, Any] = {"norm_weight": "plus_one"}
GEMMA_SCALE = Derived("embedding_scale", lambda fields: float(fields["hidden_size"]) ** 0.5, "sqrt(d_model)")
GEMMA2_CAPS = (
    Value("attn_logit_softcapping", "attention_cap", 50.0),
    Value("final_logit_softcapping", "logit_cap", 30.0),
)
GEMMA3_CAPS = tuple(replace(cap, default=None) for cap in GEMMA2_CAPS)
HIDDEN_ACTIVATION = Activation("hidden_activation")
GRANITE_MULTIPLIERS = (
    Value("embedding_multiplier", "embedding_scale", 1.0),
    Value("residual_multiplier", "residual_scale", 1.0),
    AttentionMultiplier(),
    Value("logits_scaling", "logit_scale", 1.0, to_native=lambda scale: 1 / scale, to_hf=_invert),
)

DENSE_FAMILIES: dict[str, Family] = {
    "llama": make_family("LlamaForCausalLM", RMS_EPS, AttentionBias(), Value("mlp_bias", "feedforward_bias", False)),
    "mistral": make_family(
        "MistralForCausalLM", RMS_EPS, Value("sliding_window", "window", 4096), sizes=Sizes(default_kv_heads=8)
    ),
    "qwen2": make_family("Qwen2ForCausalLM", RMS_EPS, _QwenWindows(), qkv_bias=True, sizes=Sizes(default_kv_heads=32)),
    "qwen3": make_family(
        "Qwen3ForCausalLM",
        RMS_EPS,
        AttentionBias(),
        _QwenWindows(),
        qk_norm=True,
        sizes=Sizes(default_kv_heads=32, default_head_dim=128),
    ),
    "gemma": make_family(
        "GemmaForCausalLM",
        RMS_EPS,
        NO_BIAS,
        GEMMA_SCALE,
        tied=True,
        **GEMMA,
        sizes=Sizes(default_kv_heads=16, default_head_dim=256),
    ),
    "gemma2": make_family(
        "Gemma2ForCausalLM",
        *(RMS_EPS, NO_BIAS, GEMMA_SCALE, _QueryScale(), *GEMMA2_CAPS, LayerTypes(full_each(2))),
        names=SANDWICH_NORMS,
        activation=HIDDEN_ACTIVATION,
        tied=True,
        norm_order="sandwich",
        **GEMMA,
        sizes=Sizes(default_kv_heads=4, default_head_dim=256),
    ),
    "gemma3_text": make_family(
        "Gemma3ForCausalLM",
        *(RMS_EPS, NO_BIAS, GEMMA_SCALE, _QueryScale(), *GEMMA3_CAPS),
        names=SANDWICH_NORMS,
        activation=HIDDEN_ACTIVATION,
        rope=LayerTypes(full_each(6), RopeFormat(theta=1_000_000.0, sliding_theta=10_000.0)),
        tied=True,
        norm_order="sandwich",
        qk_norm=True,
        **GEMMA,
        sizes=Sizes(default_kv_heads=4, default_head_dim=256),
    ),
    "olmo": make_family(
        "OlmoForCausalLM",
        *(NO_BIAS, Constant("clip_qkv", None)),
        norm="layernorm",
        norm_weight="none",
    ),
    "olmo2": make_family(
        "Olmo2ForCausalLM", RMS_EPS_1E5, NO_BIAS, names=REORDERED_NORMS, norm_order="reordered", qk_norm="all"
    ),
    "olmo3": make_family(
        "Olmo3ForCausalLM",
        *(RMS_EPS_1E5, NO_BIAS),
        names=REORDERED_NORMS,
        rope=LayerTypes(full_each(4), RopeFormat(theta=500_000.0, sliding_theta=500_000.0)),
        norm_order="reordered",
        qk_norm="all",
    ),
    "smollm3": make_family(
        "SmolLM3ForCausalLM",
        *(RMS_EPS, AttentionBias(), Value("mlp_bias", "feedforward_bias", False), _SmolLM3Layers()),
        rope=Rope(RopeFormat(theta=2_000_000.0)),
        tied=True,
        sizes=Sizes(default_kv_heads=4),
    ),
    "granite": make_family(
        "GraniteForCausalLM",
        *(RMS_EPS, AttentionBias(), Value("mlp_bias", "feedforward_bias", False)),
        *GRANITE_MULTIPLIERS,
    ),
    "glm": make_family(
        "GlmForCausalLM",
        *(RMS_EPS_GLM, Value("attention_bias", "qkv_bias", True)),
        names={**PAIRED_ATTENTION_NAMES, **FUSED_GATE_UP},
        rope=HALF_ROTATED,
        sizes=Sizes(default_kv_heads=2, default_head_dim=128),
    ),
    "glm4": make_family(
        "Glm4ForCausalLM",
        *(RMS_EPS_GLM, Value("attention_bias", "qkv_bias", True)),
        names={
            **PAIRED_ATTENTION_NAMES,
            **FUSED_GATE_UP,
            "norm_attention_out": "post_self_attn_layernorm",
            "norm_feedforward_out": "post_mlp_layernorm",
        },
        rope=HALF_ROTATED,
        norm_order="sandwich",
        sizes=Sizes(default_kv_heads=2, default_head_dim=128),
    ),
    "phi": make_family(
        "PhiForCausalLM",
        *(LAYER_NORM_EPS, Constant("qk_layernorm", False)),
        names={
            "attention.out": "self_attn.dense",
            "feedforward.up": "mlp.fc1",
            "feedforward.down": "mlp.fc2",
        },
        other_names={**OTHER_NAMES, "head.norm": "model.final_layernorm"},
        sizes=Sizes(has_head_dim=False),
        activation=Activation(names=UNGATED),
        rope=HALF_ROTATED,
        bias=True,
        norm="layernorm",
        parallel_residual="one_norm",
        head_bias=True,
    ),
    "phi3": make_family(
        "Phi3ForCausalLM",
        *(RMS_EPS_1E5, Value("sliding_window", "window", None)),
        names={
            **{f"attention.{name}": Part("self_attn.qkv_proj", _stacked(name)) for name in "qkv"},
            **FUSED_GATE_UP,
        },
        sizes=Sizes(has_head_dim=False),
        rope=Rope(RopeFormat(fraction=1.0)),
    ),
    "gpt_neox": make_family(
        "GPTNeoXForCausalLM",
        *(LAYER_NORM_EPS, Constant("attention_bias", True), _ParallelResidual("two_norms", True)),
        names={
            **{f"attention.{name}": Part("attention.query_key_value", _by_group(name)) for name in "qkv"},
            "attention.out": "attention.dense",
            "feedforward.up": "mlp.dense_h_to_4h",
            "feedforward.down": "mlp.dense_4h_to_h",
        },
        other_names={
            "embed.tokens": "gpt_neox.embed_in",
            "head.norm": "gpt_neox.final_layer_norm",
            "head.out": "embed_out",
        },
        prefix="gpt_neox.layers.{}.",
        sizes=Sizes(n_kv_heads=None, has_head_dim=False),
        activation=Activation(names=UNGATED),
        rope=Rope(RopeFormat(fraction=0.25, theta_field="rotary_emb_base")),
        bias=True,
        norm="layernorm",
    ),
    "falcon": make_family(
        "FalconForCausalLM",
        *(Value("layer_norm_epsilon", "norm_eps", 1e-5), _FalconLayout()),
        names={
            **{f"attention.{name}": Part("self_attention.query_key_value", _by_group(name)) for name in "qkv"},
            "attention.out": "self_attention.dense",
            "feedforward.up": "mlp.dense_h_to_4h",
            "feedforward.down": "mlp.dense_4h_to_h",
            "norm_attention": lambda model: "ln_attn" if model.parallel_residual == "two_norms" else "input_layernorm",
            "norm_feedforward": "ln_mlp",
        },
        other_names={
            "embed.tokens": "transformer.word_embeddings",
            "head.norm": "transformer.ln_f",
            "head.out": "lm_head",
        },
        prefix="transformer.h.{}.",
        sizes=Sizes(d_ff="ffn_hidden_size", n_kv_heads=None, has_head_dim=False, d_ff_factor=4),
        activation=Activation("activation", UNGATED),
        tied=True,
        **LAYER_NORM,
    ),
    "cohere": make_family(
        "CohereForCausalLM",
        *(
            LAYER_NORM_EPS,
            AttentionBias(),
            Constant("use_qk_norm", False),
            Value("logit_scale", "logit_scale", 0.0625),
        ),
        names=PAIRED_ATTENTION_NAMES,
        sizes=Sizes(has_head_dim=False),
        rope=Rope(RopeFormat(theta=500_000.0)),
        norm="layernorm",
        parallel_residual="one_norm",
        tied=True,
    ),
    "cohere2": make_family(
        "Cohere2ForCausalLM",
        *(LAYER_NORM_EPS, AttentionBias(), Value("logit_scale", "logit_scale", 0.0625)),
        LayerTypes(full_each(4), unrotated=True),
        names=PAIRED_ATTENTION_NAMES,
        norm="layernorm",
        parallel_residual="one_norm",
        tied=True,
    ),
    "nemotron": make_family(
        "NemotronForCausalLM",
        *(Value("norm_eps", "norm_eps", 1e-5), AttentionBias(), Value("mlp_bias", "feedforward_bias", False)),
        activation=Activation(names=UNGATED),
        rope=HALF_ROTATED,
        norm_weight="plus_one",
        **LAYER_NORM,
    ),
    "stablelm": make_family(
        "StableLmForCausalLM",
        *(LAYER_NORM_EPS, Value("use_qkv_bias", "qkv_bias", False), Constant("qk_layernorm", False)),
        _ParallelResidual("one_norm", False),
        sizes=Sizes(default_kv_heads=32, has_head_dim=False),
        rope=Rope(RopeFormat(fraction=0.25)),
        **LAYER_NORM,
    ),
    "starcoder2": make_family(
        "Starcoder2ForCausalLM",
        *(Value("norm_epsilon", "norm_eps", 1e-5), Value("use_bias", "bias", True)),
        Value("sliding_window", "window", None),
        names={"feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj"},
        sizes=Sizes(default_kv_heads=2, has_head_dim=False),
        activation=Activation(names=UNGATED),
        tied=True,
        **LAYER_NORM,
    ),
    "opt": make_family(
        "OPTForCausalLM",
        Constant("do_layer_norm_before", True),
        Constant("enable_bias", True),
        Constant("layer_norm_elementwise_affine", True),
        Constant("_remove_final_layer_norm", False),
        Value("word_embed_proj_dim", "d_model"),
        names={
            "norm_attention": "self_attn_layer_norm",
            "norm_feedforward": "final_layer_norm",
            "attention.out": "self_attn.out_proj",
            "feedforward.up": "fc1",
            "feedforward.down": "fc2",
        },
        other_names={
            "embed.tokens": "model.decoder.embed_tokens",
            "embed.positions": Part("model.decoder.embed_positions", skip=2),
            "head.norm": "model.decoder.final_layer_norm",
            "head.out": "lm_head",
        },
        prefix="model.decoder.layers.{}.",
        sizes=Sizes(d_ff="ffn_dim", n_kv_heads=None, has_head_dim=False),
        activation=Activation("activation_function", UNGATED),
        rope=Derived("positions", lambda fields: "learned", "learned"),
        tied=True,
        bias=True,
        norm="layernorm",
    ),
    "bloom": make_family(
        "BloomForCausalLM",
        *(Value("layer_norm_epsilon", "norm_eps", 1e-5), Constant("apply_residual_connection_post_layernorm", False)),
        names={
            **{f"attention.{name}": Part("self_attention.query_key_value", _by_group(name)) for name in "qkv"},
            "attention.out": "self_attention.dense",
            "feedforward.up": "mlp.dense_h_to_4h",
            "feedforward.down": "mlp.dense_4h_to_h",
        },
        other_names={
            "embed.tokens": "transformer.word_embeddings",
            "embed.norm": "transformer.word_embeddings_layernorm",
            "head.norm": "transformer.ln_f",
            "head.out": "lm_head",
        },
        prefix="transformer.h.{}.",
        sizes=_BloomSizes(),
        activation=Derived("activation", lambda fields: "gelu_tanh", "gelu_tanh"),
        rope=Derived("positions", lambda fields: "alibi", "alibi"),
        tied=True,
        bias=True,
        norm="layernorm",
        norm_embedding=True,
    ),
}
