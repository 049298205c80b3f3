"""Convert rotary positions between our keys and the fields of a Hugging Face config.json.

Old files have rope_theta, rope_scaling and partial_rotary_factor (GPT-NeoX: rotary_emb_base and rotary_pct). Newer
files have rope_parameters: the parameters of all layers, or of each type of layer. In an old file of a family with
types, rope_scaling belongs to the layers with full attention, and rope_local_base_freq is the base of the others.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dist_llm.config.model_section import ModelConfig
from dist_llm.config.rope_sections import LongropeScaling
from dist_llm.convert.hf_config_fields import ConfigFields
from dist_llm.errors import CheckpointError

# Our key of model.rope_scaling -> field of Hugging Face, by kind of scaling.
_ORIGINAL = {"original_max_seq_len": "original_max_position_embeddings"}
SCALING_FIELDS: dict[str, dict[str, str]] = {
    "linear": {"factor": "factor"},
    "dynamic": {"factor": "factor"},
    "llama3": {
        "factor": "factor",
        "low_freq_factor": "low_freq_factor",
        "high_freq_factor": "high_freq_factor",
        **_ORIGINAL,
    },
    "yarn": {
        "factor": "factor",
        "beta_fast": "beta_fast",
        "beta_slow": "beta_slow",
        "truncate": "truncate",
        "attention_factor": "attention_factor",
        **_ORIGINAL,
    },
    "longrope": {
        "short_factors": "short_factor",
        "long_factors": "long_factor",
        "attention_factor": "attention_factor",
        **_ORIGINAL,
    },
}
SECTIONS_OF_TYPES = ("sliding_attention", "full_attention")


@dataclass(frozen=True)
class RopeFormat:
    """How a family writes rotary positions, and the values of absent fields."""

    theta: float = 10_000.0
    fraction: float | None = None  # None: all dimensions of a head rotate, and a field that says otherwise is an error
    sliding_theta: float | None = None  # of layers with a window, if rope_parameters has a section for each type
    theta_field: str = "rope_theta"  # name outside of rope_parameters


def read_rope(fields: ConfigFields, rope_format: RopeFormat, layer_type: str | None = None) -> dict[str, Any]:
    """Return our keys rope_theta, rotary_fraction and rope_scaling of all layers, or of the layers of `layer_type`.

    Raises CheckpointError for an unsupported scaling or an unknown parameter.
    """
    parameters = _merge_old_and_new_fields(fields, layer_type)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    theta = _read_theta(fields, parameters, rope_format, layer_type)
    fraction = _first_set(
        parameters.pop("partial_rotary_factor", None),
        fields.get("partial_rotary_factor"),
        fields.get("rotary_pct"),
        rope_format.fraction or 1.0,
    )
    if rope_format.fraction is None and fraction != 1:
        raise CheckpointError(
            f"config.json: partial_rotary_factor {fraction} is not supported for model_type {fields['model_type']}"
        )
    keys: dict[str, Any] = {
        "rope_theta": theta,
        "rotary_fraction": float(fraction),
        "rope_scaling": None,
    }
    if rope_type not in ("default", *SCALING_FIELDS):
        raise CheckpointError(
            f"config.json: rope_type {rope_type} is not supported; choose from default, {', '.join(SCALING_FIELDS)}"
        )
    if rope_type != "default":
        keys["rope_scaling"] = _read_scaling(rope_type, parameters, fields)
    for name, value in parameters.items():
        if value is not None:
            raise CheckpointError(f"config.json: {name} {value} of rope is not supported")
    return keys


def _merge_old_and_new_fields(fields: ConfigFields, layer_type: str | None) -> dict[str, Any]:
    """Return the parameters in rope_parameters, and those in rope_scaling that rope_parameters lacks."""
    new, old = fields.get("rope_parameters") or {}, fields.get("rope_scaling") or {}
    if layer_type is not None and layer_type in new:
        new = new[layer_type] or {}
    if layer_type == "sliding_attention":
        old = {}
    return {**old, **{key: value for key, value in new.items() if key not in SECTIONS_OF_TYPES}}


def _read_theta(
    fields: ConfigFields, parameters: dict[str, Any], rope_format: RopeFormat, layer_type: str | None
) -> float:
    """Return the base of the frequencies. Removes it from `parameters`, which has priority over other fields."""
    outer_theta, inner_theta = fields.get(rope_format.theta_field), parameters.pop("rope_theta", None)
    default_theta = rope_format.theta
    if layer_type is not None:
        sliding_theta = fields.get("rope_local_base_freq", rope_format.sliding_theta)
        if layer_type == "sliding_attention":
            outer_theta, default_theta = sliding_theta, sliding_theta
    if None not in (outer_theta, inner_theta) and outer_theta != inner_theta and layer_type is None:
        raise CheckpointError(
            f"config.json: rope_theta is {outer_theta}, but {inner_theta} in rope_parameters; make them equal"
        )
    return float(_first_set(inner_theta, outer_theta, default_theta))


def _first_set(*values: Any) -> Any:
    """Return the first value that is not None."""
    return next((value for value in values if value is not None), None)


def _read_scaling(rope_type: str, parameters: dict[str, Any], fields: ConfigFields) -> dict[str, Any]:
    """Return our section rope_scaling. Removes the parameters that it reads."""
    max_seq_len = fields["max_position_embeddings"]
    scaling: dict[str, Any] = {"name": rope_type}
    for key, name in SCALING_FIELDS[rope_type].items():
        if (value := parameters.pop(name, None)) is not None:
            scaling[key] = tuple(value) if isinstance(value, list) else value
    if rope_type != "linear":
        outer_original = fields.get("original_max_position_embeddings")
        inner_original = parameters.pop("original_max_position_embeddings", None)
        original = scaling.get("original_max_seq_len")
        scaling["original_max_seq_len"] = outer_original or original or inner_original or max_seq_len
    if rope_type == "yarn":
        numerator, denominator = parameters.pop("mscale", None), parameters.pop("mscale_all_dim", None)
        if numerator and denominator and "attention_factor" not in scaling:
            scaling["attention_factor"] = _yarn_mscale(scaling["factor"], numerator) / _yarn_mscale(
                scaling["factor"], denominator
            )
    if rope_type == "longrope":
        # Hugging Face chooses the factors by the longest sequence of a batch. Here the config chooses: those of the
        # original context, until the user sets a greater length.
        scaling["length"] = scaling["original_max_seq_len"]
        factor = parameters.pop("factor", None)
        original = scaling["original_max_seq_len"]
        if factor is not None and "attention_factor" not in scaling and factor != max_seq_len / original:
            is_extended = factor > 1
            scaling["attention_factor"] = math.sqrt(1 + math.log(factor) / math.log(original)) if is_extended else 1.0
    return {
        key: float(value) if type(value) is int and key not in INTEGERS else value for key, value in scaling.items()
    }


# Keys of our section that stay integers. All other numbers become floats.
INTEGERS = ("original_max_seq_len", "length")


def _yarn_mscale(factor: float, mscale: float) -> float:
    """Return YaRN's factor of the rotated queries and keys, for a context that is `factor` times as long."""
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def write_rope(model: ModelConfig, rope_format: RopeFormat) -> dict[str, Any]:
    """Return the parameters of one layer, for rope_parameters."""
    parameters: dict[str, Any] = {"rope_type": "default", "rope_theta": model.rope_theta}
    if rope_format.fraction is not None:
        parameters["partial_rotary_factor"] = model.rotary_fraction
    scaling = model.rope_scaling
    if scaling is None:
        return parameters
    parameters["rope_type"] = scaling.name
    for key, name in SCALING_FIELDS[scaling.name].items():
        if (value := getattr(scaling, key)) is not None:
            parameters[name] = list(value) if isinstance(value, tuple) else value
    if isinstance(scaling, LongropeScaling):
        parameters["factor"] = model.max_seq_len / scaling.original_max_seq_len
    return parameters


def outer_rope_fields(model: ModelConfig, rope_format: RopeFormat) -> Mapping[str, Any]:
    """Return the fields of rotary positions outside of rope_parameters, which old versions of transformers read."""
    if isinstance(model.rope_scaling, LongropeScaling):
        return {"original_max_position_embeddings": model.rope_scaling.original_max_seq_len}
    return {rope_format.theta_field: model.rope_theta}
