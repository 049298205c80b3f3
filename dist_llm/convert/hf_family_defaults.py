"""Names of Hugging Face modules that several families of decoders share, and fields that they share."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from dist_llm.convert.hf_codecs import (
    ActivationField,
    DerivedKey,
    RenamedField,
    RequiredField,
    RopeFields,
    SizeFields,
)
from dist_llm.convert.hf_family import Family, ModuleName, TensorPart
from dist_llm.convert.hf_family_codecs import (
    AttentionMultiplier,
    invert_scale,
)
from dist_llm.convert.hf_rope import RopeFormat
from dist_llm.convert.hf_row_order import select_interleaved_rotary, select_stacked_gate_up

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
    "feedforward.gate": TensorPart("mlp.gate_up_proj", select_stacked_gate_up(0)),
    "feedforward.up": TensorPart("mlp.gate_up_proj", select_stacked_gate_up(1)),
    "feedforward.down": "mlp.down_proj",
}


PAIRED_ATTENTION_NAMES = ATTENTION_NAMES | {
    "attention.q": TensorPart("self_attn.q_proj", select_interleaved_rotary("q")),
    "attention.k": TensorPart("self_attn.k_proj", select_interleaved_rotary("k")),
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


RMS_EPS = RenamedField("rms_norm_eps", "norm_eps", 1e-6)


RMS_EPS_1E5, RMS_EPS_GLM = replace(RMS_EPS, default=1e-5), replace(RMS_EPS, default=1.5625e-07)


LAYER_NORM_EPS = RenamedField("layer_norm_eps", "norm_eps", 1e-5)


NO_BIAS = RequiredField("attention_bias", False)


LLAMA_SIZES, LLAMA_ACTIVATION, LLAMA_ROPE = SizeFields(), ActivationField(), RopeFields()


HALF_ROTATED = RopeFields(RopeFormat(fraction=0.5))


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


LAYER_NORM: dict[str, Any] = {"norm": "layernorm", "norm_bias": True}


GEMMA: dict[str, Any] = {"norm_weight": "plus_one"}


GEMMA_SCALE = DerivedKey("embedding_scale", lambda fields: float(fields["hidden_size"]) ** 0.5, "sqrt(d_model)")


GEMMA2_CAPS = (
    RenamedField("attn_logit_softcapping", "attention_cap", 50.0),
    RenamedField("final_logit_softcapping", "logit_cap", 30.0),
)


GEMMA3_CAPS = tuple(replace(cap, default=None) for cap in GEMMA2_CAPS)


HIDDEN_ACTIVATION = ActivationField("hidden_activation")


GRANITE_MULTIPLIERS = (
    RenamedField("embedding_multiplier", "embedding_scale", 1.0),
    RenamedField("residual_multiplier", "residual_scale", 1.0),
    AttentionMultiplier(),
    RenamedField("logits_scaling", "logit_scale", 1.0, to_native=lambda scale: 1 / scale, to_hf=invert_scale),
)
