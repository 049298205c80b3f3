"""The families of Hugging Face decoders with a mixture of experts, one table for each."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_codecs import LayerTypesField, RenamedField, RequiredField, RopeFields, SizeFields
from dist_llm.convert.hf_family import Family, ModuleName, ModulePerExpert, TensorPart
from dist_llm.convert.hf_family_codecs import AttentionBias
from dist_llm.convert.hf_family_defaults import GRANITE_MULTIPLIERS, HALF_ROTATED, RMS_EPS, RMS_EPS_1E5, make_family
from dist_llm.convert.hf_moe_codecs import (
    FIRST_LAYERS,
    QWEN_LAYERS,
    GptOssActivation,
    GptOssRope,
    QwenGlobalWindow,
    Router,
    get_moe,
    read_gpt_oss_types,
    require_shared_expert,
)
from dist_llm.convert.hf_rope import RopeFormat


def _select_expert_gate_up(index: int) -> Callable[[ModelConfig], Sequence[int]]:
    """The gate of an expert, then its up projection (Granite)."""

    def rows(model: ModelConfig) -> Sequence[int]:
        moe = get_moe(model)
        assert moe is not None
        return range(index * moe.d_expert, (index + 1) * moe.d_expert)

    return rows


def _select_interleaved_gate_up(index: int) -> Callable[[ModelConfig], Sequence[int]]:
    """The rows of the gate and of the up projection of an expert alternate (gpt-oss)."""

    def rows(model: ModelConfig) -> Sequence[int]:
        moe = get_moe(model)
        assert moe is not None
        return range(index, 2 * moe.d_expert, 2)

    return rows


def _name_experts(prefix: str, gate: str, up: str, down: str) -> dict[str, ModuleName]:
    """Return the names of layers with a module for each expert."""
    return {
        "feedforward.router": f"{prefix}.gate",
        "feedforward.experts.gate": ModulePerExpert(f"{prefix}.experts.{{}}.{gate}"),
        "feedforward.experts.up": ModulePerExpert(f"{prefix}.experts.{{}}.{up}"),
        "feedforward.experts.down": ModulePerExpert(f"{prefix}.experts.{{}}.{down}"),
    }


EXPERT_NAMES = _name_experts("mlp", "gate_proj", "up_proj", "down_proj")
SHARED_NAMES: dict[str, ModuleName] = {
    f"feedforward.shared.{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
}
GPT_OSS_SUFFIXES = {"weight": "", "bias": "_bias"}
LOCAL_EXPERTS = RenamedField("num_local_experts", "n_experts", 8)
# The name on the hub. Newer versions of transformers write num_local_experts.
NUM_EXPERTS = RenamedField("num_experts", "n_experts", 128, other_name="num_local_experts")
WIDTH_OF_ALL = RenamedField("intermediate_size", "d_expert")
WIDTH_OF_EXPERT = RenamedField("moe_intermediate_size", "d_expert")
PER_TOKEN = RenamedField("num_experts_per_tok", "top_k")
NORMALIZE = RenamedField("norm_topk_prob", "normalize_weights", False)
SOFTMAX: dict[str, Any] = {"score": "softmax"}
NORMALIZED_SOFTMAX = {**SOFTMAX, "normalize_weights": True}

MOE_FAMILIES: dict[str, Family] = {
    "mixtral": make_family(
        "MixtralForCausalLM",
        *(RMS_EPS_1E5, RenamedField("sliding_window", "window", None)),
        Router((LOCAL_EXPERTS, replace(PER_TOKEN, default=2), WIDTH_OF_ALL), NORMALIZED_SOFTMAX),
        names=_name_experts("block_sparse_moe", "w1", "w3", "w2"),
        sizes=SizeFields(default_kv_heads=8),
        rope=RopeFields(RopeFormat(theta=1_000_000.0)),
    ),
    "qwen3_moe": make_family(
        "Qwen3MoeForCausalLM",
        *(RMS_EPS, AttentionBias(), QwenGlobalWindow(), QWEN_LAYERS),
        Router((NUM_EXPERTS, replace(PER_TOKEN, default=8), replace(WIDTH_OF_EXPERT, default=768), NORMALIZE), SOFTMAX),
        names=EXPERT_NAMES,
        sizes=SizeFields(default_kv_heads=4),
        qk_norm=True,
    ),
    "olmoe": make_family(
        "OlmoeForCausalLM",
        *(RMS_EPS_1E5, AttentionBias(), RequiredField("clip_qkv", None)),
        Router((replace(NUM_EXPERTS, default=64), replace(PER_TOKEN, default=8), WIDTH_OF_ALL, NORMALIZE), SOFTMAX),
        names=EXPERT_NAMES,
        sizes=SizeFields(has_head_dim=False),
        qk_norm="all",
    ),
    "glm4_moe": make_family(
        "Glm4MoeForCausalLM",
        *(
            RMS_EPS_1E5,
            RenamedField("attention_bias", "qkv_bias", False),
            RenamedField("use_qk_norm", "qk_norm", False),
        ),
        FIRST_LAYERS,
        Router(
            (
                RenamedField("n_routed_experts", "n_experts", 128),
                *(replace(PER_TOKEN, default=8), replace(WIDTH_OF_EXPERT, default=1408)),
                RenamedField("n_shared_experts", "n_shared_experts", 1, to_native=require_shared_expert),
                replace(NORMALIZE, default=True),
                RenamedField("routed_scaling_factor", "weight_scale", 1.0, to_native=float),
                RenamedField("n_group", "n_groups", 1),
                RenamedField("topk_group", "top_groups", 1),
            ),
            {"score": "sigmoid", "selection_bias": True},
        ),
        names={
            **EXPERT_NAMES,
            **SHARED_NAMES,
            "feedforward": TensorPart("mlp.gate", suffixes={"selection_bias": ".e_score_correction_bias"}),
        },
        sizes=SizeFields(default_kv_heads=8),
        rope=HALF_ROTATED,
    ),
    "granitemoe": make_family(
        "GraniteMoeForCausalLM",
        *(RMS_EPS, AttentionBias(), *GRANITE_MULTIPLIERS),
        Router((LOCAL_EXPERTS, replace(PER_TOKEN, default=2), WIDTH_OF_ALL), NORMALIZED_SOFTMAX),
        names={
            "feedforward.router": "block_sparse_moe.router.layer",
            "feedforward.experts.gate": TensorPart(
                "block_sparse_moe.input_linear", _select_expert_gate_up(0), rows_dim=1
            ),
            "feedforward.experts.up": TensorPart(
                "block_sparse_moe.input_linear", _select_expert_gate_up(1), rows_dim=1
            ),
            "feedforward.experts.down": "block_sparse_moe.output_linear",
        },
    ),
    "gpt_oss": make_family(
        "GptOssForCausalLM",
        *(RMS_EPS_1E5, AttentionBias(default=True), LayerTypesField(read_gpt_oss_types)),
        Router(
            (replace(LOCAL_EXPERTS, default=128), replace(PER_TOKEN, default=4), WIDTH_OF_ALL),
            {**NORMALIZED_SOFTMAX, "router_bias": True},
        ),
        names={
            "attention": TensorPart("self_attn.sinks", suffixes={"sinks": ""}),
            "feedforward.router": "mlp.router",
            **{
                f"feedforward.experts.{name}": TensorPart(
                    "mlp.experts.gate_up_proj",
                    _select_interleaved_gate_up(index),
                    rows_dim=1,
                    transposed=True,
                    suffixes=GPT_OSS_SUFFIXES,
                )
                for index, name in enumerate(("gate", "up"))
            },
            "feedforward.experts.down": TensorPart("mlp.experts.down_proj", transposed=True, suffixes=GPT_OSS_SUFFIXES),
        },
        sizes=SizeFields(default_kv_heads=8, default_head_dim=64),
        activation=GptOssActivation(),
        rope=GptOssRope(),
        attention_sinks=True,
        feedforward_bias=True,
    ),
}
