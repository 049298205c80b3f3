"""Codecs of Hugging Face decoders with a mixture of experts."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from dist_llm.config.feedforward_sections import MoEConfig
from dist_llm.config.model_section import ModelConfig
from dist_llm.convert.hf_codecs import ANY_VALUE, FreeKeys, RenamedField, RopeFields, build_kinds
from dist_llm.convert.hf_config_fields import ConfigFields
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

    values: Sequence[RenamedField]  # keys of the section
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


def read_qwen_dense_layers(fields: ConfigFields) -> list[int]:
    """Return the layers of mlp_only_layers, and those whose number, from 1, decoder_sparse_step does not divide."""
    listed, step = fields.get("mlp_only_layers") or [], fields.get("decoder_sparse_step", 1)
    if not isinstance(listed, list):
        raise CheckpointError(f"config.json: mlp_only_layers {listed!r} is not a list of layers")
    return [layer for layer in range(fields["num_hidden_layers"]) if layer in listed or (layer + 1) % step]


QWEN_LAYERS = DenseLayers(read_qwen_dense_layers, lambda layers: {"mlp_only_layers": layers, "decoder_sparse_step": 1})


# A model whose dense layers do not come first reads back as another one, so `build_hf_config` refuses it.
FIRST_LAYERS = DenseLayers(
    lambda fields: range(fields.get("first_k_dense_replace", 1)), lambda layers: {"first_k_dense_replace": len(layers)}
)


class QwenGlobalWindow:
    """The window of all layers, which needs use_sliding_window."""

    free_keys: ClassVar[FreeKeys] = {"window": ANY_VALUE}

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        window = fields.get("sliding_window", 4096)
        return {"window": window if fields.get("use_sliding_window", False) else None}

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return {"sliding_window": model.window, "use_sliding_window": model.window is not None}


class GptOssRope:
    """The rotary positions, whose default is not the usual one: YaRN. So an import requires them."""

    rope = RopeFields(RopeFormat(theta=150_000.0))
    free_keys = rope.free_keys

    def read(self, fields: ConfigFields) -> dict[str, Any]:
        if not (fields.get("rope_parameters") or fields.get("rope_scaling")):
            raise CheckpointError("config.json: has neither rope_parameters nor rope_scaling; gpt_oss needs one")
        return self.rope.read(fields)

    def write(self, model: ModelConfig) -> dict[str, Any]:
        return self.rope.write(model)


class GptOssActivation:
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


def read_gpt_oss_types(fields: ConfigFields) -> list[str]:
    """Without layer_types: every other layer has a window, from the first on."""
    return ["full_attention" if layer % 2 else "sliding_attention" for layer in range(fields["num_hidden_layers"])]


def require_shared_expert(count: int) -> int:
    if count < 1:
        raise CheckpointError(f"config.json: n_shared_experts {count} is not supported; at least 1 is")
    return count
