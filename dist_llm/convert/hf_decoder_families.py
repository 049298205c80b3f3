"""The families of Hugging Face decoders without experts, one table for each."""

from dist_llm.convert.hf_codecs import (
    UNGATED,
    ActivationField,
    DerivedKey,
    LayerTypesField,
    RenamedField,
    RequiredField,
    RopeFields,
    SizeFields,
)
from dist_llm.convert.hf_family import Family, TensorPart
from dist_llm.convert.hf_family_codecs import (
    AttentionBias,
    BloomSizes,
    FalconLayout,
    ParallelResidual,
    QueryPreAttnScalar,
    QwenLayerWindows,
    SmolLM3Layers,
    full_attention_every,
)
from dist_llm.convert.hf_family_defaults import (
    FUSED_GATE_UP,
    GEMMA,
    GEMMA2_CAPS,
    GEMMA3_CAPS,
    GEMMA_SCALE,
    GRANITE_MULTIPLIERS,
    HALF_ROTATED,
    HIDDEN_ACTIVATION,
    LAYER_NORM,
    LAYER_NORM_EPS,
    NO_BIAS,
    OTHER_NAMES,
    PAIRED_ATTENTION_NAMES,
    REORDERED_NORMS,
    RMS_EPS,
    RMS_EPS_1E5,
    RMS_EPS_GLM,
    SANDWICH_NORMS,
    make_family,
)
from dist_llm.convert.hf_rope import RopeFormat
from dist_llm.convert.hf_row_order import select_qkv_by_kv_head, select_stacked_qkv

# Rows of fused and of otherwise ordered tensors.


DENSE_FAMILIES: dict[str, Family] = {
    "llama": make_family(
        "LlamaForCausalLM", RMS_EPS, AttentionBias(), RenamedField("mlp_bias", "feedforward_bias", False)
    ),
    "mistral": make_family(
        "MistralForCausalLM",
        RMS_EPS,
        RenamedField("sliding_window", "window", 4096),
        sizes=SizeFields(default_kv_heads=8),
    ),
    "qwen2": make_family(
        "Qwen2ForCausalLM", RMS_EPS, QwenLayerWindows(), qkv_bias=True, sizes=SizeFields(default_kv_heads=32)
    ),
    "qwen3": make_family(
        "Qwen3ForCausalLM",
        RMS_EPS,
        AttentionBias(),
        QwenLayerWindows(),
        qk_norm=True,
        sizes=SizeFields(default_kv_heads=32, default_head_dim=128),
    ),
    "gemma": make_family(
        "GemmaForCausalLM",
        RMS_EPS,
        NO_BIAS,
        GEMMA_SCALE,
        tied=True,
        **GEMMA,
        sizes=SizeFields(default_kv_heads=16, default_head_dim=256),
    ),
    "gemma2": make_family(
        "Gemma2ForCausalLM",
        *(RMS_EPS, NO_BIAS, GEMMA_SCALE, QueryPreAttnScalar(), *GEMMA2_CAPS, LayerTypesField(full_attention_every(2))),
        names=SANDWICH_NORMS,
        activation=HIDDEN_ACTIVATION,
        tied=True,
        norm_order="sandwich",
        **GEMMA,
        sizes=SizeFields(default_kv_heads=4, default_head_dim=256),
    ),
    "gemma3_text": make_family(
        "Gemma3ForCausalLM",
        *(RMS_EPS, NO_BIAS, GEMMA_SCALE, QueryPreAttnScalar(), *GEMMA3_CAPS),
        names=SANDWICH_NORMS,
        activation=HIDDEN_ACTIVATION,
        rope=LayerTypesField(full_attention_every(6), RopeFormat(theta=1_000_000.0, sliding_theta=10_000.0)),
        tied=True,
        norm_order="sandwich",
        qk_norm=True,
        **GEMMA,
        sizes=SizeFields(default_kv_heads=4, default_head_dim=256),
    ),
    "olmo": make_family(
        "OlmoForCausalLM",
        *(NO_BIAS, RequiredField("clip_qkv", None)),
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
        rope=LayerTypesField(full_attention_every(4), RopeFormat(theta=500_000.0, sliding_theta=500_000.0)),
        norm_order="reordered",
        qk_norm="all",
    ),
    "smollm3": make_family(
        "SmolLM3ForCausalLM",
        *(RMS_EPS, AttentionBias(), RenamedField("mlp_bias", "feedforward_bias", False), SmolLM3Layers()),
        rope=RopeFields(RopeFormat(theta=2_000_000.0)),
        tied=True,
        sizes=SizeFields(default_kv_heads=4),
    ),
    "granite": make_family(
        "GraniteForCausalLM",
        *(RMS_EPS, AttentionBias(), RenamedField("mlp_bias", "feedforward_bias", False)),
        *GRANITE_MULTIPLIERS,
    ),
    "glm": make_family(
        "GlmForCausalLM",
        *(RMS_EPS_GLM, RenamedField("attention_bias", "qkv_bias", True)),
        names={**PAIRED_ATTENTION_NAMES, **FUSED_GATE_UP},
        rope=HALF_ROTATED,
        sizes=SizeFields(default_kv_heads=2, default_head_dim=128),
    ),
    "glm4": make_family(
        "Glm4ForCausalLM",
        *(RMS_EPS_GLM, RenamedField("attention_bias", "qkv_bias", True)),
        names={
            **PAIRED_ATTENTION_NAMES,
            **FUSED_GATE_UP,
            "norm_attention_out": "post_self_attn_layernorm",
            "norm_feedforward_out": "post_mlp_layernorm",
        },
        rope=HALF_ROTATED,
        norm_order="sandwich",
        sizes=SizeFields(default_kv_heads=2, default_head_dim=128),
    ),
    "phi": make_family(
        "PhiForCausalLM",
        *(LAYER_NORM_EPS, RequiredField("qk_layernorm", False)),
        names={
            "attention.out": "self_attn.dense",
            "feedforward.up": "mlp.fc1",
            "feedforward.down": "mlp.fc2",
        },
        other_names={**OTHER_NAMES, "head.norm": "model.final_layernorm"},
        sizes=SizeFields(has_head_dim=False),
        activation=ActivationField(native_names=UNGATED),
        rope=HALF_ROTATED,
        bias=True,
        norm="layernorm",
        parallel_residual="one_norm",
        head_bias=True,
    ),
    "phi3": make_family(
        "Phi3ForCausalLM",
        *(RMS_EPS_1E5, RenamedField("sliding_window", "window", None)),
        names={
            **{f"attention.{name}": TensorPart("self_attn.qkv_proj", select_stacked_qkv(name)) for name in "qkv"},
            **FUSED_GATE_UP,
        },
        sizes=SizeFields(has_head_dim=False),
        rope=RopeFields(RopeFormat(fraction=1.0)),
    ),
    "gpt_neox": make_family(
        "GPTNeoXForCausalLM",
        *(LAYER_NORM_EPS, RequiredField("attention_bias", True), ParallelResidual("two_norms", True)),
        names={
            **{
                f"attention.{name}": TensorPart("attention.query_key_value", select_qkv_by_kv_head(name))
                for name in "qkv"
            },
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
        sizes=SizeFields(n_kv_heads=None, has_head_dim=False),
        activation=ActivationField(native_names=UNGATED),
        rope=RopeFields(RopeFormat(fraction=0.25, theta_field="rotary_emb_base")),
        bias=True,
        norm="layernorm",
    ),
    "falcon": make_family(
        "FalconForCausalLM",
        *(RenamedField("layer_norm_epsilon", "norm_eps", 1e-5), FalconLayout()),
        names={
            **{
                f"attention.{name}": TensorPart("self_attention.query_key_value", select_qkv_by_kv_head(name))
                for name in "qkv"
            },
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
        sizes=SizeFields(d_ff="ffn_hidden_size", n_kv_heads=None, has_head_dim=False, d_ff_factor=4),
        activation=ActivationField("activation", UNGATED),
        tied=True,
        **LAYER_NORM,
    ),
    "cohere": make_family(
        "CohereForCausalLM",
        *(
            LAYER_NORM_EPS,
            AttentionBias(),
            RequiredField("use_qk_norm", False),
            RenamedField("logit_scale", "logit_scale", 0.0625),
        ),
        names=PAIRED_ATTENTION_NAMES,
        sizes=SizeFields(has_head_dim=False),
        rope=RopeFields(RopeFormat(theta=500_000.0)),
        norm="layernorm",
        parallel_residual="one_norm",
        tied=True,
    ),
    "cohere2": make_family(
        "Cohere2ForCausalLM",
        *(LAYER_NORM_EPS, AttentionBias(), RenamedField("logit_scale", "logit_scale", 0.0625)),
        LayerTypesField(full_attention_every(4), unrotated=True),
        names=PAIRED_ATTENTION_NAMES,
        norm="layernorm",
        parallel_residual="one_norm",
        tied=True,
    ),
    "nemotron": make_family(
        "NemotronForCausalLM",
        *(
            RenamedField("norm_eps", "norm_eps", 1e-5),
            AttentionBias(),
            RenamedField("mlp_bias", "feedforward_bias", False),
        ),
        activation=ActivationField(native_names=UNGATED),
        rope=HALF_ROTATED,
        norm_weight="plus_one",
        **LAYER_NORM,
    ),
    "stablelm": make_family(
        "StableLmForCausalLM",
        *(LAYER_NORM_EPS, RenamedField("use_qkv_bias", "qkv_bias", False), RequiredField("qk_layernorm", False)),
        ParallelResidual("one_norm", False),
        sizes=SizeFields(default_kv_heads=32, has_head_dim=False),
        rope=RopeFields(RopeFormat(fraction=0.25)),
        **LAYER_NORM,
    ),
    "starcoder2": make_family(
        "Starcoder2ForCausalLM",
        *(RenamedField("norm_epsilon", "norm_eps", 1e-5), RenamedField("use_bias", "bias", True)),
        RenamedField("sliding_window", "window", None),
        names={"feedforward.up": "mlp.c_fc", "feedforward.down": "mlp.c_proj"},
        sizes=SizeFields(default_kv_heads=2, has_head_dim=False),
        activation=ActivationField(native_names=UNGATED),
        tied=True,
        **LAYER_NORM,
    ),
    "opt": make_family(
        "OPTForCausalLM",
        RequiredField("do_layer_norm_before", True),
        RequiredField("enable_bias", True),
        RequiredField("layer_norm_elementwise_affine", True),
        RequiredField("_remove_final_layer_norm", False),
        RenamedField("word_embed_proj_dim", "d_model"),
        names={
            "norm_attention": "self_attn_layer_norm",
            "norm_feedforward": "final_layer_norm",
            "attention.out": "self_attn.out_proj",
            "feedforward.up": "fc1",
            "feedforward.down": "fc2",
        },
        other_names={
            "embed.tokens": "model.decoder.embed_tokens",
            "embed.positions": TensorPart("model.decoder.embed_positions", skip=2),
            "head.norm": "model.decoder.final_layer_norm",
            "head.out": "lm_head",
        },
        prefix="model.decoder.layers.{}.",
        sizes=SizeFields(d_ff="ffn_dim", n_kv_heads=None, has_head_dim=False),
        activation=ActivationField("activation_function", UNGATED),
        rope=DerivedKey("positions", lambda fields: "learned", "learned"),
        tied=True,
        bias=True,
        norm="layernorm",
    ),
    "bloom": make_family(
        "BloomForCausalLM",
        *(
            RenamedField("layer_norm_epsilon", "norm_eps", 1e-5),
            RequiredField("apply_residual_connection_post_layernorm", False),
        ),
        names={
            **{
                f"attention.{name}": TensorPart("self_attention.query_key_value", select_qkv_by_kv_head(name))
                for name in "qkv"
            },
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
        sizes=BloomSizes(),
        activation=DerivedKey("activation", lambda fields: "gelu_tanh", "gelu_tanh"),
        rope=DerivedKey("positions", lambda fields: "alibi", "alibi"),
        tied=True,
        bias=True,
        norm="layernorm",
        norm_embedding=True,
    ),
}
