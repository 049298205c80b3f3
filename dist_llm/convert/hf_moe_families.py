"""The families of Hugging Face decoders with a mixture of experts, one table for each."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.convert.hf_decoder_families import (
    GRANITE_MULTIPLIERS,
    HALF_ROTATED,
    RMS_EPS,
    RMS_EPS_1E5,
    AttentionBias,
    make_family,
)
from dist_llm.convert.hf_family import (
    ANY_VALUE,
    ByExpert,
    Constant,
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
from dist_llm.errors import CheckpointError
from dist_llm.models.feedforward import CLAMP_LIMIT, SIGMOID_SLOPE


def get_moe(model: ModelConfig) -> MoEConfig | None:
    """Return the section `feedforward` of the first layer with experts; None if no layer has experts."""
    sections = (model.layer_config(layer).feedforward for layer in range(model.n_layers))
    return next((section for section in sections if isinstance(section, MoEConfig)), None)


@dataclass(frozen=True)
class Router:
    """The section `model.feedforward` of all layers. `keys` are shared by all models of the family."""

    values: Sequence[Value]  # keys of the section
    keys: Mapping[str, Any] = field(default_factory=dict)

    @property
    def shared_keys(self) -> dict[str, Any]:
        """Return the shared keys of the section, with their path."""
        return {f"feedforward.{key}": value for key, value in {"name": "moe", **self.keys}.items()}

    @property
    def free_keys(self) -> FreeKeys:
        """Return the keys of the section in which models differ, with their path."""
        return {f"feedforward.{value.key}": ANY_VALUE for value in self.values}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return the section."""
        section: dict[str, Any] = {"name": "moe", **self.keys}
        for value in self.values:
            section |= value.read(fields)
        return {"feedforward": section}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields. A model without experts fails the comparison in `build_hf_config`."""
        moe, fields = get_moe(model), dict[str, Any]()
        if moe is not None:
            for value in self.values:
                fields |= value.write(moe)
        return fields


@dataclass(frozen=True)
class DenseLayers:
    """Layers with a dense feed-forward layer between layers with experts. `read_layers` returns their numbers.

    `write_layers` returns the fields for these numbers.
    """

    read_layers: Callable[[ConfigFields], Sequence[int]]
    write_layers: Callable[[list[int]], dict[str, Any]]

    @property
    def free_keys(self) -> FreeKeys:
        """Return the key, which can differ between layers."""
        return {"kinds.feedforward": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        """Return our keys `layers` and `kinds`; no key if all layers have experts."""
        dense_layers = set(self.read_layers(fields))
        types = ["dense" if layer in dense_layers else "moe" for layer in range(fields["num_hidden_layers"])]
        return build_kinds(types, {"dense": {"feedforward": {"name": "dense"}}, "moe": {}})

    def write(self, model: ModelConfig) -> dict[str, Any]:
        """Return the fields."""
        layers = range(model.n_layers)
        return self.write_layers([layer for layer in layers if model.layer_config(layer).feedforward.name == "dense"])


def _read_qwen_layers(fields: ConfigFields) -> list[int]:
    """Return the layers of mlp_only_layers, and those whose number, from 1, decoder_sparse_step does not divide."""
    listed, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
    if not isinstance(listed, list):
        raise CheckpointError(f"config.json: mlp_only_layers {listed!r} is not a list of layers")
    return [layer for layer in range(fields["num_hidden_layers"]) if layer in listed or (layer + 1) % step]


QWEN_LAYERS = DenseLayers(_read_qwen_layers, lambda layers: {"mlp_only_layers": layers, "decoder_sparse_step": 1})
# A model whose dense layers do not come first reads back as another one, so `build_hf_config` refuses it.
FIRST_LAYERS = DenseLayers(
    lambda fields: range(fields.get("first_k_dense_replace", 1)), lambda layers: {"first_k_dense_replace": len(layers)}
)


class _QwenWindow:
    """The window of all layers, which needs use_sliding_window."""

    free_keys: ClassVar[FreeKeys] = {"window": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        window = fields.get("sliding_window", 4096)
        return {"window": window if fields.get("use_sliding_window", False) else None}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": model.window, "use_sliding_window": model.window is not None}


class _GptOssRope:
    """The rotary positions, whose default is not the usual one: YaRN. So an import requires them."""

    rope = Rope(RopeFormat(theta=150_000.0))
    free_keys = rope.free_keys

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        if not (fields.get("rope_parameters") or fields.get("rope_scaling")):
            raise CheckpointError("config.json: has neither rope_parameters nor rope_scaling; gpt_oss needs one")
        return self.rope.read(fields)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return self.rope.write(model)


class _GptOssActivation:
    """The clamped SwiGLU. Other limits and slopes are not supported."""

    shared_keys: ClassVar[dict[str, Any]] = {"activation": "swiglu_clamped"}
    free_keys: ClassVar[FreeKeys] = {}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        fields.require(hidden_act="silu", swiglu_limit=CLAMP_LIMIT, swiglu_alpha=SIGMOID_SLOPE)
        fields.require(experts_per_token=fields["num_experts_per_tok"])  # the same number by another name
        fields.get("initial_context_length")  # also in the parameters of YaRN
        return self.shared_keys

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"hidden_act": "silu", "swiglu_limit": CLAMP_LIMIT, "swiglu_alpha": SIGMOID_SLOPE}


def _gpt_oss_types(fields: ConfigFields) -> list[str]:
    """Without layer_types: every other layer has a window, from the first on."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(fields["num_hidden_layers"])]


def _require_shared_expert(count: int) -> int:
    if count < 1:
        raise CheckpointError(f"config.json: n_shared_experts {count} is not supported; at least 1 is")
    return count


def _gate_up(index: int) -> Callable[[ModelConfig], Sequence[int]]:
    """The gate of an expert, then its up projection (Granite)."""

    def rows(model: ModelConfig) -> Sequence[int]:
        moe = get_moe(model)
        assert moe is not None
        return range(index * moe.d_expert, (index + 1) * moe.d_expert)

    return rows


def _interleaved(index: int) -> Callable[[ModelConfig], Sequence[int]]:
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
        "feedforward.experts.gate": ByExpert(f"{prefix}.experts.{{}}.{gate}"),
        "feedforward.experts.up": ByExpert(f"{prefix}.experts.{{}}.{up}"),
        "feedforward.experts.down": ByExpert(f"{prefix}.experts.{{}}.{down}"),
    }


EXPERT_NAMES = _name_experts("mlp", "gate_proj", "up_proj", "down_proj")
SHARED_NAMES: dict[str, ModuleName] = {
    f"feedforward.shared.{name}": f"mlp.shared_experts.{name}_proj" for name in ("gate", "up", "down")
}
GPT_OSS_SUFFIXES = {"weight": "", "bias": "_bias"}
LOCAL_EXPERTS = Value("num_local_experts", "n_experts", 8)
# The name on the hub. Newer versions of transformers write num_local_experts.
NUM_EXPERTS = Value("num_experts", "n_experts", 128, other_name="num_local_experts")
WIDTH_OF_ALL = Value("intermediate_size", "d_expert")
WIDTH_OF_EXPERT = Value("moe_intermediate_size", "d_expert")
PER_TOKEN = Value("num_experts_per_tok", "top_k")
NORMALIZE = Value("norm_topk_prob", "normalize_weights", False)
SOFTMAX: dict[str, Any] = {"score": "softmax"}
NORMALIZED_SOFTMAX = {**SOFTMAX, "normalize_weights": True}

MOE_FAMILIES: dict[str, Family] = {
    "mixtral": make_family(
        "MixtralForCausalLM",
        *(RMS_EPS_1E5, Value("sliding_window", "window", None)),
        Router((LOCAL_EXPERTS, replace(PER_TOKEN, default=2), WIDTH_OF_ALL), NORMALIZED_SOFTMAX),
        names=_name_experts("block_sparse_moe", "w1", "w3", "w2"),
        sizes=Sizes(default_kv_heads=8),
        rope=Rope(RopeFormat(theta=1_000_000.0)),
    ),
    "qwen3_moe": make_family(
        "Qwen3MoeForCausalLM",
        *(RMS_EPS, AttentionBias(), _QwenWindow(), QWEN_LAYERS),
        Router((NUM_EXPERTS, replace(PER_TOKEN, default=8), replace(WIDTH_OF_EXPERT, default=768), NORMALIZE), SOFTMAX),
        names=EXPERT_NAMES,
        sizes=Sizes(default_kv_heads=4),
        qk_norm=True,
    ),
    "olmoe": make_family(
        "OlmoeForCausalLM",
        *(RMS_EPS_1E5, AttentionBias(), Constant("clip_qkv", None)),
        Router((replace(NUM_EXPERTS, default=64), replace(PER_TOKEN, default=8), WIDTH_OF_ALL, NORMALIZE), SOFTMAX),
        names=EXPERT_NAMES,
        sizes=Sizes(has_head_dim=False),
        qk_norm="all",
    ),
    "glm4_moe": make_family(
        "Glm4MoeForCausalLM",
        *(RMS_EPS_1E5, Value("attention_bias", "qkv_bias", False), Value("use_qk_norm", "qk_norm", False)),
        FIRST_LAYERS,
        Router(
            (
                Value("n_routed_experts", "n_experts", 128),
                *(replace(PER_TOKEN, default=8), replace(WIDTH_OF_EXPERT, default=1408)),
                Value("n_shared_experts", "n_shared_experts", 1, to_native=_require_shared_expert),
                replace(NORMALIZE, default=True),
                Value("routed_scaling_factor", "weight_scale", 1.0, to_native=float),
                Value("n_group", "n_groups", 1),
                Value("topk_group", "top_groups", 1),
            ),
            {"score": "sigmoid", "selection_bias": True},
        ),
        names={
            **EXPERT_NAMES,
            **SHARED_NAMES,
            "feedforward": Part("mlp.gate", suffixes={"selection_bias": ".e_score_correction_bias"}),
        },
        sizes=Sizes(default_kv_heads=8),
        rope=HALF_ROTATED,
    ),
    "granitemoe": make_family(
        "GraniteMoeForCausalLM",
        *(RMS_EPS, AttentionBias(), *GRANITE_MULTIPLIERS),
        Router((LOCAL_EXPERTS, replace(PER_TOKEN, default=2), WIDTH_OF_ALL), NORMALIZED_SOFTMAX),
        names={
            "feedforward.router": "block_sparse_moe.router.layer",
            "feedforward.experts.gate": Part("block_sparse_moe.input_linear", _gate_up(0), rows_dim=1),
            "feedforward.experts.up": Part("block_sparse_moe.input_linear", _gate_up(1), rows_dim=1),
            "feedforward.experts.down": "block_sparse_moe.output_linear",
        },
    ),
    "gpt_oss": make_family(
        "GptOssForCausalLM",
        *(RMS_EPS_1E5, AttentionBias(default=True), LayerTypes(_gpt_oss_types)),
        Router(
            (replace(LOCAL_EXPERTS, default=128), replace(PER_TOKEN, default=4), WIDTH_OF_ALL),
            {**NORMALIZED_SOFTMAX, "router_bias": True},
        ),
        names={
            "attention": Part("self_attn.sinks", suffixes={"sinks": ""}),
            "feedforward.router": "mlp.router",
            **{
                f"feedforward.experts.{name}": Part(
                    "mlp.experts.gate_up_proj",
                    _interleaved(index),
                    rows_dim=1,
                    transposed=True,
                    suffixes=GPT_OSS_SUFFIXES,
                )
                for index, name in enumerate(("gate", "up"))
            },
            "feedforward.experts.down": Part("mlp.experts.down_proj", transposed=True, suffixes=GPT_OSS_SUFFIXES),
        },
        sizes=Sizes(default_kv_heads=8, default_head_dim=64),
        activation=_GptOssActivation(),
        rope=_GptOssRope(),
        attention_sinks=True,
        feedforward_bias=True,
    ),
}
